"""Adapters of each kind: they begin as their base, and are what their formula says, in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.core.errors import TrainingError
from potstill.models import TransformersModel, load
from potstill.train.lora import add_adapter, save_adapter
from potstill.train.settings import LoraSettings

IDS = torch.tensor([[5, 17, 200, 299, 40, 3]])
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "dora and rslora": {"dora": True, "rslora": True},
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> dict[str, Any]:
    return METHODS[request.param]


@torch.no_grad()
def moved(model: Any) -> Any:
    """An adapter as training leaves one: no part of it at its beginning."""
    generator = torch.Generator().manual_seed(1)
    for name, one in model.named_parameters():
        if "lora_B" in name:
            one.normal_(std=0.3, generator=generator)
        if "lora_magnitude_vector" in name:
            one.mul_(1 + 0.2 * torch.rand(one.shape, generator=generator))
    return model


def dequantised(module: Any) -> Tensor:
    """A base layer's weight as [out, in] in float64."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(module).detach().double()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def written_out(module: Any, settings: LoraSettings) -> Tensor:
    """The weight that an adapted layer multiplies with, by the papers' formulas, in float64."""
    scale = settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)
    lora_b, lora_a = (getattr(module, name)["default"].weight.double() for name in ("lora_B", "lora_A"))
    weight = dequantised(module.get_base_layer()) + scale * lora_b @ lora_a
    if settings.dora:
        lengths = weight.square().sum(1, keepdim=True).sqrt()
        weight = module.lora_magnitude_vector["default"].weight.double()[:, None] * weight / lengths
    return weight.detach()


def adapted_layers(model: Any) -> dict[str, Any]:
    return {name: one for name, one in model.named_modules() if hasattr(one, "lora_A")}


def test_an_adapter_leaves_a_mixtures_experts_and_routers_as_they_are(
    build_tiny_model: Any, moe_family: str
) -> None:
    adapted = add_adapter(build_tiny_model(moe_family), LoraSettings(rank=4, dropout=0.1), seed=3)
    assert {name.rpartition(".")[2] for name in adapted_layers(adapted)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert not adapted.peft_config["default"].target_parameters


def test_every_adapter_begins_as_its_base_in_every_family(tiny_model: Any, method: dict[str, Any]) -> None:
    with torch.no_grad():
        expected = tiny_model(IDS, use_cache=False).logits
        adapted = add_adapter(tiny_model, LoraSettings(rank=4, **method), seed=3)
        assert len(adapted_layers(adapted)) > 6
        torch.testing.assert_close(adapted(IDS, use_cache=False).logits, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapted_layer_multiplies_with_what_its_formula_says(
    build_tiny_model: Any, family: str, method: dict[str, Any]
) -> None:
    settings = LoraSettings(rank=4, alpha=6.0, **method)
    model = moved(add_adapter(build_tiny_model(family).double(), settings, seed=3).double())
    kinds = {type(one.get_base_layer()).__name__ for one in adapted_layers(model).values()}
    assert kinds == ({"Conv1D"} if family == "gpt2" else {"Linear"})
    for layer in adapted_layers(model).values():
        weight = written_out(layer, settings)
        assert (weight - dequantised(layer.get_base_layer())).abs().max() > 0.01
        given = torch.randn(3, weight.shape[1], dtype=torch.float64)
        bias = layer.get_base_layer().bias
        expected = given @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(layer(given), expected, rtol=1e-9, atol=1e-9)


def test_dora_on_weights_in_bfloat16_begins_with_their_exact_lengths(build_tiny_model: Any) -> None:
    model = add_adapter(build_tiny_model().bfloat16(), LoraSettings(rank=4, dora=True), seed=3)
    layers = adapted_layers(model)
    assert layers
    rounded = []
    for layer in layers.values():
        found = layer.lora_magnitude_vector["default"].weight
        assert found.dtype == torch.float32
        exact = layer.get_base_layer().weight.double().norm(dim=1)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
        rounded.append((exact.bfloat16().double() / exact - 1).abs().max())
    assert max(rounded) > 1e-4, "in bfloat16 they would be others"


@pytest.mark.parametrize("quantize", ["nf4", "nf4_single"])
def test_over_4_bits_an_adapter_has_the_gradients_of_one_over_the_dequantised_weights(
    build_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, method: dict[str, Any], quantize: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    build_tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    settings = LoraSettings(rank=4, **method)
    given = TransformersModel(path=str(tmp_path), device="cpu", quantize=quantize)
    packed = load(given, dtype=torch.float32).model
    plain = load(given.model_copy(update={"quantize": None}), dtype=torch.float32).model
    layers = 0
    with torch.no_grad():
        for name, module in packed.named_modules():
            if hasattr(getattr(module, "weight", None), "quant_state"):
                assert module.weight.quant_state.nested == (quantize == "nf4")
                plain.get_submodule(name).weight.copy_(dequantised(module))
                layers += 1
    assert layers == 14
    gradients = []
    for model in (packed, plain):
        adapted = moved(add_adapter(model, settings, seed=3)).train()
        logits = adapted(IDS, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        found = {name: one.grad for name, one in adapted.named_parameters() if one.requires_grad}
        gradients.append((logits.detach(), found))
    (logits, found), (expected_logits, expected) = gradients
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert len(expected) == 14 * (3 if settings.dora else 2)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item(), msg=name
        )


def test_dora_over_4_bits_under_autocast_begins_as_its_base(
    build_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    build_tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    given = TransformersModel(path=str(tmp_path), device="cpu", quantize="nf4")
    model = load(given, dtype=torch.bfloat16).model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(IDS, use_cache=False).logits
        adapted = add_adapter(model, LoraSettings(rank=4, dora=True), seed=3).train()
        assert torch.equal(adapted(IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_is_saved_by_peft_s_names_and_loaded_the_same(
    build_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, family: str, method: dict[str, Any]
) -> None:
    build_tiny_model(family).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = load(TransformersModel(path=str(tmp_path / "base"), device="cpu"), dtype=torch.float32).model
    model = moved(add_adapter(model, LoraSettings(rank=4, **method), seed=3)).eval()
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["use_dora"] is bool(method.get("dora"))
    assert config["use_rslora"] is bool(method.get("rslora"))
    assert config["fan_in_fan_out"] is (family == "gpt2")
    loaded = load(TransformersModel(path=str(tmp_path / "adapter"), device="cpu"), dtype=torch.float32).model
    with torch.no_grad():
        found, expected = (one(IDS, use_cache=False).logits for one in (loaded, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_of_a_gpt2_the_layers_that_can_be_adapted_are_named(build_tiny_model: Any) -> None:
    with pytest.raises(TrainingError, match="c_attn"):
        add_adapter(build_tiny_model("gpt2"), LoraSettings(target=["query"]), seed=3)
