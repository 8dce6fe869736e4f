"""Reading with transformers: silent on the terminal, and an error where it would only warn."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from potstill.core.environment import quiet_bitsandbytes
from potstill.core.errors import ModelError
from potstill.core.memory import is_out_of_memory

__all__ = ["HARMLESS_PEFT_WARNINGS", "quiet_transformers", "read_adapter", "read_pretrained", "read_weights"]

# What PEFT does by itself anyway (a Conv1D's weights lie the other way round), or what merging sees to (a
# head that shares the embedding's weights).
HARMLESS_PEFT_WARNINGS = ("fan_in_fan_out is set to", "Model has `tie_word_embeddings=True` and a tied layer")
# Buffers of older files, which a model computes by itself.
_BUFFER = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|version)$")
_NAMES_SHOWN = 3


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' log lines and progress bars off the terminal; errors still raise."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_pretrained(read: Callable[..., Any], *arguments: Any, where: str, **options: Any) -> Any:
    """Call a `from_pretrained`, with whatever it meets in a damaged or foreign file as a ModelError."""
    try:
        return read(*arguments, **options)
    except Exception as error:  # readers of five formats, each with errors of its own
        if is_out_of_memory(error):
            raise  # there is nothing wrong with the model
        raise ModelError(
            f"cannot be loaded ({type(error).__name__}: {error})",
            where=where,
            expected="a whole model of an architecture that transformers knows",
            mend="copy or fetch the model again; --debug shows where the reading failed",
        ) from error


def read_weights(name: str, *, where: str, **options: Any) -> Any:
    """A causal language model or an encoder-decoder with every weight taken from its files.

    `options` go to from_pretrained. Raises ModelError where transformers would fill in or drop some.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from potstill.models.attention import register_attention
    from potstill.models.shared_experts import register_shared_experts

    quiet_bitsandbytes()
    register_shared_experts()
    register_attention()
    kind = AutoModelForCausalLM
    if "gguf_file" not in options:  # what llama.cpp runs is decoder-only
        place = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
        config = read_pretrained(AutoConfig.from_pretrained, name, where=where, **place)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, info = read_pretrained(
        kind.from_pretrained, name, where=where, output_loading_info=True, **options
    )
    dropped = {key for key in info["unexpected_keys"] if not _BUFFER.search(key)}
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    for what, names in (
        ("weights are missing from the files and would be random", set(info["missing_keys"])),
        ("weights have another shape than the configuration says", mismatched),
        ("weights in the files have no place in the model and would be dropped", dropped),
    ):
        if names:
            raise ModelError(
                f"{len(names)} {what}: {_some(names)}",
                where=where,
                expected="weights and config.json of one model",
                mend="copy or make the model folder again",
            )
    return model


def read_adapter(base: Any, folder: str, *, trainable: bool) -> Any:
    """A PEFT adapter over its loaded base. Raises ModelError for one that does not fit."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for harmless in HARMLESS_PEFT_WARNINGS:
            warnings.filterwarnings("ignore", harmless)
        model = read_pretrained(PeftModel.from_pretrained, base, folder, where=folder, is_trainable=trainable)
    for warning in caught:
        if "missing adapter keys" in str(warning.message).lower():
            raise ModelError(
                f"does not fit its base: {warning.message}",
                where=folder,
                expected="one weight for each layer that adapter_config.json names",
                mend="train the adapter again on this base",
            )
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return model


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown}, …"
