"""Blocks of whole numbers as compressed bytes: frequent ids get small numbers, zstd packs each byte plane.

There is little in ids and log-probabilities that repeats; what zstd saves here is that some bytes are
frequent. For that, ids are numbered by how often their shard uses them, and the high and the low bytes of
numbers are compressed apart, since they are distributed differently.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from potstill.core.errors import DataError

__all__ = [
    "Array",
    "Block",
    "Stream",
    "compress",
    "decompress",
    "frequency_classes",
    "ids_by_frequency",
    "pack_block",
]

Array = np.ndarray[Any, np.dtype[Any]]
# Levels below 12 give up what they could save on bytes without repetitions; above 13 only the time grows.
_ZSTD = pa.Codec("zstd", compression_level=13)


def compress(values: Array) -> bytes:
    """The bytes of an array as one zstd frame."""
    frame: bytes = _ZSTD.compress(values.tobytes(), asbytes=True)
    return frame


def decompress(frame: bytes | memoryview | Array, size_bytes: int) -> Array:
    """The bytes of a frame that holds so many. Raises ValueError for another content."""
    try:
        return np.frombuffer(_ZSTD.decompress(frame, size_bytes), dtype=np.uint8)
    except OSError as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Stream:
    """How a kind of numbers is stored: type, numbers a token (None: as many as the token has), and layout."""

    dtype: str
    columns: int | None = 1
    in_planes: bool = True

    @property
    def frames(self) -> int:
        """Compressed frames in a block."""
        return int(self.dtype[-1]) if self.in_planes else 1


def frequency_classes(ids: Array, vocabulary_size: int) -> Array:
    """One a vocabulary id: about the log2 of how often it occurs, rounded up; 0 where it never does."""
    counts = np.bincount(ids.ravel(), minlength=vocabulary_size)
    return np.ceil(np.log2(counts + 1)).astype(np.uint8)


def ids_by_frequency(classes: Array) -> Array:
    """The ids that occur, the frequent ones first: an id's place here is the number that stands for it."""
    used = np.flatnonzero(classes)
    order: Array = used[np.argsort(255 - classes[used], kind="stable")].astype(np.uint32)
    return order


def pack_block(streams: Mapping[str, Stream], arrays: Mapping[str, Array]) -> Iterator[tuple[bytes, int]]:
    """The frames of a block in order, each with its size when unpacked, in bytes."""
    for name, stream in streams.items():
        values = np.ascontiguousarray(arrays[name], dtype=stream.dtype)
        planes = values.reshape(-1).view(np.uint8).reshape(-1, stream.frames)
        for number in range(stream.frames):
            plane = planes[:, number]
            yield compress(plane), plane.size


class Block:
    """A block read from a shard; a stream is unpacked when it is first asked for."""

    def __init__(
        self,
        streams: Mapping[str, Stream],
        data: bytes,
        frame_ends: Sequence[int],
        frame_sizes: Sequence[int],
        *,
        where: str,
    ) -> None:
        self._streams, self._where = streams, where
        self._data, self._ends, self._sizes = memoryview(data), frame_ends, frame_sizes
        self._planes: dict[str, list[Array]] = {}

    def read(self, name: str, part: slice = slice(None)) -> Array:
        """A stream's numbers: those of some tokens; where columns vary, some of all numbers."""
        stream = self._streams[name]
        if name not in self._planes:
            self._planes[name] = self._unpack(name, stream)
        parts = [plane[part] for plane in self._planes[name]]
        if len(parts) == 1:
            return parts[0].view(stream.dtype)
        values: Array = parts[-1].astype(f"<u{len(parts)}")
        for plane in reversed(parts[:-1]):
            values <<= 8
            values |= plane
        return values.view(stream.dtype)

    def _unpack(self, name: str, stream: Stream) -> list[Array]:
        first = 0
        for before, other in self._streams.items():
            if before == name:
                break
            first += other.frames
        planes = []
        for number in range(first, first + stream.frames):
            start = self._ends[number - 1] if number else 0
            try:
                values = decompress(self._data[start : self._ends[number]], self._sizes[number])
            except ValueError as error:
                raise DataError(f"a block cannot be unpacked ({error})", where=self._where) from error
            if not stream.in_planes:
                values = values.view(stream.dtype)
            planes.append(values if stream.columns is None else values.reshape(-1, stream.columns))
        return planes
