"""The init step on mixtures of experts, and what other steps make of the student."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from potstill.core.errors import ModelError, TrainingError
from potstill.core.step import StepContext, StepResult
from potstill.models import TransformersModel, load
from potstill.models.shared_experts import SharedExperts, expert_blocks
from potstill.student import InitSettings, run
from potstill.train.lora import add_adapter
from potstill.train.settings import LoraSettings

Init = Callable[..., tuple[StepResult, StepContext]]


@pytest.fixture
def init(step_context: Any, build_tiny_model: Any, tiny_tokenizer: Any, traces: Any, tmp_path: Path) -> Init:
    """`init(family, **settings)`: the step on a tiny model of a family."""
    calibration = traces(20)

    def make(family: str, **fields: Any) -> tuple[StepResult, StepContext]:
        source = tmp_path / "moe"
        build_tiny_model(family).save_pretrained(source)
        tiny_tokenizer.save_pretrained(source)
        context = step_context(
            "init",
            folder=f"artifact-{len(list(tmp_path.iterdir()))}",
            models={"base": TransformersModel(path=str(source))},
            data={"traces": [calibration]},
        )
        usual = {"do": "init", "model": "base", "data": "traces", "device": "cpu"}
        return run(InitSettings.model_validate({**usual, **fields}), context), context

    return make


def generated(model: Any) -> tuple[int, ...]:
    found = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return tuple(found.shape)


def test_shared_experts_are_saved_measured_and_reported(moe_family: str, init: Init) -> None:
    result, context = init(moe_family, method="share_experts", keep_ratio=0.5)
    student = load(TransformersModel(path=str(context.folder))).model
    assert all(isinstance(block.experts, SharedExperts) for block in expert_blocks(student).values())
    assert result.counts["rank"] == student.config.compression_config["rank"] == 6
    assert result.counts["parameters"] == student.num_parameters() < result.metrics["parameters_before"]
    assert result.metrics["expert_parameters"] <= 0.5 * result.metrics["expert_parameters_before"]
    assert result.metrics["weight_bytes"] < result.metrics["weight_bytes_before"]
    for number, layer in enumerate(result.metrics["experts"]):
        assert layer["layer"] == number
        assert 0 < layer["error"]["gate_up"] < 1
        assert 0 < layer["error"]["down"] < 1
        assert sum(layer["frequency"]) == pytest.approx(1)
        assert layer["bytes"] == 4 * layer["parameters"]
        assert layer["bytes_before"] == 4 * layer["parameters_before"]
    for key in ("parameters", "parameters_before"):
        total = result.metrics[f"expert_{key}"]
        assert sum(layer[key] for layer in result.metrics["experts"]) == total
    assert result.metrics["quality"]["measured_on"] == "held-out"
    assert any("share a core, with deltas of rank 6" in line for line in context.reporter.said)


def test_the_core_can_weigh_experts_by_their_gradients(init: Init) -> None:
    cores = []
    for core_by in ("frequency", "fisher"):
        _, context = init("mixtral", method="share_experts", rank=4, core_by=core_by)
        student = load(TransformersModel(path=str(context.folder)), dtype=torch.float32).model
        cores.append(expert_blocks(student)[0].experts.shared_core_down)
    assert cores[0].isfinite().all()
    assert cores[1].isfinite().all()
    assert not torch.allclose(*cores, atol=1e-3)


def test_pruned_experts_leave_a_plain_model(moe_family: str, init: Init) -> None:
    from transformers import AutoModelForCausalLM

    result, context = init(moe_family, method="prune_experts", experts=3)
    student, info = AutoModelForCausalLM.from_pretrained(context.folder, output_loading_info=True)
    assert not any(info.values())
    assert student.config.model_type == moe_family
    assert student.config.num_experts == result.counts["experts"] == 3
    for layer in result.metrics["experts"]:
        worth = layer["mean_contribution"]
        dropped = [worth[expert] for expert in range(8) if expert not in layer["kept"]]
        assert min(worth[expert] for expert in layer["kept"]) >= max(dropped)
    assert generated(student) == (1, 6)


@pytest.mark.parametrize("experts", [None, 2])
@pytest.mark.parametrize(("family", "dense"), [("qwen3_moe", "qwen3"), ("mixtral", "mistral")])
def test_a_dense_student_is_a_plain_model(family: str, dense: str, experts: int | None, init: Init) -> None:
    from transformers import AutoModelForCausalLM

    result, context = init(family, method="to_dense", experts=experts)
    student, info = AutoModelForCausalLM.from_pretrained(context.folder, output_loading_info=True)
    assert not any(info.values())
    assert student.config.model_type == dense
    assert generated(student) == (1, 6)
    assert result.counts["parameters"] == student.num_parameters() < result.metrics["parameters_before"]


@pytest.mark.parametrize(
    "fields", [{"method": "share_experts", "rank": 2}, {"method": "prune_experts", "experts": 1}], ids=str
)
def test_a_model_without_experts_is_refused(fields: dict[str, Any], init: Init) -> None:
    with pytest.raises(ModelError, match="a llama model has no experts that are known here"):
        init("llama", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "prune_experts"}, "needs experts"),
        ({"method": "share_experts"}, "either rank or keep_ratio"),
        ({"method": "share_experts", "rank": 2, "keep_ratio": 0.5}, "either rank or keep_ratio"),
        ({"method": "to_dense", "rank": 2}, "rank belongs to method share_experts"),
        ({"method": "share_experts", "rank": 2, "experts": 2}, "experts belongs to method prune_experts or"),
        ({"method": "prune_experts", "experts": 2, "layers": 2}, "layers belongs to method"),
        ({"method": "share_experts", "keep_ratio": 1.5}, "less than 1"),
    ],
    ids=str,
)
def test_settings_that_say_nothing_to_the_method_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        InitSettings.model_validate({"do": "init", "model": "base", "data": "traces", **fields})


def test_an_adapter_on_what_is_no_linear_layer_is_refused_by_name(init: Init) -> None:
    _, context = init("qwen3_moe", method="share_experts", rank=4)
    model = load(TransformersModel(path=str(context.folder)), dtype=torch.float32).model
    with pytest.raises(TrainingError, match=r"\['shared_core_down'\] cannot be adapted"):
        add_adapter(model, LoraSettings(rank=2, target=["shared_core_down"]), seed=0)
    with pytest.raises(TrainingError, match=r"\['gate_up_proj'\] cannot be adapted"):
        add_adapter(model, LoraSettings(rank=2, target=["gate_up_proj"]), seed=0)
    adapted = add_adapter(model, LoraSettings(rank=2), seed=0)
    names = [name for name, one in adapted.named_parameters() if one.requires_grad]
    assert names
    assert not any("experts" in name for name in names)
