"""Experts that share a core, W_e = W_core + U_e V_e: the layer, the families that have it, the way back.

Shapes: N tokens, K experts a token, S = N K routed tokens, E experts, H hidden size, F inner size of an
expert, R rank, O and I outputs and inputs of a linear layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers import initialization as init
from transformers.activations import ACT2FN

from potstill.core.errors import ModelError

__all__ = [
    "MOE_FAMILIES",
    "SharedExperts",
    "SharedMixtralConfig",
    "SharedMixtralForCausalLM",
    "SharedOlmoeConfig",
    "SharedOlmoeForCausalLM",
    "SharedQwen3MoeConfig",
    "SharedQwen3MoeForCausalLM",
    "expanded_model",
    "expert_blocks",
    "register_shared_experts",
    "shared_model",
]

_METHOD = "shared_core"


class SharedExperts(nn.Module):
    """The experts of one layer as a shared core and a low-rank delta each (Gu et al. 2025, D2-MoE).

    Gate and up of an expert are one matrix [2F, H], as in transformers' fused experts, with one delta. The
    forward takes and gives what theirs does, and never makes an expert's whole weights.
    """

    def __init__(self, experts: int, hidden: int, inner: int, rank: int, activation: str) -> None:
        super().__init__()
        self.num_experts = experts
        self.act_fn = ACT2FN[activation]
        self.shared_core_gate_up = nn.Parameter(torch.empty(2 * inner, hidden))
        self.shared_core_down = nn.Parameter(torch.empty(hidden, inner))
        self.delta_gate_up_out = nn.Parameter(torch.empty(experts, 2 * inner, rank))
        self.delta_gate_up_in = nn.Parameter(torch.empty(experts, rank, hidden))
        self.delta_down_out = nn.Parameter(torch.empty(experts, hidden, rank))
        self.delta_down_in = nn.Parameter(torch.empty(experts, rank, inner))

    def forward(self, hidden_states_NH: Tensor, top_k_index_NK: Tensor, top_k_weights_NK: Tensor) -> Tensor:
        """The sum of each token's experts' outputs [N, H], times their weights.

        The core's products are the same for all experts of a token, so they are made once: that of gate and
        up before the activation, and as `down` is linear, that of down after the weighted sum.
        """
        tokens, per_token = top_k_index_NK.shape
        order_S = top_k_index_NK.flatten().argsort(stable=True)
        token_S = order_S // per_token
        # What each expert is given is handed over without a name, so that it is freed before the sums.
        parts = self._each_expert(
            torch.bincount(top_k_index_NK.flatten(), minlength=self.num_experts).tolist(),
            hidden_states_NH[token_S],
            functional.linear(hidden_states_NH, self.shared_core_gate_up)[token_S],
            top_k_weights_NK.flatten()[order_S, None],
        )
        place_S = order_S.argsort()
        inner_NF, delta_NH = (
            torch.cat(of_experts)[place_S].view(tokens, per_token, -1).sum(1) for of_experts in parts
        )
        output_NH = functional.linear(inner_NF, self.shared_core_down) + delta_NH
        return output_NH.to(hidden_states_NH.dtype)

    def _each_expert(
        self, counts: list[int], hidden_SH: Tensor, core_S2F: Tensor, weights_S1: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each expert with tokens what `down` is given, and what its delta makes of it, times the weights.

        Rows are sorted by expert, and `counts` says how many are each one's.
        """
        # Divided once: a gradient of a part taken by itself would be as large as the whole.
        rows = (torch.split(one, counts) for one in (hidden_SH, core_S2F, weights_S1.to(core_S2F.dtype)))
        deltas = (self.delta_gate_up_in, self.delta_gate_up_out, self.delta_down_in, self.delta_down_out)
        inners, outputs = [], []
        for count, hidden, core, weights, up_in, up_out, down_in, down_out in zip(
            counts, *rows, *(one.unbind() for one in deltas), strict=True
        ):
            if not count:
                continue
            low = functional.linear(hidden, up_in)
            gate, up = torch.addmm(core, low, up_out.T).chunk(2, dim=-1)
            inner = self.act_fn(gate) * up * weights
            inners.append(inner)
            outputs.append(functional.linear(functional.linear(inner, down_in), down_out))
        return inners, outputs

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Every expert's whole weights, gate and up [E, 2F, H] and down [E, H, F]."""
        return (
            self.shared_core_gate_up + self.delta_gate_up_out @ self.delta_gate_up_in,
            self.shared_core_down + self.delta_down_out @ self.delta_down_in,
        )


class SharedQwen3MoeConfig(Qwen3MoeConfig):
    """A Qwen3-MoE whose experts share a core."""

    model_type = "qwen3_moe_shared_core"
    compression_config: dict[str, Any] | None = None


class SharedMixtralConfig(MixtralConfig):
    """A Mixtral whose experts share a core."""

    model_type = "mixtral_shared_core"
    compression_config: dict[str, Any] | None = None


class SharedOlmoeConfig(OlmoeConfig):
    """An OLMoE whose experts share a core."""

    model_type = "olmoe_shared_core"
    compression_config: dict[str, Any] | None = None


class _SharesExperts:
    """What makes a causal language model's experts shared ones, of the rank that its configuration states."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # the model's, which stands behind this class
        rank = _stated_rank(config)
        for block in expert_blocks(self).values():
            block.experts = _empty_experts(block.experts, config, rank)
            self._init_weights(block.experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]  # the model's, as above
        if isinstance(module, SharedExperts):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)  # type: ignore[attr-defined]  # as above


class SharedQwen3MoeForCausalLM(_SharesExperts, Qwen3MoeForCausalLM):
    """Qwen3-MoE with shared experts."""

    config_class = SharedQwen3MoeConfig


class SharedMixtralForCausalLM(_SharesExperts, MixtralForCausalLM):
    """Mixtral with shared experts."""

    config_class = SharedMixtralConfig


class SharedOlmoeForCausalLM(_SharesExperts, OlmoeForCausalLM):
    """OLMoE with shared experts."""

    config_class = SharedOlmoeConfig


@dataclass(frozen=True)
class _Family:
    """A family of mixtures of experts, as transformers has it and with shared experts."""

    config: Any
    model: Any
    shared_config: Any
    shared_model: Any


MOE_FAMILIES = {
    "qwen3_moe": _Family(
        Qwen3MoeConfig, Qwen3MoeForCausalLM, SharedQwen3MoeConfig, SharedQwen3MoeForCausalLM
    ),
    "mixtral": _Family(MixtralConfig, MixtralForCausalLM, SharedMixtralConfig, SharedMixtralForCausalLM),
    "olmoe": _Family(OlmoeConfig, OlmoeForCausalLM, SharedOlmoeConfig, SharedOlmoeForCausalLM),
}


@cache
def register_shared_experts() -> None:
    """Make transformers' automatic classes know the families with shared experts."""
    for family in MOE_FAMILIES.values():
        AutoConfig.register(family.shared_config.model_type, family.shared_config)
        AutoModelForCausalLM.register(family.shared_config, family.shared_model)


def expert_blocks(model: Any) -> dict[int, Any]:
    """The mixture-of-experts blocks, with `experts` and the router `gate`, by their layer's number."""
    return {
        number: layer.mlp
        for number, layer in enumerate(model.get_decoder().layers)
        if hasattr(layer.mlp, "experts")
    }


def shared_model(model: Any, layers: Mapping[int, SharedExperts], rank: int) -> Any:
    """The model with shared experts in each of its mixture-of-experts layers; the one given is used up."""
    family = MOE_FAMILIES[model.config.model_type]
    blocks = expert_blocks(model)
    assert blocks.keys() == layers.keys()
    for number, block in blocks.items():
        block.experts = layers[number]
    stated = {"compression_config": {"method": _METHOD, "rank": rank}}
    return _moved(model, family.shared_model, _converted(model.config, family.shared_config) | stated)


def expanded_model(model: Any) -> Any:
    """The plain model that a model with shared experts stands for; the one given is used up."""
    family = MOE_FAMILIES[model.config.model_type.removesuffix(f"_{_METHOD}")]
    settings = _converted(model.config, family.config)
    del settings["compression_config"]
    with torch.device("meta"):
        plain = family.model(family.config(**settings))
    for number, block in expert_blocks(model).items():
        whole = expert_blocks(plain)[number].experts
        gate_up_E2FH, down_EHF = block.experts.expanded()
        whole.gate_up_proj = nn.Parameter(gate_up_E2FH.detach(), requires_grad=False)
        whole.down_proj = nn.Parameter(down_EHF.detach(), requires_grad=False)
        block.experts = whole
    return _moved(model, family.model, settings)


def _converted(config: Any, kind: Any) -> dict[str, Any]:
    """A configuration's settings for another class of the same family."""
    own = {"model_type", "architectures", "transformers_version"}
    settings = {key: value for key, value in config.to_dict().items() if key not in own}
    return {**settings, "model_type": kind.model_type, "attn_implementation": config._attn_implementation}  # noqa: SLF001  # transformers has no public name for it


def _moved(model: Any, kind: Any, settings: dict[str, Any]) -> Any:
    """A model of another class with the same modules."""
    config = kind.config_class(**settings)
    with torch.device("meta"):
        other = kind(config)
    for name, module in model.named_children():
        setattr(other, name, module)
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = other.config
    other.generation_config = model.generation_config
    return other.train(model.training)


def _empty_experts(whole: Any, config: Any, rank: int) -> SharedExperts:
    return SharedExperts(whole.num_experts, whole.hidden_dim, whole.intermediate_dim, rank, config.hidden_act)


def _stated_rank(config: Any) -> int:
    stated = config.compression_config
    rank = stated.get("rank") if isinstance(stated, dict) and stated.get("method") == _METHOD else None
    if not isinstance(rank, int) or rank < 1:
        raise ModelError(
            f"compression_config in config.json is {stated!r}",
            expected=f'{{"method": "{_METHOD}", "rank": a whole number above 0}}',
            mend="copy or make the model folder again",
        )
    return rank
