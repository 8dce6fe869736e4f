import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from potstill.core.errors import ModelError
from potstill.models import TransformersModel, load
from potstill.models.pretrained import read_weights
from potstill.models.shared_experts import (
    SharedExperts,
    expanded_model,
    expert_blocks,
    register_shared_experts,
    shared_model,
)

EXPERTS, HIDDEN, INNER, RANK = 6, 10, 7, 3


@pytest.fixture
def layer() -> SharedExperts:
    """A random layer of six experts, in float64."""
    made = SharedExperts(EXPERTS, HIDDEN, INNER, RANK, "silu").double()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def routed(tokens: int = 9, per_token: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, chosen experts and their weights; nothing is routed to the last expert."""
    generator = torch.Generator().manual_seed(1)
    hidden_NH = torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=generator)
    chosen = [torch.randperm(EXPERTS - 1, generator=generator)[:per_token] for _ in range(tokens)]
    weights_NK = torch.rand(tokens, per_token, dtype=torch.float64, generator=generator)
    return hidden_NH, torch.stack(chosen), weights_NK


def token_by_token(layer: SharedExperts, hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The slow and obvious layer: each token through each of its experts' whole weights."""
    gate_up_E2FH, down_EHF = layer.expanded()
    rows = []
    for hidden_H, experts, weights in zip(hidden_NH, index_NK.tolist(), weights_NK, strict=True):
        output_H = torch.zeros_like(hidden_H)
        for expert, weight in zip(experts, weights, strict=True):
            gate_F, up_F = (gate_up_E2FH[expert] @ hidden_H).chunk(2)
            output_H = output_H + weight * (down_EHF[expert] @ (torch.nn.functional.silu(gate_F) * up_F))
        rows.append(output_H)
    return torch.stack(rows)


def test_the_layer_computes_what_its_experts_whole_weights_do(layer: SharedExperts) -> None:
    given = routed()
    torch.testing.assert_close(layer(*given), token_by_token(layer, *given))


def test_gradients_of_cores_deltas_and_inputs_are_those_through_the_whole_weights(
    layer: SharedExperts,
) -> None:
    hidden_NH, index_NK, weights_NK = routed()
    leaves = (hidden_NH.requires_grad_(), weights_NK.requires_grad_(), *layer.parameters())
    pull_NH = torch.randn(hidden_NH.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad(token_by_token(layer, hidden_NH, index_NK, weights_NK), leaves, pull_NH)
    found = torch.autograd.grad(layer(hidden_NH, index_NK, weights_NK), leaves, pull_NH)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)
    unused = dict(zip((name for name, _ in layer.named_parameters()), found[2:], strict=True))
    assert not unused["delta_down_in"][EXPERTS - 1].any()  # nothing is routed there


def test_gradients_are_those_of_finite_differences(layer: SharedExperts) -> None:
    hidden_NH, index_NK, weights_NK = routed(tokens=4)
    names = [name for name, _ in layer.named_parameters()]

    def output(hidden_NH: Tensor, weights_NK: Tensor, *parameters: Tensor) -> Tensor:
        found: Tensor = functional_call(
            layer, dict(zip(names, parameters, strict=True)), (hidden_NH, index_NK, weights_NK)
        )
        return found

    given = (hidden_NH.requires_grad_(), weights_NK.requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(output, given)


def test_no_experts_whole_weights_are_made(layer: SharedExperts) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes: list[tuple[int, ...]] = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            shapes.extend(one.shape for one in [output] if isinstance(one, Tensor))
            return output

    whole = {(2 * INNER, HIDDEN), (HIDDEN, 2 * INNER), (HIDDEN, INNER), (INNER, HIDDEN)}
    core = {id(layer.shared_core_gate_up), id(layer.shared_core_down)}
    assert len(core) == 2
    with Shapes():
        layer.expanded()
    assert any(shape[1:] in whole for shape in shapes)  # what is looked for is seen
    shapes.clear()
    with Shapes():
        layer(*routed())
    assert shapes
    # A transposed view of a core is all that has the shape of an expert's weights.
    assert not any(shape[1:] in whole for shape in shapes if len(shape) == 3)
    assert sum(shape in whole for shape in shapes) <= 2


def test_autocast_and_half_precision_give_the_type_that_they_are_given(layer: SharedExperts) -> None:
    hidden_NH, index_NK, weights_NK = routed()
    expected_NH = layer(hidden_NH, index_NK, weights_NK).float()
    layer.bfloat16()
    half_NH = layer(hidden_NH.bfloat16(), index_NK, weights_NK.float())  # Mixtral's router gives float32
    assert half_NH.dtype == torch.bfloat16
    torch.testing.assert_close(half_NH.float(), expected_NH, atol=0.3, rtol=0.1)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed_NH = layer(hidden_NH.float(), index_NK, weights_NK.float())
    torch.testing.assert_close(mixed_NH.float(), expected_NH, atol=0.3, rtol=0.1)


def shared(build_tiny_model: Any, family: str) -> Any:
    """A tiny model with random shared experts of rank 3."""
    model = build_tiny_model(family)
    layers = {}
    for number, block in expert_blocks(model).items():
        experts, hidden, inner = block.experts.down_proj.shape
        made = layers[number] = SharedExperts(experts, hidden, inner, RANK, "silu")
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(number))
    return shared_model(model, layers, RANK)


def ids() -> Tensor:
    return torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def test_a_saved_model_is_read_back_as_it_was(
    moe_family: str, build_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = shared(build_tiny_model, moe_family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert stated["compression_config"] == {"method": "shared_core", "rank": RANK}
    found = load(TransformersModel(path=str(tmp_path)), dtype=torch.float32).model
    assert isinstance(expert_blocks(found)[1].experts, SharedExperts)
    assert found.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(found(ids()).logits, model(ids()).logits, rtol=0, atol=0)
        assert found.generate(ids(), max_new_tokens=2, do_sample=False).shape == (2, 14)


def test_expanded_it_is_a_plain_model_with_the_same_logits(
    moe_family: str, build_tiny_model: Any, tmp_path: Path
) -> None:
    model = shared(build_tiny_model, moe_family)
    with torch.no_grad():
        expected = model(ids(), labels=ids(), output_router_logits=True)
    plain = expanded_model(model)
    plain.save_pretrained(tmp_path)
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(found) is type(build_tiny_model(moe_family))
    assert "compression_config" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        output = found(ids(), labels=ids(), output_router_logits=True)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    assert expected.aux_loss > 0


def test_transformers_alone_refuses_the_folder(build_tiny_model: Any, tmp_path: Path) -> None:
    """Read as the plain family it would have random experts, of which transformers only warns."""
    import subprocess
    import sys

    shared(build_tiny_model, "qwen3_moe").save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "qwen3_moe_shared_core" in found.stderr


def test_a_fresh_model_has_finite_weights(moe_family: str, build_tiny_model: Any) -> None:
    register_shared_experts()
    config = shared(build_tiny_model, moe_family).config
    model = AutoModelForCausalLM.from_config(config)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "stated", [None, {"method": "shared_core"}, {"method": "pruned", "rank": 3}], ids=str
)
def test_a_configuration_without_method_or_rank_is_refused(
    stated: Any, build_tiny_model: Any, tmp_path: Path
) -> None:
    shared(build_tiny_model, "olmoe").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "compression_config": stated}))
    with pytest.raises(ModelError, match="compression_config"):
        read_weights(str(tmp_path), where=str(tmp_path))


def test_weights_of_another_rank_than_stated_are_refused(build_tiny_model: Any, tmp_path: Path) -> None:
    shared(build_tiny_model, "mixtral").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.compression_config = {"method": "shared_core", "rank": RANK + 1}
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        read_weights(str(tmp_path), where=str(tmp_path))
