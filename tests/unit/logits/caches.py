"""Small caches of random logits, for tests of those who write and those who read them."""

import random
from pathlib import Path

import torch
from torch import Tensor

from potstill.logits.codecs import Codec, TopK
from potstill.logits.logit_cache import LogitCache
from potstill.logits.shards import CachedRow, ShardWriter, write_index
from potstill.losses.types import Sampled, Sparse, TeacherSignal

V = 40
CODEC = TopK(4, V, (1.0, 2.0))


def row_of(number: int, prompt: int = 3, response: int = 5) -> CachedRow:
    """A row of its own for each number."""
    chance = random.Random(number)
    ids = [chance.randrange(V) for _ in range(prompt + response)]
    return CachedRow(ids, [0] * prompt + [1] * response, number % 5 == 0, f"record-{number}")


def logits_of(row: CachedRow) -> Tensor:
    """Logits that the row's key alone decides."""
    seed = int.from_bytes(row.key[:4], "big")
    return 3 * torch.randn(sum(row.mask), V, generator=torch.Generator().manual_seed(seed))


def writer_of(folder: Path, writer: int = 0, codec: Codec = CODEC) -> ShardWriter:
    """A writer of small shards."""
    folder.mkdir(exist_ok=True)
    return ShardWriter(folder, codec, tokenizer="tok", model="model", writer=writer, shard_tokens=20)


def assert_same_signal(
    found: TeacherSignal, wanted: TeacherSignal, *, log_probs: float = 0.02, tail: float = 2**-9
) -> None:
    """Two signals keep the same ids, with log-probabilities and tails that differ by rounding at most."""
    assert isinstance(found, Sparse)
    assert isinstance(wanted, Sparse)
    assert torch.equal(found.ids_NK, wanted.ids_NK)
    torch.testing.assert_close(found.log_probs_NK, wanted.log_probs_NK, rtol=0, atol=log_probs)
    torch.testing.assert_close(found.log_tail_N, wanted.log_tail_N, rtol=0, atol=tail)


def kept_of(row: CachedRow, codec: Codec = CODEC) -> dict[str, Tensor]:
    """What the codec keeps of a row."""
    logits_NV = logits_of(row)
    return codec.encoder([row.key], [len(logits_NV)])(logits_NV, slice(0, len(logits_NV)))


def write_cache(folder: Path, rows: list[CachedRow], codec: Codec = CODEC) -> LogitCache:
    """A cache of these rows."""
    writer = writer_of(folder, codec=codec)
    for row in rows:
        if row.key not in writer:
            writer.append(row, kept_of(row, codec))
    writer.seal()
    write_index(folder, rows)
    return LogitCache.open(folder)


def equal(found: Sparse | Sampled, wanted: Sparse | Sampled) -> bool:
    """Whether all tensors of two signals are the same."""
    return all(
        torch.equal(value, vars(wanted)[name])
        for name, value in vars(found).items()
        if isinstance(value, Tensor)
    )
