"""A cached teacher answers for any rows of its caches, whatever their codec."""

import random
from pathlib import Path

import pytest
import torch

from potstill.core.errors import DataError
from potstill.data.chat import Rendered
from potstill.logits.codecs import Codec, Draws, TopK
from potstill.logits.shards import CachedRow, LogitCache, ShardWriter, write_index
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


def test_caches_of_different_codecs_are_not_mixed(tmp_path: Path) -> None:
    caches = [_cache(tmp_path / "a", TopK(8, V)), _cache(tmp_path / "b", Draws(20, V))]
    with pytest.raises(DataError, match="logits of codecs sampled and topk cannot be mixed"):
        CachedTeacher(caches, 1.0)
