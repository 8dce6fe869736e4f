"""Tokenizers: loading, and what two of them must share for their models' logits to be compared."""

from collections.abc import Callable
from typing import Any

from potstill.core.errors import ModelError
from potstill.core.hashing import hash_bytes, hash_json
from potstill.models.chat_templates import CHAT_TEMPLATES, chat_template_text, control_tokens
from potstill.models.encoder_decoder import decoder_start_id
from potstill.models.heads import output_projection
from potstill.models.pretrained import quiet_transformers, read_pretrained
from potstill.models.source import TransformersModel, adapter_base, find_source

__all__ = [
    "THINK_CLOSE",
    "THINK_OPEN",
    "check_same_vocabulary",
    "decoder_start_token",
    "load_tokenizer",
    "new_token_ids",
    "reasoning_format",
    "set_rendering",
    "template_hash",
    "token_bytes",
    "tokenizer_hash",
    "vocabulary_size",
]

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_REASONING_KEY = "reasoning_format"
_DECODER_START_KEY = "decoder_start_token"

# Text on which tokenizers of one vocabulary may still differ: splits, merges, normalisation, white space,
# bytes.
_PROBES = (
    "Hello, world! It's 12345.67 + 89 = ?",
    "  two  spaces\n\n1. a list\n\n\t2. tabbed\r\n   ",
    "def f(x):\n    return x**2  # naïve café — “quotes” …",
    "Дистилляция знаний, 知识蒸馏, ナレッジ, المعرفة, ज्ञान",
    "🙂👩‍🔬 e\u0301 ﬁ ½ ² \u00a0\u200b\ufeff",
    "<think>I'll, DON'T, we've</think> https://example.org/a_b?c=1&d=%20",
)


def load_tokenizer(settings: TransformersModel, *, say: Callable[[str], None] | None = None) -> Any:
    """A model's tokenizer with its added tokens, a chat template and how the model writes its reasoning.

    The template is the stated one, the model's own, or "plain". One that comes along begins with the BOS
    token where the tokenizer itself begins a text with it. That of an encoder-decoder, by default "source",
    ends a prompt with the end of its source and the token that the decoder starts with. An adapter without a
    tokenizer of its own has its base's. All of this is saved with the tokenizer; `say` hears what was not the
    model's own. Raises ModelError where there is no tokenizer, and for a template that cannot be used.
    """
    source = find_source(settings.path)
    if source.kind == "adapter" and settings.add_tokens:
        raise ModelError(
            "add_tokens is given for an adapter, whose vocabulary is its base's",
            where=settings.path,
            mend="declare the base with add_tokens, and train the adapter on that",
        )
    if not source.has_tokenizer and source.kind == "adapter":
        base = adapter_base(source.folder)
        stated = {
            name: getattr(settings, name) or getattr(base, name) for name in ("chat_template", _REASONING_KEY)
        }
        return load_tokenizer(base.model_copy(update=stated), say=say)
    tokenizer = _read_tokenizer(settings)
    say = say or (lambda message: None)
    own = tokenizer.get_vocab()
    start = _set_decoder_start(tokenizer, settings)
    _set_template(tokenizer, settings, "plain" if start is None else "source", say)
    text = str(tokenizer.chat_template)
    for token in settings.add_tokens:
        # What the template writes controls the model and must not be read as text; think tags are read.
        _add_token(tokenizer, token, special=token in text and token not in (THINK_OPEN, THINK_CLOSE))
    _check_template(tokenizer, settings)
    if settings.add_tokens:
        ids = tokenizer.convert_tokens_to_ids(settings.add_tokens)
        added = [
            f"{token} ({'id' if token in own else 'new id'} {at})"
            for token, at in zip(settings.add_tokens, ids, strict=True)
        ]
        say(f"tokens with rows of their own: {', '.join(added)}")
    if settings.reasoning_format is not None:
        set_rendering(tokenizer, tokenizer.chat_template, settings.reasoning_format)
    if start is not None:
        starts = f"{{% if add_generation_prompt %}}{{{{ eos_token + {start!r} }}}}{{% endif %}}"
        tokenizer.chat_template = str(tokenizer.chat_template).removesuffix(starts) + starts
    return tokenizer


def _set_decoder_start(tokenizer: Any, settings: TransformersModel) -> str | None:
    """Note the token that the model's decoder starts with in its tokenizer; None for other models."""
    from transformers import AutoConfig, PretrainedConfig

    source = find_source(settings.path)
    if source.kind not in ("folder", "hub"):  # an adapter's own tokenizer has it already
        return decoder_start_token(tokenizer)
    name, options = source.pretrained()
    options["trust_remote_code"] = settings.trust_remote_code
    with quiet_transformers():
        found, _ = read_pretrained(PretrainedConfig.get_config_dict, name, where=settings.path, **options)
        if not found.get("is_encoder_decoder"):
            return None
        config = read_pretrained(AutoConfig.from_pretrained, name, where=settings.path, **options)
    start_id = decoder_start_id(config)
    if start_id is None:
        return None
    if isinstance(config.eos_token_id, int):  # some tokenizers have to be told
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    start = tokenizer.convert_ids_to_tokens(start_id)
    if start is None or tokenizer(start, add_special_tokens=False).input_ids != [start_id]:
        raise ModelError(
            f"its decoder starts with id {start_id}, which is no special token of its tokenizer",
            where=settings.path,
            expected="a tokenizer and a model that belong together",
            mend="set decoder_start_token_id in its config.json to the id of the padding token",
        )
    tokenizer.init_kwargs[_DECODER_START_KEY] = start
    return str(start)


def decoder_start_token(tokenizer: Any) -> str | None:
    """The token that an encoder-decoder's decoder starts with; None for the tokenizer of another model."""
    found: str | None = tokenizer.init_kwargs.get(_DECODER_START_KEY)
    return found


def _read_tokenizer(settings: TransformersModel) -> Any:
    from transformers import AutoTokenizer

    source = find_source(settings.path)
    if not source.has_tokenizer:
        raise ModelError(
            "the model folder has no tokenizer",
            where=settings.path,
            expected="tokenizer.json beside config.json",
            mend="save it there too: AutoTokenizer.from_pretrained(original).save_pretrained(folder)",
        )
    name, options = source.pretrained()
    options["trust_remote_code"] = settings.trust_remote_code
    with quiet_transformers():
        return read_pretrained(AutoTokenizer.from_pretrained, name, where=settings.path, **options)


def _set_template(
    tokenizer: Any, settings: TransformersModel, default: str, say: Callable[[str], None]
) -> None:
    if settings.chat_template is None and tokenizer.chat_template is not None:
        return
    if settings.chat_template is None:
        say(
            f"{settings.path} has no chat template: it takes the one called {default}, which is saved with "
            "what is trained (`chat_template` names another)"
        )
    name = settings.chat_template or default
    text = chat_template_text(name)
    if name in CHAT_TEMPLATES:
        begins_with_bos = (
            tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        )
        text = ("{{ bos_token }}" if begins_with_bos else "") + text
    tokenizer.chat_template = text


def _check_template(tokenizer: Any, settings: TransformersModel) -> None:
    """Refuse a stated template that writes control tokens which are none, or nothing at all."""
    from jinja2 import TemplateError

    name = settings.chat_template
    if name is None:
        return
    for token in control_tokens(name):
        if token not in tokenizer.get_vocab():
            raise ModelError(
                f"the chat template {name} writes {token}, which is no token of this model",
                where=settings.path,
                mend=f"name {' and '.join(control_tokens(name))} in add_tokens as well, or take plain, which "
                "needs none",
            )
        _add_token(tokenizer, token, special=True)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except TemplateError as error:
        raise ModelError(
            f"the chat template cannot be used ({type(error).__name__}: {error})",
            where=name,
            expected="a Jinja template over `messages`, a list of {role, content}",
        ) from error


def _add_token(tokenizer: Any, token: str, *, special: bool) -> None:
    from tokenizers import AddedToken

    if special or token not in {known.content for known in tokenizer.added_tokens_decoder.values()}:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)], special_tokens=special)


def new_token_ids(settings: TransformersModel) -> tuple[list[int], int]:
    """The ids of those `add_tokens` that the model's own vocabulary lacks, and how many ids that has."""
    # Without the chat template, whose file may be gone by the time that an adapter's base is loaded.
    tokenizer = _read_tokenizer(settings)
    known, size = tokenizer.get_vocab(), vocabulary_size(tokenizer)
    for token in settings.add_tokens:
        _add_token(tokenizer, token, special=False)
    new = [token for token in settings.add_tokens if token not in known]
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in new], size


def reasoning_format(tokenizer: Any) -> str | list[str] | None:
    """How the model writes its reasoning, as `TransformersModel.reasoning_format` states it."""
    found: str | list[str] | None = tokenizer.init_kwargs.get(_REASONING_KEY)
    return found


def set_rendering(tokenizer: Any, chat_template: Any, reasoning: str | list[str] | None) -> None:
    """Set chat template and reasoning format, which are saved and loaded with the tokenizer."""
    tokenizer.chat_template = chat_template
    tokenizer.init_kwargs.pop(_REASONING_KEY, None)
    if reasoning is not None:
        tokenizer.init_kwargs[_REASONING_KEY] = reasoning


def vocabulary_size(tokenizer: Any, model: Any = None) -> int:
    """One past the tokenizer's highest id: how many logits mean something; models pad theirs past it.

    With a model, no more than the rows of its output head: some tokenizers know ids that a model has no row
    for.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    if model is not None:
        size = min(size, output_projection(model).out_features)
    return int(size)


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each id stands for, in order of ids; empty for an id that is not in use."""
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    of_character = _bytes_of_characters() if byte_level else {}
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    tokens = dict.fromkeys(range(vocabulary_size(tokenizer)), b"")
    for token, index in tokenizer.get_vocab().items():
        if index in added:
            tokens[index] = added[index].encode("utf-8", "surrogatepass")
        elif byte_level and all(character in of_character for character in token):
            tokens[index] = bytes(of_character[character] for character in token)
        elif (
            not byte_level and len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")
        ):
            tokens[index] = bytes([int(token[3:5], 16)])
        else:
            tokens[index] = (token if byte_level else token.replace("▁", " ")).encode(
                "utf-8", "surrogatepass"
            )
    return [tokens[index] for index in range(len(tokens))]


def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def _probe_ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(probe, add_special_tokens=False).input_ids for probe in _PROBES]


def tokenizer_hash(tokenizer: Any) -> str:
    """What a tokenizer is known by: the bytes behind every id, and the ids of probe texts.

    Equal hashes mean that ids mean the same and text is split the same, into a row of one kind: that of an
    encoder-decoder has two parts. The chat template is hashed apart.
    """
    vocabulary = hash_bytes(
        b"".join(len(token).to_bytes(4, "big") + token for token in token_bytes(tokenizer))
    )
    parts = {"vocabulary": vocabulary, "probes": _probe_ids(tokenizer)}
    if (start := decoder_start_token(tokenizer)) is not None:
        parts["decoder_start"] = start
    return hash_json(parts)


def template_hash(tokenizer: Any) -> str:
    """The hash of a tokenizer's chat template, and of its reasoning format where it has one."""
    reasoning = reasoning_format(tokenizer)
    template = tokenizer.chat_template
    return hash_json(template if reasoning is None else [template, reasoning])


def check_same_vocabulary(one: Any, other: Any, *, names: tuple[str, str] = ("teacher", "student")) -> None:
    """Raise ModelError, with the first difference, unless two tokenizers agree on ids and splits."""
    if tokenizer_hash(one) == tokenizer_hash(other):
        return
    if decoder_start_token(one) != decoder_start_token(other):
        kinds = ("encoder-decoder" if decoder_start_token(each) else "decoder-only" for each in (one, other))
        raise ModelError(
            f"the {names[0]} is {next(kinds)}, the {names[1]} {next(kinds)}",
            expected="models of one kind, because the loss compares their logits token by token",
            mend="distil through responses alone (no cached logits)",
        )
    ours, theirs = token_bytes(one), token_bytes(other)
    differing = [index for index, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]]
    if differing:
        at = differing[0]
        difference = f"id {at} is {ours[at]!r} for the {names[0]} and {theirs[at]!r} for the {names[1]}"
    elif len(ours) != len(theirs):
        difference = f"the {names[0]} has {len(ours)} ids, the {names[1]} {len(theirs)}"
    else:
        pairs = zip(_PROBES, _probe_ids(one), _probe_ids(other), strict=True)
        probe = next(text for text, mine, yours in pairs if mine != yours)
        difference = f"they split the text {probe!r} differently"
    raise ModelError(
        f"the vocabularies of {names[0]} and {names[1]} do not match: {difference}",
        expected="one tokenizer for both, because the loss compares their logits id by id",
        mend="choose models of one family, or distil through responses alone (no cached logits)",
    )
