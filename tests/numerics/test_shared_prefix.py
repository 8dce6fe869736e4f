"""A prefix that all rows share is run once for all of them, and changes nothing but the time."""

from typing import Any

import pytest
import torch

from potstill.data.chat import Rendered
from potstill.models import can_share_prefix, hidden_states, hidden_states_after
from potstill.train.student import StudentWithLoss, make_micro_batch

PREFIX = 12
# Rows of one prefix that then differ in prompt, response and length.
ROWS = [
    Rendered(
        [*(i * 7 % 300 for i in range(PREFIX)), *((n * 31 + i) % 300 for i in range(5 + n))],
        [0] * (PREFIX + 2) + [1] * (3 + n),
    )
    for n in range(4)
]
FAMILIES = ("llama", "qwen2", "qwen3", "phi3", "gpt2")


def gradients(
    model: Any, *, share: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, list[torch.Tensor]]:
    monkeypatch.setattr("potstill.scoring.can_share_prefix", lambda model: share)
    model.zero_grad()
    batch = make_micro_batch(ROWS)
    loss, _ = StudentWithLoss(model, 300)(batch, batch.supervised)
    loss.backward()
    return loss.item(), [one.grad.clone() for one in model.parameters() if one.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_whole_rows(
    family: str, build_tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny_model(family).double()
    assert can_share_prefix(model)
    assert make_micro_batch(ROWS).shared_prefix == PREFIX
    whole_loss, whole = gradients(model, share=False, monkeypatch=monkeypatch)
    seen: list[int] = []
    trunk = getattr(model, model.base_model_prefix)
    hook = trunk.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    shared_loss, shared = gradients(model, share=True, monkeypatch=monkeypatch)
    hook.remove()
    assert seen == [PREFIX, len(ROWS) * (max(len(row.ids) for row in ROWS) - PREFIX)]
    assert shared_loss == pytest.approx(whole_loss, rel=1e-7)
    assert len(shared) == len(whole) > 0
    for one, other in zip(shared, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_whole_rows(family: str, build_tiny_model: Any) -> None:
    model = build_tiny_model(family).double()
    ids_BT = torch.stack([torch.tensor(ROWS[n].ids[: PREFIX + 5]) for n in range(4)])
    torch.testing.assert_close(
        hidden_states_after(model, ids_BT, PREFIX),
        hidden_states(model, ids_BT)[:, PREFIX:],
        rtol=1e-9,
        atol=1e-12,
    )


def test_sliding_windows_and_unknown_families_are_left_alone(build_tiny_model: Any) -> None:
    assert not can_share_prefix(build_tiny_model("gemma3"))
    assert not can_share_prefix(build_tiny_model("opt"))


def test_the_prefix_ends_before_the_token_that_predicts_the_first_supervised_one() -> None:
    twin = Rendered([1, 2, 3, 4, 5], [0, 0, 0, 1, 1])
    assert make_micro_batch([twin, twin]).shared_prefix == 2
    assert make_micro_batch([twin]).shared_prefix == 0
    assert make_micro_batch([twin, Rendered([1, 9, 3, 4], [0, 0, 0, 1])]).shared_prefix == 1
