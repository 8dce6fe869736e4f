"""A finished cache of teacher logits, read row by row in constant memory (`logits.shards` has its layout)."""

import json
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potstill.core.errors import DataError
from potstill.core.hashing import hash_file, hash_json
from potstill.core.keys import KeyNumbers
from potstill.logits.checked_files import ColumnFile, read_arrays
from potstill.logits.codecs import Codec, codec_of, describe
from potstill.logits.packing import Array, Block, decompress, ids_by_frequency
from potstill.logits.shards import (
    HEADER_FILE,
    INDEX_FILE,
    CachedRow,
    read_header,
    row_key,
    row_streams,
)
from potstill.losses.types import Sampled, Sparse

__all__ = ["LogitCache"]

# What is kept of a shard between reads (its ids by frequency, where its blocks lie) is about 100 KB.
_OPEN_SHARDS, _UNPACKED_BLOCKS = 64, 8
_MASS_BINS = 10_000


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
        self._index = ColumnFile(folder / INDEX_FILE)
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
        if not (folder / INDEX_FILE).is_file():
            raise DataError(
                "holds no finished cache of teacher logits",
                where=str(folder),
                expected=f"the folder of a cache step, with {HEADER_FILE} and {INDEX_FILE}",
                mend="run the cache step; an interrupted one goes on where it stopped",
            )
        header = read_header(folder)
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
    def digest(self) -> str:
        """What tells this cache from others: whose logits it holds, as what, and where each row's lie."""
        return hash_json([self.description, hash_file(self.folder / INDEX_FILE)])

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
            read_arrays(self.folder / name)
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


class _Shard:
    """An open shard: which id each number stands for, and where its blocks lie."""

    def __init__(self, path: Path, codec: Codec, *, check: bool) -> None:
        self._path, self._streams = path, row_streams(codec)
        tensors = read_arrays(path, None if check else {"frequency_classes", "frame_bytes"})
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
