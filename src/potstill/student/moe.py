"""Students out of a mixture of experts: fewer experts, experts that share a core, or none at all."""

import itertools
from dataclasses import asdict
from typing import Any

import torch

from potstill.models import share_weights
from potstill.models.shared_experts import SharedExperts, expert_blocks, shared_model
from potstill.student.making import Made, Original
from potstill.student.moe_dense import dense_model, empty_dense_model
from potstill.student.moe_pruning import choose_experts, drop_experts
from potstill.student.moe_routing import Routing, measure_fisher, measure_routing, require_experts
from potstill.student.moe_sharing import check_rank, empty_shared_experts, rank_for, share_experts
from potstill.student.settings import InitSettings

__all__ = ["empty_student", "prune_experts", "shared_experts", "to_dense"]


def prune_experts(original: Original) -> Made:
    """The model with the `experts` of each layer that add most (REAP), a plain model of its family."""
    routing, where = _routing(original), str(original.settings.model)
    assert original.settings.experts is not None
    kept = choose_experts(routing, original.settings.experts)
    student = share_weights(original.model)
    drop_experts(student, kept, where)
    return Made(
        student,
        f"{original.settings.experts} of {original.model.config.num_experts} experts a layer kept",
        counts={"experts": original.settings.experts},
        metrics={
            "experts": [
                {**row, "kept": kept[row["layer"]], **sizes}
                for row, sizes in zip(
                    _routing_rows(routing), _layer_sizes(original.model, student), strict=True
                )
            ],
            **_bytes(original.model, student),
        },
    )


def to_dense(original: Original) -> Made:
    """The model of the dense sibling family whose feed-forward layers are made of the experts."""
    routing, wanted = _routing(original), original.settings.experts
    student = dense_model(original.model, routing, wanted, str(original.settings.model))
    how = "the average of all" if wanted is None else f"the {wanted} that add most"
    return Made(
        student,
        f"a dense {student.config.model_type} model, each layer made of {how} experts",
        metrics={"experts": _routing_rows(routing), **_bytes(original.model, student)},
    )


def shared_experts(original: Original) -> Made:
    """The model whose experts share a core and differ by low-rank deltas (D2-MoE)."""
    settings, model, where = original.settings, original.model, str(original.settings.model)
    routing = _routing(original)
    rank = _rank(settings, model)
    weights = {number: found.frequency for number, found in routing.items()}
    if settings.core_by == "fisher":
        fisher = measure_fisher(model, original.batches("measuring the experts' gradients"))
        weights = {number: share_E * fisher[number] for number, share_E in weights.items()}
    passes = itertools.count(1)
    layers: dict[int, SharedExperts] = {}
    errors: dict[int, dict[str, float]] = {}
    for number, shared, error in share_experts(
        model,
        lambda: original.batches(f"measuring the experts' inputs ({next(passes)})"),
        rank,
        weights,
        where,
    ):
        original.context.check_stop()
        layers[number], errors[number] = shared, asdict(error)
    student = shared_model(share_weights(model), layers, rank)
    worst = max(max(one.values()) for one in errors.values())
    return Made(
        student,
        f"{model.config.num_experts} experts a layer share a core, with deltas of rank {rank}; their layers' "
        f"outputs are off by {worst:.1%} at most",
        counts={"rank": rank},
        metrics={
            "experts": [
                {**row, "error": errors[row["layer"]], **sizes}
                for row, sizes in zip(_routing_rows(routing), _layer_sizes(model, student), strict=True)
            ],
            "expert_parameters_before": _expert_parameters(model),
            "expert_parameters": _expert_parameters(student),
            **_bytes(model, student),
        },
    )


def empty_student(settings: InitSettings, model: Any) -> Any:
    """The student that such settings make of a mixture without weights (device meta), which is used up.

    Raises ModelError as making it does.
    """
    where = str(settings.model)
    require_experts(model, where)
    blocks = expert_blocks(model)
    if settings.method == "to_dense":
        with torch.device("meta"):
            return empty_dense_model(model, settings.experts, where)
    if settings.method == "prune_experts":
        assert settings.experts is not None
        drop_experts(model, dict.fromkeys(blocks, range(settings.experts)), where)
        return model
    rank = _rank(settings, model)
    check_rank(model, rank, where)
    layers = {
        number: empty_shared_experts(block.experts, rank, model.config.hidden_act)
        for number, block in blocks.items()
    }
    return shared_model(model, layers, rank)


def _rank(settings: InitSettings, model: Any) -> int:
    if settings.rank is not None:
        return settings.rank
    assert settings.keep_ratio is not None
    return rank_for(model, settings.keep_ratio, str(settings.model))


def _routing(original: Original) -> dict[int, Routing]:
    require_experts(original.model, str(original.settings.model))
    return measure_routing(original.model, original.batches("measuring the experts"))


def _routing_rows(routing: dict[int, Routing]) -> list[dict[str, Any]]:
    """What was measured of each layer, for the manifest."""
    return [
        {
            "layer": number,
            "frequency": found.frequency.tolist(),
            "mean_contribution": found.mean_contribution.tolist(),
        }
        for number, found in routing.items()
    ]


def _layer_sizes(before: Any, after: Any) -> list[dict[str, int]]:
    """Of each mixture-of-experts layer what its experts are and were in parameters and bytes of memory."""
    sizes = []
    for old, new in zip(expert_blocks(before).values(), expert_blocks(after).values(), strict=True):
        row = {}
        for block, suffix in ((new, ""), (old, "_before")):
            weights = [*block.experts.parameters()]
            row[f"parameters{suffix}"] = sum(one.numel() for one in weights)
            row[f"bytes{suffix}"] = sum(one.nbytes for one in weights)
        sizes.append(row)
    return sizes


def _expert_parameters(model: Any) -> int:
    return sum(one.numel() for block in expert_blocks(model).values() for one in block.experts.parameters())


def _bytes(before: Any, after: Any) -> dict[str, int]:
    """What the weights take in memory, in the type that they are in here."""
    return {
        "weight_bytes_before": before.get_memory_footprint(),
        "weight_bytes": after.get_memory_footprint(),
    }
