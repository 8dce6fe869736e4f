"""Files of named arrays in safetensors' form that hold their own checksum and get their name once whole."""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from potstill.core.errors import DataError
from potstill.core.spool import Spool
from potstill.logits.packing import Array

__all__ = ["ColumnFile", "read_arrays", "write_arrays", "write_columns"]

# Of a column so many rows are in memory at once.
_READ_ROWS = 8_192
_NAMES_OF_TYPES = {"|u1": "U8", "<u4": "U32", "<i8": "I64"}  # safetensors' own


def read_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, Array]:
    """A file's arrays: some of them, or all, which are then checked against the file's checksum.

    Raises DataError for a file that is damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
            checksum = (file.metadata() or {}).get("sha256")
        damage = None if names is not None or checksum == _checksum(tensors) else "its checksum is another"
    except (OSError, SafetensorError) as error:
        damage = str(error)
    if damage is not None:
        raise _damaged(path, damage)
    return tensors


def write_arrays(path: Path, tensors: dict[str, Array]) -> None:
    """Write a file so that it has its name only when all of it is on the disk."""
    _write_parts(path, [save(tensors, {"sha256": _checksum(tensors)})])


def write_columns(path: Path, columns: Mapping[str, tuple[str, tuple[int, ...], Spool]]) -> None:
    """`write_arrays` of what is not in memory: of each column its type, its shape and its bytes."""
    digest = _digest(
        (name, np.dtype(dtype), shape, spool.chunks())
        for name, (dtype, shape, spool) in sorted(columns.items())
    )
    header: dict[str, Any] = {"__metadata__": {"sha256": digest}}
    order = sorted(columns, key=lambda name: (-np.dtype(columns[name][0]).itemsize, name))
    end = 0
    for name in order:
        dtype, shape, spool = columns[name]
        offsets = [end, end := end + spool.size]
        header[name] = {"dtype": _NAMES_OF_TYPES[dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    data = (chunk for name in order for chunk in columns[name][2].chunks())
    _write_parts(path, itertools.chain([len(text).to_bytes(8, "little") + text], data))


class ColumnFile:
    """A file of columns, checked once; they are read from the file in parts, in constant memory.

    Raises DataError for a file that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="np") as file:
                checksum = (file.metadata() or {}).get("sha256")
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_bytes))
            types = {name: dtype for dtype, name in _NAMES_OF_TYPES.items()}
            self._columns = {
                name: (
                    np.dtype(types[one["dtype"]]),
                    tuple(one["shape"]),
                    8 + header_bytes + one["data_offsets"][0],
                )
                for name, one in header.items()
                if name != "__metadata__"
            }
        except (OSError, SafetensorError, KeyError) as error:
            raise _damaged(path, str(error)) from error
        found = _digest((name, *self._columns[name][:2], self._bytes(name)) for name in sorted(self._columns))
        if checksum != found:
            raise _damaged(path, "its checksum is another")

    def _bytes(self, name: str) -> Iterator[memoryview]:
        return (part.reshape(-1).view(np.uint8).data for part in self.parts(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """A column's rows from `start` to before `stop`."""
        dtype, (rows, *rest), offset = self._columns[name]
        width, stop = math.prod(rest), rows if stop is None else stop
        # Opened anew each time, as a shard is.
        with self._path.open("rb", buffering=0) as file:
            file.seek(offset + start * width * dtype.itemsize)
            data = file.read((stop - start) * width * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(-1, *rest)

    def parts(self, name: str) -> Iterator[Array]:
        """A column, some rows at a time."""
        rows = self._columns[name][1][0]
        for start in range(0, rows, _READ_ROWS):
            yield self.read(name, start, min(start + _READ_ROWS, rows))


def _write_parts(path: Path, parts: Iterable[bytes]) -> None:
    unfinished = path.with_suffix(".partial")
    with unfinished.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _checksum(tensors: Mapping[str, Array]) -> str:
    arrays = ((name, np.ascontiguousarray(tensors[name])) for name in sorted(tensors))
    return _digest(
        (name, values.dtype, values.shape, [values.reshape(-1).view(np.uint8).data])
        for name, values in arrays
    )


def _digest(columns: Iterable[tuple[str, np.dtype[Any], tuple[int, ...], Iterable[Any]]]) -> str:
    """SHA-256 of columns in the order of their names: each with its type, its shape and its bytes."""
    digest = hashlib.sha256()
    for name, dtype, shape, data in columns:
        digest.update(f"{name} {dtype.str} {shape} ".encode())
        for part in data:
            digest.update(part)
    return digest.hexdigest()


def _damaged(path: Path, how: str) -> DataError:
    return DataError(
        f"is damaged ({how})",
        where=str(path),
        expected="a file as the cache step sealed it",
        mend="delete it and run the cache step again, which makes what is missing",
    )
