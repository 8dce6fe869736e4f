"""A prefix that rows share is run once for all of them, and changes nothing but the time."""

from typing import Any

import pytest
import torch

from potstill.data.chat import Rendered
from potstill.models import hidden_states
from potstill.models.prefixes import can_share_prefix, hidden_states_after, run_prefixes
from potstill.train.base import Base
from potstill.train.lora import add_adapter
from potstill.train.settings import LoraSettings
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
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi", "phi3", "granite", "gpt2", "gpt_neox")


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
    (prefix,) = run_prefixes(model, ids_BT[:1, :PREFIX], [PREFIX], [None])
    torch.testing.assert_close(
        hidden_states_after(model, ids_BT[:, PREFIX:], [prefix] * 4),
        hidden_states(model, ids_BT)[:, PREFIX:],
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_go_on_from_prefixes_of_different_lengths_that_share_a_prefix_themselves(
    family: str, build_tiny_model: Any
) -> None:
    model = build_tiny_model(family).double()
    rows = [torch.randint(0, 300, (20,), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    for row in rows:
        row[:4] = rows[0][:4]
    (root,) = run_prefixes(model, rows[0][None, :4], [4], [None])
    lengths = [9, 3]
    ids_BT = torch.stack([row[4:13] for row in rows[:2]])
    ids_BT[1, 3:] = 0  # padding
    one, other = run_prefixes(model, ids_BT, lengths, [root, root])
    assert (root.tokens, one.tokens, other.tokens) == (4, 13, 7)
    starts = [13, 7, 7, 4]
    wholes = [rows[0], rows[1], torch.cat([rows[1][:7], rows[2][7:]]), rows[2]]
    own_BT = torch.stack([whole[start : start + 7] for whole, start in zip(wholes, starts, strict=True)])
    found_BTH = hidden_states_after(model, own_BT, [one, other, other, root])
    for whole, start, found_TH in zip(wholes, starts, found_BTH, strict=True):
        expected_TH = hidden_states(model, whole[None])[0, start : start + 7]
        torch.testing.assert_close(found_TH, expected_TH, rtol=1e-9, atol=1e-12)


def test_sliding_windows_and_unknown_families_are_left_alone(build_tiny_model: Any) -> None:
    assert not can_share_prefix(build_tiny_model("gemma3"))
    assert not can_share_prefix(build_tiny_model("opt"))


def test_positions_that_depend_on_the_longest_row_are_left_alone(build_tiny_model: Any) -> None:
    assert can_share_prefix(build_tiny_model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0}))
    assert not can_share_prefix(
        build_tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    )


def test_the_prefix_ends_before_the_token_that_predicts_the_first_supervised_one() -> None:
    twin = Rendered([1, 2, 3, 4, 5], [0, 0, 0, 1, 1])
    assert make_micro_batch([twin, twin]).shared_prefix == 2
    assert make_micro_batch([twin]).shared_prefix == 0
    assert make_micro_batch([twin, Rendered([1, 9, 3, 4], [0, 0, 0, 1])]).shared_prefix == 1


def test_where_activations_are_computed_again_whole_rows_are_run_in_training_alone(
    build_tiny_model: Any,
) -> None:
    model = build_tiny_model().double().train()
    model.activation_checkpointing_enable()
    assert not can_share_prefix(model)
    assert can_share_prefix(model.eval())


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_with_a_shared_prefix_are_those_of_activations_computed_again(
    build_tiny_model: Any, lora: bool
) -> None:
    found = {}
    for again in (False, True):
        model = build_tiny_model().double()
        if lora:
            model = add_adapter(model, LoraSettings(rank=4), seed=3).double()
            with torch.no_grad():
                for name, one in model.named_parameters():
                    if "lora_B" in name:
                        one.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        base = Base(model, 300, 0.5)
        student = StudentWithLoss(model.train(), 300, base=base)
        if again:
            student.activation_checkpointing_enable()
        passes: list[int] = []
        block = model.get_base_model().model.layers[1] if lora else model.model.layers[1]
        block.mlp.register_forward_pre_hook(lambda *given, passes=passes: passes.append(given[1][0].shape[1]))
        batch = make_micro_batch(ROWS)
        loss, values = student(batch, batch.supervised)
        loss.backward()
        longest = max(len(row.ids) for row in ROWS)
        # An adapter's base, in evaluation, shares the prefix in both cases; of full weights it is a copy.
        shared = [PREFIX, longest - PREFIX]
        of_base = shared if lora else []
        assert passes == ([longest, *of_base, longest] if again else [*shared, *of_base])
        assert (values["base_kl"] > 0) == lora
        found[again] = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert found[True].keys() == found[False].keys()
    assert len(found[True]) > 10
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, rtol=1e-5, atol=1e-6, msg=name)
