"""A cached teacher answers for any rows of its caches, whatever their codec."""

import random
from pathlib import Path

import pytest
import torch

from potstill.core.errors import DataError
from potstill.data.chat import Rendered
from potstill.logits.codecs import Codec, Draws, TopK
from potstill.logits.logit_cache import LogitCache
from potstill.logits.shards import CachedRow, ShardWriter, write_index
from potstill.losses.types import Sampled, Sparse
from potstill.train.rows import CachedTeacher, Rows

V = 30


def _cache(folder: Path, codec: Codec, seed: int = 0) -> LogitCache:
    folder.mkdir()
    chance = random.Random(seed)
    rows = [
        CachedRow([chance.randrange(V) for _ in range(5 + n)], [0, 0] + [1] * (3 + n), False, f"r{n}")
        for n in range(4)
    ]
    writer = ShardWriter(folder, codec, tokenizer="t", model="m")
    for row in rows:
        logits_NV = torch.randn(
            sum(row.mask), V, generator=torch.Generator().manual_seed(seed + len(row.mask))
        )
        encode = codec.encoder([row.key], [len(logits_NV)])
        writer.append(row, encode(logits_NV, slice(0, len(logits_NV))))
    writer.seal()
    write_index(folder, rows)
    return LogitCache.open(folder)


def _rows(caches: list[LogitCache], *, cut: int = 100) -> Rows:
    rows, source = Rows(), 0
    for cache in caches:
        for number in range(len(cache)):
            row = cache.row(number)
            rows.append(Rendered(list(row.token_ids)[:cut], list(row.mask)[:cut]), row.record_id, source)
            source += 1
    return rows


@pytest.mark.parametrize("codecs", [(TopK(8, V), TopK(5, V)), (Draws(20, V), Draws(20, V))])
def test_rows_of_several_caches_are_answered_in_the_order_asked_for(
    tmp_path: Path, codecs: tuple[Codec, Codec]
) -> None:
    caches = [_cache(tmp_path / str(number), codec, number) for number, codec in enumerate(codecs)]
    teacher, order = CachedTeacher(caches, 1.0), [6, 1, 0, 7]
    found = teacher(_rows(caches, cut=6), order)
    wanted = [caches[number // 4].signal(number % 4, 1.0, teacher.k).rows(slice(0, 4)) for number in order]
    assert found.top_ids.tolist() == [id_ for signal in wanted for id_ in signal.top_ids.tolist()]
    assert isinstance(found, Sparse if teacher.k == 5 else Sampled)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_read_with_fewer_ids_is_the_cache_that_kept_no_more(
    tmp_path: Path, temperature: float
) -> None:
    many, few = (_cache(tmp_path / str(k), TopK(k, V, (1.0, 2.0))) for k in (20, 5))
    rows, numbers = _rows([many]), [2, 0, 3]
    found, expected = (
        CachedTeacher([many], temperature, 5)(rows, numbers),
        CachedTeacher([few], temperature)(rows, numbers),
    )
    assert isinstance(found, Sparse)
    assert isinstance(expected, Sparse)
    assert torch.equal(found.ids_NK, expected.ids_NK)
    # Both are rounded, and what is kept is shifted to the kept mass.
    torch.testing.assert_close(found.log_probs_NK, expected.log_probs_NK, rtol=0.01, atol=0.01)
    torch.testing.assert_close(found.log_tail_N, expected.log_tail_N, rtol=0.02, atol=0.02)
    whole = CachedTeacher([many], temperature)(rows, numbers)
    assert isinstance(whole, Sparse)
    assert (found.log_tail_N > whole.log_tail_N + 0.1).all()


def test_more_ids_than_a_cache_kept_and_the_likeliest_of_drawn_ones_are_refused(tmp_path: Path) -> None:
    caches = [_cache(tmp_path / "a", TopK(8, V)), _cache(tmp_path / "b", TopK(5, V), 1)]
    assert CachedTeacher(caches, 1.0, 5).k == 5
    with pytest.raises(DataError, match=r"top 6 asked for[\s\S]*1 to 5, which the cache step kept"):
        CachedTeacher(caches, 1.0, 6)
    with pytest.raises(DataError, match=r"top 2 asked for[\s\S]*drawn, not the most probable"):
        CachedTeacher([_cache(tmp_path / "c", Draws(20, V))], 1.0, 2)


def test_caches_of_different_codecs_are_not_mixed(tmp_path: Path) -> None:
    caches = [_cache(tmp_path / "a", TopK(8, V)), _cache(tmp_path / "b", Draws(20, V))]
    with pytest.raises(DataError, match="logits of codecs sampled and topk cannot be mixed"):
        CachedTeacher(caches, 1.0)
