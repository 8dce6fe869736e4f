"""A response's raw text: from token ids, or from a reasoning and an answer that came apart."""

from collections.abc import Sequence
from typing import Any

from potstill.data.chat import THINK_CLOSE, THINK_OPEN

__all__ = ["join_reasoning", "response_text"]

_CONTEXT_TOKENS = 4


def join_reasoning(reasoning: str | None, answer: str) -> str:
    """The raw response of which `potstill.data.chat.split_reasoning` makes the same two parts again."""
    if reasoning is None:
        return answer
    return f"{THINK_OPEN}\n{reasoning.strip()}\n{THINK_CLOSE}\n\n{answer.lstrip()}"


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
