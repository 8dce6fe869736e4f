"""Sealed shards and their index: they resume after a kill and refuse what does not belong."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from potstill.core.errors import DataError, StoreError
from potstill.core.keys import KeyNumbers
from potstill.logits import checked_files
from potstill.logits.checked_files import read_arrays
from potstill.logits.codecs import TopK
from potstill.logits.logit_cache import LogitCache
from potstill.logits.shards import CachedRow, write_index

from .caches import CODEC, V, equal, kept_of, row_of, write_cache, writer_of


def _bytes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_token_id_past_the_vocabulary_is_refused_rather_than_wrapped(tmp_path: Path) -> None:
    row = CachedRow([1, 2**16 + 1, 3], [0, 1, 1], held_out=False, record_id="record-7")
    with pytest.raises(DataError, match=rf"record record-7: token id {2**16 + 1} is past the vocabulary"):
        writer_of(tmp_path / "cache").append(row, kept_of(row))


def test_pitfall_17_a_killed_writer_goes_on_after_its_last_sealed_shard_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    rows = [row_of(number) for number in range(10)]
    write_cache(tmp_path / "whole", rows)

    killed = writer_of(tmp_path / "killed")
    for row in rows[:7]:
        killed.append(row, kept_of(row))
    assert len(list((tmp_path / "killed").glob("shard-*"))) == 1
    del killed  # what it held in memory is gone
    (tmp_path / "killed" / "shard-000-00009.partial").write_bytes(b"half a shard")

    again = writer_of(tmp_path / "killed")
    assert [row.key in again for row in rows] == [True] * 4 + [False] * 6
    write_cache(tmp_path / "killed", rows)
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.partial"))


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = writer_of(tmp_path / "cache")
    writer.append(row_of(1), kept_of(row_of(1)))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.seal()
    assert [path.name for path in (tmp_path / "cache").glob("shard-*")] == ["shard-000-00000.partial"]


def test_several_writers_fill_one_cache(tmp_path: Path) -> None:
    rows = [row_of(number) for number in range(9)]
    writers = [writer_of(tmp_path / "cache", writer=number) for number in range(2)]
    for number, row in enumerate(rows):
        writers[number % 2].append(row, kept_of(row))
    # A writer that starts removes its own leftovers, never another's unfinished file.
    (tmp_path / "cache" / "shard-001-00009.partial").write_bytes(b"being written")
    writer_of(tmp_path / "cache", writer=0)
    assert (tmp_path / "cache" / "shard-001-00009.partial").exists()
    for writer in writers:
        writer.seal()
    write_index(tmp_path / "cache", rows)
    cache = LogitCache.open(tmp_path / "cache")
    assert [cache.row(number) for number in range(9)] == rows


def test_an_index_holds_the_rows_in_order_and_is_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_files, "_READ_ROWS", 4)
    rows = [row_of(number, response=1 + number % 7) for number in range(30)] + [row_of(3)]
    names = [f"rècord {'x' * (number % 5)}{number}" for number in range(len(rows))]
    rows = [
        CachedRow(one.token_ids, one.mask, one.held_out, name) for one, name in zip(rows, names, strict=True)
    ]
    cache = write_cache(tmp_path / "cache", rows)
    tensors = read_arrays(tmp_path / "cache" / "index.safetensors")
    assert [key.tobytes() for key in tensors["keys"]] == [row.key for row in rows]
    joined = "".join(names).encode()
    assert tensors["record_ids"].tobytes() == joined
    assert tensors["record_id_ends"][-1] == len(joined)
    assert [cache.row(number) for number in range(-1, 30)] == [rows[-1], *rows[:30]]
    with pytest.raises(IndexError):
        cache.row(31)
    assert cache.find(rows[3].token_ids, rows[3].mask) == 3, "the first of equal rows"


def test_of_a_row_that_two_writers_have_stored_the_last_counts(tmp_path: Path) -> None:
    row, kept = row_of(1), [kept_of(row_of(number)) for number in (1, 2)]
    for writer, quantities in enumerate(kept):
        made = writer_of(tmp_path / "cache", writer=writer)
        made._keys = KeyNumbers()  # as if both had begun before the other stored it
        made.append(row, quantities)
        made.seal()
    write_index(tmp_path / "cache", [row])
    found = LogitCache.open(tmp_path / "cache").signal(0, 1.0)
    assert equal(found, CODEC.decode(CODEC.pack(kept[1]), 1.0))
    assert not equal(found, CODEC.decode(CODEC.pack(kept[0]), 1.0))


_FILL = """
import sys
from pathlib import Path
from tests.unit.logits.caches import kept_of, row_of, writer_of
writer = writer_of(Path(sys.argv[1]), writer=int(sys.argv[2]))
for number in range(int(sys.argv[2]), 40, 2):
    if row_of(number).key not in writer:
        writer.append(row_of(number), kept_of(row_of(number)))
writer.seal()
"""


def test_several_processes_fill_one_cache_at_once_and_several_workers_read_it(tmp_path: Path) -> None:
    folder, rows = tmp_path / "cache", [row_of(number) for number in range(40)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
    filling = [
        subprocess.Popen([sys.executable, "-c", _FILL, str(folder), str(number)], env=environment)
        for number in range(2)
    ]
    assert [process.wait(60) for process in filling] == [0, 0]
    write_index(folder, rows)
    cache = LogitCache.open(folder)
    wanted = [cache.signal(number).top_ids.tolist() for number in range(40)]
    # Workers are forked with open state in memory, as a data loader's are where that is the default.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside other threads
        with multiprocessing.get_context("fork").Pool(2) as pool:
            found = pool.map(cache.signal, [*range(39, -1, -1)], chunksize=3)
    assert [signal.top_ids.tolist() for signal in reversed(found)] == wanted


def test_rows_longer_than_a_shard_get_one_of_their_own(tmp_path: Path) -> None:
    rows = [row_of(1, response=50), row_of(2, response=60)]
    cache = write_cache(tmp_path / "cache", rows)
    assert [cache.row(number) for number in range(2)] == rows
    assert cache.signal(1, 1.0).ids_NK.shape == (60, 4)


def test_a_writer_with_other_settings_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", [row_of(1)])
    with pytest.raises(StoreError, match="holds logits with k 4, not 5"):
        writer_of(tmp_path / "cache", codec=TopK(5, V, (1.0, 2.0)))


def test_an_index_of_rows_that_were_never_captured_is_refused(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "cache")
    writer.append(row_of(1), kept_of(row_of(1)))
    writer.seal()
    with pytest.raises(DataError, match=r"row 1 \(record record-2\) is in no shard"):
        write_index(tmp_path / "cache", [row_of(1), row_of(2)])


def test_a_deleted_shard_is_made_again_and_no_other_is_lost(tmp_path: Path) -> None:
    rows = [row_of(number) for number in range(10)]
    wanted = [write_cache(tmp_path / "cache", rows).signal(number).top_ids.tolist() for number in range(10)]
    (tmp_path / "cache" / "shard-000-00001.safetensors").unlink()
    cache = write_cache(tmp_path / "cache", rows)
    assert [cache.signal(number).top_ids.tolist() for number in range(10)] == wanted
    assert len(list((tmp_path / "cache").glob("shard-*"))) == 3
