"""Model FLOPs: against what torch itself counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from potstill.data.chat import Rendered
from potstill.losses.response import cross_entropy
from potstill.models import TransformersModel, load, output_head
from potstill.models.shared_experts import register_shared_experts
from potstill.train.groups import ParameterGroups
from potstill.train.lora import add_adapter
from potstill.train.settings import LoraSettings, ParameterGroup
from potstill.train.student import make_micro_batch, supervised_hidden
from potstill.train.throughput import StepCost, parameter_size, peak_flops_per_s

ROW = Rendered(list(range(20, 60)), [0] * 10 + [1] * 30)


def counted(model: Any, row: Rendered = ROW) -> int:
    """What torch counts of a forward and backward pass whose head sees the supervised tokens alone."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    plain.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        hidden_NH, targets_N = supervised_hidden(model.train(), make_micro_batch([row]))
        cross_entropy(output_head(model, 304)(hidden_NH), targets_N).mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "opt"])
def test_they_are_those_of_the_matrix_products(build_tiny_model: Any, family: str) -> None:
    model = build_tiny_model(family)
    causal_half = StepCost(model).per_squared_length * len(ROW.ids) ** 2
    # Eager attention computes the half that the mask throws away as well.
    assert StepCost(model).flops([40], [30]) + causal_half == pytest.approx(counted(model), rel=0.02)


@pytest.mark.parametrize("adapted", [False, True], ids=["full weights", "adapter"])
def test_of_an_encoder_decoder_each_stack_costs_its_own_tokens(tiny_t5: Any, *, adapted: bool) -> None:
    model = add_adapter(tiny_t5, LoraSettings(rank=4), seed=1) if adapted else tiny_t5
    source, target = [*range(5, 44), 1], [*range(50, 79), 1]
    row = Rendered([*source, 0, *target], [0] * 41 + [1] * 30)
    cost = StepCost(model)
    causal_half = cost.per_squared_target * 30**2
    expected = pytest.approx(counted(model, row), rel=0.12 if adapted else 0.03)
    assert cost.flops([71], [30]) + causal_half == expected


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shared"])
def test_an_expert_counts_for_the_tokens_that_are_routed_to_it(
    build_tiny_model: Any, moe_family: str, *, shared: bool
) -> None:
    model = build_tiny_model(moe_family)
    if shared:
        register_shared_experts()
        settings = {**model.config.to_dict(), "compression_config": {"method": "shared_core", "rank": 4}}
        del settings["model_type"]
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(f"{moe_family}_shared_core", **settings)
        )
    else:
        model.set_experts_implementation("eager")
    causal_half = StepCost(model).per_squared_length * len(ROW.ids) ** 2
    assert StepCost(model).flops([40], [30]) + causal_half == pytest.approx(counted(model), rel=0.02)


@pytest.mark.parametrize("kind", ["frozen below", "only the top", "adapter"])
def test_gradients_that_are_not_needed_are_not_counted(build_tiny_model: Any, kind: str) -> None:
    model = build_tiny_model(tie_word_embeddings=False)
    if kind == "adapter":
        model = add_adapter(model, LoraSettings(rank=4), seed=1)
    else:
        frozen = "embed|layers.0" if kind == "frozen below" else "embed|layers.0|layers.1.self_attn"
        ParameterGroups(model, [ParameterGroup(match=frozen, lr_multiplier=0.0)], 1e-3, 0.0)
    cost = StepCost(model)
    assert cost.flops([40], [30]) + cost.per_squared_length * 1600 == pytest.approx(counted(model), rel=0.12)


def test_weights_in_four_bits_count_as_what_they_stand_for(shared_model_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = TransformersModel(path=str(shared_model_folder), device="cpu")
    packed = load(settings.model_copy(update={"quantize": "nf4"}), dtype=torch.float32).model
    plain = load(settings, dtype=torch.float32).model
    assert sum(one.numel() for one in packed.parameters()) < sum(one.numel() for one in plain.parameters())
    sizes = [sum(map(parameter_size, model.parameters())) for model in (packed, plain)]
    assert sizes[0] == sizes[1]
    costs = [StepCost(add_adapter(model, LoraSettings(rank=4), seed=1)) for model in (packed, plain)]
    assert costs[0].flops([40], [30]) == costs[1].flops([40], [30])


def test_the_peak_is_measured_once() -> None:
    device = torch.device("cpu")
    assert peak_flops_per_s(device, torch.float32) == peak_flops_per_s(device, torch.float32) > 1e8


def test_a_full_gpu_costs_the_figure_and_not_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*tensors: torch.Tensor) -> torch.Tensor:
        if len(tensors[0]) > 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensors[0]

    device = torch.device("cpu")
    peak_flops_per_s.cache_clear()
    monkeypatch.setattr(torch, "mm", no_room)
    assert 0 < peak_flops_per_s(device, torch.float32) < float("inf")
    peak_flops_per_s.cache_clear()
    monkeypatch.setattr("potstill.train.throughput._CPU_SIZES", (512,))
    assert 1e12 / peak_flops_per_s(device, torch.float32) == 0  # a share of what could not be measured
    peak_flops_per_s.cache_clear()
