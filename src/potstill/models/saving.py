"""A model on the disk: a folder that plain transformers loads, and that ends a turn where training did."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from potstill.core.errors import StoreError
from potstill.models.pretrained import quiet_transformers

__all__ = ["ending_ids", "save_model", "set_generation_config", "writing"]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failed write (a full disk), for which each library has its own error, into a StoreError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StoreError(
            f"cannot be written ({error})",
            where=str(folder),
            expected="room on the disk for the weights and, in a checkpoint, the optimiser's two moments",
            mend="make room and run again: training goes on at its last whole checkpoint",
        ) from error


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    end_of_turn_ids: Sequence[int],
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's weights, configuration and tokenizer. Raises StoreError where that fails.

    `state` has the weights where the model has but parts of them.
    """
    set_generation_config(model, tokenizer, end_of_turn_ids)
    with writing(folder), quiet_transformers():
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


def ending_ids(model: Any, tokenizer: Any, end_of_turn_ids: Iterable[int]) -> set[int]:
    """The tokens that end a model's response: those that end a turn, and what it and its tokenizer state."""
    stated = model.generation_config.eos_token_id
    return {*end_of_turn_ids, tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])} - {
        None
    }


def set_generation_config(model: Any, tokenizer: Any, end_of_turn_ids: Sequence[int]) -> None:
    """Make a model's generation end at the tokens that end a turn, beside those that it states already."""
    config = copy.deepcopy(model.generation_config)
    config.eos_token_id = sorted(ending_ids(model, tokenizer, end_of_turn_ids))
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        # Models on the hub state a temperature without sampling, which cannot be saved.
        config.do_sample = True
    model.generation_config = config
