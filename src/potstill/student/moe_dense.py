"""A dense model out of a mixture of experts: one feed-forward layer in the place of the experts.

Shapes: E experts, H hidden size, F inner size of an expert, D inner size of the dense layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from potstill.core.errors import ModelError
from potstill.models.shared_experts import expert_blocks
from potstill.student.moe_routing import Routing

__all__ = ["dense_model", "empty_dense_model"]

# Families that differ from a mixture of experts in their feed-forward layers alone.
_DENSE = {"qwen3_moe": "qwen3", "mixtral": "mistral"}
_EXPERTS = ".mlp.experts."
_ROUTER = ".mlp.gate.weight"


def dense_model(model: Any, routing: Mapping[int, Routing], experts: int | None, where: str) -> Any:
    """The model of the dense sibling family, with the weights of attention, norms, embedding and head as is.

    The `experts` experts that add most stand side by side in it; with None there is one, the average of all,
    weighted by the router weights that each was given. What the router decided a token becomes a constant, by
    which `down` is multiplied: an expert's mean router weight, scaled so that the sum of the weights is on
    average what it was. The model given stays as it is. Raises ModelError for a family without such a
    sibling, for more experts than there are, and where dense layers between the others are of another size.
    """
    dense, blocks = empty_dense_model(model, experts, where), expert_blocks(model)
    weights = {
        name: weight
        for name, weight in model.state_dict().items()
        if _EXPERTS not in name and not name.endswith(_ROUTER)
    }
    for number, block in blocks.items():
        gate_up, down_HD = _joined(block.experts, routing[number], experts)
        gate_DH, up_DH = gate_up
        place = f"model.layers.{number}.mlp"
        for name, weight in (("gate", gate_DH), ("up", up_DH), ("down", down_HD)):
            weights[f"{place}.{name}_proj.weight"] = weight.to(model.dtype)
    dense.load_state_dict(weights)
    dense.generation_config = model.generation_config
    return dense.to(model.device).train(model.training)


def empty_dense_model(model: Any, experts: int | None, where: str) -> Any:
    """The model of the dense sibling family as it is before it gets its weights. Raises as `dense_model`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = model.config
    if config.model_type not in _DENSE:
        raise ModelError(
            f"there is no dense family that a {config.model_type} model could become",
            where=where,
            expected=f"a model of one of: {', '.join(_DENSE)}",
            mend="use method: prune_experts or share_experts",
        )
    if experts is not None and experts > config.num_experts:
        raise ModelError(
            f"{experts} experts cannot be kept of {config.num_experts}",
            where=where,
            expected=f"experts between 1 and {config.num_experts}",
        )
    blocks = expert_blocks(model)
    inner = next(iter(blocks.values())).experts.intermediate_dim * (experts or 1)
    if len(blocks) < config.num_hidden_layers and config.intermediate_size != inner:
        raise ModelError(
            f"its dense layers have an inner size of {config.intermediate_size}, and those made of experts "
            f"would have {inner}",
            where=where,
            expected="one inner size for all layers, as the dense family has",
        )
    return AutoModelForCausalLM.from_config(
        _dense_config(AutoConfig.for_model(_DENSE[config.model_type]), model, inner), dtype=model.dtype
    )


def _dense_config(kind: Any, model: Any, inner: int) -> Any:
    """A configuration of the dense family with all that it has in common with the model's own."""
    own = model.config.to_dict()
    shared = {
        field.name: own[field.name]
        for field in dataclasses.fields(kind)
        if field.name in own and field.name not in ("architectures", "transformers_version")
    }
    settings = {
        **shared,
        "intermediate_size": inner,
        "head_dim": model.get_decoder().layers[0].self_attn.head_dim,
    }
    if getattr(model.config, "sliding_window", None) is not None:
        settings["max_window_layers"] = 0  # such a mixture has its window in every layer
    return type(kind)(**settings)


@torch.no_grad()
def _joined(experts: Any, routing: Routing, count: int | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Gate and up [D, H], and down [H, D], of the dense layer, in fp32 or the weights' wider type."""
    dtype = torch.promote_types(experts.down_proj.dtype, torch.float32)
    share_E = (routing.gates_E / routing.gates_E.sum()).to(experts.down_proj.device, dtype)
    router_weight = float(routing.gates_E.sum()) / routing.total_tokens
    gate_EFH, up_EFH = experts.gate_up_proj.to(dtype).chunk(2, dim=1)
    down_EHF = experts.down_proj.to(dtype)
    if count is None:
        gate_FH, up_FH, down_HF = (
            torch.einsum("e,eoi->oi", share_E, one) for one in (gate_EFH, up_EFH, down_EHF)
        )
        return (gate_FH, up_FH), router_weight * down_HF
    order = routing.contributions_E.argsort(descending=True, stable=True)[:count]
    top_E = order.sort().values.to(share_E.device)
    scale_E = router_weight * share_E[top_E] / share_E[top_E].sum()
    down_HD = (scale_E[:, None, None] * down_EHF[top_E]).transpose(0, 1).flatten(1)
    return (gate_EFH[top_E].flatten(0, 1), up_EFH[top_E].flatten(0, 1)), down_HD
