"""The rows that a rule chooses from, in a table on disk: what ranks each, its scores, and who keeps it."""

# ruff: noqa: S608  # what is put into queries are our own columns and arms

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from potstill.core.database import Database
from potstill.core.hashing import derive_seed

__all__ = ["ARMS", "Arm", "Candidate", "Candidates", "Outcome"]

Arm = Literal["all", "rule", "random", "length"]
ARMS: tuple[Arm, ...] = ("all", "rule", "random", "length")

_PENDING_ROWS = 1024
_CANDIDATES = """candidates (
    row INTEGER PRIMARY KEY, id BLOB, prompt BLOB, tokens INTEGER, score REAL, divergence REAL, scores BLOB,
    random_seed INTEGER, length_seed INTEGER, bin INTEGER,
    by_all INTEGER DEFAULT 1, by_rule INTEGER DEFAULT 0,
    by_random INTEGER DEFAULT 0, by_length INTEGER DEFAULT 0
)"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scored trace: its row in the data, its response's tokens, and what it is ranked by.

    Between equal scores the divergence decides, then the id.
    """

    row: int
    id: str
    prompt_id: str
    tokens: int
    score: float
    divergence: float


class Outcome(NamedTuple):
    """What became of a row: its scores, or why it has none, and whether it is kept."""

    scores: Mapping[str, float]
    unscored: str | None
    kept: bool


class Candidates(Database):
    """A table of scored rows and of those that have no score; in memory there are never more than some rows.

    The draws of the controls come from `seed`. Whatever the file held before is gone.
    """

    def __init__(self, path: Path, seed: int) -> None:
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        unscored = "unscored (row INTEGER PRIMARY KEY, reason BLOB)"
        super().__init__(path, "scores", [_CANDIDATES, unscored, "edges (edge INTEGER)"])
        self._seed = seed
        self._names: tuple[str, ...] = ()
        self._scored: list[tuple[object, ...]] = []
        self._unscored: list[tuple[object, ...]] = []

    def add(self, candidate: Candidate, scores: Mapping[str, float]) -> None:
        """Add a row with its scores, which have the same names in all rows."""
        self._names = self._names or tuple(scores)
        assert self._names == tuple(scores)
        one = candidate
        seeds = (derive_seed(self._seed, purpose, one.id) for purpose in ("random", "length"))
        ranked = (one.row, _encoded(one.id), _encoded(one.prompt_id), one.tokens, one.score, one.divergence)
        self._scored.append((*ranked, array("d", scores.values()).tobytes(), *seeds))
        if len(self._scored) == _PENDING_ROWS:
            self.flush()

    def leave_out(self, row: int, reason: str) -> None:
        """Note why a row has no score."""
        self._unscored.append((row, _encoded(reason)))
        if len(self._unscored) == _PENDING_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what was added; called once more at the end."""
        columns = "row, id, prompt, tokens, score, divergence, scores, random_seed, length_seed"
        self.write(
            (f"INSERT INTO candidates ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", self._scored),
            ("INSERT INTO unscored VALUES (?, ?)", self._unscored),
        )
        self._scored, self._unscored = [], []

    def count(self, arm: Arm = "all") -> int:
        """How many rows an arm keeps."""
        [(count,)] = self.rows(f"SELECT count(*) FROM candidates WHERE by_{arm}")
        return int(count)

    def keep(self, arm: Arm, query: str, *values: object) -> None:
        """Let an arm keep the rows that a query finds."""
        self.write((f"UPDATE candidates SET by_{arm} = 1 WHERE row IN ({query})", [values]))

    def values(self, column: Literal["tokens", "score", "divergence"], arm: Arm = "all") -> Iterator[Any]:
        """A column of the rows that an arm keeps."""
        return (value for (value,) in self.rows(f"SELECT {column} FROM candidates WHERE by_{arm}"))

    def extremes(self, column: Literal["score", "divergence"]) -> tuple[float, float]:
        """The least and the greatest value of a column."""
        [(least, most)] = self.rows(f"SELECT min({column}), max({column}) FROM candidates")
        return least, most

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names of the scores that each row has."""
        return self._names

    def scores(self, name: str, arm: Arm = "all") -> Iterator[float]:
        """One of the scores of the rows that an arm keeps."""
        place = self._names.index(name)
        found = self.rows(f"SELECT scores FROM candidates WHERE by_{arm}")
        return (array("d", scores)[place] for (scores,) in found)

    def outcome(self, row: int, arm: Arm) -> Outcome:
        """What became of a row where an arm decides."""
        found = self.row(f"SELECT scores, by_{arm} FROM candidates WHERE row = ?", row)
        if found is not None:
            return Outcome(dict(zip(self._names, array("d", found[0]), strict=True)), None, bool(found[1]))
        reason = self.row("SELECT reason FROM unscored WHERE row = ?", row)
        return Outcome({}, None if reason is None else _decoded(reason[0]), kept=False)

    def unscored(self) -> int:
        """How many rows have no score."""
        [(count,)] = self.rows("SELECT count(*) FROM unscored")
        return int(count)

    def most_common_reasons(self, count: int) -> list[tuple[str, int]]:
        """Why rows have no score, with how many do so for it; the most frequent first."""
        query = (
            "SELECT reason, count(*) FROM unscored GROUP BY reason ORDER BY count(*) DESC, min(row) LIMIT ?"
        )
        return [(_decoded(reason), rows) for reason, rows in self.rows(query, count)]


def _encoded(text: str) -> bytes:
    # Its bytes are in the order of its letters, and text for SQLite could have no lone surrogates.
    return text.encode("utf-8", "surrogatepass")


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass")
