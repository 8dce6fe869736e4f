from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.core.errors import ModelError
from potstill.models.shared_experts import expert_blocks, shared_model
from potstill.student import moe_sharing
from potstill.student.moe_routing import measure_moments, measure_routing
from potstill.student.moe_sharing import low_rank_delta, rank_for, share_experts

Batches = list[tuple[Tensor, Tensor]]
OUTPUTS, INPUTS, TOKENS = 9, 6, 40


def uneven() -> tuple[Tensor, Tensor]:
    """A matrix, and inputs of very uneven directions."""
    generator = torch.Generator().manual_seed(0)
    delta_OI = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64, generator=generator)
    mixing_II = torch.randn(INPUTS, INPUTS, dtype=torch.float64, generator=generator)
    inputs_NI = torch.randn(TOKENS, INPUTS, dtype=torch.float64, generator=generator)
    return delta_OI, inputs_NI @ torch.diag(2.0 ** -torch.arange(INPUTS)).double() @ mixing_II


def in_float64(model: Any) -> Any:
    """The model in float64, with experts that know that type."""
    model.set_experts_implementation("eager")
    return model.double()


def missed(delta_OI: Tensor, inputs_NI: Tensor, product_OI: Tensor) -> float:
    return float(((delta_OI - product_OI) @ inputs_NI.T).norm())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_delta_misses_no_more_than_any_matrix_of_its_rank_must(rank: int) -> None:
    """Eckart and Young: no product of that rank comes nearer to `delta X` than its last singular values."""
    delta_OI, inputs_NI = uneven()
    out_OR, in_RI = low_rank_delta(delta_OI, inputs_NI.T @ inputs_NI, rank)
    assert out_OR.shape == (OUTPUTS, rank)
    assert in_RI.shape == (rank, INPUTS)
    least = torch.linalg.svdvals(delta_OI @ inputs_NI.T)[rank:].norm().item()
    assert missed(delta_OI, inputs_NI, out_OR @ in_RI) == pytest.approx(least, rel=1e-5)
    left, values, right = torch.linalg.svd(delta_OI, full_matrices=False)
    blind_OI = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
    assert missed(delta_OI, inputs_NI, blind_OI) > 1.05 * least  # what the activations are there for


def test_at_full_rank_nothing_is_missed() -> None:
    delta_OI, inputs_NI = uneven()
    out_OR, in_RI = low_rank_delta(delta_OI, inputs_NI.T @ inputs_NI, INPUTS)
    torch.testing.assert_close(out_OR @ in_RI, delta_OI)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_inputs_of_fewer_directions_than_there_are_can_be_factorised(tokens: int) -> None:
    delta_OI, inputs_NI = uneven()
    moment_II = inputs_NI[:tokens].T @ inputs_NI[:tokens]
    out_OR, in_RI = low_rank_delta(delta_OI.float(), moment_II.float(), 4)
    assert in_RI.isfinite().all()
    assert missed(delta_OI, inputs_NI[:tokens], (out_OR @ in_RI).double()) < 1e-2


def test_moments_that_are_not_finite_are_an_error() -> None:
    delta_OI, _ = uneven()
    with pytest.raises(ModelError, match="not finite"):
        low_rank_delta(delta_OI, torch.full((INPUTS, INPUTS), float("nan")), 2)


def shared(model: Any, batches: Batches, rank: int) -> tuple[Any, dict[int, Any]]:
    """The model with shared experts, their cores weighted by routing frequency, and the layers' errors."""
    weights = {number: found.frequency for number, found in measure_routing(model, batches).items()}
    layers, errors = {}, {}
    for number, made, error in share_experts(model, lambda: batches, rank, weights, "some-model"):
        layers[number], errors[number] = made, error
    return shared_model(model, layers, rank), errors


def test_experts_that_differ_by_little_rank_are_kept_to_the_last_digit(
    moe_family: str, build_tiny_model: Any, padded_batches: Batches
) -> None:
    """The core is a mean, so the deltas of experts that differ from expert 0 by rank 1 have rank 7."""
    model = in_float64(build_tiny_model(moe_family))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in expert_blocks(model).values():
            for weight_EOI in (block.experts.gate_up_proj, block.experts.down_proj):
                count, outputs, inputs = weight_EOI.shape
                out_EO1 = torch.randn(count, outputs, 1, dtype=torch.float64, generator=generator)
                in_I = torch.randn(1, inputs, dtype=torch.float64, generator=generator)
                weight_EOI.copy_(weight_EOI[:1] + 0.1 * out_EO1 @ in_I)
        expected = model(padded_batches[0][0]).logits
    made, errors = shared(model, padded_batches, rank=1)
    with torch.no_grad():
        found = made(padded_batches[0][0]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert all(error.gate_up < 1e-6 and error.down < 1e-6 for error in errors.values())


def test_the_core_is_the_weighted_mean_of_the_experts(build_tiny_model: Any, padded_batches: Batches) -> None:
    model = build_tiny_model("olmoe")
    whole_EOI = expert_blocks(model)[1].experts.down_proj
    weights = {number: torch.arange(8.0) for number in (0, 1)}
    layers = {
        n: made for n, made, _ in share_experts(model, lambda: padded_batches, 2, weights, "some-model")
    }
    expected_OI = (torch.arange(8.0)[:, None, None] / 28 * whole_EOI).sum(0)
    torch.testing.assert_close(layers[1].shared_core_down.detach(), expected_OI)


def test_the_error_is_what_the_layers_outputs_lose(build_tiny_model: Any, padded_batches: Batches) -> None:
    model = in_float64(build_tiny_model("mixtral"))
    moments = measure_moments(model, padded_batches, [0, 1])
    whole = {number: block.experts for number, block in expert_blocks(model).items()}
    made, errors = shared(model, padded_batches, rank=3)
    for number, block in expert_blocks(made).items():
        for name, before_EOI, after_EOI, moment_EII in (
            ("gate_up", whole[number].gate_up_proj, block.experts.expanded()[0], moments[number].hidden_EHH),
            ("down", whole[number].down_proj, block.experts.expanded()[1], moments[number].inner_EFF),
        ):
            lost = total = 0.0
            for before_OI, after_OI, moment_II in zip(before_EOI, after_EOI, moment_EII, strict=True):
                lost += torch.trace((before_OI - after_OI) @ moment_II @ (before_OI - after_OI).T).item()
                total += torch.trace(before_OI @ moment_II @ before_OI.T).item()
            assert getattr(errors[number], name) == pytest.approx((lost / total) ** 0.5, rel=1e-6)
            assert 0.05 < getattr(errors[number], name) < 1


def test_a_higher_rank_is_nearer(build_tiny_model: Any, padded_batches: Batches) -> None:
    found = []
    for rank in (1, 4, 10):
        _, errors = shared(build_tiny_model("qwen3_moe"), padded_batches, rank)
        found.append(errors[1])
    assert found[0].gate_up > found[1].gate_up > found[2].gate_up
    assert found[0].down > found[1].down > found[2].down


def test_measured_layer_by_layer_the_result_is_the_same(
    build_tiny_model: Any, padded_batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, _ = shared(build_tiny_model("olmoe"), padded_batches, 3)
    monkeypatch.setattr(moe_sharing, "_MOMENT_BYTES", 1)
    passes = []
    model = build_tiny_model("olmoe")
    weights = {number: torch.ones(8) for number in (0, 1)}
    list(share_experts(model, lambda: passes.append(1) or padded_batches, 3, weights, "some-model"))
    assert len(passes) == 2
    apart, _ = shared(build_tiny_model("olmoe"), padded_batches, 3)
    for name, parameter in together.named_parameters():
        assert torch.equal(parameter, apart.get_parameter(name)), name


def test_a_keep_ratio_is_kept_to(build_tiny_model: Any, padded_batches: Batches) -> None:
    model = build_tiny_model("qwen3_moe")
    before = sum(one.numel() for one in expert_blocks(model)[0].experts.parameters())
    rank = rank_for(model, 0.6, "some-model")
    made, _ = shared(model, padded_batches, rank)
    after = sum(one.numel() for one in expert_blocks(made)[0].experts.parameters())
    per_rank = 8 * (3 * 24 + 2 * 32)
    assert after <= 0.6 * before < after + per_rank


def test_a_keep_ratio_without_room_for_deltas_is_refused(build_tiny_model: Any) -> None:
    with pytest.raises(ModelError, match=r"keep_ratio of 0\.1 leaves 8.*\n.*at least 0\.185"):
        rank_for(build_tiny_model("mixtral"), 0.1, "some-model")
    assert rank_for(build_tiny_model("mixtral"), 0.185, "some-model") == 1


def test_no_rank_is_higher_than_that_of_an_experts_weights(build_tiny_model: Any) -> None:
    narrow = build_tiny_model("mixtral", hidden_size=96, intermediate_size=8)
    assert rank_for(narrow, 0.98, "some-model") == 8  # there would be room for rank 9


def test_a_rank_that_saves_nothing_is_refused(build_tiny_model: Any, padded_batches: Batches) -> None:
    model = build_tiny_model("mixtral")
    with pytest.raises(ModelError, match=r"rank 15: core and deltas.*\n.*at most 14"):
        list(share_experts(model, lambda: padded_batches, 15, {}, "some-model"))
