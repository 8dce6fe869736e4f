"""Low-rank adapters: put on a model, and saved so that the same weights give the same files."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from potstill.core.errors import TrainingError
from potstill.core.store import MODEL_CARD_FILE
from potstill.models import decoder_start_id, find_routers
from potstill.models.pretrained import HARMLESS_PEFT_WARNINGS
from potstill.train.settings import LoraSettings

__all__ = ["add_adapter", "save_adapter"]

_NAMES_OF_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj"})


def add_adapter(model: Any, settings: LoraSettings, seed: int, token_ids: Sequence[int] = ()) -> Any:
    """The model with a new adapter: its only trained weights, in fp32 whatever the model's type.

    The rows of `token_ids` in embedding and head are part of it. Raises TrainingError for layers that cannot
    be adapted, and for such rows of a head with a bias.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(model, settings.target),
        trainable_token_indices=_trained_rows(model, token_ids) if token_ids else None,
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        task_type="CAUSAL_LM" if decoder_start_id(model.config) is None else "SEQ_2_SEQ_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", FutureWarning)  # peft still calls what transformers has renamed
        for harmless in HARMLESS_PEFT_WARNINGS:
            warnings.filterwarnings("ignore", harmless)
        try:
            adapted = get_peft_model(model, config)
        except TypeError as error:
            if not token_ids:
                raise
            raise TrainingError(
                f"lora.target {settings.target} adapts embedding or head, of which add_tokens trains rows",
                expected="one way to train a layer",
                mend="leave embedding and head out of lora.target, or leave add_tokens out: the tokens are "
                "written as text then",
            ) from error
        except ValueError as error:
            names = sorted(
                {
                    name.rpartition(".")[2]
                    for name, one in model.named_modules()
                    if isinstance(one, (torch.nn.Linear, Conv1D))
                }
            )
            raise TrainingError(
                f"lora.target {settings.target} cannot be adapted ({error})",
                expected=f"all-linear, or names among: {', '.join(names)}",
            ) from error
    if settings.dora:
        _set_magnitudes(adapted)
    return adapted


def _targets(model: Any, target: str | list[str]) -> str | list[str]:
    """The layers to adapt; all linear ones of a mixture of experts by their names.

    PEFT takes "all-linear" of a mixture for its routers and experts as well, of which it then makes whole
    matrices in every pass, and by the names of their products even those of dense layers between.
    """
    if target != "all-linear" or not find_routers(model):
        return target
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, one in model.named_modules()
        if isinstance(one, torch.nn.Linear) and one is not head
    }
    return sorted(linear - _NAMES_OF_EXPERTS)


@torch.no_grad()
def _set_magnitudes(model: Any) -> None:
    """Begin DoRA's magnitudes at the norms of the base's weights in fp32.

    PEFT takes the norms in the weights' own type: rounded to bfloat16 the student would not be its base.
    """
    from peft.utils.integrations import dequantize_module_weight

    for module in model.modules():
        for layer in getattr(module, "lora_magnitude_vector", {}).values():
            weight = dequantize_module_weight(module.get_base_layer()).float()
            layer.weight.data = layer.get_weight_norm(weight, lora_weight=weight.new_zeros(()), scaling=1.0)


def _trained_rows(model: Any, token_ids: Sequence[int]) -> dict[str, list[int]]:
    """PEFT's setting that trains rows of embedding and head: the same for both, by the layers' names."""
    if decoder_start_id(model.config) is not None:
        raise TrainingError(
            f"add_tokens: a {model.config.model_type} model has its embedding in three places, and PEFT "
            "would train rows of one",
            expected="a decoder-only model, or all weights trained",
            mend="leave lora out, or leave add_tokens out: the tokens are written as text then",
        )
    if model.get_output_embeddings().bias is not None:
        raise TrainingError(
            f"add_tokens: a {model.config.model_type} model's head has a bias, which PEFT would leave out",
            expected="a head without a bias, of which single rows can be trained",
            mend="leave lora out, so that all weights are trained, or leave add_tokens out: the tokens are "
            "written as text then",
        )
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        name.rpartition(".")[2]: list(token_ids)
        for name, module in model.named_modules()
        if any(module is layer for layer in layers)
    }


def save_adapter(model: Any, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the adapter in PEFT's format; `state` has its weights where the model has but parts of them."""
    for config in model.peft_config.values():
        # PEFT keeps a set, whose order differs from one process to the next.
        config.target_modules = sorted(config.target_modules)
    given = {} if state is None else {"state_dict": state}
    model.save_pretrained(folder, save_embedding_layers=False, **given)
    (folder / MODEL_CARD_FILE).unlink()  # PEFT writes an empty form
