"""Expert pruning: a mixture of experts without those that add least. Shapes: E experts, H hidden size."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from potstill.core.errors import ModelError
from potstill.models.shared_experts import expert_blocks
from potstill.student.moe_routing import Routing

__all__ = ["choose_experts", "drop_experts"]


def choose_experts(routing: Mapping[int, Routing], count: int) -> dict[int, list[int]]:
    """The `count` experts of each layer with the largest mean contribution (REAP), in their own order."""
    return {
        number: sorted(found.mean_contribution.argsort(descending=True, stable=True)[:count].tolist())
        for number, found in routing.items()
    }


def drop_experts(model: Any, kept: Mapping[int, Sequence[int]], where: str) -> None:
    """Leave only the experts `kept` of each layer, with their rows of the router, in place.

    Each layer keeps as many, as the configuration has one number for all. Raises ModelError for more than
    there are, and for fewer than a token is routed to.
    """
    config, count = model.config, len(next(iter(kept.values())))
    assert all(len(experts) == count for experts in kept.values())
    if not config.num_experts_per_tok <= count <= config.num_experts:
        raise ModelError(
            f"{count} experts cannot be kept of {config.num_experts}, of which a token is routed to "
            f"{config.num_experts_per_tok}",
            where=where,
            expected=f"experts between {config.num_experts_per_tok} and {config.num_experts}",
        )
    for number, block in expert_blocks(model).items():
        index_E = torch.tensor(kept[number], device=model.device)
        for module, name in (
            (block.experts, "gate_up_proj"),
            (block.experts, "down_proj"),
            (block.gate, "weight"),
        ):
            before = getattr(module, name)
            setattr(module, name, nn.Parameter(before.detach()[index_E], before.requires_grad))
        block.experts.num_experts = block.gate.num_experts = count
    model.num_experts = config.num_experts = count
