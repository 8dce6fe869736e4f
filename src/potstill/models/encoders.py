"""Encoders of text: from a name to the weights that embed passages or score them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from potstill.core.errors import ModelError
from potstill.models.embedded import EMBEDDED_ENCODERS, fetch_encoder
from potstill.models.loading import choose_device
from potstill.models.pretrained import quiet_transformers, read_pretrained
from potstill.models.source import TransformersModel, find_source, identity

__all__ = ["encoder_identity", "load_encoder"]


def encoder_identity(name: str) -> str:
    """What an encoder is known by: an embedded one by its archive's hash, others as any model is."""
    if name in EMBEDDED_ENCODERS:
        return EMBEDDED_ENCODERS[name].sha256
    _check(name)
    return identity(TransformersModel(path=name))


def load_encoder(
    name: str,
    *,
    task: Literal["embedding", "scoring"],
    device: str | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[Any, Any]:
    """An encoder in fp32, in evaluation mode, and its tokenizer.

    For "scoring" it has a head that gives a pair of texts one number; of an encoder without one the head is
    random, and drawn from torch's own generator. Raises ModelError where it cannot be loaded.
    """
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    options: dict[str, Any] = {}
    if name in EMBEDDED_ENCODERS:
        place = str(fetch_encoder(name, say=say))
    else:
        _check(name)
        place, options = find_source(name).pretrained()
    options["trust_remote_code"] = False
    with quiet_transformers():
        tokenizer = read_pretrained(AutoTokenizer.from_pretrained, place, where=name, **options)
        kind: Any = AutoModel
        options |= {"dtype": torch.float32, "use_safetensors": True}
        if task == "scoring":
            kind = AutoModelForSequenceClassification
            options["num_labels"] = 1
        model = read_pretrained(kind.from_pretrained, place, where=name, **options)
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "its tokenizer has no padding token",
            where=name,
            expected="an encoder of sentences",
            mend=f"name another one, such as {next(iter(EMBEDDED_ENCODERS))}",
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(choose_device(TransformersModel(path=place, device=device))).eval(), tokenizer


def _check(name: str) -> None:
    """ModelError for a name without a slash that no embedded encoder has."""
    if "/" not in name and not Path(name).is_dir():
        raise ModelError(
            f"no embedded encoder of the name {name!r}",
            expected=f"one of: {', '.join(EMBEDDED_ENCODERS)}; a model folder; a hub id (organisation/name)",
            mend="name one of these, or write a path with a '/' (./folder)",
        )
    source = find_source(name)
    if source.kind not in ("folder", "hub"):
        raise ModelError(f"is of kind {source.kind}", where=name, expected="a model folder or a hub id")
