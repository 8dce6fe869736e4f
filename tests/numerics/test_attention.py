"""Causal attention in tiles against the written-out sums, and against torch's own.

Shapes: B rows, H query heads, K key heads, T queries, S keys, D width of a head.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from potstill.models import attention
from potstill.models.attention import CausalAttention

TILE = 8
SCALE = 0.3

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_TILE_QUERIES", TILE)
    monkeypatch.setattr(attention, "_TILE_SCORES", 500)


def inputs(
    rows: int,
    heads: int,
    key_heads: int,
    queries: int,
    keys: int,
    width: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose heads lie side by side in memory, as a model's do."""
    generator = torch.Generator().manual_seed(rows + 10 * heads + 100 * queries + 1000 * keys)

    def one(number: int, length: int) -> Tensor:
        made = torch.randn(rows, length, number, width, generator=generator, dtype=torch.float64)
        return made.to(dtype).transpose(1, 2).requires_grad_()

    return one(heads, queries), one(key_heads, keys), one(key_heads, keys)


def naive(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor) -> Tensor:
    """Each query by itself, over the keys that it sees: [B, T, H, D]."""
    rows, heads, queries, _ = query_BHTD.shape
    key_heads, keys = key_BKSD.shape[1:3]
    found = []
    for row in range(rows):
        for query in range(queries):
            for head in range(heads):
                of_keys = row, head * key_heads // heads, slice(keys - queries + query + 1)
                weights_S = (SCALE * key_BKSD[of_keys] @ query_BHTD[row, head, query]).exp()
                found.append(weights_S / weights_S.sum() @ value_BKSD[of_keys])
    return torch.stack(found).view(rows, queries, heads, -1)


def tiled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    output: Tensor = CausalAttention.apply(query, key, value, SCALE, query.dtype)  # type: ignore[no-untyped-call]  # torch has no types for it
    return output


def of_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's own kernel, with a mask where there are more keys than queries."""
    queries, keys = query.shape[2], key.shape[2]
    mask_TS = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask_TS, scale=SCALE, enable_gqa=True
    ).transpose(1, 2)


def output_and_gradients(function: Attention, given_: tuple[Tensor, ...]) -> list[Tensor]:
    query, key, value = (one.detach().requires_grad_() for one in given_)
    output_BTHD = function(query, key, value)
    weights = torch.linspace(-1, 1, output_BTHD.numel(), dtype=torch.float64).view(output_BTHD.shape)
    (output_BTHD * weights.to(output_BTHD.dtype)).sum().backward()
    gradients = [one.grad for one in (query, key, value) if one.grad is not None]
    assert len(gradients) == 3
    return [output_BTHD.detach(), *gradients]


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("queries", [1, 2, TILE - 1, TILE, TILE + 1, 3 * TILE + 1])
def test_output_and_gradients_are_those_of_each_query_by_itself(queries: int, before: int) -> None:
    given_ = inputs(3, 6, 2, queries, queries + before, 4)
    for one, other in zip(
        output_and_gradients(tiled, given_), output_and_gradients(naive, given_), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 4),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    queries=st.integers(1, 40),
    before=st.integers(0, 12),
    width=st.integers(1, 9),
)
def test_any_shape_is_torchs_own_attention(
    rows: int, key_heads: int, group: int, queries: int, before: int, width: int
) -> None:
    given_ = inputs(rows, key_heads * group, key_heads, queries, queries + before, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_TILE_QUERIES", TILE)
        patch.setattr(attention, "_TILE_SCORES", 500)
        found = output_and_gradients(tiled, given_)
    for one, other in zip(found, output_and_gradients(of_torch, given_), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_the_gradient_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(tiled, inputs(2, 4, 2, TILE + 2, TILE + 5, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_rounds_no_worse_than_torchs_own(dtype: torch.dtype) -> None:
    """Scores and sums in fp32, products in the inputs' type; large scores, which rounding would show."""
    exact = [
        one.detach() * factor for one, factor in zip(inputs(2, 6, 2, 60, 60, 16), (4, 4, 1), strict=True)
    ]
    rounded = tuple(one.to(dtype) for one in exact)
    expected = output_and_gradients(naive, tuple(one.double() for one in rounded))

    def errors(function: Attention) -> list[float]:
        found = output_and_gradients(function, rounded)
        return [
            float((one.double() - other).norm() / other.norm())
            for one, other in zip(found, expected, strict=True)
        ]

    for own, torchs in zip(errors(tiled), errors(of_torch), strict=True):
        assert own < 1.3 * torchs
        assert own < (2e-6 if dtype == torch.float32 else 2e-2)


def test_what_a_tile_does_not_see_is_not_read() -> None:
    """A later token's keys and values change nothing, not even where they are no numbers."""
    query, key, value = (one.detach() for one in inputs(2, 4, 2, 3 * TILE, 3 * TILE, 4))
    before = tiled(query, key, value)
    key[:, :, 2 * TILE :], value[:, :, 2 * TILE :] = torch.inf, torch.nan
    after = tiled(query, key, value)
    assert torch.equal(before[:, : 2 * TILE], after[:, : 2 * TILE])
    assert after[:, 2 * TILE :].isnan().all()
