"""One SQLite file that several processes may use at once, and whose failures a person understands."""

import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Self

from potstill.core.errors import StoreError

__all__ = ["CheckedValues", "Database"]

_BUSY_TIMEOUT_S = 60.0
_CHECKSUM = "checksum"
Statement = tuple[str, Iterable[Sequence[object]]]


class Database:
    """An SQLite file of tables; it and its folder are made where they are not there.

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

    def rows(self, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
        """The rows that a query finds, one in memory at a time."""
        with self._explained():
            yield from self._connection.execute(query, values)

    def write(self, *statements: Statement) -> None:
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
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", None) not in (
                sqlite3.SQLITE_CORRUPT,
                sqlite3.SQLITE_NOTADB,
            ):
                raise self._unusable(error) from error
            raise StoreError(
                f"the store of {self.holds} is damaged ({error})",
                where=str(self.path),
                expected="the file as SQLite has written it",
                mend=f"`sqlite3 {self.path.name} .recover | sqlite3 new.sqlite` saves what can be read; put "
                f"that in its place, or move the file away: the {self.holds} in it are made anew then",
            ) from error
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> StoreError:
        return StoreError(
            f"the store of {self.holds} cannot be used ({error})",
            where=str(self.path),
            expected="a folder that can be written, with room on its disk",
            mend=f"free some space or name another store (POTSTILL_STORE); {self.holds} so far are not lost",
        )


class CheckedValues(Database):
    """A database of values by key, and other tables.

    What it `holds` is the name of their table: `key` and one column `value`, each declared, beside a
    checksum, which SQLite itself has none of.
    """

    def __init__(self, path: Path, holds: str, key: str, value: str, tables: Sequence[str] = ()) -> None:
        self._key, value_name = key.partition(" ")[0], value.partition(" ")[0]
        # As bytes: a damaged text need not be one.
        self._checked_values = f"SELECT {self._key}, CAST({value_name} AS BLOB), {_CHECKSUM} FROM {holds}"  # noqa: S608  # our names
        values = f"{holds} ({key} PRIMARY KEY, {value} NOT NULL, {_CHECKSUM} INTEGER)"
        super().__init__(path, holds, [values, *tables])
        with self._explained():
            self._add_checksums()

    def _add_checksums(self) -> None:
        """Give the column to a file of before there were any; what is in it stays unchecked."""
        if _CHECKSUM in self._columns():
            return
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            if _CHECKSUM not in self._columns():  # nobody has added it meanwhile
                self._connection.execute(f"ALTER TABLE {self.holds} ADD COLUMN {_CHECKSUM} INTEGER")

    def _columns(self) -> list[str]:
        return [name for _, name, *_ in self._connection.execute(f"PRAGMA table_info({self.holds})")]

    def __contains__(self, key: object) -> bool:
        return self.row(f"SELECT 1 FROM {self.holds} WHERE {self._key} = ?", key) is not None  # noqa: S608  # our names

    def value(self, key: object) -> bytes | None:
        """The value of a key, as bytes, or None.

        Raises StoreError where it is not what was kept: all such values are taken out then, and can be kept
        anew.
        """
        if (row := self.row(f"{self._checked_values} WHERE {self._key} = ?", key)) is None:
            return None
        _, value, checksum = row
        if _is_damaged(value, checksum):
            self._remove_damaged()
        return bytes(value)

    def keep(self, values: Iterable[tuple[object, str | bytes]], *statements: Statement) -> None:
        """Keep values, but for keys that have one, and carry out statements; all of it or nothing."""
        rows = [
            (key, value, zlib.crc32(value.encode() if isinstance(value, str) else value))
            for key, value in values
        ]
        self.write((f"INSERT OR IGNORE INTO {self.holds} VALUES (?, ?, ?)", rows), *statements)  # noqa: S608  # our names

    def _remove_damaged(self) -> NoReturn:
        with self._explained():
            rows = self._connection.execute(self._checked_values)
            damaged = [(key,) for key, value, checksum in rows if _is_damaged(value, checksum)]
        self.write((f"DELETE FROM {self.holds} WHERE {self._key} = ?", damaged))  # noqa: S608  # our names
        raise StoreError(
            f"{len(damaged):,} {self.holds} were damaged on the disk, and have been taken out",
            where=str(self.path),
            expected=f"{self.holds} as they were kept",
            mend="give the same command again: those alone are made anew",
        )


def _is_damaged(value: bytes | None, checksum: int | None) -> bool:
    """Whether a value is not what was kept; one of before there were checksums is taken as it is."""
    return value is None or (checksum is not None and checksum != zlib.crc32(value))
