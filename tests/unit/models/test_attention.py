"""Transformers' "sdpa" is attention in tiles where that is right and faster, and torch's own elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from potstill.models import attention, hidden_states, output_head
from potstill.models.attention import CausalAttention, register_attention
from potstill.models.pretrained import read_weights
from potstill.scoring import supervised_hidden

TOKENS, VOCABULARY = 40, 300
IDS = torch.arange(3 * TOKENS).view(3, TOKENS) * 37 % VOCABULARY
CAUSAL_MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=2)

Calls = list[tuple[int, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Queries and keys a row of each attention that ran in tiles."""
    found: Calls = []

    class Counted(CausalAttention):
        @staticmethod
        def forward(ctx: Any, query_BHTD: Tensor, key_BKSD: Tensor, *more: Any) -> Tensor:
            found.append((query_BHTD.shape[2], key_BKSD.shape[2]))
            return CausalAttention.forward(ctx, query_BHTD, key_BKSD, *more)

    monkeypatch.setattr(attention, "CausalAttention", Counted)
    register_attention()
    return found


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What gives "sdpa" back to transformers for the rest of a test."""

    def give_back() -> None:
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)

    return give_back


def step(model: Any, *, prefix_tokens: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step whose second halves of rows are supervised."""
    ids_BT = torch.cat([IDS[:1, :prefix_tokens].expand(3, -1), IDS[:, prefix_tokens:]], dim=1)
    mask_BT = (torch.arange(TOKENS) >= TOKENS // 2).long().expand_as(ids_BT)
    hidden_NH, targets_N = supervised_hidden(model, ids_BT, mask_BT, prefix_tokens=prefix_tokens)
    loss = cross_entropy(output_head(model, VOCABULARY)(hidden_NH).float(), targets_N)
    loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def assert_same_step(
    one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], by: float
) -> None:
    (one_loss, one_gradients), (other_loss, other_gradients) = one, other
    assert one_gradients.keys() == other_gradients.keys()
    assert abs(one_loss - other_loss) <= by * abs(other_loss)
    for name, gradient in other_gradients.items():
        assert (one_gradients[name] - gradient).norm() <= by * gradient.norm() + 1e-12, name


LAYERS = [(TOKENS, TOKENS)] * 2
FAMILIES: list[tuple[str, dict[str, Any], Calls]] = [
    ("llama", {}, LAYERS),
    ("qwen3", {}, LAYERS),
    ("gpt2", {}, LAYERS),
    # The window is shorter than the rows.
    ("gemma3", {"layer_types": ["sliding_attention", "full_attention"]}, LAYERS[:1]),
    ("gemma3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}, LAYERS),
]


@pytest.mark.parametrize(("family", "config", "expected"), FAMILIES)
def test_a_training_step_is_that_of_torchs_attention(
    build_tiny_model: Any,
    calls: Calls,
    without: Callable[[], None],
    family: str,
    config: dict[str, Any],
    expected: Calls,
) -> None:
    model = build_tiny_model(family, **config).double().train()
    ours = step(model)
    assert calls == expected
    without()
    theirs = step(model)
    assert calls == expected
    assert_same_step(ours, theirs, 1e-6)  # norms are in fp32, whose rounding another order of sums may turn


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_under_autocast_too(
    build_tiny_model: Any, calls: Calls, without: Callable[[], None], family: str
) -> None:
    """As near to the step in float32 as torch's attention is."""
    model = build_tiny_model(family).train()
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(model)
        without()
        theirs = step(model)
    assert calls == LAYERS
    _, exact = step(model)

    def error(one: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        return torch.stack([(one[1][name] - exact[name]).norm() / exact[name].norm() for name in exact]).max()

    assert error(ours) < 1.3 * error(theirs) < 0.1


def test_rows_behind_a_shared_prefix_run_in_tiles_as_the_prefix_does(
    build_tiny_model: Any, calls: Calls, without: Callable[[], None]
) -> None:
    model = build_tiny_model().double().train()
    ours = step(model, prefix_tokens=10)
    assert calls == [(10, 10), (10, 10), (TOKENS - 10, TOKENS), (TOKENS - 10, TOKENS)]
    without()
    assert_same_step(ours, step(model, prefix_tokens=10), 1e-6)


def test_recomputed_layers_have_the_same_gradients(build_tiny_model: Any, calls: Calls) -> None:
    model = build_tiny_model().double().train()
    expected = step(model)
    model.activation_checkpointing_enable()
    calls.clear()
    assert_same_step(step(model), expected, 1e-12)
    assert calls == 2 * LAYERS


def test_nothing_is_kept_where_nothing_is_trained(calls: Calls) -> None:
    def kept_bytes(*, trained: bool) -> int:
        saved: list[Tensor] = []

        def keep(one: Tensor) -> Tensor:
            saved.append(one)
            return one

        query, key, value = half()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
            attention.attention(CAUSAL_MODULE, query.requires_grad_(trained), key, value, None)
        return sum(one.nbytes for one in saved)

    scores = 2 * 4 * TOKENS**2
    assert scores < kept_bytes(trained=True) < 3 * scores  # bfloat16
    assert kept_bytes(trained=False) == 0
    assert len(calls) == 2


def test_the_name_of_a_models_attention_and_its_files_stay_as_they_are(
    build_tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    build_tiny_model().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text(encoding="utf-8")
    model = read_weights(str(tmp_path), where="here")
    assert AttentionInterface()["sdpa"] is attention.attention
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == json.loads(before)
    assert model.config._attn_implementation == "sdpa"


def half(
    *, queries: int = TOKENS, keys: int = TOKENS, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = (4, queries), (2, keys), (2, keys)
    return tuple(torch.randn(2, heads, length, 8, generator=generator).to(dtype) for heads, length in sizes)


def causal(queries: int, keys: int) -> Tensor:
    """A mask as transformers makes it: one for all rows."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(2, 1, -1, -1)


SLIDING = causal(TOKENS, TOKENS) & ~causal(TOKENS, TOKENS).transpose(2, 3).roll(-5, 2)
PADDED = causal(TOKENS, TOKENS).clone()
PADDED[1, :, :, :3] = False
PADDED[1, :, :3, 0] = True


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (half(), {"dropout": 0.1}),
        (half(), {"is_causal": False}),
        (half(), {"attention_mask": SLIDING[:1]}),
        (half(), {"attention_mask": PADDED}),
        (half(), {"attention_mask": causal(TOKENS, TOKENS).float().log()}),
        (half(), {"attention_mask": torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)}),
        (half(), {"position_bias": torch.zeros(1, 4, TOKENS, TOKENS).bfloat16()}),
        (half(queries=1), {}),
        (half(queries=TOKENS - 3), {}),  # to torch the first key is the first query's then
        (half(queries=513, keys=513), {}),
        (half(queries=255, keys=255, dtype=torch.float32), {}),
        (half(dtype=torch.float16), {}),
    ],
)
def test_all_else_goes_to_torchs_own(
    calls: Calls, given: tuple[Tensor, ...], options: dict[str, Any]
) -> None:
    arguments = {"attention_mask": None, **options}
    torch.manual_seed(0)
    found, _ = attention.attention(CAUSAL_MODULE, *given, **arguments)
    torch.manual_seed(0)
    expected, _ = sdpa_attention_forward(CAUSAL_MODULE, *given, **arguments)
    assert torch.equal(found, expected)
    assert calls == []


@pytest.mark.parametrize(
    ("given", "mask"),
    [
        (half(), None),
        (half(), causal(TOKENS, TOKENS)),
        (half(queries=7), causal(7, TOKENS)),
        (half(queries=256, keys=256, dtype=torch.float32), None),
        (half(queries=512, keys=512), None),
    ],
)
def test_what_sees_all_before_it_runs_in_tiles(
    calls: Calls, given: tuple[Tensor, ...], mask: Tensor | None
) -> None:
    found, _ = attention.attention(CAUSAL_MODULE, *given, mask)
    expected, _ = sdpa_attention_forward(CAUSAL_MODULE, *given, mask)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert len(calls) == 1


def test_an_encoders_attention_looks_ahead_as_before(calls: Calls) -> None:
    module = SimpleNamespace(is_causal=False, num_key_value_groups=2)
    found, _ = attention.attention(module, *half(), None)
    assert torch.equal(found, sdpa_attention_forward(module, *half(), None)[0])
    assert calls == []


@pytest.mark.parametrize("way", ["eager", "packed", "padded on the left", "decoded"])
def test_models_whose_masks_say_more_are_left_alone(build_tiny_model: Any, calls: Calls, way: str) -> None:
    model = build_tiny_model().double()
    if way == "eager":
        model.set_attn_implementation("eager")
        hidden_states(model, IDS)
    elif way == "packed":
        positions_BT = torch.cat([torch.arange(25), torch.arange(15)]).expand(3, -1)
        hidden_states(model, IDS, position_ids_BT=positions_BT)
    elif way == "padded on the left":
        mask_BT = torch.ones_like(IDS)
        mask_BT[0, :5] = 0
        hidden_states(model, IDS, mask_BT)
    else:
        kept = model(IDS, use_cache=True).past_key_values
        assert calls == LAYERS
        calls.clear()
        model(IDS[:, :1], past_key_values=kept, use_cache=True)
    assert calls == []
