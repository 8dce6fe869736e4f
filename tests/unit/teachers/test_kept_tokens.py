"""What a trace keeps of its teacher is given to the tokens that it belongs to, or refused with the reason."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.alternatives import Alternatives
from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.models import TransformersModel
from potstill.teachers import OpenAIModel
from potstill.teachers.kept_tokens import kept_alternatives, tokenizer_of
from potstill.teachers.llama_cpp import LlamaCppModel
from potstill.teachers.solver import SolverModel

PROMPT, END = [5, 6], 9


def trace(places: list[list[tuple[int, float]]], ids: list[int], **fields: Any) -> Record:
    return Record(
        **{
            "prompt_id": "p",
            "messages": [],
            "response_token_ids": ids,
            "logprobs": [-0.5] * len(ids),
            "alternatives": Alternatives.of(places, as_ids=True),
            "sampling": {"logprob_temperature": 1.0},
            "model": "big",
            **fields,
        }
    )


# A response of three tokens that ended by itself: two ids in each place, and in that of its end.
PLACES = [
    [(1, -0.25), (2, -1.5)],
    [(3, -0.125), (1, -2.0)],
    [(7, -1.0), (8, -1.25)],
    [(END, -0.5), (3, -1.0)],
]
IDS = [1, 3, 4]
ROW, MASK = [*PROMPT, *IDS, END], [0, 0, 1, 1, 1, 1]
TRACE = trace(PLACES, IDS)


def kept(record: Record = TRACE, row: list[int] = ROW, mask: list[int] = MASK, k: int = 2) -> Any:
    return kept_alternatives(record, row, mask, k, model="big")


class TestWhatIsKept:
    def test_each_supervised_token_has_the_likeliest_ids_of_its_place(self) -> None:
        first, second, _, end = kept()
        assert first == {1: -0.25, 2: -1.5}
        assert second == {3: -0.125, 1: -2.0}
        assert end == {END: -0.5, 3: -1.0}

    def test_a_token_that_is_not_among_the_likeliest_is_there_with_its_own(self) -> None:
        assert kept()[2] == {4: -0.5, 7: -1.0, 8: -1.25}

    def test_a_token_of_which_nothing_is_known_has_the_likeliest_alone(self) -> None:
        unknown = replace(TRACE, logprobs=[math.nan] * 3)
        assert kept(unknown)[2] == {7: -1.0, 8: -1.25}
        assert kept(replace(TRACE, logprobs=None))[2] == {7: -1.0, 8: -1.25}

    def test_places_that_are_not_supervised_are_left_out(self) -> None:
        assert kept(mask=[0, 0, 0, 1, 0, 1]) == [kept()[1], kept()[3]]

    def test_a_response_that_was_cut_off_needs_no_place_for_its_end(self) -> None:
        cut = trace(PLACES[:3], IDS)
        assert kept(cut, ROW[:-1], MASK[:-1]) == kept()[:3]

    def test_the_ids_of_a_response_are_looked_for_at_the_end_of_the_row(self) -> None:
        again = [*IDS, *PROMPT, *IDS, END]  # the prompt holds them as well
        assert kept(row=again, mask=[0] * 5 + [1] * 4) == kept()

    @given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=6), ended=st.booleans(), data=st.data())
    def test_a_supervised_token_gets_its_own_place_whatever_repeats(
        self, ids: list[int], ended: bool, data: st.DataObject
    ) -> None:
        # In place n the one id that is told of is 100 + n, so that a shift by one would show.
        record = trace([[(100 + place, -1.0)] for place in range(len(ids) + ended)], ids, logprobs=None)
        row = [*data.draw(st.lists(st.integers(0, 3), max_size=4)), *ids, *[END] * ended]
        response = len(ids) + ended
        mask = [0] * (len(row) - response) + data.draw(
            st.lists(st.integers(0, 1), min_size=response, max_size=response)
        )
        wanted = [{100 + place: -1.0} for place, one in enumerate(mask[-response:]) if one]
        assert kept(record, row, mask, k=1) == wanted


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            (replace(TRACE, alternatives=None), "the trace holds no alternatives to its tokens"),
            (replace(TRACE, model="other"), "the trace holds those of other to its tokens"),
            (replace(TRACE, model=None), "the trace holds those of None"),
            (replace(TRACE, sampling={}), "nobody states that its log-probabilities are at temperature 1"),
            (replace(TRACE, sampling={"logprob_temperature": 0.7}), "nobody states"),
            (replace(TRACE, response_token_ids=None), "holds texts, or other ids"),
            (replace(TRACE, response_token_ids=[1, 3, 3]), "holds texts, or other ids"),
            (
                replace(TRACE, alternatives=Alternatives.of([[(b"x", -1.0)] * 2] * 4, as_ids=False)),
                "holds texts, or other ids",
            ),
            (trace(PLACES[:3], IDS), "no alternatives in the place where its response ended"),
            (trace([*PLACES[:2], [], PLACES[3]], IDS), "holds 0 ids in the place of a token, and top_k is 2"),
        ],
    )
    def test_a_trace_that_does_not_hold_them_says_why(self, record: Record, reason: str) -> None:
        with pytest.raises(DataError, match=reason):
            kept(record)

    def test_more_ids_than_were_kept_are_refused_and_how_many_to_ask_for_is_said(self) -> None:
        with pytest.raises(DataError, match=r"2 ids in the place(.|\n)*`logprobs: 3`, by this model"):
            kept(k=3)

    def test_a_place_that_is_not_learnt_may_lack_them(self) -> None:
        thin = trace([PLACES[0], [], *PLACES[2:]], IDS)
        assert kept(thin, mask=[0, 0, 1, 0, 1, 1]) == [kept()[0], kept()[2], kept()[3]]


class TestTokenizers:
    def test_each_engine_says_whose_tokenizer_its_ids_are_of(self) -> None:
        local = TransformersModel(path="./folder")
        assert tokenizer_of(local) is local
        embedded = LlamaCppModel(engine="llama_cpp", model="./model.gguf")
        assert tokenizer_of(embedded) == embedded.as_transformers()
        served = {"engine": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "big"}
        stated = OpenAIModel.model_validate({**served, "tokenizer": "a/b"})
        assert tokenizer_of(stated) == TransformersModel(path="a/b")
        assert tokenizer_of(OpenAIModel.model_validate(served)) is None
        assert tokenizer_of(SolverModel(engine="solver", function="sums:solve")) is None
