"""Bytes on disk for as long as the object that wrote them lives."""

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["Spool"]

_BUFFER_BYTES = 2**18


class Spool:
    """A temporary file that only grows; what it holds is read by place and costs no memory.

    It lies in `folder`, by default where the system keeps temporary files. A process that gets a copy (by
    pickle or fork) reads the same file, which goes with the object that made it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        descriptor, name = tempfile.mkstemp(prefix="spool-", dir=folder)
        os.close(descriptor)
        self._path, self._written, self._buffer = Path(name), 0, bytearray()
        self._files: dict[int, IO[bytes]] = {}  # by process: those that share a file share its position
        weakref.finalize(self, _remove, self._path, self._files, os.getpid())

    @property
    def size(self) -> int:
        """How many bytes were added."""
        return self._written + len(self._buffer)

    def append(self, data: bytes) -> None:
        """Add bytes at the end."""
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def read(self, place: int, size: int) -> bytes:
        """Bytes that were added."""
        if place + size > self._written:
            self._flush()
        file = self._file()
        file.seek(place)
        return file.read(size)

    def chunks(self) -> Iterator[bytes]:
        """All of it in order, some at a time."""
        for place in range(0, self.size, _BUFFER_BYTES):
            yield self.read(place, _BUFFER_BYTES)

    def _flush(self) -> None:
        # Two processes that were one before this write the same bytes to the same place.
        file = self._file()
        file.seek(self._written)
        rest = memoryview(bytes(self._buffer))
        while rest:  # where a disk fills up, a write takes a part before the next one fails
            rest = rest[file.write(rest) :]
        self._written += len(self._buffer)
        self._buffer.clear()

    def _file(self) -> IO[bytes]:
        process = os.getpid()
        if process not in self._files:
            self._files[process] = self._path.open("r+b", buffering=0)
        return self._files[process]

    def __getstate__(self) -> dict[str, Any]:
        self._flush()
        return {**self.__dict__, "_files": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        weakref.finalize(self, _close, self._files)


def _close(files: dict[int, IO[bytes]]) -> None:
    for file in files.values():
        file.close()


def _remove(path: Path, files: dict[int, IO[bytes]], maker: int) -> None:
    _close(files)
    if os.getpid() == maker:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
