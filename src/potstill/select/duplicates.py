"""Rows that repeat an earlier one, word for word or nearly."""

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from potstill.core.hashing import hash_json
from potstill.core.keys import KeyNumbers
from potstill.core.records import Record
from potstill.core.spool import Spool
from potstill.data.words import words

if TYPE_CHECKING:
    from rensa import RMinHash

__all__ = ["ExactDuplicates", "NearDuplicates"]

_SHINGLE_WORDS = 5
_PERMUTATIONS = 120
_ROWS_OF_A_BAND = (10, 8, 6, 5, 4, 3, 2, 1)
_LEAST_RECALL = 0.99
_MOST_CANDIDATES = 1000


class ExactDuplicates:
    """Finds rows with the prompt and response of an earlier one, white space apart.

    Ids lie on disk; in memory a kept row costs up to 36 bytes.
    """

    def __init__(self) -> None:
        self._contents, self._ids, self._ends = KeyNumbers(), Spool(), array("q", [0])

    def earlier(self, record: Record) -> str | None:
        """The id of the earlier row that this one repeats; without one it is remembered."""
        spoken = [[message["role"], _collapsed(message["content"])] for message in record.messages]
        content = hash_json([spoken, _collapsed(record.response or "")]).encode("ascii")
        if (first := self._contents.number(content)) is not None:
            start, end = self._ends[first : first + 2]
            return self._ids.read(start, end - start).decode("utf-8", "surrogatepass")
        self._contents.add(content)
        self._ids.append(record.id.encode("utf-8", "surrogatepass"))
        self._ends.append(self._ids.size)
        return None


@dataclass(frozen=True, slots=True)
class _Kept:
    id: str
    row: "RMinHash"
    response: "RMinHash"


class NearDuplicates:
    """Finds rows that nearly repeat an earlier one, in prompt and response together and in the response.

    Nearness is the Jaccard similarity of the sets of five successive words (a shorter text is one such),
    estimated by MinHash over 120 permutations: to 0.04 (one standard deviation) at 0.8. Both must reach the
    threshold, so that neither a short answer to many questions nor a long prompt with many answers is
    repetition. A row is compared with those kept before it, so that the first of a group stays, whatever
    comes later. Locality-sensitive hashing finds 99 of 100 pairs that are at the threshold; where more than
    1,000 rows come into question, as under a long template, that many are compared. Hashes are kept, not
    texts: about 3.3 KB a kept row. Source: Leskovec, Rajaraman and Ullman 2020, chapter 3.
    """

    def __init__(self, threshold: float, seed: int) -> None:
        import rensa

        self._threshold, self._seed = threshold, seed
        self._new_hash = rensa.RMinHash
        self._index = rensa.RMinHashLSH(threshold, _PERMUTATIONS, _bands(threshold))
        self._kept: list[_Kept] = []

    def earlier(self, record: Record) -> tuple[str, float] | None:
        """The id of the nearest earlier row and its Jaccard similarity; without one the row is remembered."""
        asked = "\n".join(one["content"] for one in record.messages if one["role"] != "system")
        shingles = _shingles(record.response or "")
        response = self._minhash(shingles)
        row = self._minhash([*(f"? {shingle}" for shingle in _shingles(asked)), *shingles])
        best: tuple[float, str] | None = None
        for number in self._index.query(row)[:_MOST_CANDIDATES]:
            kept = self._kept[number]
            near = kept.row.jaccard(row)
            if near < self._threshold or (best is not None and near <= best[0]):
                continue
            if kept.response.jaccard(response) >= self._threshold:
                best = near, kept.id
        if best is not None:
            return best[1], best[0]
        self._index.insert(len(self._kept), row)
        self._kept.append(_Kept(record.id, row, response))
        return None

    def _minhash(self, shingles: list[str]) -> "RMinHash":
        made = self._new_hash(_PERMUTATIONS, self._seed)
        made.update(shingles)
        return made


def _shingles(text: str) -> list[str]:
    found = words(text)
    count = max(1, len(found) - _SHINGLE_WORDS + 1)
    return [" ".join(found[start : start + _SHINGLE_WORDS]) for start in range(count)]


def _bands(threshold: float) -> int:
    """The fewest bands that let a pair at the threshold be found 99 times of 100."""
    for rows in _ROWS_OF_A_BAND:
        bands = _PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= _LEAST_RECALL:
            return bands
    return _PERMUTATIONS


def _collapsed(text: str) -> str:
    return " ".join(text.split())
