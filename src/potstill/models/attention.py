"""Causal attention of short rows on a CPU, where torch's fused kernel is slow: its operations in tiles.

A tile is some queries of some heads with all keys that they see. Its scores stay in the cores' caches, and
with queries in the order of their tokens all heads that share keys are one matrix product.

Shapes: B rows, H query heads, K key heads, G query heads a key head, T queries and S keys a row, D width of a
head; Z key heads of all rows (B K), Q queries of a tile, R queries by heads (T G or Q G), N keys of a tile.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["CausalAttention", "attention", "register_attention"]

_TILE_QUERIES = 96
# Scores of a tile, a thread: with fp32 what a core's second cache holds.
_TILE_SCORES = 1 << 18
# Past it torch's kernel is about as fast, and what is kept for the backward pass, 2 H S bytes a token in
# bfloat16 at most, is no longer little.
_MOST_KEYS = 512
# From how many keys on it is faster, by the type of products; in float64 that was not asked.
_FEWEST_KEYS = {torch.bfloat16: 2, torch.float32: 256, torch.float64: 2}


def register_attention() -> None:
    """Let transformers use `attention` for every model of this process whose attention is "sdpa"."""
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", attention)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' "sdpa" gives, [B, T, H, D], for queries [B, H, T, D]: by tiles where these serve.

    That is on a CPU, for rows of a few hundred tokens that see all before them and nothing else.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = _product_type(query, key, value)
    more = (options.get(name) for name in ("softcap", "position_bias", "cache"))
    if (
        dtype is not None
        and not dropout
        and all(one is None for one in more)
        and query.device.type == "cpu"
        and 1 < query.shape[2] <= key.shape[2]
        and _FEWEST_KEYS[dtype] <= key.shape[2] <= _MOST_KEYS
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.shape[1] % key.shape[1] == 0
        and _sees_all_before(module, query, key, attention_mask, is_causal)
    ):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output_BTHD: Tensor = CausalAttention.apply(query, key, value, scale, dtype)  # type: ignore[no-untyped-call]  # torch has no types for it
        return output_BTHD, None
    given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **options}
    output_BTHD, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    return output_BTHD, None


def _product_type(*tensors: Tensor) -> torch.dtype | None:
    """The type in which torch's own attention would multiply these; None for one that is not known here."""
    found = {one.dtype for one in tensors}
    if torch.is_autocast_enabled("cpu") and torch.float64 not in found:
        found = {torch.get_autocast_dtype("cpu")}
    dtype = found.pop()
    return dtype if not found and dtype in _FEWEST_KEYS else None


def _sees_all_before(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> bool:
    """Whether each query sees its own key and all before it, where the last query's is the last key."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return bool(causal) and queries == keys
    # Behind a prefix transformers makes a mask: the same for all rows, unless some are padded.
    alike = mask.shape[0] == 1 or mask.stride(0) == 0
    if mask.dtype != torch.bool or not alike or mask.shape[1:] != (1, queries, keys):
        return False
    expected_TS = torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)
    return torch.equal(mask[0, 0], expected_TS)


class CausalAttention(Function):
    """softmax(scale q k^T) v, [B, T, H, D], of queries that see their own key and all before it.

    The last query's key is the last one. Products are in `dtype`, but scores and all sums in fp32 at least.
    The gradient: with P the probabilities, dV = P^T dO, dP = dO V^T, dS = P (dP - sum(P dP)),
    dQ = scale dS K, dK = scale dS^T Q (Dao et al. 2022, appendix B.2).
    """

    @staticmethod
    def forward(
        ctx: Any, query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        """The attention's output."""
        rows, heads, queries, width = query_BHTD.shape
        key_heads, keys = key_BKSD.shape[1:3]
        shape = rows, key_heads, queries, heads // key_heads, width
        sums = torch.promote_types(dtype, torch.float32)
        query_ZRD = _by_token(query_BHTD.reshape(rows, key_heads, -1, queries, width).transpose(2, 3), sums)
        key_ZSD, value_ZSD = _by_head(key_BKSD, sums), _by_head(value_BKSD, dtype)
        keeps = any(ctx.needs_input_grad[:3])
        kept_ZRN: list[Tensor] = []
        output_ZRD = torch.empty(query_ZRD.shape, dtype=dtype)
        tiles, room = _tiles(shape, keys)
        # Memory that is used again, tile by tile, stays in cache.
        scores, low = torch.empty(room, dtype=sums), torch.empty(room, dtype=dtype)
        for some, first, last, seen in tiles:
            tile_ZRD = query_ZRD[some, first:last]
            tile = *tile_ZRD.shape[:2], seen
            low_ZRN = torch.empty(tile, dtype=dtype) if keeps else _of(low, tile)
            scores_ZRN = low_ZRN if dtype == sums else _of(scores, tile)
            _probabilities(scores_ZRN, tile_ZRD, key_ZSD[some, :seen], shape[3], scale)
            low_ZRN.copy_(scores_ZRN)
            torch.bmm(low_ZRN, value_ZSD[some, :seen], out=output_ZRD[some, first:last])
            if keeps:
                kept_ZRN.append(low_ZRN)
        if keeps:
            ctx.save_for_backward(query_ZRD.to(dtype), key_ZSD.to(dtype), value_ZSD, *kept_ZRN)
        ctx.settings = shape, scale, tiles, room
        ctx.types = query_BHTD.dtype, key_BKSD.dtype, value_BKSD.dtype
        return output_ZRD.view(shape).transpose(1, 2).reshape(rows, queries, heads, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of queries, keys and values."""
        shape, scale, tiles, room = ctx.settings
        query_ZRD, key_ZSD, value_ZSD, *kept_ZRN = ctx.saved_tensors
        rows, key_heads, queries, group, width = shape
        keys, dtype = key_ZSD.shape[1], value_ZSD.dtype
        sums = torch.promote_types(dtype, torch.float32)
        softmax_backward = torch.ops.aten._softmax_backward_data.out  # noqa: SLF001  # it has no other name
        grad_ZRD = _by_token(grad_BTHD.reshape(rows, queries, key_heads, group, width).transpose(1, 2), dtype)
        query_grad_ZRD = torch.empty_like(grad_ZRD)
        key_grad_ZSD, value_grad_ZSD = (torch.zeros(key_ZSD.shape, dtype=sums) for _ in range(2))
        probabilities, score_grads, low = (torch.empty(room, dtype=one) for one in (sums, sums, dtype))
        part = torch.empty(value_ZSD.numel(), dtype=dtype)
        for (some, first, last, seen), low_probabilities_ZRN in zip(tiles, kept_ZRN, strict=True):
            tile_ZRD, tile_grad_ZRD = query_ZRD[some, first:last], grad_ZRD[some, first:last]
            tile = *tile_ZRD.shape[:2], seen
            low_ZRN = _of(low, tile)
            probabilities_ZRN, grads_ZRN = low_probabilities_ZRN, low_ZRN
            if dtype != sums:
                probabilities_ZRN = _of(probabilities, tile).copy_(low_probabilities_ZRN)
                grads_ZRN = _of(score_grads, tile)
            part_ZND = _of(part, (tile[0], seen, width))
            value_grad_ZSD[some, :seen] += torch.bmm(low_probabilities_ZRN.mT, tile_grad_ZRD, out=part_ZND)
            torch.bmm(tile_grad_ZRD, value_ZSD[some, :seen].mT, out=low_ZRN)
            grads_ZRN.copy_(low_ZRN)
            # (dP - sum(P dP)) P in one pass through memory.
            softmax_backward(grads_ZRN, probabilities_ZRN, -1, sums, grad_input=grads_ZRN)
            low_ZRN.copy_(grads_ZRN)
            tile_query_grad_ZRD = query_grad_ZRD[some, first:last]
            keys_ZND = key_ZSD[some, :seen]
            torch.baddbmm(
                tile_query_grad_ZRD, low_ZRN, keys_ZND, beta=0, alpha=scale, out=tile_query_grad_ZRD
            )
            torch.bmm(low_ZRN.mT, tile_ZRD, out=part_ZND)
            key_grad_ZSD[some, :seen].add_(part_ZND, alpha=scale)
        query_grad_BHTD = query_grad_ZRD.view(shape).transpose(2, 3).reshape(rows, -1, queries, width)
        key_grad_BKSD, value_grad_BKSD = (
            one.view(rows, key_heads, keys, width) for one in (key_grad_ZSD, value_grad_ZSD)
        )
        found = query_grad_BHTD, key_grad_BKSD, value_grad_BKSD
        return *(one.to(its) for one, its in zip(found, ctx.types, strict=True)), None, None


def _by_token(heads_BKTGD: Tensor, dtype: torch.dtype) -> Tensor:
    """Queries by key head, in the order of their tokens, heads of one token side by side: [Z, R, D]."""
    return _contiguous(heads_BKTGD, dtype).flatten(2, 3).flatten(0, 1)


def _by_head(heads_BKSD: Tensor, dtype: torch.dtype) -> Tensor:
    return _contiguous(heads_BKSD, dtype).flatten(0, 1)


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _tiles(shape: tuple[int, ...], keys: int) -> tuple[list[tuple[slice, int, int, int]], int]:
    """A tile's key heads, its first row and the one after its last, and how many keys it sees.

    And how many scores the largest may have.
    """
    rows, key_heads, queries, group, _ = shape
    step = _even_part(queries, min(_TILE_QUERIES, _TILE_SCORES // (group * keys)))
    # Threads share a product by its heads.
    heads = _even_part(rows * key_heads, torch.get_num_threads() * _TILE_SCORES // (step * group * keys))
    found = []
    for head in range(0, rows * key_heads, heads):
        for first in range(0, queries, step):
            last = min(queries, first + step)
            found.append((slice(head, head + heads), first * group, last * group, keys - queries + last))
    return found, heads * step * group * keys


def _even_part(whole: int, most: int) -> int:
    """The size of the parts of a whole that are as alike as can be, none above `most` or one."""
    return max(1, math.ceil(whole / math.ceil(whole / max(1, most)))) if whole else 1


def _of(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _probabilities(scores_ZRN: Tensor, query_ZRD: Tensor, key_ZND: Tensor, group: int, scale: float) -> None:
    """Write a tile's probabilities into the place of its scores. Its last keys are those of its queries."""
    torch.baddbmm(scores_ZRN, query_ZRD, key_ZND.mT, beta=0, alpha=scale, out=scores_ZRN)
    queries = query_ZRD.shape[1] // group
    future_QQ = torch.full((queries, queries), -math.inf, dtype=scores_ZRN.dtype).triu_(1)
    by_query_ZQGN = scores_ZRN.view(len(scores_ZRN), queries, group, -1)
    by_query_ZQGN[..., -queries:].add_(future_QQ[:, None])
    torch.softmax(scores_ZRN, -1, out=scores_ZRN)
