"""Routers are found by what they are, and what they chose is read where they ran."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from potstill.models import dead_experts, find_routers, hidden_states, listen_to_routers, load_entropy

IDS = torch.tensor([[5, 17, 200, 299, 13, 8], [260, 11, 44, 91, 12, 7]])


def test_every_layers_router_is_found(build_tiny_model: Any, moe_family: str) -> None:
    model = build_tiny_model(moe_family)
    routers = find_routers(model)
    assert list(routers) == [f"model.layers.{layer}.mlp.gate" for layer in range(2)]
    assert [router.num_experts for router in routers.values()] == [8, 8]


def test_a_layer_that_is_dense_has_none(build_tiny_model: Any) -> None:
    assert list(find_routers(build_tiny_model("qwen3_moe", mlp_only_layers=[0]))) == [
        "model.layers.1.mlp.gate"
    ]


def test_a_dense_model_has_none(build_tiny_model: Any, dense_family: str) -> None:
    assert find_routers(build_tiny_model(dense_family)) == {}


def test_a_module_that_only_looks_like_a_router_is_none(tiny_llama: Any) -> None:
    class TopK(nn.Linear):
        top_k, num_experts = 2, 6

    tiny_llama.one = TopK(32, 6)  # gives logits alone
    tiny_llama.other = TopK(32, 5)  # has no row an expert
    assert find_routers(tiny_llama) == {}


def test_what_is_heard_is_what_transformers_records(build_tiny_model: Any, moe_family: str) -> None:
    model = build_tiny_model(moe_family)
    routers = find_routers(model)
    with torch.no_grad(), listen_to_routers(routers) as given:
        hidden_states(model, IDS)
    with torch.no_grad():
        expected = model(IDS, output_router_logits=True, use_cache=False).router_logits
        hidden_states(model, IDS.flip(1))  # not heard: it came after
    assert list(given) == list(routers)
    for one, logits_NE in zip(given.values(), expected, strict=True):
        assert torch.equal(one.logits_NE, logits_NE)
        assert torch.equal(one.experts_NK, logits_NE.softmax(-1).topk(2).indices)


@pytest.mark.parametrize(
    ("counts", "entropy"),
    [
        ([5, 5, 5, 5], 1.0),
        ([20, 0, 0, 0], 0.0),
        ([0, 0], 0.0),
        ([10, 10, 0, 0], 0.5),
        ([1, 3], -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)),
    ],
)
def test_entropy_is_one_where_the_load_is_even_and_zero_where_one_expert_has_all(
    counts: list[int], entropy: float
) -> None:
    assert load_entropy(counts) == pytest.approx(entropy)


def test_an_expert_is_dead_below_a_hundredth_of_its_even_share() -> None:
    assert dead_experts([0, 1, 9, 10, 980, 1000, 1000, 1000]) == [0, 1]  # even would be 500
    assert dead_experts([1, 1]) == []
    assert dead_experts([0, 0]) == [0, 1], "nothing was chosen"
