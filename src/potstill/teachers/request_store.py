"""Every answer that a model gave, under the key of its request, kept the moment it arrives."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from potstill.core.errors import StoreError
from potstill.core.hashing import hash_json
from potstill.teachers.protocol import Answer

__all__ = ["RequestStore", "open_request_store"]

_BUSY_TIMEOUT_S = 60.0


class RequestStore:
    """Answers of one model by request key, in one SQLite file that several processes may use at once.

    A key's first answer stays. What `put` has returned from survives the process being killed at any moment;
    a power cut may cost the last seconds. Raises StoreError where the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
            # The write-ahead log makes a commit one append, and lets others read while one writes.
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"
            )

    def __contains__(self, key: str) -> bool:
        with self._explained():
            return (
                self._database.execute("SELECT 1 FROM answers WHERE key = ?", (key,)).fetchone() is not None
            )

    def get(self, key: str) -> Answer | None:
        """The answer of a key, or None."""
        with self._explained():
            row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer(**json.loads(row[0]))

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer, unless the key has one."""
        text = json.dumps({name: value for name, value in asdict(answer).items() if value is not None})
        with self._explained():
            self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Close the file."""
        with self._explained():
            self._database.close()

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
                f"the store of answers cannot be used ({error})",
                where=str(self.path),
                expected="a folder that can be written, with room on its disk",
                mend="free some space or name another store (POTSTILL_STORE); answers so far are not lost",
            ) from error


def open_request_store(cache_folder: Path, model: Any) -> RequestStore:
    """The store of one model's answers; `model` is what they are known by (JSON-able)."""
    return RequestStore(cache_folder / "requests" / f"{hash_json(model)[:24]}.sqlite")
