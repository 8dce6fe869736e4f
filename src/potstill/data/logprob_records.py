"""Log-probabilities that lie apart from the responses: found by id, in constant memory."""

import sqlite3
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.files import PlacedRow
from potstill.data.responses import bytes_of_tokens
from potstill.data.shapes import BadRow
from potstill.data.source_settings import LogprobRecords
from potstill.models import TransformersModel, load_tokenizer, token_bytes, tokenizer_hash

__all__ = ["LogprobIndex"]

_COLUMNS = ("sample_uuid", "token_ids", "logprobs")


class LogprobIndex:
    """Log-probability records by id, in a database file that goes with this object.

    Raises DataError where the records lack a column, or one has not as many log-probabilities as ids.
    """

    def __init__(self, settings: LogprobRecords, rows: Iterable[PlacedRow]) -> None:
        self._settings = settings
        self._tokenizer = load_tokenizer(TransformersModel(path=settings.tokenizer))
        self._hash, self._bytes = tokenizer_hash(self._tokenizer), token_bytes(self._tokenizer)
        self._found = sqlite3.connect("", check_same_thread=False)  # a private file, removed when closed
        self._found.execute("CREATE TABLE found (id TEXT PRIMARY KEY, ids BLOB, logprobs BLOB, place TEXT)")
        with self._found:
            for place, row in rows:
                self._insert(place, _stored(place, row))

    def _insert(self, place: str, row: tuple[str, bytes, bytes]) -> None:
        if self._found.execute("INSERT OR IGNORE INTO found VALUES (?, ?, ?, ?)", (*row, place)).rowcount:
            return
        *first, first_place = self._found.execute("SELECT * FROM found WHERE id = ?", row[:1]).fetchone()
        if tuple(first) != row:
            raise DataError(
                f"sample_uuid {row[0]!r} has other log-probabilities than in {first_place}",
                where=place,
                expected="one record a sample",
                mend="take one of them out of the file",
            )

    def join(self, record: Record, row: Mapping[str, Any]) -> Record:
        """A row's record with the log-probabilities of its response.

        The ids are kept where they spell the response exactly. Where they spell something else, such as the
        channel marks that the released text has think tags for, only the log-probabilities are, with their
        tokens' places in the text. Raises BadRow for a row that no record belongs to, DataError where rows
        have no such column.
        """
        key = self._settings.key
        if key not in row:
            raise DataError(
                f"the row has no column {key!r} that names its log-probabilities",
                expected=f"one of {', '.join(row)}",
                mend="state the column with the id in logprobs: {key: ...}",
            )
        stored = self._found.execute(
            "SELECT ids, logprobs FROM found WHERE id = ?", (str(row[key]),)
        ).fetchone()
        if stored is None:
            raise BadRow(f"there are no log-probabilities for {key} {row[key]!r}")
        ids, logprobs = array("i", stored[0]).tolist(), array("f", stored[1]).tolist()
        if ids and ids[-1] in self._tokenizer.all_special_ids:  # the end of the turn
            ids, logprobs = ids[:-1], logprobs[:-1]
        spelled = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        sampling = {**record.sampling, "logprob_temperature": self._settings.temperature}
        own = spelled == record.response
        special = set(self._tokenizer.all_special_ids)
        written = [self._bytes[id_] if id_ < len(self._bytes) and id_ not in special else b"" for id_ in ids]
        sizes = bytes_of_tokens(written, record.response or "")
        return replace(
            record,
            response_token_ids=ids if own else None,
            tokenizer=self._hash if own else None,
            logprobs=logprobs,
            token_bytes=sizes,
            alternatives=None,
            sampling=sampling,
        )

    def close(self) -> None:
        """Remove the file."""
        self._found.close()


def _stored(place: str, row: Any) -> tuple[str, bytes, bytes]:
    if isinstance(row, BadRow):
        raise DataError(str(row), where=place, mend="correct the file of log-probabilities")
    if missing := [name for name in _COLUMNS if name not in row]:
        raise DataError(
            f"a log-probability record lacks {' and '.join(missing)}",
            where=place,
            expected=", ".join(_COLUMNS),
        )
    identifier, ids, logprobs = (row[name] for name in _COLUMNS)
    try:
        if len(ids) != len(logprobs):
            raise ValueError(f"{len(ids)} ids and {len(logprobs)} log-probabilities")
        return str(identifier), array("i", ids).tobytes(), array("f", logprobs).tobytes()
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"a log-probability record cannot be used ({error})",
            where=place,
            expected="as many whole numbers in token_ids as numbers in logprobs",
        ) from error
