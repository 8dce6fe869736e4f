"""Method `from_config`: a new model of any family that transformers knows, with random weights."""

import difflib
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from potstill.core.errors import ModelError
from potstill.models import decoder_start_id, decoder_start_token
from potstill.models.chat_templates import chat_template_text
from potstill.student import InitSettings
from potstill.student.making import Made, Original

__all__ = ["configuration", "configured_parameters", "from_config"]


def from_config(original: Original) -> Made:
    """A model of the stated configuration, in float32; the given one lends tokenizer and special tokens.

    An encoder-decoder made with the tokenizer of another kind of model reads messages without roles. Raises
    ModelError as `configuration` does.
    """
    tokenizer = original.loaded.tokenizer
    config = configuration(original.settings, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(original.context.derive_seed("weights"))
        model = _new_model(config, str(original.settings.model))
    if decoder_start_id(model.config) is not None and decoder_start_token(tokenizer) is None:
        tokenizer.chat_template = chat_template_text("source")  # the lender's is of conversations
    device = original.model.device
    return Made(model.to(device).eval(), f"a new {config.model_type} model with random weights")


def configuration(settings: InitSettings, tokenizer: Any) -> Any:
    """The stated configuration; what it leaves out is its family's default, and room for the tokenizer.

    Raises ModelError for an unknown family or field, for fields that do not go together, and for a vocabulary
    that is smaller than the tokenizer's.
    """
    stated, where = dict(settings.config), str(settings.model)
    family = str(stated.pop("model_type"))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    _check_fields(family, stated, where)
    try:
        config = AutoConfig.for_model(family, **{"vocab_size": len(tokenizer), **ids, **stated})
    except Exception as error:  # each family checks its own fields, with errors of its own
        raise _does_not_go_together(family, where, error) from error
    if config.vocab_size < len(tokenizer):
        raise ModelError(
            f"a vocabulary of {config.vocab_size:,} has no room for the tokenizer's",
            where=where,
            expected=f"at least {len(tokenizer):,}",
            mend="leave config.vocab_size out",
        )
    return config


def configured_parameters(settings: InitSettings, tokenizer: Any) -> int:
    """How many parameters a model of the stated configuration has. Raises ModelError as `configuration`."""
    with torch.device("meta"):
        return int(_new_model(configuration(settings, tokenizer), str(settings.model)).num_parameters())


def _new_model(config: Any, where: str) -> Any:
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        return kind.from_config(config, dtype=torch.float32)
    except Exception as error:  # as for the configuration
        raise _does_not_go_together(config.model_type, where, error) from error


def _does_not_go_together(family: str, where: str, error: Exception) -> ModelError:
    return ModelError(
        f"a {family} model cannot be made of this configuration ({type(error).__name__}: {error})",
        where=where,
        expected="fields of transformers' configuration of this family that go together",
    )


def _check_fields(family: str, stated: dict[str, Any], where: str) -> None:
    """Refuse what transformers would pass over: a configuration takes any field."""
    try:
        default = AutoConfig.for_model(family)
    except ValueError as error:
        raise ModelError(
            f"transformers knows no family {family!r}",
            where=where,
            expected="config.model_type as in a config.json, such as llama or qwen3_moe",
        ) from error
    # Models read a width of their heads and a first token that not every configuration declares.
    known = {*default.to_dict(), *default.attribute_map, "head_dim", "decoder_start_token_id"}
    for name in stated:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ModelError(
                f"the configuration of a {family} model has no field {name!r}",
                where=where,
                mend=f"did you mean {near[0]!r}?" if near else None,
            )
