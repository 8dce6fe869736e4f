"""BM25 over passages, by bm25s: scores are computed when the index is built, a search adds them up."""

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.data.words import words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Bm25", "build_bm25", "highest"]

K1, B = 1.5, 0.75


class _Documents:
    """Word ids of many documents behind each other, each a list only while it is looked at."""

    def __init__(self) -> None:
        self.ids, self.ends = array("i"), array("q", [0])

    def append(self, ids: Iterable[int]) -> None:
        """Add a document."""
        self.ids.extend(ids)
        self.ends.append(len(self.ids))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            yield self.ids[self.ends[number] : self.ends[number + 1]].tolist()


def build_bm25(texts: Iterable[str], folder: Path) -> int:
    """Write the index of texts into a folder, as plain arrays and JSON; returns how many words it knows.

    A text scores for a word idf * tf / (tf + k1 (1 - b + b length / mean length)) with Lucene's
    idf = ln(1 + (N - n + 0.5) / (n + 0.5)), k1 = 1.5 and b = 0.75 (Robertson and Zaragoza 2009; the variants
    are compared in Kamphuis et al. 2020).
    """
    import bm25s

    vocabulary: dict[str, int] = {}
    documents = _Documents()
    for text in texts:
        documents.append([vocabulary.setdefault(word, len(vocabulary)) for word in words(text)])
    index = bm25s.BM25(method="lucene", k1=K1, b=B, backend="numpy", csc_backend="numpy")
    index.scores = index.build_index_from_ids(range(len(vocabulary)), documents, show_progress=False)
    index.vocab_dict = vocabulary
    index.save(folder, show_progress=False)
    return len(vocabulary)


class Bm25:
    """A built index; its arrays are mapped from the files, so that a search reads what it needs."""

    def __init__(self, folder: Path) -> None:
        import bm25s

        self._index: Any = bm25s.BM25.load(folder, mmap=True, load_vocab=True, show_progress=False)
        self._index.backend = "numpy"

    def search(self, query: str, count: int) -> list[tuple[int, float]]:
        """The passages with the highest scores, and these; none that shares no word with the query.

        A word that stands twice in the query counts twice. Of equal scores the first passage comes first.
        """
        known: dict[str, int] = self._index.vocab_dict
        ids = [known[word] for word in words(query) if word in known]
        return highest(self._index.get_scores_from_ids(ids), count, above=0.0) if ids else []


def highest(
    scores_N: "NDArray[np.float32]", count: int, *, above: float | None = None
) -> list[tuple[int, float]]:
    """The numbers of the highest scores, and these, in order; of equal ones the lowest number first."""
    import numpy as np

    numbers = np.arange(len(scores_N)) if above is None else np.flatnonzero(scores_N > above)
    if len(numbers) > count:
        values = scores_N[numbers]
        least = np.partition(values, len(values) - count)[len(values) - count]
        numbers = np.concatenate([numbers[values > least], numbers[values == least]])[:count]
    order = np.lexsort((numbers, -scores_N[numbers]))
    return [(int(numbers[at]), float(scores_N[numbers[at]])) for at in order]
