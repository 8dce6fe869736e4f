"""The closed form of cross-entropy and forward KL on a GPU: one program a token.

A program reads its row of logits once for the largest value and the sums of exponentials, both at a time,
and once more to write the gradient over it. A sparse teacher's ids leave the rows before that, so that the
student's tail is a sum of its own, and come back last: in kernels of their own, since a barrier within one
does not wait for writes to memory on every GPU. A program has its row to itself: nothing is added atomically.
The formulas, and the clamps where a type ends, are those of `closed_form`, whose names these are.

Shapes: C tokens of one chunk, V vocabulary, K the teacher's kept ids.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from potstill.losses.head import at_least_fp32
from potstill.losses.types import Dense, Sampled, Sparse

__all__ = ["overwrite"]

# Ids that a program has in its registers at once: of the row, and of the teacher's kept ones.
_BLOCK, _KEPT_BLOCK = 4096, 256
_WARPS = 8


def overwrite(
    logits_CV: Tensor,
    targets_C: Tensor,
    signal: Dense | Sparse | Sampled | None,
    temperature: float,
    weights: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, KL and agreement, one a token; the latter two mean nothing without a signal.

    The logits z, each row of which lies without gaps, become a_n d CE_n / d z + b_n d KL_n / d (z / T) where
    `weights` are (a, b), each of C, in fp32 at least. Without weights what they become does not matter.
    """
    tokens, vocabulary = logits_CV.shape
    wide = at_least_fp32(logits_CV.dtype)
    values = torch.empty((3, tokens), dtype=wide, device=logits_CV.device)
    ids = teacher = tails = kept = None
    if isinstance(signal, Sparse | Sampled):
        ids = signal.ids_NK.contiguous()
        kept = torch.empty(ids.shape, dtype=wide, device=logits_CV.device)
    if isinstance(signal, Sparse):
        teacher, tails = signal.log_probs_NK.contiguous(), signal.log_tail_N.contiguous()
    elif isinstance(signal, Sampled):
        teacher = signal.shares_NK.contiguous()
    elif isinstance(signal, Dense):
        teacher = signal.logits_NV if signal.logits_NV.stride(-1) == 1 else signal.logits_NV.contiguous()
    k = 0 if ids is None else ids.shape[1]
    kept_block = min(_KEPT_BLOCK, triton.next_power_of_2(max(k, 1)))
    sparse = (logits_CV, logits_CV.stride(0), ids, teacher, kept, k)
    drawn: dict[str, Any] = {"SAMPLED": isinstance(signal, Sampled), "KEPT_BLOCK": kept_block}
    if not tokens:
        return values[0], values[1], values[2]
    with torch.cuda.device_of(logits_CV):
        if k:
            _leave[tokens, triton.cdiv(k, kept_block)](*sparse, **drawn)
        _closed_form[(tokens,)](
            logits_CV,
            logits_CV.stride(0),
            targets_C.contiguous(),
            None if signal is None else signal.top_ids,
            ids,
            teacher,
            0 if teacher is None else teacher.stride(0),
            tails,
            kept,
            None if weights is None else weights[0].contiguous(),
            None if weights is None else weights[1].contiguous(),
            values,
            tokens,
            vocabulary,
            k,
            SIGNAL="none" if signal is None else type(signal).__name__,
            KEEPS=kept is not None,
            TEMPERATURE=float(temperature),
            SMALLEST=torch.finfo(wide).tiny,
            GRADIENT=weights is not None,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
            KEPT_BLOCK=kept_block,
            num_warps=_WARPS,
        )
        if k and weights is not None:
            _come_back[tokens, triton.cdiv(k, kept_block)](*sparse, **drawn)
    return values[0], values[1], values[2]


@triton.jit
def _read(row, start, length, BLOCK: tl.constexpr):
    """A block of a row, -inf behind the row's end; unmasked where it can be, as masked reads are narrow."""
    columns = start + tl.arange(0, BLOCK)
    if start + BLOCK <= length:
        block = tl.load(row + columns)
    else:
        block = tl.load(row + columns, mask=columns < length, other=float("-inf"))
    return block


@triton.jit
def _write(row, start, length, block, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    if start + BLOCK <= length:
        tl.store(row + columns, block)
    else:
        tl.store(row + columns, block, mask=columns < length)


@triton.jit
def _finite(high):
    """What is taken off before an exponential: not -inf, the largest value until there is another."""
    return tl.where(high == float("-inf"), 0.0, high)


@triton.jit
def _plain(tempered, x, TEMPERATURE: tl.constexpr):
    """exp(T x), from exp(x) where that is cheaper."""
    if TEMPERATURE == 1:
        plain = tempered
    elif TEMPERATURE == 2:
        plain = tempered * tempered
    else:
        plain = tl.exp(x * TEMPERATURE)
    return plain


@triton.jit
def _leaving(teacher, place, k, SAMPLED: tl.constexpr):
    """Which places of a block hold an id of the teacher's: behind a row's draws stand shares of 0."""
    leaves = place < k
    if SAMPLED:
        leaves = tl.load(teacher + place, mask=leaves, other=0.0) > 0
    return leaves


@triton.jit
def _leave(logits, logits_stride, ids, teacher, kept, k, SAMPLED: tl.constexpr, KEPT_BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * KEPT_BLOCK + tl.arange(0, KEPT_BLOCK)
    leaves = _leaving(teacher + row * k, place, k, SAMPLED)
    at = logits + row * logits_stride + tl.load(ids + row * k + place, mask=leaves, other=0)
    z = tl.load(at, mask=leaves, other=float("-inf"))
    tl.store(kept + row * k + place, z.to(kept.dtype.element_ty), mask=place < k)
    tl.store(at, float("-inf"), mask=leaves)


@triton.jit
def _come_back(logits, logits_stride, ids, teacher, kept, k, SAMPLED: tl.constexpr, KEPT_BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * KEPT_BLOCK + tl.arange(0, KEPT_BLOCK)
    leaves = _leaving(teacher + row * k, place, k, SAMPLED)
    at = logits + row * logits_stride + tl.load(ids + row * k + place, mask=leaves, other=0)
    gradient = tl.load(kept + row * k + place, mask=leaves, other=0.0)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=leaves)


@triton.jit
def _closed_form(  # noqa: C901, PLR0912, PLR0913, PLR0915, PLR0917  # all it knows of a row is in its registers
    logits,
    logits_stride,
    targets,
    tops,
    ids,
    teacher,  # top-k log-probabilities, shares, or whole logits
    teacher_stride,
    tails,
    kept,  # the logits of the kept ids, and then their gradients
    of_target,
    of_teacher,
    values,
    tokens,
    vocabulary,
    k,
    SIGNAL: tl.constexpr,
    KEEPS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SMALLEST: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT_BLOCK: tl.constexpr,
):
    wide = values.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)  # times a stride it may pass 2^31
    logits += row * logits_stride
    target = tl.load(targets + row)
    # In `high` from the start, so that they have been read before anything is written.
    target_z = tl.load(logits + target).to(wide)
    high = target_z
    if SIGNAL != "none":
        top = tl.load(tops + row)
        top_z = tl.load(logits + top).to(wide)
        high = tl.maximum(high, top_z)
    if KEEPS:
        ids += row * k
        teacher += row * k
        kept += row * k
        for start in range(0, k, KEPT_BLOCK):
            place = start + tl.arange(0, KEPT_BLOCK)
            id_K = tl.load(ids + place, mask=place < k, other=-1)
            z_K = tl.load(kept + place, mask=place < k, other=float("-inf"))
            target_z = tl.maximum(target_z, tl.max(tl.where(id_K == target, z_K, float("-inf")), 0))
            top_z = tl.maximum(top_z, tl.max(tl.where(id_K == top, z_K, float("-inf")), 0))
            high = tl.maximum(high, tl.max(z_K, 0))

    # First pass: the largest logit, and the sums of exponentials below it.
    tempered_V = tl.zeros((BLOCK,), wide)
    plain_V = tl.zeros((BLOCK,), wide)
    if SIGNAL == "Dense":
        teacher += row * teacher_stride
        teacher_high = tl.full((), float("-inf"), wide)
        mass_V = tl.zeros((BLOCK,), wide)
    for start in range(0, vocabulary, BLOCK):
        z = _read(logits, start, vocabulary, BLOCK).to(wide)
        higher = tl.maximum(high, tl.max(z, 0))
        x = (z - _finite(higher)) * (1.0 / TEMPERATURE)
        tempered = tl.exp(x)
        down = (high - _finite(higher)) * (1.0 / TEMPERATURE)
        lowered = tl.exp(down)
        tempered_V = tempered_V * lowered + tempered
        if TEMPERATURE != 1:
            plain_V = plain_V * _plain(lowered, down, TEMPERATURE) + _plain(tempered, x, TEMPERATURE)
        high = higher
        if SIGNAL == "Dense":
            t = _read(teacher, start, vocabulary, BLOCK).to(wide)
            teacher_higher = tl.maximum(teacher_high, tl.max(t, 0))
            p = tl.exp((t - _finite(teacher_higher)) * (1.0 / TEMPERATURE))
            mass_V = mass_V * tl.exp((teacher_high - _finite(teacher_higher)) * (1.0 / TEMPERATURE)) + p
            teacher_high = teacher_higher
    rest = tl.sum(tempered_V, 0)
    total = rest
    plain_total = tl.sum(plain_V, 0)
    if SIGNAL == "Dense":
        mass = tl.sum(mass_V, 0)
        pull = tl.full((), 1.0, wide)

    if KEEPS:
        kl = tl.full((), 0.0, wide)
        mass = tl.full((), 0.0, wide)
        for start in range(0, k, KEPT_BLOCK):
            place = start + tl.arange(0, KEPT_BLOCK)
            x = (tl.load(kept + place, mask=place < k, other=float("-inf")) - high) * (1.0 / TEMPERATURE)
            tempered = tl.exp(x)
            total += tl.sum(tempered, 0)
            if TEMPERATURE != 1:
                plain_total += tl.sum(_plain(tempered, x, TEMPERATURE), 0)
            if SIGNAL == "Sparse":
                log_p = tl.load(teacher + place, mask=place < k, other=float("-inf")).to(wide)
                p = tl.exp(log_p)
            else:
                p = tl.load(teacher + place, mask=place < k, other=0.0).to(wide)
                log_p = tl.log(tl.where(p > 0, p, 1.0))
            mass += tl.sum(p, 0)
            kl += tl.sum(tl.where(p > 0, p * (log_p - x), 0.0), 0)
        kl += mass * tl.log(total)
        pull = mass
        if SIGNAL == "Sparse":
            # A tail that is too small for its type counts as the smallest number, a constant.
            tail_p = tl.exp(tl.load(tails + row).to(wide))
            tail_q = rest / total
            counts = tail_q > SMALLEST
            ratio = tail_p / tl.maximum(tail_q, SMALLEST)
            kl += tail_p * tl.log(tl.where(tail_p > 0, ratio, 1.0))
            mass += tl.where(counts, tail_p, 0.0)
            pull = mass - tl.where(counts, ratio, 0.0)
    if TEMPERATURE == 1:
        plain_total = total
    tl.store(values + row, tl.log(plain_total) - (target_z - high))

    # Second pass: the gradient, and what of a dense teacher's KL needs both largest logits.
    if GRADIENT:
        to_target = tl.load(of_target + row)
        to_teacher = tl.load(of_teacher + row)
        plain_share = to_target / plain_total
        if SIGNAL != "none":
            tempered_share = to_teacher * pull / total
    if SIGNAL == "Dense":
        difference_V = tl.zeros((BLOCK,), wide)
    if GRADIENT or SIGNAL == "Dense":
        for start in range(0, vocabulary, BLOCK):
            x = (_read(logits, start, vocabulary, BLOCK).to(wide) - high) * (1.0 / TEMPERATURE)
            tempered = tl.exp(x)
            if SIGNAL == "Dense":
                t = _read(teacher, start, vocabulary, BLOCK).to(wide)
                y = (t - teacher_high) * (1.0 / TEMPERATURE)
                p = tl.exp(y)
                difference_V += tl.where(p > 0, p * (y - x), 0.0)
            if GRADIENT:
                gradient = _plain(tempered, x, TEMPERATURE) * plain_share
                if SIGNAL != "none":
                    gradient += tempered * tempered_share
                if SIGNAL == "Dense":
                    gradient -= p * (to_teacher / mass)
                here = start + tl.arange(0, BLOCK) == target
                gradient = tl.where(here, gradient - to_target, gradient)
                _write(logits, start, vocabulary, gradient.to(logits.dtype.element_ty), BLOCK)
    if SIGNAL == "Dense":
        kl = tl.sum(difference_V, 0) / mass + tl.log(total) - tl.log(mass)
    if SIGNAL != "none":
        tl.store(values + tokens + row, kl)
        tl.store(values + 2 * tokens + row, tl.where(top_z >= high, 1.0, 0.0))

    if KEEPS and GRADIENT:
        for start in range(0, k, KEPT_BLOCK):
            place = start + tl.arange(0, KEPT_BLOCK)
            inside = place < k
            x = (tl.load(kept + place, mask=inside, other=float("-inf")) - high) * (1.0 / TEMPERATURE)
            tempered = tl.exp(x)
            if SIGNAL == "Sparse":
                p = tl.exp(tl.load(teacher + place, mask=inside, other=float("-inf")).to(wide))
            else:
                p = tl.load(teacher + place, mask=inside, other=0.0).to(wide)
            gradient = _plain(tempered, x, TEMPERATURE) * plain_share
            gradient += to_teacher * (mass * tempered / total - p)
            id_K = tl.load(ids + place, mask=inside, other=-1)
            gradient = tl.where(id_K == target, gradient - to_target, gradient)
            tl.store(kept + place, gradient, mask=inside)
