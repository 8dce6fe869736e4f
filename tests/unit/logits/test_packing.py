"""Packed blocks: whole numbers of any kind come back as they were."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.errors import DataError
from potstill.logits.packing import (
    Array,
    Block,
    Stream,
    frequency_classes,
    ids_by_frequency,
    pack_block,
)


def _block(streams: dict[str, Stream], arrays: dict[str, Array]) -> Block:
    frames, sizes = zip(*pack_block(streams, arrays), strict=True)
    ends = np.cumsum([len(frame) for frame in frames]).tolist()
    return Block(streams, b"".join(frames), ends, sizes, where="block")


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 300),
    st.integers(1, 5),
    st.sampled_from(["|u1", "<u2", "<i2", "<u4", "<f2"]),
    st.booleans(),
)
def test_arrays_come_back_whole_and_in_part(tokens: int, columns: int, dtype: str, in_planes: bool) -> None:
    chance = np.random.default_rng(tokens)
    wide = (2**16 * chance.standard_normal((tokens, columns))).astype(np.int64).astype("<i2").astype(dtype)
    flat = np.arange(tokens * 2).astype(dtype)
    streams = {"flat": Stream(dtype, None, in_planes), "wide": Stream(dtype, columns)}
    block = _block(streams, {"flat": flat, "wide": wide})
    part = slice(tokens // 3, tokens // 2)
    assert np.array_equal(block.read("wide", part), wide[part], equal_nan=True)
    assert np.array_equal(block.read("wide"), wide, equal_nan=True)
    assert np.array_equal(block.read("flat", part), flat[part], equal_nan=True)
    assert block.read("wide").dtype == np.dtype(dtype)


def test_ids_are_numbered_by_how_often_they_occur() -> None:
    ids = np.array([7] * 40 + [2] * 9 + [5, 300])
    order = ids_by_frequency(frequency_classes(ids, 1000))
    assert order.tolist() == [7, 2, 5, 300]


def test_frequent_small_numbers_take_less_than_their_bytes() -> None:
    numbers = np.random.default_rng(0).geometric(0.1, 8192)
    packed = sum(len(frame) for frame, _ in pack_block({"a": Stream("<u2")}, {"a": numbers}))
    assert packed < 8192 * 5.5 / 8


def test_a_frame_that_cannot_be_unpacked_is_an_error_that_says_where() -> None:
    block = Block({"a": Stream("|u1")}, b"no frame", [8], [100], where="the shard")
    with pytest.raises(DataError, match="the shard: a block cannot be unpacked"):
        block.read("a")
