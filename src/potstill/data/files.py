"""Rows of data files, streamed where the format allows it, each with its place."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.core.errors import DataError
from potstill.data.shapes import BadRow

__all__ = ["DATA_SUFFIXES", "PlacedRow", "read_rows"]

PlacedRow = tuple[str, Mapping[str, Any] | BadRow]
_PARQUET_BATCH_ROWS = 1024
_LONGEST_CSV_FIELD = 1 << 30
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _json_lines(path: Path) -> Iterator[PlacedRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not (line := line.removeprefix(b"\xef\xbb\xbf").strip()):
                continue
            row: dict[str, Any] | BadRow
            try:
                text = line.decode("utf-8")
                row = _object(json.loads(text), _SURROGATE_ESCAPE.search(text) is not None)
            except UnicodeDecodeError as error:
                row = BadRow(f"not UTF-8 ({error.reason} at byte {error.start})")
            except (ValueError, RecursionError) as error:
                # A number of thousands of digits is a ValueError, too.
                row = BadRow(f"not valid JSON ({error})")
            yield f"{path.name}, line {number}", row


def _object(value: Any, perhaps_surrogates: bool) -> dict[str, Any] | BadRow:
    """A row out of a JSON value."""
    if not isinstance(value, dict):
        return BadRow(f"not a JSON object but {type(value).__name__}")
    if perhaps_surrogates:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return BadRow("text with half of a surrogate pair, which no file in UTF-8 can hold")
    return value


def _json(path: Path) -> Iterator[PlacedRow]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            # One object a line under the name .json is common.
            yield from _json_lines(path)
            return
        raise DataError(f"not valid JSON ({error})", where=str(path), expected="a list of objects") from error
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"holds {type(value).__name__}", where=str(path), expected="a list of objects")
    perhaps_surrogates = _SURROGATE_ESCAPE.search(text) is not None
    for number, row in enumerate(value, start=1):
        yield f"{path.name}, row {number}", _object(row, perhaps_surrogates)


def _csv(path: Path) -> Iterator[PlacedRow]:
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _check_column_names(path, reader.fieldnames or [])
            for row in reader:
                place = f"{path.name}, line {reader.line_num}"
                if None in row or None in row.values():
                    found = sum(value is not None for name, value in row.items() if name is not None)
                    found += len(row.get(None) or [])
                    yield place, BadRow(f"{found} fields under {len(reader.fieldnames or [])} column names")
                else:
                    yield place, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"cannot be read as CSV ({error})",
                where=f"{path}, line {reader.line_num + 1}",
                expected="comma-separated values in UTF-8, column names in the first line",
            ) from error


def _check_column_names(path: Path, names: Sequence[str]) -> None:
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise DataError(
            f"two columns are named {', '.join(map(repr, twice))}",
            where=f"{path}, line 1",
            expected="a name of its own for each column",
            mend="rename one of them, or take it out of the file",
        )


def _parquet(path: Path) -> Iterator[PlacedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}, row {number}", row
    except (OSError, ValueError, pa.ArrowException) as error:
        where = f"{path}, after row {number}" if number else str(path)
        raise DataError(f"cannot be read as Parquet ({error})", where=where) from error


def _paragraphs(path: Path) -> Iterator[PlacedRow]:
    """Plain text: a paragraph between blank lines is a row with the column `text`."""
    lines: list[str] = []
    first = number = 0
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    first = number if not lines else first
                    lines.append(line)
                elif lines:
                    yield f"{path.name}, line {first}", {"text": "".join(lines).strip()}
                    lines = []
        except UnicodeDecodeError as error:
            raise DataError(
                f"not UTF-8 ({error.reason})", where=f"{path}, after line {number}", expected="text in UTF-8"
            ) from error
    if lines:
        yield f"{path.name}, line {first}", {"text": "".join(lines).strip()}


_READERS: dict[str, Callable[[Path], Iterator[PlacedRow]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _paragraphs,
}
DATA_SUFFIXES = tuple(_READERS)


def read_rows(path: Path) -> Iterator[PlacedRow]:
    """The rows of a data file in order, each with its place (`name, line 3`); a malformed one is a BadRow.

    JSONL, CSV, Parquet and plain text take constant memory. DataError when the file itself cannot be read.
    """
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"a data file cannot end in {path.suffix!r}" if path.suffix else "a data file needs an ending",
            where=str(path),
            expected=", ".join(DATA_SUFFIXES),
        )
    if not path.is_file():
        raise DataError(
            "no such data file",
            where=str(path),
            mend="check the path: beside the recipe, or in the working folder",
        )
    return _READERS[path.suffix.lower()](path)
