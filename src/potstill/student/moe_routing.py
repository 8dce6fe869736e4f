"""What calibration traces tell of a mixture of experts: where tokens go, what experts get and what they add.

Shapes: B rows, T tokens of a row, N tokens, K experts a token, E experts, H hidden size, F inner size.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from potstill.core.errors import ModelError
from potstill.models import hidden_states, removing
from potstill.models.shared_experts import MOE_FAMILIES, expert_blocks

__all__ = ["Moments", "Routing", "measure_fisher", "measure_moments", "measure_routing", "require_experts"]


@dataclass(frozen=True)
class Routing:
    """How a layer's tokens were divided among its experts, summed over tokens in float64.

    `tokens_E` counts the tokens that an expert was given, `gates_E` sums their router weights, and
    `contributions_E` these weights times the norm of the expert's output. `total_tokens` is the layer's.
    """

    tokens_E: Tensor
    gates_E: Tensor
    contributions_E: Tensor
    total_tokens: int

    @property
    def frequency(self) -> Tensor:
        """Each expert's share of all that was routed [E]."""
        return self.tokens_E / self.tokens_E.sum()

    @property
    def mean_contribution(self) -> Tensor:
        """Router weight times norm of the output, the mean over an expert's own tokens [E]; 0 without any.

        Lasby et al. 2025 (REAP).
        """
        return self.contributions_E / self.tokens_E.clamp(min=1)


@dataclass(frozen=True)
class Moments:
    """Uncentred second moments of what an expert's layers are given, summed over the tokens routed to it.

    `hidden_EHH` is of the input of gate and up, `inner_EFF` of that of down, `tokens_E` how many tokens.
    """

    hidden_EHH: Tensor
    inner_EFF: Tensor
    tokens_E: Tensor


def require_experts(model: Any, where: str) -> None:
    """Raise ModelError for a model that is no mixture of experts of a known family."""
    kind = model.config.model_type
    if kind in MOE_FAMILIES and expert_blocks(model):
        return
    shares = kind.removesuffix("_shared_core") in MOE_FAMILIES and kind not in MOE_FAMILIES
    raise ModelError(
        "its experts share a core already"
        if shares
        else f"a {kind} model has no experts that are known here",
        where=where,
        expected=f"a mixture of experts of one of the families: {', '.join(sorted(MOE_FAMILIES))}",
        mend="start from the model whose experts are whole" if shares else None,
    )


@torch.no_grad()
def measure_routing(model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[int, Routing]:
    """Measure every mixture-of-experts layer, by its number, in one pass over some batches.

    `batches` yields token ids [B, T], padded on the right, and a mask [B, T] that is true on real tokens.
    Raises ModelError where there is no token.
    """
    blocks = expert_blocks(model)
    sums = {
        number: torch.zeros(3, block.experts.num_experts, dtype=torch.float64, device=model.device)
        for number, block in blocks.items()
    }

    def add(number: int, hidden_NH: Tensor, index_NK: Tensor, gates_NK: Tensor) -> None:
        experts, sums_3E = blocks[number].experts, sums[number]
        for expert in range(experts.num_experts):
            rows, places = (index_NK == expert).nonzero(as_tuple=True)
            inner = _inner(experts, expert, hidden_NH[rows])
            norms = functional.linear(inner, experts.down_proj[expert]).double().norm(dim=-1)
            gates = gates_NK[rows, places].double()
            sums_3E[:, expert] += torch.stack([gates.new_tensor(len(rows)), gates.sum(), gates @ norms])

    tokens = _pass(model, batches, {number: blocks[number] for number in blocks}, add)
    found = {}
    for number, sums_3E in sums.items():
        tokens_E, gates_E, contributions_E = sums_3E.cpu()
        found[number] = Routing(tokens_E, gates_E, contributions_E, tokens)
    return found


@torch.no_grad()
def measure_moments(
    model: Any, batches: Iterable[tuple[Tensor, Tensor]], layers: Collection[int]
) -> dict[int, Moments]:
    """Measure the second moments of some mixture-of-experts layers, by number, in one pass over some batches.

    They are in float32, or in the weights' type where that is wider. `batches` is as for `measure_routing`.
    """
    blocks = {number: block for number, block in expert_blocks(model).items() if number in layers}
    moments: dict[int, Moments] = {}
    for number, block in blocks.items():
        experts = block.experts
        weight = experts.down_proj
        dtype = torch.promote_types(weight.dtype, torch.float32)
        count, (hidden, inner) = experts.num_experts, weight.shape[1:]
        hidden_EHH = torch.zeros(count, hidden, hidden, dtype=dtype, device=weight.device)
        inner_EFF = torch.zeros(count, inner, inner, dtype=dtype, device=weight.device)
        moments[number] = Moments(hidden_EHH, inner_EFF, torch.zeros(count, device=weight.device))

    def add(number: int, hidden_NH: Tensor, index_NK: Tensor, gates_NK: Tensor) -> None:
        experts, found = blocks[number].experts, moments[number]
        for expert in range(experts.num_experts):
            given = hidden_NH[(index_NK == expert).any(-1)]
            inner = _inner(experts, expert, given)
            found.tokens_E[expert] += len(given)
            for rows, sums in ((given, found.hidden_EHH), (inner, found.inner_EFF)):
                wide = rows.to(sums.dtype)
                sums[expert] += wide.T @ wide

    _pass(model, batches, blocks, add)
    return moments


def measure_fisher(model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """The mean square of the gradient of each expert's weights [E], by layer: empirical Fisher information.

    The gradient is that of a batch's mean cross-entropy over its real tokens. Each tensor's is freed as soon
    as it is there. `batches` is as for `measure_routing`.
    """
    blocks = expert_blocks(model)
    squares = {
        number: torch.zeros(block.experts.num_experts, dtype=torch.float64, device=model.device)
        for number, block in blocks.items()
    }

    def listener(number: int) -> Any:
        def hook(weight_EOI: Tensor) -> None:
            assert weight_EOI.grad is not None
            squares[number] += weight_EOI.grad.double().square().sum((1, 2))
            weight_EOI.grad = None

        return hook

    before = {name: one.requires_grad for name, one in model.named_parameters()}
    model.requires_grad_(requires_grad=False)
    hooks = []
    for number, block in blocks.items():
        for weight_EOI in (block.experts.gate_up_proj, block.experts.down_proj):
            weight_EOI.requires_grad = True
            hooks.append(weight_EOI.register_post_accumulate_grad_hook(listener(number)))
    try:
        with torch.enable_grad(), removing(hooks):
            for input_ids_BT, real_BT in batches:
                labels_BT = input_ids_BT.masked_fill(~real_BT, -100)
                model(input_ids=input_ids_BT, labels=labels_BT, use_cache=False).loss.backward()
    finally:
        for name, one in model.named_parameters():
            one.requires_grad = before[name]
    sizes = {
        number: sum(one[0].numel() for one in block.experts.parameters()) for number, block in blocks.items()
    }
    return {number: (one / sizes[number]).cpu() for number, one in squares.items()}


def _inner(experts: Any, expert: int, given: Tensor) -> Tensor:
    gate, up = functional.linear(given, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    inner: Tensor = experts.act_fn(gate) * up
    return inner


def _pass(model: Any, batches: Iterable[tuple[Tensor, Tensor]], blocks: dict[int, Any], add: Any) -> int:
    """Run the trunk over some batches, `add` being given what each layer's experts are; gives the tokens."""
    tokens, real_N = 0, torch.empty(0)

    def listener(number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            add(number, *(one[real_N] for one in args))

        return hook

    with removing(
        block.experts.register_forward_pre_hook(listener(number)) for number, block in blocks.items()
    ):
        for input_ids_BT, real_BT in batches:
            real_N = real_BT.flatten()
            tokens += int(real_N.sum())
            hidden_states(model, input_ids_BT)
    if not tokens:
        raise ModelError("no tokens to measure the experts on")
    return tokens
