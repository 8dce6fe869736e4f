"""One SQLite file that several processes may use at once, and whose failures a person understands."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from potstill.core.errors import StoreError

__all__ = ["Database"]

_BUSY_TIMEOUT_S = 60.0


class Database:
    """An SQLite file with the given tables; it and its folder are made where they are not there.

    `holds` names what is in it, for errors. What a call has returned from survives the process being killed
    at any moment; a power cut may cost the last seconds. Raises StoreError where the file cannot be read or
    written.
    """

    def __init__(self, path: Path, holds: str, tables: Sequence[str]) -> None:
        self.path, self.holds = path, holds
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
            # The write-ahead log makes a commit one append, and lets others read while one writes.
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            for table in tables:
                self._connection.execute(f"CREATE TABLE IF NOT EXISTS {table}")

    def row(self, query: str, *values: object) -> tuple[Any, ...] | None:
        """The first row that a query finds."""
        with self._explained():
            found: tuple[Any, ...] | None = self._connection.execute(query, values).fetchone()
        return found

    def write(self, *statements: tuple[str, Sequence[Sequence[object]]]) -> None:
        """Carry out statements, each once for every row of its values; all of it is kept, or nothing."""
        with self._explained(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            for statement, rows in statements:
                self._connection.executemany(statement, rows)

    def close(self) -> None:
        """Close the file."""
        with self._explained():
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"the store of {self.holds} cannot be used ({error})",
                where=str(self.path),
                expected="a folder that can be written, with room on its disk",
                mend="free some space or name another store (POTSTILL_STORE); "
                f"{self.holds} so far are not lost",
            ) from error
