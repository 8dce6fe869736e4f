"""A cache that is read: rows and signals in any order, figures, refusals of what is damaged or foreign."""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from potstill.core.errors import DataError
from potstill.logits import logit_cache, shards
from potstill.logits.checked_files import read_arrays
from potstill.logits.codecs import Codec, Draws
from potstill.logits.logit_cache import LogitCache
from potstill.logits.shards import CachedRow, row_key
from potstill.losses.types import Sampled, Sparse, concatenate

from .caches import CODEC, V, equal, kept_of, logits_of, row_of, write_cache, writer_of


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a shard, and fewer shards and blocks in memory than there are."""
    monkeypatch.setattr(shards, "_BLOCK_IDS", 40)
    monkeypatch.setattr(logit_cache, "_OPEN_SHARDS", 3)
    monkeypatch.setattr(logit_cache, "_UNPACKED_BLOCKS", 2)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("codec", [CODEC, Draws(50, V, (2.0,))], ids=["topk", "sampled"])
def test_rows_and_signals_come_back_in_any_order(tmp_path: Path, codec: Codec) -> None:
    rows = [row_of(number, response=1 + number % 7) for number in range(30)]
    cache = write_cache(tmp_path / "cache", rows, codec)
    order = list(range(30)) * 2
    random.Random(0).shuffle(order)
    for number in order:
        assert cache.row(number) == rows[number]
        for temperature in codec.temperatures:
            wanted = codec.decode(codec.pack(kept_of(rows[number], codec)), temperature)
            assert equal(cache.signal(number, temperature), wanted)
    assert cache.lengths.tolist() == [len(row.token_ids) for row in rows]
    assert cache.supervised.tolist() == [sum(row.mask) for row in rows]
    assert cache.held_out.tolist() == [row.held_out for row in rows]
    names = list((tmp_path / "cache").glob("shard-*"))
    assert len(names) > len(cache._shards) == logit_cache._OPEN_SHARDS, "reading never lets a shard go"
    assert max(cache._shard(number).blocks for number in range(len(names))) > 1
    assert len(cache._blocks) == logit_cache._UNPACKED_BLOCKS


@pytest.mark.parametrize("codec", [CODEC, Draws(50, V)], ids=["topk", "sampled"])
def test_the_signals_of_several_rows_are_those_of_each_cut_to_the_tokens_asked_for(
    tmp_path: Path, codec: Codec
) -> None:
    cache = write_cache(tmp_path / "cache", [row_of(number) for number in range(6)], codec)
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


def test_a_smaller_k_is_served(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", [row_of(1)])
    assert equal(cache.signal(0, 2.0, k=2), CODEC.decode(CODEC.pack(kept_of(row_of(1))), 2.0, 2))


def test_an_equal_row_is_stored_once_and_read_at_both_positions(tmp_path: Path) -> None:
    first, other = row_of(1), row_of(2)
    again = CachedRow(first.token_ids, first.mask, True, "another record")
    cache = write_cache(tmp_path / "cache", [first, other, again])
    assert len(cache) == 3
    assert cache.row(2) == again
    assert torch.equal(cache.signal(2, 1.0).log_probs_NK, cache.signal(0, 1.0).log_probs_NK)
    stored = sum(len(read_arrays(path)["keys"]) for path in (tmp_path / "cache").glob("shard-*"))
    assert stored == 2


def test_pitfall_6_rows_are_found_by_the_hash_of_their_content(tmp_path: Path) -> None:
    rows = [row_of(number) for number in range(6)]
    cache = write_cache(tmp_path / "cache", rows)
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
    row = row_of(1)
    cache = write_cache(tmp_path / "cache", [row])
    with pytest.raises(DataError, match="no logits for a row of 8 tokens, 4 of them"):
        cache.find(row.token_ids, [0, 0, 0, 0, 1, 1, 1, 1])


def test_pitfall_14_a_row_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", [row_of(1)])
    with pytest.raises(DataError, match="no logits for a row of 8 tokens, 5 of them supervised"):
        cache.find(row_of(2).token_ids, row_of(2).mask)


@pytest.mark.parametrize("where", [0.3, 0.6, 0.99])
def test_an_index_that_is_damaged_is_refused(tmp_path: Path, where: float) -> None:
    write_cache(tmp_path / "cache", [row_of(number) for number in range(9)])
    path = tmp_path / "cache" / "index.safetensors"
    whole = path.read_bytes()
    place = int(where * len(whole))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(DataError, match=r"index\.safetensors: is damaged"):
        LogitCache.open(tmp_path / "cache")
    path.write_bytes(whole[:place])
    with pytest.raises(DataError, match=r"index\.safetensors: is damaged"):
        LogitCache.open(tmp_path / "cache")


def test_a_cache_can_be_handed_to_a_worker_process(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", [row_of(1), row_of(2)])
    cache.signal(0, 1.0)
    assert cache._blocks
    other = pickle.loads(pickle.dumps(cache))
    assert not other._blocks
    assert torch.equal(other.signal(1, 2.0).log_probs_NK, cache.signal(1, 2.0).log_probs_NK)


def test_the_figures_are_over_the_stored_tokens(tmp_path: Path) -> None:
    rows = [row_of(number) for number in range(40)]
    figures = write_cache(tmp_path / "cache", [*rows, rows[0]]).figures()
    kept = torch.cat([logits_of(row).softmax(-1).topk(4, -1).values.sum(-1) for row in rows]).double()
    assert figures["mean_kept_mass"] == pytest.approx(kept.mean().item(), rel=1e-3)
    for percent in (1, 5, 50):
        wanted = kept.sort().values[200 * percent // 100 - 1].item()
        assert figures[f"kept_mass_p{percent:02d}"] == pytest.approx(wanted, abs=0.005)
    assert figures["mean_distinct_ids"] == 4
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("shard-*"))
    assert figures["bytes_per_token"] == size / 200


def test_the_figures_of_a_sample_count_its_distinct_ids(tmp_path: Path) -> None:
    rows, codec = [row_of(number) for number in range(10)], Draws(20, V)
    figures = write_cache(tmp_path / "cache", rows, codec).figures()
    distinct = [len(drawn.unique()) for row in rows for drawn in kept_of(row, codec)["drawn"]]
    assert figures["mean_distinct_ids"] == pytest.approx(sum(distinct) / len(distinct))
    assert "mean_kept_mass" not in figures


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [("other", r"another tokenizer \(tok\)(.|\n)*\(other\)"), ("tok", None), (None, None)],
)
def test_another_tokenizer_is_refused_by_name(
    tmp_path: Path, tokenizer: str | None, message: str | None
) -> None:
    write_cache(tmp_path / "cache", [row_of(1)])
    if message is None:
        assert len(LogitCache.open(tmp_path / "cache", tokenizer=tokenizer)) == 1
    else:
        with pytest.raises(DataError, match=message):
            LogitCache.open(tmp_path / "cache", tokenizer=tokenizer)


def test_another_codec_is_refused_by_name(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", [row_of(1)])
    header = tmp_path / "cache" / "cache.json"
    described = json.loads(header.read_text(encoding="utf-8"))
    header.write_text(json.dumps({**described, "codec_version": 9}), encoding="utf-8")
    with pytest.raises(DataError, match="its checksum is another"):
        LogitCache.open(tmp_path / "cache")
    del described["checksum"]
    header.write_text(json.dumps({**described, "codec_version": 9}), encoding="utf-8")
    with pytest.raises(DataError, match="codec 'topk', version 9"):
        LogitCache.open(tmp_path / "cache")


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "cache")
    writer.append(row_of(1), kept_of(row_of(1)))
    writer.seal()
    with pytest.raises(DataError, match="holds no finished cache"):
        LogitCache.open(tmp_path / "cache")


@pytest.mark.parametrize("where", [0.05, 0.5, 0.99], ids=["header", "middle", "end"])
def test_a_flipped_bit_anywhere_in_a_shard_is_found_before_anything_is_read_from_it(
    tmp_path: Path, where: float
) -> None:
    cache = write_cache(tmp_path / "cache", [row_of(number) for number in range(10)])
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
        writer_of(tmp_path / "cache")


def test_a_lost_or_shortened_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", [row_of(number) for number in range(10)])
    shard = tmp_path / "cache" / "shard-000-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"shard-000-00001\.safetensors: is damaged"):
        [cache.signal(number, 1.0) for number in range(10)]
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000-00001\.safetensors is missing"):
        LogitCache.open(tmp_path / "cache")
