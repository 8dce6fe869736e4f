"""Experts as a shared core and low-rank deltas: how core and deltas come out of whole experts.

Shapes: E experts, H hidden size, F inner size of an expert, O and I outputs and inputs of a linear layer,
R rank.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.core.errors import ModelError
from potstill.models.shared_experts import SharedExperts, expert_blocks
from potstill.student.moe_routing import Moments, measure_moments

__all__ = [
    "SharingError",
    "check_rank",
    "empty_shared_experts",
    "layers_at_once",
    "low_rank_delta",
    "rank_for",
    "share_experts",
]

# Second moments that are in memory at once; of what is left, a pass over the traces measures more.
_MOMENT_BYTES = 4 << 30
# Added to a second moment's diagonal, as a share of its mean, so that it can be factorised: the first that
# outweighs the rounding of the sums.
_RIDGES = (1e-9, 1e-7, 1e-5, 1e-3, 1e-1)


@dataclass(frozen=True)
class SharingError:
    """How far a layer's experts are from what they were.

    Norm of the difference of gate and up's outputs over all calibration tokens, and of down's, each on what
    the whole experts are given, as a share of the outputs' own norm.
    """

    gate_up: float
    down: float


def rank_for(model: Any, keep_ratio: float, where: str) -> int:
    """The largest rank at which core and deltas have at most `keep_ratio` of the experts' parameters.

    Raises ModelError where not even rank 1 does, naming the smallest ratio.
    """
    core, delta, experts = _sizes(model)
    rank = min(int((keep_ratio * experts * core - core) // (experts * delta)), _highest_rank(model))
    if rank < 1:
        smallest = math.ceil(1000 * (core + experts * delta) / (experts * core)) / 1000
        raise ModelError(
            f"a keep_ratio of {keep_ratio:g} leaves {experts} experts no deltas beside their core",
            where=where,
            expected=f"a keep_ratio of at least {smallest:.3f}",
        )
    return rank


def _sizes(model: Any) -> tuple[int, int, int]:
    """Parameters of an expert, those of a delta for each of its ranks, and how many experts a layer has."""
    down_EHF = next(iter(expert_blocks(model).values())).experts.down_proj
    experts, hidden, inner = down_EHF.shape
    return 3 * hidden * inner, 3 * inner + 2 * hidden, experts


def _highest_rank(model: Any) -> int:
    """The highest rank that saves parameters and is no higher than that of an expert's weights."""
    core, delta, experts = _sizes(model)
    down_EHF = next(iter(expert_blocks(model).values())).experts.down_proj
    return int(min((experts * core - core) // (experts * delta), *down_EHF.shape[1:]))


def check_rank(model: Any, rank: int, where: str) -> None:
    """Raise ModelError for a rank at which core and deltas would be no smaller than the experts."""
    if rank > (highest := _highest_rank(model)):
        raise ModelError(
            f"rank {rank}: core and deltas have more parameters than the experts, or a delta than its expert",
            where=where,
            expected=f"a rank of at most {highest}",
        )


def empty_shared_experts(experts: Any, rank: int, activation: str) -> SharedExperts:
    """Core and deltas of a layer's whole experts as they are before they get their weights, on no device."""
    count, hidden, inner = experts.down_proj.shape
    with torch.device("meta"):
        return SharedExperts(count, hidden, inner, rank, activation)


def share_experts(
    model: Any,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    rank: int,
    weights: Mapping[int, Tensor],
    where: str,
) -> Iterator[tuple[int, SharedExperts, SharingError]]:
    """Core and deltas of each mixture-of-experts layer with its number and its error; the model stays whole.

    `batches` begins a pass over the calibration traces, of which there are as many as the second moments of
    all layers take memory. `weights` are each layer's experts' in its core [E], of any sum above 0. Raises
    ModelError for a rank at which there would be nothing to gain.
    """
    check_rank(model, rank, where)
    blocks = expert_blocks(model)
    numbers = list(blocks)
    down_EHF = next(iter(blocks.values())).experts.down_proj
    experts, hidden, inner = down_EHF.shape
    wide = torch.promote_types(down_EHF.dtype, torch.float32)
    at_once = layers_at_once(experts, hidden, inner, wide.itemsize)
    for first in range(0, len(numbers), at_once):
        moments = measure_moments(model, batches(), numbers[first : first + at_once])
        for number in list(moments):
            shared, error = _shared(
                blocks[number].experts, moments.pop(number), rank, weights[number], model.config.hidden_act
            )
            yield number, shared, error


def layers_at_once(experts: int, hidden: int, inner: int, number_bytes: int) -> int:
    """Of how many layers the second moments of the experts' inputs are in memory, for each pass of traces."""
    return max(1, _MOMENT_BYTES // (experts * (hidden**2 + inner**2) * number_bytes))


@torch.no_grad()
def _shared(
    experts: Any, moments: Moments, rank: int, weights_E: Tensor, activation: str
) -> tuple[SharedExperts, SharingError]:
    shared = empty_shared_experts(experts, rank, activation)
    shared.to_empty(device=experts.down_proj.device).to(experts.down_proj.dtype)
    errors = {}
    for name, whole_EOI, moment_EII in (
        ("gate_up", experts.gate_up_proj, moments.hidden_EHH),
        ("down", experts.down_proj, moments.inner_EFF),
    ):
        core_OI = shared.get_parameter(f"shared_core_{name}")
        out_EOR, in_ERI = (shared.get_parameter(f"delta_{name}_{side}") for side in ("out", "in"))
        wide = moment_EII.dtype
        share_E = (weights_E / weights_E.sum()).to(whole_EOI.device, wide)
        core_OI.copy_(torch.einsum("e,eoi->oi", share_E, whole_EOI.to(wide)))
        pooled_II = moment_EII.sum(0) / moments.tokens_E.sum()
        squares = torch.zeros(2, dtype=torch.float64, device=whole_EOI.device)
        for expert in range(len(whole_EOI)):
            whole_OI = whole_EOI[expert].to(wide)
            # What few tokens say of an expert's inputs is filled up with what the layer's tokens say, as if
            # as many of these had been its own as there are inputs.
            filled_II = moment_EII[expert] + len(pooled_II) * pooled_II
            out_OR, in_RI = low_rank_delta(whole_OI - core_OI.to(wide), filled_II, rank)
            out_EOR[expert], in_ERI[expert] = out_OR, in_RI
            missed_OI = whole_OI - core_OI.to(wide) - out_EOR[expert].to(wide) @ in_ERI[expert].to(wide)
            squares += torch.stack(
                [((one @ moment_EII[expert]) * one).sum(dtype=torch.float64) for one in (missed_OI, whole_OI)]
            )
        missed, total = squares.clamp(min=0).tolist()
        errors[name] = math.sqrt(missed / total) if total else 0.0
    return shared, SharingError(**errors)


def low_rank_delta(delta_OI: Tensor, moment_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [O, R] and V [R, I] with the least ||(delta - U V) X||, X being inputs with X X^T = moment.

    The truncated SVD of delta S, S the Cholesky factor of the moment, times the inverse of S (Wang et al.
    2024, SVD-LLM). That is the projection of delta onto the first left singular vectors of delta S, without
    any inverse. Each direction's size is divided evenly among U and V.
    """
    factor_II = _factor(moment_II.double()).to(delta_OI.dtype)
    left_OR = torch.linalg.svd(delta_OI @ factor_II, full_matrices=False).U[:, :rank]
    projected_RI = left_OR.T @ delta_OI
    root_R = projected_RI.norm(dim=1).sqrt()
    root_R = torch.where(root_R == 0, 1, root_R)
    return left_OR * root_R, projected_RI / root_R[:, None]


def _factor(moment_II: Tensor) -> Tensor:
    """The Cholesky factor of a second moment, which rounding may have made indefinite."""
    scale = moment_II.diagonal().mean()
    scale = torch.where(scale == 0, 1, scale)
    eye_II = torch.eye(len(moment_II), dtype=moment_II.dtype, device=moment_II.device)
    factor_II: Tensor
    for ridge in _RIDGES:
        factor_II, failed = torch.linalg.cholesky_ex(moment_II + ridge * scale * eye_II)
        if not failed:
            return factor_II
    raise ModelError("the second moments of the calibration traces' activations are not finite")
