"""A response's raw text, from token ids or from parts that came apart, and where in it each token stands."""

import codecs
import re
from collections.abc import Sequence
from typing import Any

from potstill.data.reasoning import split_reasoning
from potstill.models import THINK_CLOSE, THINK_OPEN

__all__ = ["bytes_of_tokens", "join_reasoning", "response_text", "without_half_characters"]

_CONTEXT_TOKENS = 4
_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


def join_reasoning(reasoning: str | None, answer: str) -> str:
    """The raw response of which `potstill.data.reasoning.split_reasoning` makes the same two parts again."""
    if reasoning is None:
        return answer
    return f"{THINK_OPEN}\n{reasoning.strip()}\n{THINK_CLOSE}\n\n{answer.lstrip()}"


def without_half_characters(text: str) -> str:
    """A text with U+FFFD for each half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return _HALF_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", text)


def response_text(tokenizer: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """The text that the response adds to the prompt, special tokens included.

    Decoded behind the prompt's last tokens, because some tokenizers drop the white space that a text begins
    with.
    """
    context = [*prompt_ids[-_CONTEXT_TOKENS:]]
    before = _decode(tokenizer, context)
    both = _decode(tokenizer, [*context, *response_ids])
    return both.removeprefix(before) if both.startswith(before) else _decode(tokenizer, [*response_ids])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def bytes_of_tokens(tokens: Sequence[bytes], text: str) -> list[int] | None:
    """How many UTF-8 bytes of a response each of its tokens stands for; they sum to all of its bytes.

    A character that several tokens share belongs to the last of them. Text and tokens need not be quite the
    same: think tags may have been added, white space dropped, special tokens left out. What the tokens do not
    say belongs to the token that ends behind it, and a token that the text does not hold stands for nothing.
    None where the text, or its reasoning and then its answer, cannot be found in what the tokens say.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(token) for token in tokens]
    if not pieces:
        return None
    pieces[-1] += decoder.decode(b"", final=True)
    shared = _shared_parts("".join(pieces), text)
    if shared is None:
        return None
    counts, said, place = [], 0, 0
    for piece in pieces:
        said += len(piece)
        before, place = place, _place_in_text(said, shared)
        counts.append(_byte_count(text[before:place]))
    counts[-1] += _byte_count(text[place:])
    return counts


_Part = tuple[int, int, int]
"""Where a part begins in what the tokens say, where in the text, and how long it is, in characters."""


def _shared_parts(said: str, text: str) -> list[_Part] | None:
    if said == text:
        return [(0, 0, len(text))]
    for parts in ([text.strip()], [part for part in split_reasoning(text) if part]):
        found, here, there = [], 0, 0
        for part in parts:
            here, there = said.find(part, here), text.find(part, there)
            if not part or min(here, there) < 0:
                break
            found.append((here, there, len(part)))
            here, there = here + len(part), there + len(part)
        else:
            if found:
                return found
    return None


def _place_in_text(said: int, parts: list[_Part]) -> int:
    place = 0
    for here, there, length in parts:
        if said <= here:
            break
        place = there + min(said - here, length)
    return place


def _byte_count(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
