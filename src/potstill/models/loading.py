"""Loading a model for use or for training."""

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from potstill.core.errors import ModelError
from potstill.models.heads import hidden_states, output_head
from potstill.models.hub import hub_commit
from potstill.models.pretrained import quiet_transformers, read_adapter, read_weights
from potstill.models.source import TransformersModel, adapter_base, find_source, identity
from potstill.models.tokenizers import load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    import torch

__all__ = ["LoadedModel", "choose_device", "frozen_weight_bytes", "load", "supports_bf16"]


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, in evaluation mode, with its tokenizer and what it is known by."""

    model: Any
    tokenizer: Any
    identity: str

    @property
    def vocabulary_size(self) -> int:
        """The number of logits that mean something: ids that tokenizer and model both know."""
        return vocabulary_size(self.tokenizer, self.model)


def choose_device(settings: TransformersModel) -> "torch.device":
    """The stated device, else this process's GPU, else the CPU. Raises ModelError for an absent one."""
    import torch

    stated = settings.device
    if stated is None:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(stated)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"device {stated!r} cannot be used here ({reason})",
            where=settings.path,
            expected="cpu, or a device that this machine and this torch have",
            mend="leave `device` out; `potstill doctor` says what there is",
        ) from error
    return device


def supports_bf16(device: "torch.device") -> bool:
    """Whether a device multiplies in bfloat16 itself; elsewhere it is emulated, slower than float32."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return any(have for name, have in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    return device.type == "mps"


# Four bits and their doubly quantised scales (Dettmers et al. 2023, sec. 3).
_NF4_BYTES = (4 + 0.127) / 8


def frozen_weight_bytes(settings: TransformersModel) -> float:
    """Bytes of a frozen weight of a model as `load` would load it; of a quantised one, of those in 4 bits.

    Raises ModelError as `choose_device` does.
    """
    source = find_source(settings.path)
    base = adapter_base(source.folder) if source.kind == "adapter" else settings
    if settings.quantize or base.quantize:
        return _NF4_BYTES
    return float(_weight_type(settings, choose_device(settings), all_trained=False).itemsize)


def _weight_type(settings: TransformersModel, device: "torch.device", *, all_trained: bool) -> "torch.dtype":
    import torch

    if settings.dtype is not None:
        stated: torch.dtype = getattr(torch, settings.dtype)
        return stated
    return torch.bfloat16 if supports_bf16(device) and not all_trained else torch.float32


def load(
    settings: TransformersModel, *, dtype: "torch.dtype | None" = None, trainable: bool = False
) -> LoadedModel:
    """Load a model, or a base with its adapter.

    The weights' type is `dtype`, else what the settings state, else float32 for a full model to be trained
    and bfloat16, where the device has it, for frozen weights. With `trainable` an adapter's weights
    (float32), or all of a full model's, take gradients; without it none do, and never those in 4 bits.
    Raises ModelError, also for a model whose logits would come out wrong from its halves (`hidden_states`,
    `output_head`).
    """
    source = find_source(settings.path)
    tokenizer, device = load_tokenizer(settings), choose_device(settings)
    all_trained = trainable and source.kind != "adapter" and settings.quantize is None
    if dtype is None:
        dtype = _weight_type(settings, device, all_trained=all_trained)
    with quiet_transformers():
        if source.kind == "adapter":
            base = adapter_base(source.folder)
            base = base.model_copy(update={"quantize": settings.quantize or base.quantize})
            model = read_adapter(_load_full(base, dtype, device), str(source.folder), trainable=trainable)
        else:
            model = _load_full(settings, dtype, device)
    model.eval()
    if not (all_trained or (trainable and source.kind == "adapter")):
        model.requires_grad_(requires_grad=False)
    loaded = LoadedModel(model, tokenizer, identity(settings))
    _check_halves(loaded, settings.path)
    return loaded


def _load_full(settings: TransformersModel, dtype: "torch.dtype", device: "torch.device") -> Any:
    source = find_source(settings.path)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
    if source.kind == "hub":
        name, options["revision"] = source.name, hub_commit(source.name, source.revision)
    else:
        name = str(source.folder)
    if settings.quantize is None:
        return read_weights(name, where=settings.path, **options).to(device)
    options |= {"quantization_config": _nf4(settings.path, dtype), "device_map": {"": device}}
    model = read_weights(name, where=settings.path, **options)
    # On a CPU, bitsandbytes repacks a layer's weights when it first runs outside training, for a kernel
    # without a backward pass: from then on gradients through that layer are lost, in training as well.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _nf4(where: str, dtype: "torch.dtype") -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "quantize: nf4 needs bitsandbytes, which is not installed",
            where=where,
            mend='install it with `pip install "potstill[bnb]"`, or leave `quantize` out',
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _check_halves(loaded: LoadedModel, where: str) -> None:
    """Compare trunk and head with the whole model on two tokens: an unknown family may do more in between."""
    import torch

    model, size = loaded.model, loaded.vocabulary_size
    ids_BT = torch.tensor([[size // 2, size // 3]], device=model.device)
    with torch.no_grad():
        expected_BTV = model(input_ids=ids_BT, use_cache=False).logits[..., :size].float()
        found_BTV = output_head(model, size)(hidden_states(model, ids_BT)).float()
    apart, spread = (found_BTV - expected_BTV).abs().max(), expected_BTV.std()
    if not apart <= 0.05 * spread + 1e-6:
        raise ModelError(
            f"a {model.config.model_type} model does something between its hidden states and its logits that "
            f"potstill does not know (logits differ by up to {apart:.3g})",
            where=where,
            expected="logits = head(final hidden states), with at most a scale and a soft cap",
            mend="use a model of another family",
        )
