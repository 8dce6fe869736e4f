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
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from potstill.core.checked_json import DamagedJsonError, checked_json, read_checked_json
from potstill.core.errors import DataError, StoreError
from potstill.core.keys import KeyNumbers
from potstill.core.spool import Spool
from potstill.core.store import MANIFEST_FILE, write_atomically
from potstill.logits.checked_files import read_arrays, write_arrays, write_columns
from potstill.logits.codecs import Codec, describe, id_type
from potstill.logits.packing import (
    Array,
    Stream,
    compress,
    frequency_classes,
    ids_by_frequency,
    pack_block,
)

__all__ = [
    "HEADER_FILE",
    "INDEX_FILE",
    "SHARD_TOKENS",
    "CachedRow",
    "ShardWriter",
    "checked_when_read",
    "prepare_import",
    "read_header",
    "row_key",
    "row_streams",
    "write_index",
]

SHARD_TOKENS = 16_384
# Enough for a byte's code table to pay, few enough that one row can be read without many others.
_BLOCK_IDS = 8_192
HEADER_FILE, INDEX_FILE = "cache.json", "index.safetensors"
_SEALED_NAME = re.compile(r"(cache|manifest)\.json|(index|shard-\d+-\d+)\.safetensors")
_PARTIAL_NAME = re.compile(r"(\.(cache|manifest)\.json\.\d+|index|shard-\d+-\d+)\.partial")
_KEY_BYTES = 32
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
        if (folder / HEADER_FILE).exists():
            _check_same(read_header(folder), header, folder)
        else:
            write_atomically(folder / HEADER_FILE, checked_json(header))
        (folder / INDEX_FILE).unlink(missing_ok=True)
        for unfinished in folder.glob(f"{self._prefix}*.partial"):
            unfinished.unlink()
        # One past the last, not how many there are: a damaged one may have been deleted.
        numbers = [
            int(path.stem.removeprefix(self._prefix)) for path in folder.glob(f"{self._prefix}*.safetensors")
        ]
        self._number = max(numbers, default=-1) + 1
        self._keys = KeyNumbers()
        for path in _shard_paths(folder):
            for key in _keys(read_arrays(path)):
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
            frames += pack_block(row_streams(self.codec), arrays)
        tensors: dict[str, Array] = {
            "keys": _key_array(keys),
            "lengths": np.array([len(row.token_ids) for row in rows], dtype=np.uint32),
            "supervised": np.array([sum(row.mask) for row in rows], dtype=np.uint32),
            "block_rows": np.array(block_rows, dtype=np.uint32),
            "frame_bytes": np.array([(len(frame), size) for frame, size in frames], dtype=np.uint32),
            "frequency_classes": np.frombuffer(compress(classes), dtype=np.uint8),
            "frames": np.frombuffer(b"".join(frame for frame, _ in frames), dtype=np.uint8),
        }
        write_arrays(self.folder / f"{self._prefix}{self._number:05d}.safetensors", tensors)
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
    if found and (HEADER_FILE not in found or read_header(folder).get("imported") != file_hash):
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
        shard = read_arrays(path)
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
    write_columns(folder / INDEX_FILE, {name: (*shapes[name], columns[name]) for name in columns})


def read_header(folder: Path) -> dict[str, Any]:
    """What a cache's folder says of its logits. Raises DataError where it says nothing."""
    path = folder / HEADER_FILE
    try:
        header = read_checked_json(path.read_bytes())
        if not all(isinstance(header.get(name), str) for name in ("codec", "tokenizer", "model")):
            raise DamagedJsonError("it does not say whose logits these are")
    except (OSError, DamagedJsonError) as error:
        raise DataError(
            f"cannot be read ({error})", where=str(path), mend="run the cache step again"
        ) from error
    return header


def row_streams(codec: Codec) -> dict[str, Stream]:
    """What a shard keeps of its rows: ids, mask, and the codec's quantities."""
    ids = np.dtype(id_type(codec.vocabulary_size)).str
    return {"token_ids": Stream(ids, None, in_planes=False), "mask": Stream("|u1", None), **codec.streams}


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


def _key_array(keys: Sequence[bytes]) -> Array:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, _KEY_BYTES)


def _keys(shard: Mapping[str, Array]) -> list[bytes]:
    return [key.tobytes() for key in shard["keys"]]


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    for name in {**wanted, **found}:
        if found.get(name) != (value := wanted.get(name)):
            raise StoreError(
                f"holds logits with {name} {found.get(name)!r}, not {value!r}",
                where=str(folder),
                mend="use another folder, or delete this one",
            )
