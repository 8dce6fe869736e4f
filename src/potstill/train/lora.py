"""Low-rank adapters: put on a model, and saved so that the same weights give the same files."""

import warnings
from pathlib import Path
from typing import Any

import torch

from potstill.core.errors import TrainingError
from potstill.core.store import MODEL_CARD_FILE
from potstill.train.settings import LoraSettings

__all__ = ["add_adapter", "save_adapter"]


def add_adapter(model: Any, settings: LoraSettings, seed: int) -> Any:
    """The model with a new adapter: its only trained weights, in fp32 whatever the model's type."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", FutureWarning)  # peft still calls what transformers has renamed
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            names = sorted(
                {
                    name.rpartition(".")[2]
                    for name, one in model.named_modules()
                    if isinstance(one, torch.nn.Linear)
                }
            )
            raise TrainingError(
                f"lora.target {settings.target} cannot be adapted ({error})",
                expected=f"all-linear, or names among: {', '.join(names)}",
            ) from error


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter in PEFT's format."""
    for config in model.peft_config.values():
        # PEFT keeps a set, whose order differs from one process to the next.
        config.target_modules = sorted(config.target_modules)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / MODEL_CARD_FILE).unlink()  # PEFT writes an empty form
