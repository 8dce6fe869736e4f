"""Top-k caches as one HDF5 file, as older offline-distillation scripts write and read them.

    attributes        k, vocab_size, model, tokenizer (hash of its vocabulary), temperatures,
                      values: "log_probs" or "logits"
    top_k_ids         [N, k]  int32, each supervised token's likeliest ids, the likeliest first
    top_k_values      [N, k]  float16, their log-probabilities at T = 1, or raw logits
    log_tail          [N, T]  float32, log of the mass of all other ids at each temperature
    logsumexp         [N, T]  float32, of logits / T
    lengths           [R]     int64, supervised tokens of each row: row r has the next lengths[r] of the N
    token_ids         [tokens] int32, the ids of all rows, one row behind the other
    token_lengths     [R]     int64, tokens of each row
    loss_mask         [tokens] uint8, 1 for each supervised token
    held_out, record_ids  [R]  whether a row is held out, and which record it is

Everything is compressed by gzip. On import log_tail may be missing where T = 1 is the only temperature,
logsumexp where the values are log-probabilities, held_out and record_ids always.

Shapes: N supervised tokens, R rows, T temperatures, K kept ids, V vocabulary.
"""

import math
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from potstill.core.errors import DataError
from potstill.core.hashing import hash_file
from potstill.core.store import replacing, wait_for_disk
from potstill.logits.codecs import TopK, tail_odds_left
from potstill.logits.logit_cache import LogitCache
from potstill.logits.packing import Array
from potstill.logits.shards import CachedRow, ShardWriter, prepare_import, write_index
from potstill.losses.divergences import log1mexp
from potstill.losses.types import Sampled, Sparse

if TYPE_CHECKING:
    import h5py

__all__ = ["export_hdf5", "import_hdf5", "reconstruct"]

_CHUNK_TOKENS, _GZIP_LEVEL = 1024, 4
# float16 logits of up to 128 are off by 1/32.
_ROUNDING = 0.1
_NEEDED_DATA = ("top_k_ids", "top_k_values", "lengths", "token_ids", "token_lengths", "loss_mask")
_OPTIONAL_DATA = ("log_tail", "logsumexp", "held_out", "record_ids")
_LONGEST_ROW = 2**31
# NumPy's letters for types; all others are whole numbers or truth values.
_KINDS = {"record_ids": "OS", "top_k_values": "fiu", "log_tail": "fiu", "logsumexp": "fiu"}
_NEEDED_ATTRIBUTES = ("k", "vocab_size", "model", "tokenizer", "temperatures", "values")


def reconstruct(signal: Sparse, vocabulary_size: int) -> Tensor:
    """Log-probabilities over the whole vocabulary, NV: the kept ones as they are, the tail spread evenly.

    What each of the other ids had is not known; evenly is the choice that claims least.
    """
    tokens, kept = signal.ids_NK.shape
    others = vocabulary_size - kept
    even_N1 = signal.log_tail_N[:, None] - (math.log(others) if others else math.inf)
    return even_N1.expand(tokens, vocabulary_size).scatter(-1, signal.ids_NK, signal.log_probs_NK)


def export_hdf5(cache: LogitCache, path: Path) -> None:
    """Write a top-k cache as one file, in constant memory; the file has its name only once it is whole.

    Raises DataError for a cache of another codec, and where h5py is not installed.
    """
    codec = cache.codec
    if not isinstance(codec, TopK):
        raise DataError(
            f"a cache of codec {codec.name} has no top-k values",
            where=str(cache.folder),
            expected="codec topk",
        )
    tokens, supervised = int(cache.lengths.sum()), int(cache.supervised.sum())
    temperatures = codec.temperatures
    with _new_file(path) as file:
        file.attrs.update(k=codec.k, vocab_size=codec.vocabulary_size, values="log_probs")
        file.attrs.update(model=cache.model, tokenizer=cache.tokenizer, temperatures=temperatures)

        def dataset(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
            chunks = (max(1, min(shape[0], _CHUNK_TOKENS)), *shape[1:])
            return file.create_dataset(
                name, shape, dtype, chunks=chunks, compression="gzip", compression_opts=_GZIP_LEVEL
            )

        data = {
            "top_k_ids": dataset("top_k_ids", (supervised, codec.k), "<i4"),
            "top_k_values": dataset("top_k_values", (supervised, codec.k), "<f2"),
            "log_tail": dataset("log_tail", (supervised, len(temperatures)), "<f4"),
            "logsumexp": dataset("logsumexp", (supervised, len(temperatures)), "<f4"),
            "token_ids": dataset("token_ids", (tokens,), "<i4"),
            "loss_mask": dataset("loss_mask", (tokens,), "|u1"),
        }
        dataset("lengths", (len(cache),), "<i8")[:] = cache.supervised
        dataset("token_lengths", (len(cache),), "<i8")[:] = cache.lengths
        dataset("held_out", (len(cache),), "|u1")[:] = cache.held_out
        record_ids = []
        start = token_start = 0
        for numbers in _row_groups(cache.supervised):
            rows = [cache.row(number) for number in numbers]
            record_ids += [row.record_id for row in rows]
            signals = [_sparse(cache.signals(numbers, temperature)) for temperature in temperatures]
            found: dict[str, Array] = {
                "top_k_ids": signals[0].ids_NK.numpy(),
                "top_k_values": signals[temperatures.index(1.0)].log_probs_NK.numpy(),
                "log_tail": np.stack([signal.log_tail_N.numpy() for signal in signals], -1),
                "logsumexp": cache.logsumexp(numbers),
            }
            for name, values in found.items():
                data[name][start : start + len(values)] = values
            start += len(found["log_tail"])
            for name, parts in (
                ("token_ids", [row.token_ids for row in rows]),
                ("loss_mask", [row.mask for row in rows]),
            ):
                joined = np.concatenate(parts)
                data[name][token_start : token_start + len(joined)] = joined
            token_start += len(joined)
        file.create_dataset("record_ids", data=[one.encode("utf-8") for one in record_ids])


def import_hdf5(path: Path, folder: Path) -> LogitCache:
    """Make a cache of a file's logits in a new folder; taken up again where it was interrupted.

    Raises StoreError for a folder that holds anything but an import of this very file. Raises DataError, by
    name, for an attribute or data set that is missing or does not fit the others, and by row for ids that are
    not in the vocabulary or twice in a token's, for log-probabilities past 0, and for NaN.
    """
    with _reading(path):
        opened = _h5py().File(path, "r")
    with opened as file:
        with _reading(path):
            _check(file, path)
            attributes = {name: file.attrs[name] for name in _NEEDED_ATTRIBUTES}
            lengths, token_lengths = file["lengths"][:].astype(int), file["token_lengths"][:].astype(int)
            held_out = file["held_out"][:] if "held_out" in file else np.zeros(len(lengths), dtype=bool)
            names = _record_ids(file, path) if "record_ids" in file else None
        temperatures = tuple(float(one) for one in np.atleast_1d(attributes["temperatures"]))
        codec = TopK(int(attributes["k"]), int(attributes["vocab_size"]), temperatures)
        file_hash = hash_file(path)
        prepare_import(folder, path, file_hash)
        writer = ShardWriter(
            folder,
            codec,
            tokenizer=str(attributes["tokenizer"]),
            model=str(attributes["model"]),
            imported=file_hash,
        )
        starts, token_starts = lengths.cumsum() - lengths, token_lengths.cumsum() - token_lengths
        rows = []
        for number, (start, count) in enumerate(zip(starts, lengths, strict=True)):
            where = f"{path}, row {number}"
            part = slice(token_starts[number], token_starts[number] + token_lengths[number])
            mask = _values(file, "loss_mask", part).astype(np.uint8)
            if mask.sum() != count or count == 0 or mask[0] or mask.max() > 1:
                raise DataError(
                    f"`lengths` says {count} supervised tokens, `loss_mask` {mask.sum()}",
                    where=where,
                    expected="at least one, as many in both, and not the row's first token",
                )
            name = names[number] if names else f"row-{number}"
            ids = array("I", _ids(file, "token_ids", part, codec, where).astype(np.uint32).tobytes())
            row = CachedRow(ids, bytes(mask), bool(held_out[number]), name)
            rows.append(row)
            if row.key not in writer:
                of_row = slice(start, start + count)
                found = _quantities(file, codec, of_row, where, raw=attributes["values"] == "logits")
                writer.append(row, found, where=where)
    writer.seal()
    write_index(folder, rows)
    return LogitCache.open(folder)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Around what opens or reads the file and does nothing else: DataError where it is none, or damaged."""
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(f"cannot be read as HDF5 ({error})", where=str(path)) from error


def _values(file: "h5py.File", name: str, part: slice) -> Array:
    with _reading(Path(file.filename)):
        found: Array = file[name][part]
    return found


def _record_ids(file: "h5py.File", path: Path) -> list[str]:
    try:
        names = [one.decode("utf-8") for one in file["record_ids"][:]]
    except (AttributeError, UnicodeDecodeError) as error:
        raise DataError(f"`record_ids` holds what is no text ({error})", where=str(path)) from error
    if not all(names):
        raise DataError("`record_ids` holds an empty one", where=str(path), expected="a name for each row")
    return names


def _ids(file: "h5py.File", name: str, part: slice, codec: TopK, where: str) -> Array:
    ids = _values(file, name, part)
    outside = ids[(ids < 0) | (ids >= codec.vocabulary_size)]
    if outside.size:
        raise DataError(
            f"`{name}` holds {outside[0]}",
            where=where,
            expected=f"ids of 0 to {codec.vocabulary_size - 1}, as the attribute 'vocab_size' says",
            mend="correct the file or its 'vocab_size', or cache the logits again",
        )
    return ids


def _quantities(file: "h5py.File", codec: TopK, part: slice, where: str, *, raw: bool) -> dict[str, Tensor]:
    """What the codec packs, of some tokens of a file, whose values may be `raw` logits."""
    values_NK = torch.from_numpy(_values(file, "top_k_values", part).astype(np.float64))
    shape = (len(values_NK), len(codec.temperatures))
    logsumexp_NT = torch.full(shape, math.nan, dtype=torch.float64)
    if "logsumexp" in file:
        logsumexp_NT = torch.from_numpy(_values(file, "logsumexp", part).astype(np.float64))
    one = codec.temperatures.index(1.0)
    if raw:
        values_NK -= logsumexp_NT[:, one : one + 1]
    if (highest := float(values_NK.max())) > _ROUNDING:
        raise DataError(
            f"`top_k_values` holds the log-probability {highest:.3g}",
            where=where,
            expected="at most 0, but for rounding",
            mend="of raw logits, state values: 'logits' and give their `logsumexp`",
        )
    if "log_tail" in file:
        log_tail_NT = torch.from_numpy(_values(file, "log_tail", part).astype(np.float64))
        tail_odds_NT = log_tail_NT - log1mexp(log_tail_NT)
    else:
        tail_odds_NT = tail_odds_left(values_NK)
    values_NK, order_NK = values_NK.sort(stable=True, dim=-1, descending=True)
    ids_NK = torch.from_numpy(_ids(file, "top_k_ids", part, codec, where).astype(np.int64))
    if (ids_NK.sort(-1).values.diff(dim=-1) == 0).any():
        raise DataError(
            "`top_k_ids` holds an id twice for a token",
            where=where,
            expected=f"{codec.k} distinct ids for each token",
            mend="correct the file, or cache the logits again",
        )
    return {
        "ids": ids_NK.gather(-1, order_NK),
        "log_probs": values_NK.clamp(max=0.0),
        "logsumexp": logsumexp_NT,
        "tail_odds": tail_odds_NT,
    }


def _check(file: "h5py.File", path: Path) -> None:
    for what, expected in _faults(file):
        raise DataError(
            what,
            where=str(path),
            expected=expected,
            mend="add it to the file (its layout is in docs/how-to/logit-distillation.md), or cache the "
            "logits again",
        )


def _faults(file: "h5py.File") -> Iterator[tuple[str, str]]:
    """What a file lacks, and what is expected in its place."""
    for name in _NEEDED_ATTRIBUTES:
        if name not in file.attrs:
            yield f"the attribute {name!r} is missing", f"the attributes {', '.join(_NEEDED_ATTRIBUTES)}"
    for name in _NEEDED_DATA:
        if name not in file:
            yield f"the data set {name!r} is missing", f"the data sets {', '.join(_NEEDED_DATA)}"
    for name in (*_NEEDED_DATA, *_OPTIONAL_DATA):
        if name in file:
            yield from _no_numbers(file, name)
    yield from _wrong_attributes(file)
    values, temperatures = file.attrs["values"], np.atleast_1d(file.attrs["temperatures"]).tolist()
    if values not in ("log_probs", "logits"):
        yield f"the attribute 'values' is {values!r}", "'log_probs' or 'logits'"
    if values == "logits" and "logsumexp" not in file:
        yield "the data set 'logsumexp' is missing", "the normaliser that makes log-probabilities of logits"
    if len(temperatures) > 1 and "log_tail" not in file:
        yield "the data set 'log_tail' is missing", "the tail at each of several temperatures"
    yield from _wrong_shapes(file, len(temperatures))


def _no_numbers(file: "h5py.File", name: str) -> Iterator[tuple[str, str]]:
    """What keeps a data set from being an array of numbers, or of texts, in this very file."""
    h5py = _h5py()
    data, kinds = file[name], _KINDS.get(name, "iub")
    expected = {"OS": "an array of texts", "fiu": "an array of numbers"}.get(
        kinds, "an array of whole numbers"
    )
    if not isinstance(data, h5py.Dataset) or data.dtype.kind not in kinds or data.ndim == 0:
        yield f"the data set {name!r} is {data}", expected
    # Links and external storage would read whatever file the sender of this one names.
    elif not isinstance(file.get(name, getlink=True), h5py.HardLink) or data.is_virtual or data.external:
        yield f"the data set {name!r} lies in another file or under another name", "its values in this file"


def _wrong_attributes(file: "h5py.File") -> Iterator[tuple[str, str]]:
    for name in ("k", "vocab_size"):
        if not isinstance(file.attrs[name], int | np.integer):
            yield f"the attribute {name!r} is {file.attrs[name]!r}", "a whole number"
    if not 1 <= file.attrs["k"] <= file.attrs["vocab_size"] < 2**31:
        yield f"the attribute 'k' is {file.attrs['k']}", f"1 to vocab_size ({file.attrs['vocab_size']}) ids"
    for name in ("model", "tokenizer", "values"):
        if not isinstance(file.attrs[name], str):
            yield f"the attribute {name!r} is {file.attrs[name]!r}", "a text"
    temperatures = np.atleast_1d(file.attrs["temperatures"])
    if temperatures.dtype.kind not in "fiu" or temperatures.ndim != 1 or not (temperatures > 0).all():
        yield f"the attribute 'temperatures' is {temperatures}", "numbers above 0"
    if 1.0 not in temperatures or np.isinf(temperatures).any():
        yield f"the attribute 'temperatures' is {temperatures.tolist()}", "1 among them, that of the values"


def _wrong_shapes(file: "h5py.File", temperatures: int) -> Iterator[tuple[str, str]]:
    for name in ("lengths", "token_lengths"):
        lengths = file[name]
        if lengths.ndim != 1 or not len(lengths) or lengths[:].min() < 1 or lengths[:].max() > _LONGEST_ROW:
            yield f"the data set {name!r} has no length of a row", "a whole number above 0 for each row"
    tokens, k, total = (
        int(file["lengths"][:].astype(np.int64).sum()),
        int(file.attrs["k"]),
        int(file["token_lengths"][:].astype(np.int64).sum()),
    )
    wanted = {
        "top_k_ids": (tokens, k),
        "top_k_values": (tokens, k),
        "log_tail": (tokens, temperatures),
        "logsumexp": (tokens, temperatures),
        "token_ids": (total,),
        "loss_mask": (total,),
        "token_lengths": file["lengths"].shape,
        "held_out": file["lengths"].shape,
        "record_ids": file["lengths"].shape,
    }
    for name, shape in wanted.items():
        if name in file and file[name].shape != shape:
            yield f"the data set {name!r} has the shape {file[name].shape}", f"{shape}, as the others say"


def _sparse(signal: Sparse | Sampled) -> Sparse:
    assert isinstance(signal, Sparse)
    return signal


def _row_groups(supervised: Array) -> Iterator[range]:
    """Rows in order, about a chunk of supervised tokens at a time."""
    first = count = 0
    for number, tokens in enumerate(supervised.tolist()):
        count += tokens
        if count >= _CHUNK_TOKENS:
            yield range(first, number + 1)
            first, count = number + 1, 0
    if first < len(supervised):
        yield range(first, len(supervised))


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            "HDF5 needs h5py, which is not installed", mend='install it with `pip install "potstill[hdf5]"`'
        ) from error
    return h5py


@contextmanager
def _new_file(path: Path) -> "Iterator[h5py.File]":
    with replacing(path) as unfinished:
        with _h5py().File(unfinished, "w") as file:
            yield file
        wait_for_disk(unfinished)
