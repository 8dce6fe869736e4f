"""Loading a model for use or for training."""

import copy
import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from potstill.core.errors import ModelError
from potstill.core.memory import keep_freed_memory
from potstill.models.encoder_decoder import forward_inputs
from potstill.models.heads import add_token_rows, hidden_states, output_head
from potstill.models.pretrained import quiet_transformers, read_adapter, read_pretrained, read_weights
from potstill.models.quantization import (
    check_stored,
    dequantized,
    nf4_configuration,
    prepare_layers,
    unquantized,
)
from potstill.models.source import (
    Source,
    TransformersModel,
    adapter_base,
    expert_share,
    find_source,
    identity,
    quantization_scheme,
    stored_quantization,
)
from potstill.models.tokenizers import load_tokenizer, new_token_ids, vocabulary_size

if TYPE_CHECKING:
    import torch

__all__ = [
    "LoadedModel",
    "SharedWeights",
    "choose_device",
    "frozen_weight_bytes",
    "load",
    "share_weights",
    "supports_bf16",
]


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, in evaluation mode, with its tokenizer and what it is known by.

    `quantization` is the scheme in which its files hold the weights of model or base; None in full.
    """

    model: Any
    tokenizer: Any
    identity: str
    quantization: str | None = None

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


# Bytes a weight: four bits and their doubly quantised scales (Dettmers et al. 2023, sec. 3), or plain ones.
_QUANTIZED_BYTES = {"nf4": (4 + 0.127) / 8, "nf4_single": 4.5 / 8, "fp4": 4.5 / 8, "int8": 1.0}


def frozen_weight_bytes(settings: TransformersModel) -> float:
    """Bytes of a frozen weight of a model as `load` would load it.

    Of a quantised one, the mean of those in 4 bits and of experts, which are not. Raises ModelError as
    `choose_device` does.
    """
    source = find_source(settings.path)
    base = adapter_base(source.folder) if source.kind == "adapter" else settings
    scheme = stored_quantization(base) or settings.quantize or base.quantize
    packed_bytes = None if scheme is None else _QUANTIZED_BYTES.get(scheme)
    in_full = 1.0 if packed_bytes is None else expert_share(base)
    found = (1 - in_full) * (packed_bytes or 0.0)
    if in_full:
        found += in_full * _weight_type(settings, choose_device(settings), all_trained=False).itemsize
    return found


def _weight_type(settings: TransformersModel, device: "torch.device", *, all_trained: bool) -> "torch.dtype":
    import torch

    if settings.dtype is not None:
        stated: torch.dtype = getattr(torch, settings.dtype)
        return stated
    return torch.bfloat16 if supports_bf16(device) and not all_trained else torch.float32


@dataclass(frozen=True)
class _Weights:
    """Which weights `load` reads from files: those of a model, or of an adapter's base."""

    model: TransformersModel
    stored: str | None
    dtype: "torch.dtype"
    device: "torch.device"
    full_weights: bool
    all_trained: bool

    @property
    def key(self) -> tuple[str, ...]:
        """What they are known by: the same files, read in the same way."""
        read = (self.model.quantize, self.dtype, self.device, self.full_weights)
        return identity(self.model), *map(str, read)

    def read(self) -> Any:
        """The model of these weights."""
        model = _load_full(self.model, self.stored, self.dtype, self.device)
        return dequantized(model, self.dtype) if self.full_weights and self.stored is not None else model


def _weights(
    settings: TransformersModel, dtype: "torch.dtype | None", *, trainable: bool, full_weights: bool
) -> _Weights:
    source, device = find_source(settings.path), choose_device(settings)
    is_adapter = source.kind == "adapter"
    base = adapter_base(source.folder) if is_adapter else settings
    quantize = None if full_weights else settings.quantize or base.quantize
    stored = _stored_quantization(base, find_source(base.path))
    all_trained = trainable and not is_adapter and quantize is None and (stored is None or full_weights)
    if dtype is None:
        dtype = _weight_type(settings, device, all_trained=all_trained)
    model = base.model_copy(update={"quantize": quantize})
    return _Weights(model, stored, dtype, device, full_weights, all_trained)


def share_weights(model: Any) -> Any:
    """The same model anew with its parameters and buffers: an adapter on it leaves the given model alone."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@dataclass
class SharedWeights:
    """Weights that were read, so that a base and all adapters on it have the same ones and no copies."""

    models: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def of(self, weights: _Weights) -> Any:
        """A model of these weights, which are read where they are not there."""
        if weights.key not in self.models:
            self.models[weights.key] = weights.read()
        return share_weights(self.models[weights.key])

    def keep(self, models: Iterable[TransformersModel]) -> None:
        """Let go of the weights that none of these models has, as `load` would load it."""
        wanted = {_weights(one, None, trainable=False, full_weights=False).key for one in models}
        self.models = {key: one for key, one in self.models.items() if key in wanted}


def load(
    settings: TransformersModel,
    *,
    dtype: "torch.dtype | None" = None,
    trainable: bool = False,
    say: Callable[[str], None] | None = None,
    full_weights: bool = False,
    shared: SharedWeights | None = None,
) -> LoadedModel:
    """Load a model, or a base with its adapter.

    The weights' type is `dtype`, else what the settings state, else float32 for a full model to be trained
    and bfloat16, where the device has it, for frozen weights. With `trainable` an adapter's weights
    (float32), or all of a full model's, take gradients; without it none do, and never those in 4 or 8 bits.
    With `full_weights` none are in 4 or 8 bits: `quantize` is passed over, for an adapter's base as well,
    and what the files hold quantised is dequantised. `say` hears what `load_tokenizer` tells, and of a
    quantised mixture that its experts are not. With `shared` frozen weights are read once: all models that
    are loaded with it have the same ones. Raises ModelError, also for a model whose logits would come out
    wrong from its halves (`hidden_states`, `output_head`).
    """
    source, tokenizer = find_source(settings.path), load_tokenizer(settings, say=say)
    is_adapter = source.kind == "adapter"
    with quiet_transformers():
        weights = _weights(settings, dtype, trainable=trainable, full_weights=full_weights)
        if weights.device.type == "cpu":
            keep_freed_memory()
        model = weights.read() if shared is None or weights.all_trained else shared.of(weights)
        if is_adapter:
            model = read_adapter(model, str(source.folder), trainable=trainable)
    if say is not None and (kept := unquantized(model)) is not None:
        say(f"{settings.path}: {kept}")
    model.eval()
    if not (weights.all_trained or (trainable and is_adapter)):
        model.requires_grad_(requires_grad=False)
    loaded = LoadedModel(model, tokenizer, identity(settings), weights.stored)
    _check_halves(loaded, settings.path)
    return loaded


def _stored_quantization(settings: TransformersModel, source: Source) -> str | None:
    """`stored_quantization`, for which a hub model's configuration is fetched."""
    if source.kind != "hub":
        return stored_quantization(settings)
    from transformers import PretrainedConfig

    name, options = source.pretrained()
    found, _ = read_pretrained(PretrainedConfig.get_config_dict, name, where=settings.path, **options)
    return quantization_scheme(found)


def _load_full(
    settings: TransformersModel, stored: str | None, dtype: "torch.dtype", device: "torch.device"
) -> Any:
    name, options = find_source(settings.path).pretrained()
    options |= {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
    if stored is None and settings.quantize is None:
        return _with_added_tokens(read_weights(name, where=settings.path, **options).to(device), settings)
    if stored is None:
        options |= {"quantization_config": nf4_configuration(settings, dtype), "device_map": {"": device}}
    else:
        check_stored(settings, stored)
        options["device_map"] = {"": device}
    model = read_weights(name, where=settings.path, **options)
    prepare_layers(model, dtype)
    return _with_added_tokens(model, settings)


def _with_added_tokens(model: Any, settings: TransformersModel) -> Any:
    """The model with rows for the tokens that its own vocabulary lacks."""
    if settings.add_tokens:
        new_ids, known_ids = new_token_ids(settings)
        if new_ids:
            add_token_rows(model, new_ids, known_ids)
    return model


def _check_halves(loaded: LoadedModel, where: str) -> None:
    """Compare trunk and head with the whole model on two tokens: an unknown family may do more in between."""
    import torch

    model, size = loaded.model, loaded.vocabulary_size
    ids_BT = torch.tensor([[size // 2, size // 3]], device=model.device)
    given = forward_inputs(model, ids_BT)
    row_BT = torch.cat([*given.values()], dim=1)
    with torch.no_grad():
        logits_BTV = model(**given, use_cache=False).logits[..., :size]
        found_BTV = output_head(model, size)(hidden_states(model, row_BT)[:, -2:]).float()
    expected_BTV = logits_BTV.float()
    apart, spread = (found_BTV - expected_BTV).abs().max(), expected_BTV.std()
    # A model trained from nothing has logits far from zero and close together: coarse where they are stored.
    rounding = 2 * torch.finfo(logits_BTV.dtype).eps * expected_BTV.abs().max()
    if not apart <= 0.05 * spread + rounding + 1e-6:
        raise ModelError(
            f"a {model.config.model_type} model does something between its hidden states and its logits that "
            f"potstill does not know (logits differ by up to {apart:.3g})",
            where=where,
            expected="logits = head(final hidden states), with at most a scale and a soft cap",
            mend="use a model of another family",
        )
