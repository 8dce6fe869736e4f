"""Models in 4 and 8 bits through bitsandbytes: how they are asked for, made right on a CPU, and undone."""

import functools
import importlib.util
import logging
import warnings
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from potstill.core.errors import ModelError
from potstill.models.source import TransformersModel

if TYPE_CHECKING:
    import torch

__all__ = ["check_stored", "dequantized", "nf4_configuration", "prepare_layers", "unquantized"]

_BITSANDBYTES = frozenset({"nf4", "fp4", "int8"})
_GB = 1e9


def prepare_layers(model: Any, dtype: "torch.dtype") -> None:
    """Make a loaded model's quantised layers compute rightly, in `dtype`, where bitsandbytes would not."""
    for module in model.modules():
        # On a CPU, bitsandbytes repacks a layer's weights when it first runs outside training, for a kernel
        # without a backward pass: from then on gradients through that layer are lost, in training as well.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            _dequantize_across_rows()
            module.support_avx512bf16_for_cpu = False
            # A checkpoint's own may be a type that this device emulates.
            module.compute_dtype, module.compute_type_is_set = dtype, True


@functools.cache
def _dequantize_across_rows() -> "torch.library.Library":
    """Replace bitsandbytes' dequantising on a CPU by one that is right for rows of any width.

    Blocks of weights that share a scale go on from one row into the next. The kernel for AVX-512 (0.50) lets
    them begin anew with each row, which is wrong where a row is no whole number of blocks: there the weights
    are given to it as one row. Returns what the replacement lives in.
    """
    import bitsandbytes  # noqa: F401  # registers the kernel
    import torch

    name = "bitsandbytes::dequantize_4bit"
    kernel = torch.library.get_kernel(name, "CPU")

    def dequantize(
        keys: Any,
        codes: "torch.Tensor",
        scales: "torch.Tensor",
        block: int,
        scheme: str,
        shape: Sequence[int],
        dtype: "torch.dtype",
    ) -> "torch.Tensor":
        rows = shape if shape[-1] % block == 0 else [prod(shape)]
        found: torch.Tensor = kernel.call_boxed(keys, codes, scales, block, scheme, rows, dtype)
        return found.reshape(shape)

    library = torch.library.Library("bitsandbytes", "IMPL")  # type: ignore[no-untyped-call]  # torch has no types here
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        library.impl(  # type: ignore[no-untyped-call]  # as above
            "dequantize_4bit", dequantize, "CPU", with_keyset=True, allow_override=True
        )
    return library


def unquantized(model: Any) -> str | None:
    """What a quantised mixture holds in full, in a sentence; None of any other model.

    bitsandbytes packs linear layers, and transformers keeps all experts of a layer in one tensor.
    """
    if not any(getattr(model, name, False) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit")):
        return None
    experts = [
        one for name, one in model.named_parameters() if ".experts." in name and one.is_floating_point()
    ]
    if not experts:
        return None
    count, size_gb = sum(one.numel() for one in experts), sum(one.nbytes for one in experts) / _GB
    return (
        f"its experts ({count:,} weights, {size_gb:.1f} GB) are no linear layers and stay in "
        f"{str(experts[0].dtype).removeprefix('torch.')}; only its other layers are quantised"
    )


def check_stored(settings: TransformersModel, stored: str) -> None:
    """Raise ModelError for files in a scheme that cannot be read here or is not the one asked for."""
    if stored in _BITSANDBYTES:
        _need_bitsandbytes(settings.path, f"its weights are in {stored}, which")
        # It says of every product that it takes float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if settings.quantize is not None and not settings.quantize.startswith(stored):
        raise ModelError(
            f"its weights are in {stored} already, and quantize asks for {settings.quantize}",
            where=settings.path,
            expected="full weights, as quantising twice loses twice",
            mend="leave `quantize` out, or name the model in full weights",
        )


def _need_bitsandbytes(where: str, what: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{what} needs bitsandbytes, which is not installed",
            where=where,
            mend='install it with `pip install "potstill[bnb]"`, or name a model in full weights without '
            "`quantize`",
        )


def nf4_configuration(settings: TransformersModel, dtype: "torch.dtype") -> Any:
    """What transformers quantises full weights by on loading; raises ModelError without bitsandbytes."""
    _need_bitsandbytes(settings.path, f"quantize: {settings.quantize}")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.quantize == "nf4",
        bnb_4bit_compute_dtype=dtype,
    )


def dequantized(model: Any, dtype: "torch.dtype") -> Any:
    """The model with full weights, as plain transformers saves and loads it."""
    try:
        model = model.dequantize(dtype)
    except NotImplementedError as error:
        raise ModelError(
            f"transformers cannot dequantise it ({error})",
            where=str(model.name_or_path),
            mend="name the model in full weights",
        ) from error
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False  # PEFT and transformers go by these
    vars(model).pop("hf_device_map", None)
    # Saving turns round what loading did, and the unpacking of bitsandbytes' files cannot be turned round.
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [  # noqa: SLF001  # there is no public way to say that it is plain now
        one
        for one in conversions
        if not any("bitsandbytes" in type(step).__module__ for step in getattr(one, "operations", ()))
    ]
    return model
