"""The likeliest tokens of each place come out as they went in, through every form that they are kept in."""

import math
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.alternatives import Alternatives

LOGPROBS = st.floats(max_value=0, width=32, allow_nan=False)


def places(token: st.SearchStrategy[Any]) -> st.SearchStrategy[list[list[tuple[Any, float]]]]:
    return st.lists(st.lists(st.tuples(token, LOGPROBS), max_size=4), max_size=5)


IDS = places(st.integers(0, 2**31 - 1))
TEXTS = places(st.binary(max_size=5))


def both(test: Any) -> Any:
    """A test of `told`, places of ids or of bytes, and `as_ids`."""
    cases = st.tuples(IDS, st.just(True)) | st.tuples(TEXTS, st.just(False))
    return given(case=cases)(test)


@both
def test_each_place_has_the_pairs_that_were_told_of_it(case: tuple[Any, bool]) -> None:
    told, as_ids = case
    found = Alternatives.of(told, as_ids=as_ids)
    assert len(found) == len(told)
    assert [*found] == told
    assert (found.ids is None, found.texts is None) == (not as_ids, as_ids)


@both
def test_they_come_back_out_of_json(case: tuple[Any, bool]) -> None:
    told, as_ids = case
    found = Alternatives.of(told, as_ids=as_ids)
    assert Alternatives.of_json(found.to_json()) == found


@both
def test_they_come_back_out_of_a_column(case: tuple[Any, bool]) -> None:
    told, as_ids = case
    found = Alternatives.of(told, as_ids=as_ids)
    types = {"counts": pa.int32(), "logprobs": pa.float32(), "ids": pa.int32(), "texts": pa.binary()}
    column = pa.array([found.columns()], pa.struct({name: pa.list_(one) for name, one in types.items()}))
    assert Alternatives.of_columns(column[0]) == found


@given(told=IDS, behind=st.integers(0, 3))
def test_behind_a_beginning_its_places_are_those_of_which_nothing_is_known(told: Any, behind: int) -> None:
    found = Alternatives.of(told, as_ids=True)
    assert [*found.behind(behind)] == [[] for _ in range(behind)] + told
    assert [*found] == told, "what was there before stays as it was"


def test_an_impossible_token_keeps_its_infinite_logarithm() -> None:
    [[(_, logprob)]] = Alternatives.of([[(7, -math.inf)]], as_ids=True)
    assert logprob == -math.inf


def test_the_numbers_of_a_column_are_those_in_memory_and_no_copy() -> None:
    found = Alternatives.of([[(7, -0.5)]], as_ids=True)
    found.logprobs[0] = -2.0
    assert found.columns()["logprobs"].tolist() == [-2.0]
