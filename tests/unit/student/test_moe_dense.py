from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from potstill.core.errors import ModelError
from potstill.models.shared_experts import expert_blocks
from potstill.student.moe_dense import dense_model
from potstill.student.moe_routing import measure_routing

Batches = list[tuple[Tensor, Tensor]]
FAMILIES = {"qwen3_moe": "qwen3", "mixtral": "mistral"}
# The sum of a token's router weights is 1 in one of them and less in the other.
SETTINGS: dict[str, dict[str, Any]] = {"qwen3_moe": {"norm_topk_prob": False}, "mixtral": {}}


def ids() -> Tensor:
    return torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family with a dense sibling."""
    return str(request.param)


def uniform(build_tiny_model: Any, family: str, **settings: Any) -> Any:
    """A model whose tokens go to all of four experts alike: its router cannot tell them apart."""
    count = {"num_local_experts" if family == "mixtral" else "num_experts": 4}
    model = build_tiny_model(family, num_experts_per_tok=4, **count, **SETTINGS[family], **settings)
    with torch.no_grad():
        for block in expert_blocks(model).values():
            block.gate.weight.zero_()
    return model


def test_experts_that_all_take_part_alike_become_one_layer_side_by_side(
    family: str, build_tiny_model: Any, padded_batches: Batches, tmp_path: Path
) -> None:
    model = uniform(build_tiny_model, family)
    with torch.no_grad():
        expected = model(ids()).logits
    dense = dense_model(model, measure_routing(model, padded_batches), 4, "some-model")
    dense.save_pretrained(tmp_path)
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert saved.config.model_type == FAMILIES[family]
    assert saved.config.intermediate_size == 4 * 24
    with torch.no_grad():
        torch.testing.assert_close(saved(ids()).logits, expected, atol=1e-4, rtol=1e-4)


def test_experts_that_are_all_the_same_are_their_average(
    family: str, build_tiny_model: Any, padded_batches: Batches
) -> None:
    model = uniform(build_tiny_model, family)
    with torch.no_grad():
        for block in expert_blocks(model).values():
            for weight_EOI in (block.experts.gate_up_proj, block.experts.down_proj):
                weight_EOI.copy_(weight_EOI[:1].expand_as(weight_EOI).clone())
        expected = model(ids()).logits
    dense = dense_model(model, measure_routing(model, padded_batches), None, "some-model")
    assert dense.config.intermediate_size == 24
    with torch.no_grad():
        torch.testing.assert_close(dense(ids()).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_average_is_by_what_the_router_gave_each_expert(
    family: str, build_tiny_model: Any, padded_batches: Batches
) -> None:
    model = build_tiny_model(family)
    routing = measure_routing(model, padded_batches)
    dense = dense_model(model, routing, None, "some-model")
    share_E = (routing[1].gates_E / routing[1].gates_E.sum()).float()
    up_EFH = expert_blocks(model)[1].experts.gate_up_proj[:, 24:]
    torch.testing.assert_close(
        dense.model.layers[1].mlp.up_proj.weight, (share_E[:, None, None] * up_EFH).sum(0)
    )


def test_of_all_experts_those_that_add_most_are_taken(build_tiny_model: Any, padded_batches: Batches) -> None:
    model = build_tiny_model("mixtral")
    routing = measure_routing(model, padded_batches)
    dense = dense_model(model, routing, 2, "some-model")
    best = sorted(routing[0].contributions_E.topk(2).indices.tolist())
    gate_2FH = torch.cat([expert_blocks(model)[0].experts.gate_up_proj[expert][:24] for expert in best])
    torch.testing.assert_close(dense.model.layers[0].mlp.gate_proj.weight, gate_2FH)


def test_a_sliding_window_stays_in_every_layer(build_tiny_model: Any, padded_batches: Batches) -> None:
    for family, window in (
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
        ("mixtral", {"sliding_window": 8}),
    ):
        model = uniform(build_tiny_model, family, **window)
        with torch.no_grad():
            expected = model(ids()).logits
            unbounded = uniform(build_tiny_model, family)(ids()).logits
            assert not torch.allclose(expected, unbounded, atol=0.01)
            dense = dense_model(model, measure_routing(model, padded_batches), 4, "some-model")
            torch.testing.assert_close(dense(ids()).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_family_without_a_dense_sibling_is_refused(build_tiny_model: Any) -> None:
    with pytest.raises(ModelError, match="no dense family that a olmoe model"):
        dense_model(build_tiny_model("olmoe"), {}, None, "some-model")


def test_more_experts_than_there_are_are_refused(build_tiny_model: Any) -> None:
    with pytest.raises(ModelError, match="9 experts cannot be kept of 8"):
        dense_model(build_tiny_model("mixtral"), {}, 9, "some-model")


def test_dense_layers_of_another_size_between_the_others_are_refused(
    build_tiny_model: Any, padded_batches: Batches
) -> None:
    model = build_tiny_model("qwen3_moe", mlp_only_layers=[0])
    routing = measure_routing(model, padded_batches)
    with pytest.raises(ModelError, match="inner size of 48, and those made of experts would have 24"):
        dense_model(model, routing, None, "some-model")
    assert dense_model(model, routing, 2, "some-model").config.intermediate_size == 48
