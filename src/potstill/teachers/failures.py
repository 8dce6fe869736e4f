"""Rows that got no answer: each a line of a file with its reason, counted, and an end to them."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.core.errors import DataError, EngineError
from potstill.teachers.protocol import RequestError

__all__ = ["FAILURES_FILE", "Failures"]

FAILURES_FILE = "failures.jsonl"
_FAILURES_IN_A_ROW = 20
_REASONS_SHOWN = 3


class Failures:
    """The requests that failed in this attempt; `where` is the engine in errors.

    `path` gets a line for each of them, and is of the latest attempt alone.
    """

    def __init__(self, path: Path, *, where: str) -> None:
        self.path, self.where = path, where
        self.count = 0
        self._reasons: Counter[str] = Counter()
        self._mends: dict[str, str | None] = {}
        self._in_a_row = 0
        self._answered = False
        path.unlink(missing_ok=True)

    def answered(self) -> None:
        """A request got its answer."""
        self._answered, self._in_a_row = True, 0

    def add(self, row: Mapping[str, Any], error: RequestError | DataError, *, kept: str) -> None:
        """Note a row that failed.

        Raises EngineError, which says what is `kept`, where failures do not end.
        """
        self.count += 1
        status = error.status if isinstance(error, RequestError) else None
        line = {**row, "reason": error.what, "status": status}
        with self.path.open("a", encoding="utf-8", newline="\n") as failures:
            failures.write(json.dumps(line, ensure_ascii=False) + "\n")
        if error.what in self._reasons or len(self._reasons) < _REASONS_SHOWN:
            self._reasons[error.what] += 1
            self._mends.setdefault(error.what, error.mend)
        blames_row = isinstance(error, DataError) or error.blames_row
        # Rows at fault say nothing about the engine, unless there has been no other row yet.
        if not blames_row or not self._answered:
            self._in_a_row += 1
        if self._in_a_row >= _FAILURES_IN_A_ROW:
            raise EngineError(
                f"{self._in_a_row} requests in a row failed, the last with: {error.what}",
                where=self.where,
                expected=error.expected,
                mend=f"{error.mend or f'see {self.path}'}. {kept}",
            )

    def check(self, max_failed_share: float, total: int, *, kept: str) -> None:
        """Raise EngineError where more of `total` requests failed than may, or all."""
        if not self.count or (self.count <= max_failed_share * total and self.count < total):
            return
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in self._reasons.most_common())
        mends = set(self._mends.values())
        mend = f"{mends.pop()}; or " if len(mends) == 1 and None not in mends else ""
        raise EngineError(
            f"{self.count:,} of {total:,} requests failed: {reasons}",
            where=self.where,
            expected=f"at most {max_failed_share:.3g} of them (max_failed_share), and an answer at all",
            mend=f"{mend}run again to retry, or allow more with `max_failed_share`. {kept}",
        )
