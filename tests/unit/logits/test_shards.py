"""Sealed shards: what is written can be read, resumes after a kill, and refuses what does not belong."""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.numpy import save
from torch import Tensor

from potstill.core.errors import DataError, StoreError
from potstill.core.keys import KeyNumbers
from potstill.logits import shards
from potstill.logits.codecs import Codec, Draws, TopK
from potstill.logits.shards import CachedRow, LogitCache, ShardWriter, row_key, write_index
from potstill.losses.types import Sampled, Sparse, concatenate

V = 40
CODEC = TopK(4, V, (1.0, 2.0))


def _row(number: int, prompt: int = 3, response: int = 5) -> CachedRow:
    chance = random.Random(number)
    ids = [chance.randrange(V) for _ in range(prompt + response)]
    return CachedRow(ids, [0] * prompt + [1] * response, number % 5 == 0, f"record-{number}")


def _logits(row: CachedRow) -> Tensor:
    seed = int.from_bytes(row.key[:4], "big")
    return 3 * torch.randn(sum(row.mask), V, generator=torch.Generator().manual_seed(seed))


def _writer(folder: Path, writer: int = 0, codec: Codec = CODEC) -> ShardWriter:
    folder.mkdir(exist_ok=True)
    return ShardWriter(folder, codec, tokenizer="tok", model="model", writer=writer, shard_tokens=20)


def _kept(row: CachedRow, codec: Codec = CODEC) -> dict[str, Tensor]:
    logits_NV = _logits(row)
    return codec.encoder([row.key], [len(logits_NV)])(logits_NV, slice(0, len(logits_NV)))


def _write(folder: Path, rows: list[CachedRow], codec: Codec = CODEC) -> LogitCache:
    writer = _writer(folder, codec=codec)
    for row in rows:
        if row.key not in writer:
            writer.append(row, _kept(row, codec))
    writer.seal()
    write_index(folder, rows)
    return LogitCache.open(folder)


def _bytes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _equal(found: Sparse | Sampled, wanted: Sparse | Sampled) -> bool:
    return all(
        torch.equal(value, vars(wanted)[name])
        for name, value in vars(found).items()
        if isinstance(value, Tensor)
    )


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a shard, and fewer shards and blocks in memory than there are."""
    monkeypatch.setattr(shards, "_BLOCK_IDS", 40)
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 3)
    monkeypatch.setattr(shards, "_UNPACKED_BLOCKS", 2)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("codec", [CODEC, Draws(50, V, (2.0,))], ids=["topk", "sampled"])
def test_rows_and_signals_come_back_in_any_order(tmp_path: Path, codec: Codec) -> None:
    rows = [_row(number, response=1 + number % 7) for number in range(30)]
    cache = _write(tmp_path / "cache", rows, codec)
    order = list(range(30)) * 2
    random.Random(0).shuffle(order)
    for number in order:
        assert cache.row(number) == rows[number]
        for temperature in codec.temperatures:
            wanted = codec.decode(codec.pack(_kept(rows[number], codec)), temperature)
            assert _equal(cache.signal(number, temperature), wanted)
    assert cache.lengths.tolist() == [len(row.token_ids) for row in rows]
    assert cache.supervised.tolist() == [sum(row.mask) for row in rows]
    assert cache.held_out.tolist() == [row.held_out for row in rows]
    names = list((tmp_path / "cache").glob("shard-*"))
    assert len(names) > len(cache._shards) == shards._OPEN_SHARDS, "reading never lets a shard go"
    assert max(cache._shard(number).blocks for number in range(len(names))) > 1
    assert len(cache._blocks) == shards._UNPACKED_BLOCKS


@pytest.mark.parametrize("codec", [CODEC, Draws(50, V)], ids=["topk", "sampled"])
def test_the_signals_of_several_rows_are_those_of_each_cut_to_the_tokens_asked_for(
    tmp_path: Path, codec: Codec
) -> None:
    cache = _write(tmp_path / "cache", [_row(number) for number in range(6)], codec)
    found = cache.signals([4, 0, 4], tokens=[2, 5, 1])
    wanted = [cache.signal(4).rows(slice(0, 2)), cache.signal(0), cache.signal(4).rows(slice(0, 1))]
    joined: Sparse | Sampled = concatenate(wanted)
    assert found.top_ids.tolist() == joined.top_ids.tolist()
    values = (found.log_probs_NK, joined.log_probs_NK) if isinstance(found, Sparse) else None
    if isinstance(found, Sampled):
        width = found.shares_NK.shape[1]
        values = found.shares_NK, joined.shares_NK[:, :width]
        assert not joined.shares_NK[:, width:].any()
    assert values is not None
    assert torch.equal(*values)


def test_a_token_id_past_the_vocabulary_is_refused_rather_than_wrapped(tmp_path: Path) -> None:
    row = CachedRow([1, 2**16 + 1, 3], [0, 1, 1], held_out=False, record_id="record-7")
    with pytest.raises(DataError, match=rf"record record-7: token id {2**16 + 1} is past the vocabulary"):
        _writer(tmp_path / "cache").append(row, _kept(row))


def test_a_smaller_k_is_served(tmp_path: Path) -> None:
    cache = _write(tmp_path / "cache", [_row(1)])
    assert _equal(cache.signal(0, 2.0, k=2), CODEC.decode(CODEC.pack(_kept(_row(1))), 2.0, 2))


def test_an_equal_row_is_stored_once_and_read_at_both_positions(tmp_path: Path) -> None:
    first, other = _row(1), _row(2)
    again = CachedRow(first.token_ids, first.mask, True, "another record")
    cache = _write(tmp_path / "cache", [first, other, again])
    assert len(cache) == 3
    assert cache.row(2) == again
    assert torch.equal(cache.signal(2, 1.0).log_probs_NK, cache.signal(0, 1.0).log_probs_NK)
    stored = sum(len(shards._load(path)["keys"]) for path in (tmp_path / "cache").glob("shard-*"))
    assert stored == 2


def test_pitfall_6_rows_are_found_by_the_hash_of_their_content(tmp_path: Path) -> None:
    rows = [_row(number) for number in range(6)]
    cache = _write(tmp_path / "cache", rows)
    assert [cache.find(row.token_ids, row.mask) for row in reversed(rows)] == [5, 4, 3, 2, 1, 0]
    # The bytes of the ids and of the mask, not a process's salted hash.
    code = "from potstill.logits.shards import row_key; print(row_key([1, 70000, 2], [0, 1, 1]).hex())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == row_key([1, 70000, 2], [0, 1, 1]).hex()


def test_the_same_ids_with_another_mask_are_another_row(tmp_path: Path) -> None:
    row = _row(1)
    cache = _write(tmp_path / "cache", [row])
    with pytest.raises(DataError, match="no logits for a row of 8 tokens, 4 of them"):
        cache.find(row.token_ids, [0, 0, 0, 0, 1, 1, 1, 1])


def test_pitfall_14_a_row_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    cache = _write(tmp_path / "cache", [_row(1)])
    with pytest.raises(DataError, match="no logits for a row of 8 tokens, 5 of them supervised"):
        cache.find(_row(2).token_ids, _row(2).mask)


def test_pitfall_17_a_killed_writer_goes_on_after_its_last_sealed_shard_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    rows = [_row(number) for number in range(10)]
    _write(tmp_path / "whole", rows)

    killed = _writer(tmp_path / "killed")
    for row in rows[:7]:
        killed.append(row, _kept(row))
    assert len(list((tmp_path / "killed").glob("shard-*"))) == 1
    del killed  # what it held in memory is gone
    (tmp_path / "killed" / "shard-000-00009.partial").write_bytes(b"half a shard")

    again = _writer(tmp_path / "killed")
    assert [row.key in again for row in rows] == [True] * 4 + [False] * 6
    _write(tmp_path / "killed", rows)
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.partial"))


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = _writer(tmp_path / "cache")
    writer.append(_row(1), _kept(_row(1)))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.seal()
    assert [path.name for path in (tmp_path / "cache").glob("shard-*")] == ["shard-000-00000.partial"]


def test_several_writers_fill_one_cache(tmp_path: Path) -> None:
    rows = [_row(number) for number in range(9)]
    writers = [_writer(tmp_path / "cache", writer=number) for number in range(2)]
    for number, row in enumerate(rows):
        writers[number % 2].append(row, _kept(row))
    # A writer that starts removes its own leftovers, never another's unfinished file.
    (tmp_path / "cache" / "shard-001-00009.partial").write_bytes(b"being written")
    _writer(tmp_path / "cache", writer=0)
    assert (tmp_path / "cache" / "shard-001-00009.partial").exists()
    for writer in writers:
        writer.seal()
    write_index(tmp_path / "cache", rows)
    cache = LogitCache.open(tmp_path / "cache")
    assert [cache.row(number) for number in range(9)] == rows


def test_an_index_is_the_file_that_safetensors_would_write_of_whole_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_READ_ROWS", 4)
    rows = [_row(number, response=1 + number % 7) for number in range(30)] + [_row(3)]
    names = [f"rècord {'x' * (number % 5)}{number}" for number in range(len(rows))]
    rows = [
        CachedRow(one.token_ids, one.mask, one.held_out, name) for one, name in zip(rows, names, strict=True)
    ]
    cache = _write(tmp_path / "cache", rows)
    path = tmp_path / "cache" / "index.safetensors"
    tensors = shards._load(path)
    assert path.read_bytes() == save(tensors, {"sha256": shards._checksum(tensors)})
    assert [key.tobytes() for key in tensors["keys"]] == [row.key for row in rows]
    joined = "".join(names).encode()
    assert tensors["record_ids"].tobytes() == joined
    assert tensors["record_id_ends"][-1] == len(joined)
    assert [cache.row(number) for number in range(-1, 30)] == [rows[-1], *rows[:30]]
    with pytest.raises(IndexError):
        cache.row(31)
    assert cache.find(rows[3].token_ids, rows[3].mask) == 3, "the first of equal rows"


def test_of_a_row_that_two_writers_have_stored_the_last_counts(tmp_path: Path) -> None:
    row, kept = _row(1), [_kept(_row(number)) for number in (1, 2)]
    for writer, quantities in enumerate(kept):
        made = _writer(tmp_path / "cache", writer=writer)
        made._keys = KeyNumbers()  # as if both had begun before the other stored it
        made.append(row, quantities)
        made.seal()
    write_index(tmp_path / "cache", [row])
    found = LogitCache.open(tmp_path / "cache").signal(0, 1.0)
    assert _equal(found, CODEC.decode(CODEC.pack(kept[1]), 1.0))
    assert not _equal(found, CODEC.decode(CODEC.pack(kept[0]), 1.0))


@pytest.mark.parametrize("where", [0.3, 0.6, 0.99])
def test_an_index_that_is_damaged_is_refused(tmp_path: Path, where: float) -> None:
    _write(tmp_path / "cache", [_row(number) for number in range(9)])
    path = tmp_path / "cache" / "index.safetensors"
    whole = path.read_bytes()
    place = int(where * len(whole))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(DataError, match=r"index\.safetensors: is damaged"):
        LogitCache.open(tmp_path / "cache")
    path.write_bytes(whole[:place])
    with pytest.raises(DataError, match=r"index\.safetensors: is damaged"):
        LogitCache.open(tmp_path / "cache")


_FILL = """
import sys
from pathlib import Path
from tests.unit.logits.test_shards import _row, _writer, _kept
writer = _writer(Path(sys.argv[1]), writer=int(sys.argv[2]))
for number in range(int(sys.argv[2]), 40, 2):
    if _row(number).key not in writer:
        writer.append(_row(number), _kept(_row(number)))
writer.seal()
"""


def test_several_processes_fill_one_cache_at_once_and_several_workers_read_it(tmp_path: Path) -> None:
    folder, rows = tmp_path / "cache", [_row(number) for number in range(40)]
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
    rows = [_row(1, response=50), _row(2, response=60)]
    cache = _write(tmp_path / "cache", rows)
    assert [cache.row(number) for number in range(2)] == rows
    assert cache.signal(1, 1.0).ids_NK.shape == (60, 4)


def test_a_cache_can_be_handed_to_a_worker_process(tmp_path: Path) -> None:
    cache = _write(tmp_path / "cache", [_row(1), _row(2)])
    cache.signal(0, 1.0)
    assert cache._blocks
    other = pickle.loads(pickle.dumps(cache))
    assert not other._blocks
    assert torch.equal(other.signal(1, 2.0).log_probs_NK, cache.signal(1, 2.0).log_probs_NK)


def test_the_figures_are_over_the_stored_tokens(tmp_path: Path) -> None:
    rows = [_row(number) for number in range(40)]
    figures = _write(tmp_path / "cache", [*rows, rows[0]]).figures()
    kept = torch.cat([_logits(row).softmax(-1).topk(4, -1).values.sum(-1) for row in rows]).double()
    assert figures["mean_kept_mass"] == pytest.approx(kept.mean().item(), rel=1e-3)
    for percent in (1, 5, 50):
        wanted = kept.sort().values[200 * percent // 100 - 1].item()
        assert figures[f"kept_mass_p{percent:02d}"] == pytest.approx(wanted, abs=0.005)
    assert figures["mean_distinct_ids"] == 4
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("shard-*"))
    assert figures["bytes_per_token"] == size / 200


def test_the_figures_of_a_sample_count_its_distinct_ids(tmp_path: Path) -> None:
    rows, codec = [_row(number) for number in range(10)], Draws(20, V)
    figures = _write(tmp_path / "cache", rows, codec).figures()
    distinct = [len(drawn.unique()) for row in rows for drawn in _kept(row, codec)["drawn"]]
    assert figures["mean_distinct_ids"] == pytest.approx(sum(distinct) / len(distinct))
    assert "mean_kept_mass" not in figures


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [("other", r"another tokenizer \(tok\)(.|\n)*\(other\)"), ("tok", None), (None, None)],
)
def test_another_tokenizer_is_refused_by_name(
    tmp_path: Path, tokenizer: str | None, message: str | None
) -> None:
    _write(tmp_path / "cache", [_row(1)])
    if message is None:
        assert len(LogitCache.open(tmp_path / "cache", tokenizer=tokenizer)) == 1
    else:
        with pytest.raises(DataError, match=message):
            LogitCache.open(tmp_path / "cache", tokenizer=tokenizer)


def test_another_codec_is_refused_by_name(tmp_path: Path) -> None:
    _write(tmp_path / "cache", [_row(1)])
    header = tmp_path / "cache" / "cache.json"
    described = json.loads(header.read_text(encoding="utf-8"))
    header.write_text(json.dumps({**described, "codec_version": 9}), encoding="utf-8")
    with pytest.raises(DataError, match="its checksum is another"):
        LogitCache.open(tmp_path / "cache")
    del described["checksum"]
    header.write_text(json.dumps({**described, "codec_version": 9}), encoding="utf-8")
    with pytest.raises(DataError, match="codec 'topk', version 9"):
        LogitCache.open(tmp_path / "cache")


def test_a_writer_with_other_settings_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "cache", [_row(1)])
    with pytest.raises(StoreError, match="holds logits with k 4, not 5"):
        _writer(tmp_path / "cache", codec=TopK(5, V, (1.0, 2.0)))


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "cache")
    writer.append(_row(1), _kept(_row(1)))
    writer.seal()
    with pytest.raises(DataError, match="holds no finished cache"):
        LogitCache.open(tmp_path / "cache")


def test_an_index_of_rows_that_were_never_captured_is_refused(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "cache")
    writer.append(_row(1), _kept(_row(1)))
    writer.seal()
    with pytest.raises(DataError, match=r"row 1 \(record record-2\) is in no shard"):
        write_index(tmp_path / "cache", [_row(1), _row(2)])


@pytest.mark.parametrize("where", [0.05, 0.5, 0.99], ids=["header", "middle", "end"])
def test_a_flipped_bit_anywhere_in_a_shard_is_found_before_anything_is_read_from_it(
    tmp_path: Path, where: float
) -> None:
    cache = _write(tmp_path / "cache", [_row(number) for number in range(10)])
    assert cache.verify() == 3
    shard = tmp_path / "cache" / "shard-000-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[int(where * len(content))] ^= 4
    shard.write_bytes(content)
    again = LogitCache.open(tmp_path / "cache")
    for read in (again.verify, lambda: [again.signal(number) for number in range(10)]):
        with pytest.raises(DataError, match=r"shard-000-00001\.safetensors: is damaged"):
            read()
    with pytest.raises(DataError, match=r"shard-000-00001\.safetensors: is damaged"):
        _writer(tmp_path / "cache")


def test_a_deleted_shard_is_made_again_and_no_other_is_lost(tmp_path: Path) -> None:
    rows = [_row(number) for number in range(10)]
    wanted = [_write(tmp_path / "cache", rows).signal(number).top_ids.tolist() for number in range(10)]
    (tmp_path / "cache" / "shard-000-00001.safetensors").unlink()
    cache = _write(tmp_path / "cache", rows)
    assert [cache.signal(number).top_ids.tolist() for number in range(10)] == wanted
    assert len(list((tmp_path / "cache").glob("shard-*"))) == 3


def test_a_lost_or_shortened_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    cache = _write(tmp_path / "cache", [_row(number) for number in range(10)])
    shard = tmp_path / "cache" / "shard-000-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"shard-000-00001\.safetensors: is damaged"):
        [cache.signal(number, 1.0) for number in range(10)]
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000-00001\.safetensors is missing"):
        LogitCache.open(tmp_path / "cache")
