"""Shuffled records: the order is that of sorting by drawn numbers, and rows lie on disk meanwhile."""

import math
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.records import Record
from potstill.data.shuffling import shuffled

LETTERS = 10_000


def records(count: int, letters: int = 0) -> Iterator[Record]:
    return (
        Record(prompt_id=str(number), messages=[{"role": "user", "content": f"{number}" + "x" * letters}])
        for number in range(count)
    )


def in_memory(found: list[Record], seed: int, limit: int | None) -> list[Record]:
    """The order in the obvious way: sorted by a number drawn for each."""
    chance = random.Random(seed)
    keyed = sorted((chance.random(), number) for number in range(len(found)))
    return [found[number] for _, number in keyed[:limit]]


@given(count=st.integers(0, 40), seed=st.integers(0, 2**63), limit=st.none() | st.integers(1, 50))
def test_the_order_is_that_of_numbers_drawn_for_all_records(count: int, seed: int, limit: int | None) -> None:
    wanted = in_memory([*records(count)], seed, limit)
    assert [*shuffled(records(count), seed, limit, None)] == wanted


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    whole = Record(
        prompt_id="p",
        messages=[{"role": "user", "content": "é \ud800 \x00"}],
        held_out=True,
        response="<think>\nso\n</think>\n\n4",
        reasoning="so",
        answer="4",
        reference="4",
        task="math",
        response_token_ids=[1, 2],
        logprobs=[-0.1, -math.inf],
        token_bytes=[3, 4],
        sampling={"logprob_temperature": 1.0},
        meta={"choices": ["a", "b"], "level": 2, "share": 0.5, "hard": True},
    )
    assert [*shuffled([whole], 1, None, tmp_path)] == [whole]


@pytest.mark.parametrize("limit", [None, 500])
def test_rows_lie_on_disk_while_they_are_shuffled(tmp_path: Path, limit: int | None) -> None:
    tracemalloc.start()
    found = shuffled(records(1000, LETTERS), 1, limit, tmp_path)
    count = sum(1 for _ in found)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == (limit or 1000)
    assert peak_bytes < 200 * LETTERS, "a thousand rows are no more than a buffer of them"
    del found
    assert not [*tmp_path.iterdir()]


def test_of_a_few_records_out_of_many_little_more_is_written(tmp_path: Path) -> None:
    found = shuffled(records(5000, LETTERS), 1, 10, tmp_path)
    next(found)
    [file] = tmp_path.iterdir()
    assert file.stat().st_size < 200 * LETTERS
