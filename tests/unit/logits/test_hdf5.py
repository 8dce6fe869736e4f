"""HDF5 files of top-k logits: out and in again, from other scripts, never half written.

Shapes: N tokens, V vocabulary, K kept ids.
"""

import math
import random
import sys
from array import array
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from potstill.core.errors import DataError
from potstill.logits.codecs import Codec, Draws, TopK
from potstill.logits.hdf5 import export_hdf5, import_hdf5, reconstruct
from potstill.logits.logit_cache import LogitCache
from potstill.logits.shards import CachedRow, ShardWriter, write_index
from potstill.losses.types import Sparse

from .caches import assert_same_signal

V, K = 40, 6


def _row(number: int) -> CachedRow:
    chance = random.Random(number)
    ids = [chance.randrange(V) for _ in range(4 + number % 5)]
    return CachedRow(ids, [0, 0] + [1] * (len(ids) - 2), number % 3 == 0, f"récord-{number}")


def _logits(row: CachedRow) -> Tensor:
    seed = int.from_bytes(row.key[:4], "big")
    return 3 * torch.randn(sum(row.mask), V, generator=torch.Generator().manual_seed(seed)) + 5


@pytest.fixture
def rows() -> list[CachedRow]:
    """Fifty rows, the last of which is the first again."""
    return [*map(_row, range(50)), _row(0)]


def _write(folder: Path, rows: list[CachedRow], codec: Codec) -> LogitCache:
    folder.mkdir()
    writer = ShardWriter(folder, codec, tokenizer="tok", model="teacher", shard_tokens=50)
    for row in rows:
        if row.key not in writer:
            logits_NV = _logits(row)
            encode = codec.encoder([row.key], [len(logits_NV)])
            writer.append(row, encode(logits_NV, slice(0, len(logits_NV))))
    writer.seal()
    write_index(folder, rows)
    return LogitCache.open(folder)


@pytest.fixture
def cache(tmp_path: Path, rows: list[CachedRow]) -> LogitCache:
    """A cache of two temperatures."""
    return _write(tmp_path / "cache", rows, TopK(K, V, (1.0, 2.0)))


def _foreign(path: Path, rows: list[CachedRow], *, values: str = "log_probs", **changes: Any) -> None:
    """A file as another script would write it: no more than is needed."""
    logits_NV = torch.cat([_logits(row) for row in rows])
    top = logits_NV.topk(K, -1) if values == "logits" else logits_NV.log_softmax(-1).topk(K, -1)
    shuffled = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    data: dict[str, Any] = {
        "top_k_ids": top.indices[:, shuffled].numpy(),
        "top_k_values": top.values[:, shuffled].numpy(),
        "lengths": [sum(row.mask) for row in rows],
        "token_ids": np.concatenate([row.token_ids for row in rows]),
        "token_lengths": [len(row.token_ids) for row in rows],
        "loss_mask": np.concatenate([row.mask for row in rows]),
    }
    if values == "logits":
        data["logsumexp"] = logits_NV.logsumexp(-1, keepdim=True).numpy()
    attributes: dict[str, Any] = {"k": K, "vocab_size": V, "model": "m", "tokenizer": "tok"}
    attributes |= {"temperatures": 1.0, "values": values}
    with h5py.File(path, "w") as file:
        for name, value in (data | changes).items():
            if name in attributes:
                attributes[name] = value
            elif value is not None:
                file[name] = value
        file.attrs.update({name: value for name, value in attributes.items() if value is not None})


def test_what_is_exported_comes_back_within_the_codecs_error(
    cache: LogitCache, rows: list[CachedRow], tmp_path: Path
) -> None:
    export_hdf5(cache, tmp_path / "logits.h5")
    again = import_hdf5(tmp_path / "logits.h5", tmp_path / "again")
    assert again.description == cache.description
    assert len(again) == len(rows)
    assert np.allclose(again.logsumexp(range(51)), cache.logsumexp(range(51)))
    for number, row in enumerate(rows):
        assert again.row(number) == row
        for temperature in (1.0, 2.0):
            found, wanted = again.signal(number, temperature), cache.signal(number, temperature)
            assert isinstance(found, Sparse)
            assert isinstance(wanted, Sparse)
            assert torch.equal(found.ids_NK.sort(-1).values, wanted.ids_NK.sort(-1).values)
            limit = 2 * (1 + wanted.log_probs_NK.abs().max().item() * temperature) / 512
            torch.testing.assert_close(found.log_probs_NK, wanted.log_probs_NK, rtol=0, atol=limit)
            torch.testing.assert_close(found.log_tail_N, wanted.log_tail_N, rtol=0, atol=2**-9)


def test_the_file_is_what_its_description_says_and_compressed(cache: LogitCache, tmp_path: Path) -> None:
    export_hdf5(cache, tmp_path / "logits.h5")
    with h5py.File(tmp_path / "logits.h5") as file:
        assert file["top_k_ids"].shape == (int(cache.supervised.sum()), K)
        assert file["top_k_values"].dtype == np.float16
        assert (file.attrs["k"], file.attrs["vocab_size"], file.attrs["model"]) == (K, V, "teacher")
        assert file.attrs["temperatures"].tolist() == [1.0, 2.0]
        assert all(
            file[name].compression == "gzip"
            for name in ("top_k_ids", "top_k_values", "log_tail", "token_ids")
        )
        start = int(cache.supervised[:7].sum())
        signal = cache.signal(7)
        assert isinstance(signal, Sparse)
        assert file["top_k_ids"][start].tolist() == signal.ids_NK[0].tolist()


@pytest.mark.parametrize("values", ["log_probs", "logits"])
def test_a_file_of_another_script_is_a_cache_of_the_same_distributions(
    tmp_path: Path, rows: list[CachedRow], values: str
) -> None:
    _foreign(tmp_path / "other.h5", rows, values=values)
    found = import_hdf5(tmp_path / "other.h5", tmp_path / "found")
    wanted = _write(tmp_path / "wanted", rows, TopK(K, V))
    for number in range(len(rows)):
        assert found.row(number).token_ids == rows[number].token_ids
        assert_same_signal(found.signal(number), wanted.signal(number), log_probs=0.03, tail=2**-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k_values": None}, "the data set 'top_k_values' is missing"),
        ({"loss_mask": None}, "the data set 'loss_mask' is missing"),
        ({"tokenizer": None}, "the attribute 'tokenizer' is missing"),
        ({"temperatures": 2.0}, "'temperatures' is \\[2.0\\]"),
        ({"temperatures": [1.0, 2.0]}, "the data set 'log_tail' is missing"),
        ({"k": 5}, "'top_k_ids' has the shape"),
        ({"values": "logits", "logsumexp": None}, "the data set 'logsumexp' is missing"),
        ({"loss_mask": "all ones"}, "row 0: `lengths` says 2 supervised tokens, `loss_mask` 4"),
    ],
)
def test_a_file_without_what_is_needed_is_refused_by_name(
    tmp_path: Path, rows: list[CachedRow], change: dict[str, Any], message: str
) -> None:
    if change.get("loss_mask") == "all ones":
        change = {"loss_mask": np.ones(sum(len(row.token_ids) for row in rows), dtype=np.uint8)}
    _foreign(tmp_path / "other.h5", rows, **change)
    with pytest.raises(DataError, match=message):
        import_hdf5(tmp_path / "other.h5", tmp_path / "found")


def _changed(path: Path, name: str, at: int | tuple[int, int], value: float) -> None:
    with h5py.File(path, "r+") as file:
        file[name][at] = value


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("top_k_ids", 1, V, rf"`top_k_ids` holds {V}(.|\n)*0 to {V - 1}"),
        ("top_k_ids", 1, -1, "`top_k_ids` holds -1"),
        ("top_k_values", 2, math.nan, "token 0 of those kept has no distribution"),
        ("log_tail", 0, math.nan, "token 0 of those kept has no distribution"),
        ("log_tail", 0, 0.5, "token 0 of those kept has no distribution"),
        ("token_ids", None, V, f"`token_ids` holds {V}"),
        ("token_ids", None, 2**32 + 1, f"`token_ids` holds {2**32 + 1}"),
    ],
)
def test_content_that_no_teacher_gives_is_refused_by_row(
    tmp_path: Path, rows: list[CachedRow], name: str, column: int | None, value: float, message: str
) -> None:
    tail = np.full((sum(sum(row.mask) for row in rows), 1), -3.0)
    _foreign(tmp_path / "other.h5", rows, log_tail=tail)
    if column is None:
        at: int | tuple[int, int] = sum(len(row.token_ids) for row in rows[:3])
    else:
        at = sum(sum(row.mask) for row in rows[:3]), column
    _changed(tmp_path / "other.h5", name, at, value)
    with pytest.raises(DataError, match=rf"other\.h5, row 3: {message}"):
        import_hdf5(tmp_path / "other.h5", tmp_path / "found")


def test_an_id_kept_twice_for_a_token_is_refused_by_row(tmp_path: Path, rows: list[CachedRow]) -> None:
    _foreign(tmp_path / "other.h5", rows)
    start = sum(sum(row.mask) for row in rows[:3])
    with h5py.File(tmp_path / "other.h5") as file:
        first = int(file["top_k_ids"][start, 0])
    _changed(tmp_path / "other.h5", "top_k_ids", (start, 4), first)
    with pytest.raises(DataError, match=r"other\.h5, row 3: `top_k_ids` holds an id twice for a token"):
        import_hdf5(tmp_path / "other.h5", tmp_path / "found")


def test_raw_logits_that_are_called_log_probabilities_are_refused_by_row(
    tmp_path: Path, rows: list[CachedRow]
) -> None:
    _foreign(tmp_path / "other.h5", rows, values="logits")
    with h5py.File(tmp_path / "other.h5", "r+") as file:
        file.attrs["values"] = "log_probs"
    with pytest.raises(DataError, match=r"row 0: `top_k_values` holds the log-probability \d+(.|\n)*logits"):
        import_hdf5(tmp_path / "other.h5", tmp_path / "found")


def test_rows_take_four_bytes_a_token_while_they_are_imported(
    tmp_path: Path, rows: list[CachedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    _foreign(tmp_path / "other.h5", rows)
    indexed: list[CachedRow] = []

    def spied(folder: Path, found: list[CachedRow]) -> None:
        indexed.extend(found)
        write_index(folder, found)

    monkeypatch.setattr("potstill.logits.hdf5.write_index", spied)
    import_hdf5(tmp_path / "other.h5", tmp_path / "found")
    assert [list(row.token_ids) for row in indexed] == [row.token_ids for row in rows]
    assert all(isinstance(row.token_ids, array) and row.token_ids.itemsize == 4 for row in indexed)


def test_what_is_no_hdf5_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.h5").write_text("no", encoding="utf-8")
    with pytest.raises(DataError, match=r"other\.h5: cannot be read as HDF5"):
        import_hdf5(tmp_path / "other.h5", tmp_path / "found")


@pytest.mark.parametrize("error", [KeyError("a column"), RuntimeError("out of memory"), OSError("no room")])
def test_what_fails_beside_the_reading_is_not_called_a_fault_of_the_file(
    tmp_path: Path, rows: list[CachedRow], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    _foreign(tmp_path / "other.h5", rows)
    monkeypatch.setattr(ShardWriter, "append", fails)
    with pytest.raises(type(error), match=str(error)):
        import_hdf5(tmp_path / "other.h5", tmp_path / "found")


def test_values_that_are_damaged_on_the_disk_are_a_fault_of_the_file(
    cache: LogitCache, tmp_path: Path
) -> None:
    path = tmp_path / "logits.h5"
    export_hdf5(cache, path)
    with h5py.File(path) as file:
        chunk = file["top_k_values"].id.get_chunk_info(0)
    with path.open("r+b") as written:
        written.seek(chunk.byte_offset)
        written.write(bytes(chunk.size))
    with pytest.raises(DataError, match=r"logits\.h5: cannot be read as HDF5"):
        import_hdf5(path, tmp_path / "again")


def test_pitfall_17_a_kill_in_the_middle_leaves_the_old_file_or_none(
    cache: LogitCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LogitCache, "logsumexp", killed)
    path = tmp_path / "logits.h5"
    with pytest.raises(KeyboardInterrupt):
        export_hdf5(cache, path)
    assert not path.exists()
    path.write_bytes(b"the old file")
    with pytest.raises(KeyboardInterrupt):
        export_hdf5(cache, path)
    assert path.read_bytes() == b"the old file"


def test_a_sample_is_not_exported_as_top_k(tmp_path: Path, rows: list[CachedRow]) -> None:
    cache = _write(tmp_path / "sampled", rows, Draws(20, V))
    with pytest.raises(DataError, match="codec sampled has no top-k values"):
        export_hdf5(cache, tmp_path / "logits.h5")


def test_without_h5py_the_error_says_what_to_install(
    cache: LogitCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"potstill\[hdf5\]"):
        export_hdf5(cache, tmp_path / "logits.h5")


@pytest.mark.parametrize("k", [1, 5, V])
def test_the_whole_vocabulary_has_the_kept_ids_as_they_are_and_the_tail_evenly(k: int) -> None:
    log_probs_NV = torch.randn(4, V).log_softmax(-1)
    kept_NK, ids_NK = log_probs_NV.topk(k, -1)
    tail_N = (1 - kept_NK.exp().sum(-1)).clamp(min=0)
    full_NV = reconstruct(Sparse(ids_NK, kept_NK, tail_N.log()), V)
    assert torch.equal(full_NV.gather(-1, ids_NK), kept_NK)
    torch.testing.assert_close(full_NV.exp().sum(-1), torch.ones(4))
    if k < V:
        others = [one for one in range(V) if one not in ids_NK[0].tolist()]
        assert full_NV[0, others].unique().tolist() == pytest.approx(
            [math.log(tail_N[0] / (V - k))], rel=1e-5
        )


def test_data_in_another_file_are_not_read(tmp_path: Path, rows: list[CachedRow]) -> None:
    path, other = tmp_path / "other.h5", tmp_path / "secret.h5"
    for file in (path, other):
        _foreign(file, rows)
    with h5py.File(path, "r+") as file:
        del file["token_ids"]
        file["token_ids"] = h5py.ExternalLink(str(other), "token_ids")
    with pytest.raises(DataError, match="'token_ids' lies in another file"):
        import_hdf5(path, tmp_path / "linked")
    with h5py.File(path, "r+") as file:
        del file["token_ids"]
        count = sum(len(row.token_ids) for row in rows)
        (tmp_path / "raw").write_bytes(bytes(4 * count))
        file.create_dataset("token_ids", (count,), "<i4", external=[(str(tmp_path / "raw"), 0, 4 * count)])
    with pytest.raises(DataError, match="'token_ids' lies in another file"):
        import_hdf5(path, tmp_path / "external")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_ids", "halves", "'token_ids' is .*"),
        ("top_k_ids", "halves", "'top_k_ids' is .*"),
        ("lengths", "negative", "'lengths' has no length of a row"),
        ("loss_mask", "twos", "`lengths` says"),
    ],
)
def test_arrays_of_the_wrong_kind_are_refused_and_not_rounded(
    tmp_path: Path, rows: list[CachedRow], name: str, value: str, message: str
) -> None:
    path = tmp_path / "other.h5"
    _foreign(path, rows)
    with h5py.File(path, "r+") as file:
        given = file[name][:]
        del file[name]
        file[name] = {"halves": given + 0.5, "negative": -given, "twos": given * 2}[value]
    with pytest.raises(DataError, match=message):
        import_hdf5(path, tmp_path / "found")
