"""How much a text repeats itself."""

from collections.abc import Sequence

from potstill.data.words import marked_words

__all__ = ["repeated_share"]

_SHORTEST_ENDING_NGRAMS = 64


def repeated_share(text: str, ngram: int) -> float:
    """The share of n-grams that occurred before: 1 - distinct / all, of the text or of an ending of it.

    n-grams run over words and marks. The greatest share counts of those of the last 64, 128, 256, ... n-grams
    and of the whole text, so that a loop at the end of a long response is seen as one that fills it: r rounds
    of a loop give 1 - 2/r at least. A text shorter than one n-gram repeats nothing (0).
    """
    return _greatest_share(marked_words(text), ngram)


def _greatest_share(items: Sequence[str], ngram: int) -> float:
    count = len(items) - ngram + 1
    seen: set[tuple[str, ...]] = set()
    greatest = 0.0
    until = _SHORTEST_ENDING_NGRAMS
    for number in range(1, count + 1):
        start = count - number
        seen.add(tuple(items[start : start + ngram]))
        if number in (until, count):
            greatest = max(greatest, 1 - len(seen) / number)
            until *= 2
    return greatest
