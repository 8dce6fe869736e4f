"""ROUGE: the words that an answer shares with a reference (Lin 2004), by rouge-score."""

import functools
import importlib
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from potstill.core.errors import DataError

__all__ = ["check_rouge", "rouge"]

_KINDS = ("rouge1", "rouge2", "rougeL")
# Scripts without spaces between words: a character counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def check_rouge() -> None:
    """Raise DataError where rouge-score is not installed."""
    if importlib.util.find_spec("rouge_score") is None:
        raise DataError(
            "ROUGE needs rouge-score, which is not installed",
            mend='install it with `pip install "potstill[rouge]"`, or leave `rouge` out',
        )


def rouge(answer: str, references: Sequence[str]) -> dict[str, float]:
    """F-measures in 0..1: shared words, shared pairs of words, longest common subsequence of words.

    Of several references each measure takes the nearest. Words are those of any script, in lower case.
    """
    found = _scorer().score_multi(list(references), answer)
    return {kind: float(found[kind].fmeasure) for kind in _KINDS}


class _Words:
    """What rouge-score asks for words: its own keeps ASCII alone."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


@functools.cache
def _scorer() -> Any:
    module = importlib.import_module("rouge_score.rouge_scorer")  # without types, and slow to import
    return module.RougeScorer(list(_KINDS), tokenizer=_Words())
