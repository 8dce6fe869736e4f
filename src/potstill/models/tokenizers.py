"""Tokenizers: loading, and what two of them must share for their models' logits to be compared."""

from typing import Any

from potstill.core.errors import ModelError
from potstill.core.hashing import hash_bytes, hash_json
from potstill.models.hub import hub_commit
from potstill.models.pretrained import quiet_transformers, read_pretrained
from potstill.models.source import TransformersModel, adapter_base, existing_template, find_source

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "check_same_vocabulary",
    "load_tokenizer",
    "template_hash",
    "token_bytes",
    "tokenizer_hash",
    "vocabulary_size",
]

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)

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


def load_tokenizer(settings: TransformersModel) -> Any:
    """A model's tokenizer, with a chat template: the stated one, its own, or DEFAULT_CHAT_TEMPLATE.

    The default template begins with the BOS token where the tokenizer itself begins a text with it. An
    adapter without a tokenizer of its own has its base's. Raises ModelError where there is none.
    """
    from transformers import AutoTokenizer

    source = find_source(settings.path)
    if not source.has_tokenizer and source.kind == "adapter":
        base = adapter_base(source.folder)
        return load_tokenizer(
            base.model_copy(update={"chat_template": settings.chat_template or base.chat_template})
        )
    if not source.has_tokenizer:
        raise ModelError(
            "the model folder has no tokenizer",
            where=settings.path,
            expected="tokenizer.json beside config.json",
            mend="save it there too: AutoTokenizer.from_pretrained(original).save_pretrained(folder)",
        )
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if source.kind == "hub":
        name, options["revision"] = source.name, hub_commit(source.name, source.revision)
    else:
        name = str(source.folder)
    with quiet_transformers():
        tokenizer = read_pretrained(AutoTokenizer.from_pretrained, name, where=settings.path, **options)
    if settings.chat_template is not None:
        tokenizer.chat_template = existing_template(settings.chat_template).read_text(encoding="utf-8")
    elif tokenizer.chat_template is None:
        begins_with_bos = (
            tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        )
        tokenizer.chat_template = ("{{ bos_token }}" if begins_with_bos else "") + DEFAULT_CHAT_TEMPLATE
    return tokenizer


def vocabulary_size(tokenizer: Any, model: Any = None) -> int:
    """One past the tokenizer's highest id: how many logits mean something; models pad theirs past it.

    With a model, no more than the rows of its output head: some tokenizers know ids that a model has no row
    for.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    if model is not None:
        size = min(size, model.get_output_embeddings().out_features)
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

    Equal hashes mean that ids mean the same and text is split the same. The chat template is hashed apart.
    """
    vocabulary = hash_bytes(
        b"".join(len(token).to_bytes(4, "big") + token for token in token_bytes(tokenizer))
    )
    return hash_json({"vocabulary": vocabulary, "probes": _probe_ids(tokenizer)})


def template_hash(tokenizer: Any) -> str:
    """The hash of a tokenizer's chat template."""
    return hash_json(tokenizer.chat_template)


def check_same_vocabulary(one: Any, other: Any, *, names: tuple[str, str] = ("teacher", "student")) -> None:
    """Raise ModelError, with the first difference, unless two tokenizers agree on ids and splits."""
    if tokenizer_hash(one) == tokenizer_hash(other):
        return
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
