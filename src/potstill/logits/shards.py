"""A folder of teacher logits: sealed shards that a killed capture resumes after, read in constant memory.

`cache.json` states the codec and what the logits belong to. Each shard holds whole rows: token ids,
supervised mask and what the codec keeps of every supervised token, under the SHA-256 of ids and mask.
`index.safetensors` is written last and gives the rows in the order of the data; equal rows share one entry. A
file gets its name only once it is whole.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from potstill.core.errors import DataError, StoreError
from potstill.core.store import write_atomically
from potstill.logits.codecs import Array, TopK, id_type
from potstill.losses.types import Sparse

__all__ = ["SHARD_TOKENS", "CachedRow", "LogitCache", "ShardWriter", "row_key", "write_index"]

SHARD_TOKENS = 16_384
_HEADER_FILE, _INDEX_FILE = "cache.json", "index.safetensors"
# Mapped pages count as resident: a few open shards bound what random reading keeps in memory.
_OPEN_SHARDS = 4
_KEY_BYTES = 32


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
    with its own number, may fill one folder. Raises StoreError when it holds logits of other settings.
    """

    def __init__(
        self,
        folder: Path,
        codec: TopK,
        *,
        tokenizer: str,
        model: str,
        writer: int = 0,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.folder, self.codec, self.shard_tokens = folder, codec, shard_tokens
        self._prefix = f"shard-{writer:03d}-"
        header = {**codec.describe(), "tokenizer": tokenizer, "model": model}
        if (folder / _HEADER_FILE).exists():
            _check_same(_read_header(folder), header, folder)
        else:
            write_atomically(folder / _HEADER_FILE, json.dumps(header, indent=2))
        (folder / _INDEX_FILE).unlink(missing_ok=True)
        for unfinished in folder.glob(f"{self._prefix}*.partial"):
            unfinished.unlink()
        self._number = len(list(folder.glob(f"{self._prefix}*.safetensors")))
        self._keys = {key for path in _shard_paths(folder) for key in _keys(_open(path))}
        self._pending: list[tuple[bytes, CachedRow, dict[str, Array]]] = []
        self._pending_tokens = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def append(self, row: CachedRow, quantities: Mapping[str, Tensor]) -> None:
        """Add a row with the codec's quantities of its supervised tokens, in order."""
        key, packed = row.key, self.codec.pack(quantities)
        assert key not in self._keys
        assert row.mask[0] == 0
        assert all(len(values) == sum(row.mask) > 0 for values in packed.values())
        self._keys.add(key)
        self._pending.append((key, row, packed))
        self._pending_tokens += sum(row.mask)
        if self._pending_tokens >= self.shard_tokens:
            self.seal()

    def seal(self) -> None:
        """Write the rows that are not yet in a shard as one; called once more at the end."""
        if not self._pending:
            return
        keys, rows, packed = zip(*self._pending, strict=True)
        id_array = partial(np.array, dtype=id_type(self.codec.vocabulary_size))
        tensors: dict[str, Array] = {
            "keys": _key_array(keys),
            "lengths": np.array([len(row.token_ids) for row in rows], dtype=np.int64),
            "supervised": np.array([sum(row.mask) for row in rows], dtype=np.int64),
            "token_ids": np.concatenate([id_array(row.token_ids) for row in rows]),
            "mask": np.concatenate([np.frombuffer(bytes(row.mask), dtype=np.uint8) for row in rows]),
            **{name: np.concatenate([values[name] for values in packed]) for name in packed[0]},
        }
        _write(self.folder / f"{self._prefix}{self._number:05d}.safetensors", tensors)
        self._number += 1
        self._pending.clear()
        self._pending_tokens = 0


def write_index(folder: Path, rows: Iterable[CachedRow]) -> None:
    """Complete a cache: its rows in order, each found in a sealed shard, or else a DataError."""
    place: dict[bytes, tuple[int, ...]] = {}
    paths = _shard_paths(folder)
    for number, path in enumerate(paths):
        shard = _open(path)
        lengths, supervised = shard.get_tensor("lengths"), shard.get_tensor("supervised")
        starts, supervised_starts = lengths.cumsum() - lengths, supervised.cumsum() - supervised
        for key, *where in zip(_keys(shard), starts, lengths, supervised_starts, supervised, strict=True):
            place[key] = (number, *where)
    keys, places, held_out, record_ids = [], [], [], []
    for position, row in enumerate(rows):
        if (key := row.key) not in place:
            raise DataError(f"row {position} (record {row.record_id}) is in no shard", where=str(folder))
        keys.append(key)
        places.append(place[key])
        held_out.append(row.held_out)
        record_ids.append(row.record_id.encode("utf-8"))
    assert all(record_ids)
    tensors: dict[str, Array] = {
        "keys": _key_array(keys),
        "places": np.array(places, dtype=np.int64),
        "held_out": np.array(held_out, dtype=np.uint8),
        "record_ids": np.frombuffer(b"".join(record_ids), dtype=np.uint8),
        "record_id_ends": np.cumsum([len(one) for one in record_ids], dtype=np.int64),
    }
    _write(folder / _INDEX_FILE, tensors, {"shards": json.dumps([path.name for path in paths])})


class LogitCache:
    """A finished cache, which is a training set by itself: rows are read from mapped shards when asked for.

    It can be handed to data-loader workers, where each opens the shards for itself.
    """

    def __init__(self, folder: Path, codec: TopK, tokenizer: str, model: str) -> None:
        self.folder, self.codec, self.tokenizer, self.model = folder, codec, tokenizer, model
        self._open_shards: dict[str, Any] = {}
        self._numbers: dict[bytes, int] | None = None
        index = self._shard(_INDEX_FILE)
        self._names: list[str] = json.loads(index.metadata()["shards"])
        for name in self._names:
            if not (folder / name).is_file():
                raise DataError(f"{name} is missing", where=str(folder), mend="run the cache step again")
        self._places: Array = index.get_tensor("places")
        self._record_id_ends: Array = index.get_tensor("record_id_ends")
        self.held_out: Array = index.get_tensor("held_out").astype(bool)

    @classmethod
    def open(cls, folder: Path, *, tokenizer: str | None = None) -> "LogitCache":
        """Open a cache folder; `tokenizer` is the hash that the reader's tokenizer has.

        Raises DataError for a folder that holds no finished cache, an unknown codec, and another tokenizer.
        """
        if not (folder / _INDEX_FILE).is_file():
            raise DataError(
                "holds no finished cache of teacher logits",
                where=str(folder),
                expected=f"the folder of a cache step, with {_HEADER_FILE} and {_INDEX_FILE}",
                mend="run the cache step; an interrupted one goes on where it stopped",
            )
        header = _read_header(folder)
        codec = TopK.from_description(header, where=str(folder))
        if tokenizer is not None and tokenizer != header["tokenizer"]:
            raise DataError(
                f"these logits belong to another tokenizer ({header['tokenizer'][:12]}) than the model that "
                f"would learn from them ({tokenizer[:12]})",
                where=str(folder),
                expected="one tokenizer for teacher and student: their logits are compared id by id",
                mend="cache the logits of a teacher of the student's family, or train on responses alone",
            )
        return cls(folder, codec, header["tokenizer"], header["model"])

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_shards": {}}

    @property
    def description(self) -> dict[str, Any]:
        """The codec's settings, and whose logits these are, as JSON."""
        return {**self.codec.describe(), "tokenizer": self.tokenizer, "model": self.model}

    @property
    def lengths(self) -> Array:
        """Tokens of each row."""
        return self._places[:, 2]

    @property
    def supervised(self) -> Array:
        """Supervised tokens of each row."""
        return self._places[:, 4]

    def figures(self) -> dict[str, float]:
        """Means over the stored supervised tokens: mass kept at T = 1, bytes that a token takes."""
        size_bytes, kept = 0, []
        for name in self._names:
            size_bytes += (self.folder / name).stat().st_size
            log_tail_NT: Array = _open(self.folder / name).get_tensor("log_tail")
            kept.append(1 - np.exp(log_tail_NT[:, self.codec.temperatures.index(1.0)], dtype=np.float64))
        kept_N = np.concatenate(kept)
        return {"mean_kept_mass": float(kept_N.mean()), "bytes_per_token": size_bytes / len(kept_N)}

    def row(self, number: int) -> CachedRow:
        """A row's token ids and mask, and which record it was."""
        shard, start, length, _, _ = self._places[number].tolist()
        end = int(self._record_id_ends[number])
        begin = int(self._record_id_ends[number - 1]) if number else 0
        return CachedRow(
            self._slice(self._names[shard], "token_ids", start, length).tolist(),
            self._slice(self._names[shard], "mask", start, length).tolist(),
            bool(self.held_out[number]),
            self._slice(_INDEX_FILE, "record_ids", begin, end - begin).tobytes().decode("utf-8"),
        )

    def signal(self, number: int, temperature: float = 1.0, k: int | None = None) -> Sparse:
        """What the teacher gives to a row's supervised tokens, in order, at one declared temperature.

        `k` takes fewer ids than were kept; the others join the tail. Raises DataError as `TopK.decode` does.
        """
        shard, _, _, start, count = self._places[number].tolist()
        names = ("ids", "log_probs", "log_tail")
        stored = {name: self._slice(self._names[shard], name, start, count) for name in names}
        return self.codec.decode(stored, temperature, k, where=str(self.folder))

    def find(self, token_ids: Sequence[int], mask: Sequence[int]) -> int:
        """The number of the row with these ids and this mask.

        Raises DataError when there is none: training on without the teacher would be another training.
        """
        if self._numbers is None:
            keys = _keys(self._shard(_INDEX_FILE))
            self._numbers = {key: number for number, key in reversed(list(enumerate(keys)))}
        try:
            return self._numbers[row_key(token_ids, mask)]
        except KeyError:
            raise DataError(
                f"there are no logits for a row of {len(token_ids)} tokens, {sum(mask)} of them supervised",
                where=str(self.folder),
                expected="every row that is trained on",
                mend="run the cache step on this data, with the chat template and lengths of the training",
            ) from None

    def _shard(self, file_name: str) -> Any:
        if file_name not in self._open_shards:
            if len(self._open_shards) == _OPEN_SHARDS:
                del self._open_shards[next(iter(self._open_shards))]
            self._open_shards[file_name] = _open(self.folder / file_name)
        return self._open_shards[file_name]

    def _slice(self, file_name: str, name: str, start: int, count: int) -> Array:
        values: Array = self._shard(file_name).get_slice(name)[start : start + count]
        return values


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"cannot be read ({error})",
            where=str(path),
            expected="a shard as the cache step sealed it",
            mend="delete the cache's folder and run the cache step again",
        ) from error


def _key_array(keys: Sequence[bytes]) -> Array:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, _KEY_BYTES)


def _keys(shard: Any) -> list[bytes]:
    return [key.tobytes() for key in shard.get_tensor("keys")]


def _write(path: Path, tensors: dict[str, Array], metadata: dict[str, str] | None = None) -> None:
    """Write a file so that it has its name only when all of it is on the disk."""
    unfinished = path.with_suffix(".partial")
    with unfinished.open("wb") as file:
        file.write(save(tensors, metadata))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / _HEADER_FILE
    try:
        header: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(
            f"cannot be read ({error})", where=str(path), mend="run the cache step again"
        ) from error
    return header


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise StoreError(
                f"holds logits with {name} {found.get(name)!r}, not {value!r}",
                where=str(folder),
                mend="use another folder, or delete this one",
            )
