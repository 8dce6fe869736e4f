"""Prompts that stand in an evaluation set."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import regex

from potstill.core.records import Record
from potstill.data.words import words

__all__ = ["EvaluationText"]

_PARAGRAPH_BREAK = regex.compile(r"\n\s*\n")
_FEWEST_WORDS = 8
_SHARED_WORDING_ROWS = 10


class EvaluationText:
    """The word n-grams of an evaluation set's prompts, to find the prompts that share one.

    A prompt shares text with the set when n successive words of a paragraph stand in a paragraph of the set,
    or a shorter paragraph of the set, of 8 words at least, stands in one of its own, or all of it is a prompt
    of the set, however short. What more than 10 prompts of the set have in common is wording (instructions)
    and tells nothing. Words are compared without case and punctuation, but with arithmetic signs; of plain
    text all is the prompt. n = 13 is that of Brown et al. 2020 (GPT-3), appendix C. The set's n-grams are
    kept as hashes, about 100 bytes each.
    """

    def __init__(self, records: Iterable[Record], ngram: int) -> None:
        self._ngram = ngram
        self._lengths = {ngram}
        self._rows: dict[int, str] = {}
        occurrences: Counter[int] = Counter()
        for record in records:
            text = _prompt_text(record)
            whole = hash((None, *words(text)))
            if whole in self._rows:
                continue
            self._rows[whole] = record.id
            keys: set[int] = set()
            for paragraph in _paragraphs(text):
                length = min(ngram, len(paragraph))
                if length >= min(ngram, _FEWEST_WORDS):
                    self._lengths.add(length)
                    keys.update(key for key, _ in _ngrams(paragraph, length))
            occurrences.update(keys)
            for key in keys:
                self._rows.setdefault(key, record.id)
        for key, count in occurrences.items():
            if count > _SHARED_WORDING_ROWS:
                del self._rows[key]

    def shared(self, record: Record) -> tuple[str, str] | None:
        """The id of an evaluation row whose prompt shares text with this record's, and that text."""
        text = _prompt_text(record)
        if (whole := self._rows.get(hash((None, *words(text))))) is not None:
            return whole, " ".join(text.split())
        for paragraph in _paragraphs(text):
            for length in self._lengths:
                for key, start in _ngrams(paragraph, length):
                    if (row := self._rows.get(key)) is not None:
                        return row, " ".join(paragraph[start : start + length])
        return None


def _prompt_text(record: Record) -> str:
    if not record.messages:
        return record.response or ""
    return "\n\n".join(message["content"] for message in record.messages if message["role"] == "user")


def _paragraphs(text: str) -> Iterator[list[str]]:
    return map(words, _PARAGRAPH_BREAK.split(text))


def _ngrams(paragraph: Sequence[str], length: int) -> Iterator[tuple[int, int]]:
    """A hash of every n-gram, good within this process, and where it starts."""
    for start in range(len(paragraph) - length + 1):
        yield hash(tuple(paragraph[start : start + length])), start
