"""A folder of teacher logits: sealed shards that a killed capture resumes after, read in constant memory.

`cache.json` states the codec and what the logits belong to. Each shard holds whole rows: token ids,
supervised mask and what the codec keeps of every supervised token, under the SHA-256 of ids and mask. Rows
lie in compressed blocks, so that a row is read by unpacking one block.
`index.safetensors` is written last and gives the rows in the order of the data; equal rows share one entry. A
file gets its name only once it is whole, and holds the SHA-256 of its content.
"""

import hashlib
import itertools
import json
import math
import os
import re
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from potstill.core.checked_json import DamagedJsonError, checked_json, read_checked_json
from potstill.core.errors import DataError, StoreError
from potstill.core.keys import KeyNumbers
from potstill.core.spool import Spool
from potstill.core.store import MANIFEST_FILE, write_atomically
from potstill.logits.codecs import Codec, codec_of, describe, id_type
from potstill.logits.packing import (
    Array,
    Block,
    Stream,
    compress,
    decompress,
    frequency_classes,
    ids_by_frequency,
    pack_block,
)
from potstill.losses.types import Sampled, Sparse

__all__ = [
    "SHARD_TOKENS",
    "CachedRow",
    "LogitCache",
    "ShardWriter",
    "checked_when_read",
    "prepare_import",
    "row_key",
    "write_index",
]

SHARD_TOKENS = 16_384
# Enough for a byte's code table to pay, few enough that one row can be read without many others.
_BLOCK_IDS = 8_192
_HEADER_FILE, _INDEX_FILE = "cache.json", "index.safetensors"
_SEALED_NAME = re.compile(r"(cache|manifest)\.json|(index|shard-\d+-\d+)\.safetensors")
_PARTIAL_NAME = re.compile(r"(\.(cache|manifest)\.json\.\d+|index|shard-\d+-\d+)\.partial")
# What is kept of a shard between reads (its ids by frequency, where its blocks lie) is about 100 KB.
_OPEN_SHARDS, _UNPACKED_BLOCKS = 64, 8
_MASS_BINS = 10_000
_KEY_BYTES = 32
# Of an index so many rows are in memory at once.
_READ_ROWS = 8_192
_NAMES_OF_TYPES = {"|u1": "U8", "<u4": "U32", "<i8": "I64"}  # safetensors' own
_Place = np.dtype(("<u4", 6))  # shard, block, first token and tokens, first supervised token and how many


@dataclass(frozen=True, slots=True)
class CachedRow:
    """A row of a cache: token ids, 1 for each supervised one, and which record of the data it was."""

    token_ids: Sequence[int]
    mask: Sequence[int]
    held_out: bool
    record_id: str

    @property
    def key(self) -> bytes:
        """What the row's logits are stored under."""
        return row_key(self.token_ids, self.mask)


def row_key(token_ids: Sequence[int], mask: Sequence[int]) -> bytes:
    """SHA-256 of a row's token ids and supervised mask, 32 bytes: the same in every process and machine."""
    assert len(token_ids) == len(mask)
    return hashlib.sha256(np.array(token_ids, dtype="<u4").tobytes() + bytes(mask)).digest()


class ShardWriter:
    """Appends rows to a cache folder and seals a shard every `shard_tokens` supervised tokens.

    It continues after the last sealed shard: `key in writer` says which rows are there. Several writers, each
    with its own number, may fill one folder. `imported` is the SHA-256 of the file that the rows come from,
    where they do. Raises StoreError when the folder holds logits of other settings.
    """

    def __init__(
        self,
        folder: Path,
        codec: Codec,
        *,
        tokenizer: str,
        model: str,
        imported: str | None = None,
        writer: int = 0,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.folder, self.codec, self.shard_tokens = folder, codec, shard_tokens
        self._prefix = f"shard-{writer:03d}-"
        header = {**describe(codec), "tokenizer": tokenizer, "model": model}
        if imported is not None:
            header["imported"] = imported
        if (folder / _HEADER_FILE).exists():
            _check_same(_read_header(folder), header, folder)
        else:
            write_atomically(folder / _HEADER_FILE, checked_json(header))
        (folder / _INDEX_FILE).unlink(missing_ok=True)
        for unfinished in folder.glob(f"{self._prefix}*.partial"):
            unfinished.unlink()
        # One past the last, not how many there are: a damaged one may have been deleted.
        numbers = [
            int(path.stem.removeprefix(self._prefix)) for path in folder.glob(f"{self._prefix}*.safetensors")
        ]
        self._number = max(numbers, default=-1) + 1
        self._keys = KeyNumbers()
        for path in _shard_paths(folder):
            for key in _keys(_load(path)):
                self._keys.add(key)
        self._pending: list[tuple[bytes, CachedRow, dict[str, Array]]] = []
        self._pending_tokens = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def append(self, row: CachedRow, quantities: Mapping[str, Tensor], *, where: str | None = None) -> None:
        """Add a row with the codec's quantities of its supervised tokens, in order.

        Raises DataError for a token id past the vocabulary and for a NaN among the quantities; `where` names
        the row, by default by its record.
        """
        where = where or f"record {row.record_id}"
        size = self.codec.vocabulary_size
        if (highest := max(row.token_ids)) >= size:
            raise DataError(
                f"token id {highest} is past the vocabulary of {size} ids",
                where=where,
                expected="ids that the teacher has logits for",
                mend="use data of the teacher's own tokenizer, or leave the row out",
            )
        key, packed = row.key, self.codec.pack(quantities, where=where)
        assert row.mask[0] == 0
        assert all(len(values) == sum(row.mask) > 0 for values in quantities.values())
        is_new = self._keys.add(key)
        assert is_new
        self._pending.append((key, row, packed))
        self._pending_tokens += sum(row.mask)
        if self._pending_tokens >= self.shard_tokens:
            self.seal()

    def seal(self) -> None:
        """Write the rows that are not yet in a shard as one; called once more at the end."""
        if not self._pending:
            return
        keys, rows, packed = zip(*self._pending, strict=True)
        classes = frequency_classes(
            np.concatenate([values["ids"].ravel() for values in packed]), self.codec.vocabulary_size
        )
        order = ids_by_frequency(classes)
        numbers = np.zeros(self.codec.vocabulary_size, dtype=id_type(self.codec.vocabulary_size))
        numbers[order] = np.arange(len(order))
        block_rows = _block_rows([values["ids"].size for values in packed])
        frames: list[tuple[bytes, int]] = []
        for first, last in itertools.pairwise(block_rows):
            arrays = {name: np.concatenate([one[name] for one in packed[first:last]]) for name in packed[0]}
            arrays["ids"] = numbers[arrays["ids"]]
            arrays["token_ids"] = np.concatenate([np.asarray(row.token_ids) for row in rows[first:last]])
            arrays["mask"] = np.frombuffer(b"".join(bytes(row.mask) for row in rows[first:last]), np.uint8)
            frames += pack_block(_streams(self.codec), arrays)
        tensors: dict[str, Array] = {
            "keys": _key_array(keys),
            "lengths": np.array([len(row.token_ids) for row in rows], dtype=np.uint32),
            "supervised": np.array([sum(row.mask) for row in rows], dtype=np.uint32),
            "block_rows": np.array(block_rows, dtype=np.uint32),
            "frame_bytes": np.array([(len(frame), size) for frame, size in frames], dtype=np.uint32),
            "frequency_classes": np.frombuffer(compress(classes), dtype=np.uint8),
            "frames": np.frombuffer(b"".join(frame for frame, _ in frames), dtype=np.uint8),
        }
        _write(self.folder / f"{self._prefix}{self._number:05d}.safetensors", tensors)
        self._number += 1
        self._pending.clear()
        self._pending_tokens = 0


def checked_when_read(name: str) -> bool:
    """Whether a cache's file of this name holds a checksum that its reader compares."""
    return name.endswith(".safetensors")


def prepare_import(folder: Path, path: Path, file_hash: str) -> None:
    """Make a folder ready to import a file into: an empty one, or that file's own import.

    What was sealed there is then unfinished. Raises StoreError, and changes nothing, where the folder holds
    anything else.
    """
    names = sorted(one.name for one in folder.iterdir()) if folder.exists() else []
    partial = [name for name in names if _PARTIAL_NAME.fullmatch(name)]
    found = [name for name in names if name not in partial]
    for name in found:
        if not _SEALED_NAME.fullmatch(name):
            raise StoreError(
                f"holds {name}, which no import of {path.name} made",
                where=str(folder),
                expected="a new or an empty folder",
                mend="name another folder",
            )
    if found and (_HEADER_FILE not in found or _read_header(folder).get("imported") != file_hash):
        raise StoreError(
            f"holds the logits of another file than {path}",
            where=str(folder),
            expected="a new folder, or one with an unfinished import of this very file",
            mend="name another folder, or delete this one",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST_FILE, *partial):
        (folder / name).unlink(missing_ok=True)


def write_index(folder: Path, rows: Iterable[CachedRow], *, scratch: Path | None = None) -> None:
    """Complete a cache: its rows in order, each found in a sealed shard, or else a DataError.

    In memory a stored row costs up to 28 bytes. What is put together lies in `scratch` until it is whole, by
    default where the system keeps temporary files.
    """
    paths = _shard_paths(folder)
    stored, places = KeyNumbers(), Spool(scratch)
    # Of what several writers have stored, the last counts.
    for number, path in reversed([*enumerate(paths)]):
        shard = _load(path)
        for key, place in zip(_keys(shard), _places(number, shard), strict=True):
            if stored.add(key):
                places.append(place.tobytes())
    names = json.dumps([path.name for path in paths]).encode("utf-8")
    columns = {
        name: Spool(scratch) for name in ("keys", "places", "held_out", "record_ids", "record_id_ends")
    }
    count = 0
    for row in rows:
        if (found := stored.number(row.key)) is None:
            raise DataError(f"row {count} (record {row.record_id}) is in no shard", where=str(folder))
        assert row.record_id
        columns["keys"].append(row.key)
        columns["places"].append(places.read(found * _Place.itemsize, _Place.itemsize))
        columns["held_out"].append(bytes([row.held_out]))
        columns["record_ids"].append(row.record_id.encode("utf-8"))
        columns["record_id_ends"].append(np.int64(columns["record_ids"].size).tobytes())
        count += 1
    columns["shards"] = Spool(scratch)
    columns["shards"].append(names)
    shapes = {"keys": ("|u1", (count, _KEY_BYTES)), "places": ("<u4", (count, *_Place.shape))}
    shapes |= {"held_out": ("|u1", (count,)), "record_id_ends": ("<i8", (count,))}
    shapes |= {name: ("|u1", (columns[name].size,)) for name in ("record_ids", "shards")}
    _write_columns(folder / _INDEX_FILE, {name: (*shapes[name], columns[name]) for name in columns})


def _places(number: int, shard: Mapping[str, Array]) -> Array:
    """Where each row of a shard lies: its block, and its first token and supervised token there."""
    lengths, supervised = shard["lengths"].astype(np.int64), shard["supervised"].astype(np.int64)
    block_rows = shard["block_rows"].astype(np.int64)
    block_of_row = np.repeat(np.arange(len(block_rows) - 1), np.diff(block_rows))
    first_rows = block_rows[block_of_row]
    starts, supervised_starts = lengths.cumsum() - lengths, supervised.cumsum() - supervised
    columns = (
        np.full(len(lengths), number),
        block_of_row,
        starts - starts[first_rows],
        lengths,
        supervised_starts - supervised_starts[first_rows],
        supervised,
    )
    return np.stack(columns, -1).astype("<u4")


class LogitCache:
    """A finished cache, which is a training set by itself: rows are read from the shards when asked for.

    What it holds in memory does not grow with the logits, and with the rows by a byte each; once a row is
    looked for by its content (`find`), by up to 33. It can be handed to data-loader workers, forked or not.
    """

    def __init__(
        self, folder: Path, codec: Codec, tokenizer: str, model: str, imported: str | None = None
    ) -> None:
        self.folder, self.codec, self.tokenizer, self.model = folder, codec, tokenizer, model
        self.imported = imported
        self._index = _Index(folder / _INDEX_FILE)
        self._names: list[str] = json.loads(self._index.read("shards").tobytes())
        for name in self._names:
            if not (folder / name).is_file():
                raise DataError(f"{name} is missing", where=str(folder), mend="run the cache step again")
        self.held_out: Array = self._index.read("held_out").astype(bool)
        self._found: tuple[KeyNumbers, array[int]] | None = None
        self._checked: set[str] = set()
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], Block] = OrderedDict()

    @classmethod
    def open(cls, folder: Path, *, tokenizer: str | None = None) -> "LogitCache":
        """Open a cache folder; `tokenizer` is the hash that the reader's tokenizer has.

        Raises DataError for a folder that holds no finished cache, an unknown codec, and another tokenizer.
        """
        if folder.is_file():  # a run folder's link where there are no links
            folder = Path(folder.read_text(encoding="utf-8"))
        if not (folder / _INDEX_FILE).is_file():
            raise DataError(
                "holds no finished cache of teacher logits",
                where=str(folder),
                expected=f"the folder of a cache step, with {_HEADER_FILE} and {_INDEX_FILE}",
                mend="run the cache step; an interrupted one goes on where it stopped",
            )
        header = _read_header(folder)
        codec = codec_of(header, where=str(folder))
        if tokenizer is not None and tokenizer != header["tokenizer"]:
            raise DataError(
                f"these logits belong to another tokenizer ({header['tokenizer'][:12]}) than the model that "
                f"would learn from them ({tokenizer[:12]})",
                where=str(folder),
                expected="one tokenizer for teacher and student: their logits are compared id by id",
                mend="cache the logits of a teacher of the student's family, or train on responses alone",
            )
        return cls(folder, codec, header["tokenizer"], header["model"], header.get("imported"))

    def __len__(self) -> int:
        return len(self.held_out)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": OrderedDict(), "_blocks": OrderedDict()}

    @property
    def description(self) -> dict[str, Any]:
        """The codec's settings, and whose logits these are, as JSON."""
        return {**describe(self.codec), "tokenizer": self.tokenizer, "model": self.model}

    @property
    def lengths(self) -> Array:
        """Tokens of each row."""
        return self._column_of_places(3)

    @property
    def supervised(self) -> Array:
        """Supervised tokens of each row."""
        return self._column_of_places(5)

    def _column_of_places(self, column: int) -> Array:
        parts = [part[:, column].astype(np.int64) for part in self._index.parts("places")]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _place(self, number: int) -> list[int]:
        [place] = self._index.read("places", number, number + 1).tolist()
        found: list[int] = place
        return found

    def row(self, number: int) -> CachedRow:
        """A row's token ids and mask, and which record it was."""
        number = range(len(self))[number]
        shard, block, start, length, _, _ = self._place(number)
        part, found = slice(start, start + length), self._block(shard, block)
        ends = self._index.read("record_id_ends", max(0, number - 1), number + 1).tolist()
        record_id = self._index.read("record_ids", ends[0] if number else 0, ends[-1])
        return CachedRow(
            found.read("token_ids", part).tolist(),
            found.read("mask", part).tolist(),
            bool(self.held_out[number]),
            record_id.tobytes().decode("utf-8"),
        )

    def signal(self, number: int, temperature: float = 1.0, k: int | None = None) -> Sparse | Sampled:
        """`signals` of one row."""
        return self.signals([number], temperature, k)

    def signals(
        self,
        numbers: Sequence[int],
        temperature: float = 1.0,
        k: int | None = None,
        *,
        tokens: Sequence[int] | None = None,
    ) -> Sparse | Sampled:
        """What the teacher gives to the supervised tokens of some rows, row by row, at one temperature.

        `k` takes fewer ids than were kept; the others join the tail. `tokens` takes so many of each row's
        first tokens. Raises DataError as the codec's `decode` does, and for a damaged shard.
        """
        parts = []
        for position, (shard, block, _, _, start, count) in enumerate(map(self._place, numbers)):
            wanted = slice(start, start + (count if tokens is None else tokens[position]))
            assert wanted.stop - start <= count
            part = self.codec.select(self._block(shard, block).read, wanted)
            part["ids"] = self._shard(shard).order[part["ids"]]
            parts.append(part)
        stored = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self.codec.decode(stored, temperature, k, where=str(self.folder))

    def logsumexp(self, numbers: Sequence[int]) -> Array:
        """Of a top-k cache: the logsumexp of logits / T of some rows' supervised tokens, a column a T."""
        parts = []
        for shard, block, _, _, start, count in map(self._place, numbers):
            parts.append(self._block(shard, block).read("logsumexp", slice(start, start + count)))
        logsumexp_NT: Array = np.concatenate(parts).astype(np.float32)
        return logsumexp_NT

    def find(self, token_ids: Sequence[int], mask: Sequence[int]) -> int:
        """The number of the row with these ids and this mask.

        Raises DataError when there is none: training on without the teacher would be another training.
        """
        if self._found is None:
            keys, first_rows, row = KeyNumbers(), array("I"), 0
            for part in self._index.parts("keys"):
                for key in part:
                    if keys.add(key.tobytes()):
                        first_rows.append(row)
                    row += 1
            self._found = keys, first_rows
        keys, first_rows = self._found
        if (number := keys.number(row_key(token_ids, mask))) is None:
            raise DataError(
                f"there are no logits for a row of {len(token_ids)} tokens, {sum(mask)} of them supervised",
                where=str(self.folder),
                expected="every row that is trained on",
                mend="run the cache step on this data, with the chat template and lengths of the training",
            )
        return first_rows[number]

    def counts(self) -> dict[str, int]:
        """Rows, tokens and supervised tokens, a repeated row counted each time."""
        return {
            "rows": len(self),
            "tokens": int(self.lengths.sum()),
            "supervised_tokens": int(self.supervised.sum()),
        }

    def figures(self) -> dict[str, float]:
        """Over stored supervised tokens: bytes a token, distinct ids, and of top-k the mass kept at T = 1.

        Percentiles are to 1/10,000. Reads every shard, in constant memory.
        """
        tokens, distinct, mass = 0, 0, 0.0
        histogram = np.zeros(_MASS_BINS, dtype=np.int64)
        for number in range(len(self._names)):
            for block in range(self._shard(number).blocks):
                stored = self.codec.select(self._block(number, block).read, slice(None))
                figures = self.codec.token_figures(stored)
                tokens += len(figures["distinct_ids"])
                distinct += int(figures["distinct_ids"].sum())
                if (kept := figures.get("kept_mass")) is not None:
                    mass += float(kept.sum())
                    histogram += np.histogram(kept, _MASS_BINS, (0.0, 1.0))[0]
        size_bytes = sum((self.folder / name).stat().st_size for name in self._names)
        found = {"bytes_per_token": size_bytes / tokens, "mean_distinct_ids": distinct / tokens}
        if self.codec.k is not None:
            found["mean_kept_mass"] = mass / tokens
            ranks = histogram.cumsum()
            for percent in (1, 5, 50):
                bin_ = int(np.searchsorted(ranks, percent / 100 * tokens))
                found[f"kept_mass_p{percent:02d}"] = (bin_ + 0.5) / _MASS_BINS
        return found

    def verify(self) -> int:
        """Read every shard against its checksum and say how many; DataError names one that is damaged."""
        for name in self._names:
            _load(self.folder / name)
        return len(self._names)

    def _shard(self, number: int) -> "_Shard":
        if (shard := self._shards.get(number)) is None:
            if len(self._shards) == _OPEN_SHARDS:
                self._shards.popitem(last=False)
            name = self._names[number]
            shard = self._shards[number] = _Shard(
                self.folder / name, self.codec, check=name not in self._checked
            )
            self._checked.add(name)
        self._shards.move_to_end(number)
        return shard

    def _block(self, shard: int, number: int) -> Block:
        if (block := self._blocks.get((shard, number))) is None:
            if len(self._blocks) == _UNPACKED_BLOCKS:
                self._blocks.popitem(last=False)
            block = self._blocks[shard, number] = self._shard(shard).read(number)
        self._blocks.move_to_end((shard, number))
        return block


class _Index:
    """The index of a cache, checked once; its columns are read from the file in parts.

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
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error)) from error
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


class _Shard:
    """An open shard: which id each number stands for, and where its blocks lie."""

    def __init__(self, path: Path, codec: Codec, *, check: bool) -> None:
        self._path, self._streams = path, _streams(codec)
        tensors = _load(path, None if check else {"frequency_classes", "frame_bytes"})
        self.order = ids_by_frequency(decompress(tensors["frequency_classes"], codec.vocabulary_size))
        packed_bytes, unpacked_bytes = tensors["frame_bytes"].T
        self._ends: list[int] = packed_bytes.cumsum(dtype=np.int64).tolist()
        self._sizes: list[int] = unpacked_bytes.tolist()
        self._frames = sum(stream.frames for stream in self._streams.values())
        self.blocks = len(self._ends) // self._frames
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            offsets = json.loads(file.read(header_bytes))["frames"]["data_offsets"]
        self._start = 8 + header_bytes + offsets[0]

    def read(self, number: int) -> Block:
        """A block, still packed."""
        frames = slice(number * self._frames, (number + 1) * self._frames)
        begin = self._ends[frames.start - 1] if number else 0
        ends = [end - begin for end in self._ends[frames]]
        # Opened anew each time: a mapped file's pages would count as this process's memory, and forked
        # workers share an open file's position.
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._start + begin)
            data = file.read(ends[-1])
        return Block(self._streams, data, ends, self._sizes[frames], where=str(self._path))


def _streams(codec: Codec) -> dict[str, Stream]:
    ids = np.dtype(id_type(codec.vocabulary_size)).str
    return {"token_ids": Stream(ids, None, in_planes=False), "mask": Stream("|u1", None), **codec.streams}


def _block_rows(ids_a_row: Sequence[int]) -> list[int]:
    """The first row of each block, and the number of rows."""
    firsts, count = [0], 0
    for row, ids in enumerate(ids_a_row):
        if count >= _BLOCK_IDS:
            firsts.append(row)
            count = 0
        count += ids
    return [*firsts, len(ids_a_row)]


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def _load(path: Path, names: Collection[str] | None = None) -> dict[str, Array]:
    """A file's tensors: some of them, or all, which are then checked against the file's checksum."""
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


def _damaged(path: Path, how: str) -> DataError:
    return DataError(
        f"is damaged ({how})",
        where=str(path),
        expected="a file as the cache step sealed it",
        mend="delete it and run the cache step again, which makes what is missing",
    )


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


def _key_array(keys: Sequence[bytes]) -> Array:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, _KEY_BYTES)


def _keys(shard: Mapping[str, Array]) -> list[bytes]:
    return [key.tobytes() for key in shard["keys"]]


def _write(path: Path, tensors: dict[str, Array]) -> None:
    """Write a file so that it has its name only when all of it is on the disk."""
    _write_parts(path, [save(tensors, {"sha256": _checksum(tensors)})])


def _write_columns(path: Path, columns: Mapping[str, tuple[str, tuple[int, ...], Spool]]) -> None:
    """`_write` of what is not in memory: of each column its type, its shape and its bytes."""
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


def _write_parts(path: Path, parts: Iterable[bytes]) -> None:
    unfinished = path.with_suffix(".partial")
    with unfinished.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / _HEADER_FILE
    try:
        header = read_checked_json(path.read_bytes())
        if not all(isinstance(header.get(name), str) for name in ("codec", "tokenizer", "model")):
            raise DamagedJsonError("it does not say whose logits these are")
    except (OSError, DamagedJsonError) as error:
        raise DataError(
            f"cannot be read ({error})", where=str(path), mend="run the cache step again"
        ) from error
    return header


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    for name in {**wanted, **found}:
        if found.get(name) != (value := wanted.get(name)):
            raise StoreError(
                f"holds logits with {name} {found.get(name)!r}, not {value!r}",
                where=str(folder),
                mend="use another folder, or delete this one",
            )
