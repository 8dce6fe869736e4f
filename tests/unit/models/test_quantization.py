"""What a model in 4 bits multiplies with on a CPU, against blocks dequantised one at a time."""

import warnings

import pytest
import torch

from potstill.models import TransformersModel, load
from potstill.models.quantization import prepare_layers

bitsandbytes = pytest.importorskip("bitsandbytes")


def naive(codes, state):
    """Codes of 4 bits, the first in a byte's upper half; each 64 of them, across rows, have one scale."""
    scales = state.absmax
    if state.nested:
        outer = state.state2
        scales = outer.code[scales.long()] * outer.absmax.repeat_interleave(outer.blocksize)[: len(scales)]
        scales = scales + state.offset
    numbers = torch.stack([codes.reshape(-1) >> 4, codes.reshape(-1) & 15], dim=1).reshape(-1).long()
    each = scales.double().repeat_interleave(state.blocksize)[: len(numbers)]
    return (state.code.double()[numbers] * each).reshape(state.shape)


@pytest.fixture
def layer():
    """`layer(width, dtype, nested)`: 50 rows in NF4 as `load` makes them, and their weights in full."""

    def make(width, dtype=torch.float32, *, nested=True):
        generator = torch.Generator().manual_seed(width)
        weights = torch.randn(50, width, generator=generator)
        made = bitsandbytes.nn.Linear4bit(width, 50, bias=False, compress_statistics=nested, quant_type="nf4")
        made.weight = bitsandbytes.nn.Params4bit(
            weights.clone(), requires_grad=False, compress_statistics=nested, quant_type="nf4"
        )
        made = made.to("cpu")
        prepare_layers(made, dtype)
        return made.eval(), weights

    return make


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("width", [32, 64, 96, 130, 432, 576])
def test_rows_of_any_width_are_dequantised_as_they_were_quantised(layer, width, nested):
    made, weights = layer(width, nested=nested)
    state = made.weight.quant_state
    assert state.nested == nested
    found = bitsandbytes.functional.dequantize_4bit(made.weight.data, state)
    torch.testing.assert_close(found.double(), naive(made.weight.data, state), rtol=1e-5, atol=1e-6)
    assert (found - weights).norm() < 0.095 * weights.norm()  # what 16 levels of a normal distribution cost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 128])
def test_a_layer_multiplies_with_these_weights_forward_and_backward(layer, width, dtype):
    made, _ = layer(width, dtype)
    expected = naive(made.weight.data, made.weight.quant_state)
    given = torch.randn(7, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.2}
    with torch.no_grad():
        torch.testing.assert_close(made(given).double(), given.double() @ expected.T, **tolerance)
    given.requires_grad_()
    found = made.train()(given)
    torch.testing.assert_close(found.double(), given.double() @ expected.T, **tolerance)
    found.sum().backward()
    torch.testing.assert_close(given.grad.double(), expected.sum(0).expand_as(given), **tolerance)


def test_a_loaded_model_of_narrow_layers_has_the_weights_of_its_files(tiny_model_folder):
    settings = TransformersModel(path=str(tiny_model_folder), device="cpu", quantize="nf4")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*Overriding a previously registered kernel")
        packed = load(settings, dtype=torch.float32).model
    plain = load(settings.model_copy(update={"quantize": None}), dtype=torch.float32).model
    widths = set()
    for name, module in packed.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            expected = plain.get_submodule(name).weight
            found = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert (found - expected).norm() < 0.1 * expected.norm(), name
            widths.add(expected.shape[1])
    assert any(width % 64 for width in widths)
