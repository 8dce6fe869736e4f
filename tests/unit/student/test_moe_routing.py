from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from potstill.core.errors import ModelError
from potstill.models.shared_experts import expert_blocks
from potstill.student.moe_routing import measure_fisher, measure_moments, measure_routing, require_experts

Batches = list[tuple[Tensor, Tensor]]


def in_float64(model: Any) -> Any:
    """The model in float64, with experts that know that type."""
    model.set_experts_implementation("eager")
    return model.double()


def given_to_the_experts(model: Any, batches: Batches) -> dict[int, list[tuple[Tensor, Tensor, Tensor]]]:
    """What each layer's experts are given, row by row without any padding."""
    seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {number: [] for number in expert_blocks(model)}
    hooks = [
        block.experts.register_forward_pre_hook(lambda _, args, number=number: seen[number].append(args))
        for number, block in expert_blocks(model).items()
    ]
    with torch.no_grad():
        for ids_BT, real_BT in batches:
            for ids_T, real_T in zip(ids_BT, real_BT, strict=True):
                model(ids_T[None, : int(real_T.sum())], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_routing_is_what_the_router_says_token_by_token(
    moe_family: str, build_tiny_model: Any, padded_batches: Batches
) -> None:
    model = in_float64(build_tiny_model(moe_family))
    found = measure_routing(model, padded_batches)
    assert found.keys() == {0, 1}
    for number, passes in given_to_the_experts(model, padded_batches).items():
        experts = expert_blocks(model)[number].experts
        tokens, gates, contributions = torch.zeros(3, experts.num_experts, dtype=torch.float64)
        for hidden_NH, index_NK, weights_NK in passes:
            for hidden_H, chosen, weights in zip(hidden_NH, index_NK.tolist(), weights_NK, strict=True):
                for expert, weight in zip(chosen, weights, strict=True):
                    gate_F, up_F = (experts.gate_up_proj[expert] @ hidden_H).chunk(2)
                    output_H = experts.down_proj[expert] @ (functional.silu(gate_F) * up_F)
                    tokens[expert] += 1
                    gates[expert] += weight.item()
                    contributions[expert] += (weight * output_H.norm()).item()
        real_tokens = sum(int(real_BT.sum()) for _, real_BT in padded_batches)
        assert found[number].total_tokens == real_tokens
        torch.testing.assert_close(found[number].tokens_E, tokens)
        torch.testing.assert_close(found[number].gates_E, gates, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[number].contributions_E, contributions, atol=1e-5, rtol=1e-5)
        assert found[number].frequency.sum() == pytest.approx(1)
        assert tokens.sum() == real_tokens * model.config.num_experts_per_tok


def test_moments_are_those_of_each_experts_own_tokens(
    moe_family: str, build_tiny_model: Any, padded_batches: Batches
) -> None:
    model = in_float64(build_tiny_model(moe_family))
    found = measure_moments(model, padded_batches, layers=[1])
    assert found.keys() == {1}
    experts = expert_blocks(model)[1].experts
    passes = given_to_the_experts(model, padded_batches)[1]
    for expert in range(experts.num_experts):
        given_NH = torch.cat([hidden[(index == expert).any(-1)] for hidden, index, _ in passes])
        gate_NF, up_NF = (given_NH @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        inner_NF = functional.silu(gate_NF) * up_NF
        assert found[1].tokens_E[expert] == len(given_NH)
        torch.testing.assert_close(found[1].hidden_EHH[expert], given_NH.T @ given_NH)
        torch.testing.assert_close(found[1].inner_EFF[expert], inner_NF.T @ inner_NF)


def test_an_expert_that_nothing_is_routed_to_counts_as_nothing(
    build_tiny_model: Any, padded_batches: Batches
) -> None:
    model = build_tiny_model("mixtral", num_experts_per_tok=1)
    with torch.no_grad():
        for block in expert_blocks(model).values():
            block.gate.weight[3] = (block.gate.weight[0] + block.gate.weight[1]) / 2  # never the largest
    routing = measure_routing(model, padded_batches)[0]
    assert routing.tokens_E[3] == 0
    assert routing.mean_contribution[3] == 0
    assert routing.mean_contribution.isfinite().all()


def test_measuring_leaves_no_hook_behind(build_tiny_model: Any, padded_batches: Batches) -> None:
    model = build_tiny_model("olmoe")
    measure_routing(model, padded_batches)
    measure_moments(model, padded_batches, layers=[0])
    assert not any(block.experts._forward_pre_hooks for block in expert_blocks(model).values())


def test_padding_alone_is_an_error(build_tiny_model: Any) -> None:
    nothing = [(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool))]
    with pytest.raises(ModelError, match="no tokens"):
        measure_routing(build_tiny_model("olmoe"), nothing)


def test_a_model_without_experts_is_refused_by_its_family(build_tiny_model: Any) -> None:
    with pytest.raises(ModelError, match=r"a llama model has no experts.*\n.*mixtral, olmoe, qwen3_moe"):
        require_experts(build_tiny_model("llama"), "some-model")
    with pytest.raises(ModelError, match="a qwen3_moe model has no experts"):
        require_experts(build_tiny_model("qwen3_moe", mlp_only_layers=[0, 1]), "some-model")


def test_fisher_information_is_the_mean_square_of_plain_gradients(
    moe_family: str, build_tiny_model: Any, padded_batches: Batches
) -> None:
    model = build_tiny_model(moe_family).requires_grad_(requires_grad=False)
    found = measure_fisher(model, padded_batches)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    other = build_tiny_model(moe_family)
    expected = torch.zeros(8, dtype=torch.float64)
    for ids_BT, real_BT in padded_batches:
        other.zero_grad()
        other(input_ids=ids_BT, labels=ids_BT.masked_fill(~real_BT, -100)).loss.backward()
        experts = expert_blocks(other)[1].experts
        for expert in range(8):
            squares = [
                weight.grad[expert].double().square().flatten()
                for weight in (experts.gate_up_proj, experts.down_proj)
            ]
            expected[expert] += torch.cat(squares).mean()
    assert found.keys() == {0, 1}
    torch.testing.assert_close(found[1], expected, atol=1e-12, rtol=1e-4)
