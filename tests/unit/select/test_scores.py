"""Probabilities of responses and sentences from log-probabilities of tokens."""

import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.errors import StoreError
from potstill.core.records import Record
from potstill.data.chat import Renderer
from potstill.select.score_store import ScoreStore
from potstill.select.scores import (
    SentenceClass,
    TokenScores,
    probability,
    sentence_class,
    sentence_probabilities,
    stored_scores,
)
from potstill.select.sentences import sentences

NAN = float("nan")
shares = st.floats(0, 1)


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=50))
def test_a_probability_is_the_geometric_mean_of_the_tokens(logprobs: list[float]) -> None:
    expected = math.prod(math.exp(one / len(logprobs)) for one in logprobs)
    assert probability(np.array(logprobs)) == pytest.approx(expected, rel=1e-9)


def test_tokens_of_unknown_probability_are_left_out() -> None:
    assert probability(np.array([-1.0, NAN, -3.0])) == pytest.approx(math.exp(-2))
    assert math.isnan(probability(np.array([NAN, NAN])))


@given(shares, shares, st.none() | shares, shares, shares)
def test_every_sentence_has_exactly_one_class(
    teacher: float, student: float, distilled: float | None, alpha: float, beta: float
) -> None:
    found = sentence_class(teacher, student, distilled, alpha=alpha, beta=beta)
    assert found in get_args(SentenceClass)
    gap = teacher - student
    if found == "teacher":
        assert gap > beta
    if found == "student":
        assert -gap > beta
    if found == "boosted":
        assert distilled is not None
        assert abs(gap) <= beta
    # Exchanging the two exchanges their classes.
    swapped = {"teacher": "student", "student": "teacher"}.get(found, found)
    assert sentence_class(student, teacher, distilled, alpha=alpha, beta=beta) == swapped


@pytest.mark.parametrize(
    ("teacher", "student", "distilled", "expected"),
    [
        (0.9, 0.5, None, "teacher"),
        (0.5, 0.9, None, "student"),
        (0.9, 0.85, None, "shared"),
        (0.9, 0.85, 0.88, "shared"),
        (0.9, 0.85, 0.5, "boosted"),
        (0.9, 0.5, 0.5, "teacher"),
        (0.5, 0.9, 0.9, "student"),
    ],
)
def test_classes_are_those_of_the_paper(
    teacher: float, student: float, distilled: float | None, expected: str
) -> None:
    assert sentence_class(teacher, student, distilled, alpha=0.1, beta=0.1) == expected


def test_shared_comes_before_the_teachers_where_alpha_is_wider_than_beta() -> None:
    assert sentence_class(0.9, 0.7, 0.8, alpha=0.3, beta=0.1) == "shared"
    assert sentence_class(0.9, 0.7, None, alpha=0.3, beta=0.1) == "teacher"


def test_a_sentences_probability_is_that_of_the_tokens_in_it() -> None:
    text = "One. Two!"
    spans = sentences(text)
    assert spans == [(0, 4), (4, 9)]
    # "One", ".", " Two", "!"
    scores = TokenScores(np.log([0.5, 0.5, 0.25, 1.0]), [3, 1, 4, 1])
    assert sentence_probabilities(scores, spans) == pytest.approx([0.5, 0.5])
    unknown = TokenScores(np.array([-1.0, NAN, NAN, NAN]), [3, 1, 4, 1])
    first, second = sentence_probabilities(unknown, spans)
    assert first == pytest.approx(math.exp(-1))
    assert math.isnan(second)


@given(st.data())
def test_the_sentences_of_a_response_make_up_its_probability(data: st.DataObject) -> None:
    text = data.draw(st.text("ab. !\n?", min_size=1, max_size=60))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=20)) | {len(text)})
    sizes = np.diff([0, *cuts]).tolist()
    logprobs = np.array(data.draw(st.lists(st.floats(-5, 0), min_size=len(sizes), max_size=len(sizes))))
    scores = TokenScores(logprobs, sizes)
    spans = sentences(text)
    logs = [
        (math.log(value), sum(1 for size in _tokens_in(scores, spans, number)))
        for number, value in enumerate(sentence_probabilities(scores, spans))
        if not math.isnan(value)
    ]
    assert sum(count for _, count in logs) == len(sizes), "a token lies in no sentence or in two"
    total = math.fsum(value * count for value, count in logs) / len(sizes)
    assert math.exp(total) == pytest.approx(probability(logprobs), rel=1e-6)


def _tokens_in(scores: TokenScores, spans: list[tuple[int, int]], sentence: int) -> list[int]:
    from potstill.select.sentences import tokens_of_spans

    assert scores.token_bytes is not None
    return [one for one in tokens_of_spans(spans, scores.token_bytes) if one == sentence]


def test_stored_log_probabilities_are_placed_by_their_own_bytes_else_by_ids_of_the_tokenizer(
    tiny_tokenizer: Any,
) -> None:
    renderer = Renderer(tiny_tokenizer)
    ids = tiny_tokenizer("The answer is 4.", add_special_tokens=False)["input_ids"]
    record = Record("p", [], response="The answer is 4.", response_token_ids=ids, logprobs=[-1.0] * len(ids))
    unplaced = stored_scores(record, renderer)
    assert isinstance(unplaced, TokenScores)
    assert unplaced.token_bytes is None
    record.tokenizer = renderer.tokenizer_hash
    placed = stored_scores(record, renderer)
    assert isinstance(placed, TokenScores)
    assert placed.token_bytes is not None
    assert sum(placed.token_bytes) == len("The answer is 4.")
    record.token_bytes = [16] + [0] * (len(ids) - 1)
    own = stored_scores(record, renderer)
    assert isinstance(own, TokenScores)
    assert own.token_bytes == record.token_bytes
    record.logprobs = [NAN] * len(ids)
    assert stored_scores(record, renderer) == "the log-probability of none of its tokens is known"


def test_a_score_stays_and_is_there_for_the_next_process(tmp_path: Any) -> None:
    path = tmp_path / "folder" / "scores.sqlite"
    store = ScoreStore(path)
    store.put([(b"a", np.array([-1.0, -2.0], dtype=np.float32)), (b"b", np.zeros(0, dtype=np.float32))])
    store.put([(b"a", np.array([-9.0], dtype=np.float32))])
    other = ScoreStore(path)
    assert other[b"a"].tolist() == [-1.0, -2.0]
    assert other[b"b"].tolist() == []
    assert b"c" not in other
    with pytest.raises(KeyError):
        other[b"c"]
    store.close()
    other.close()


def test_a_store_that_cannot_be_used_says_so(tmp_path: Any) -> None:
    (tmp_path / "scores.sqlite").write_text("no database at all, but long enough to be read as one" * 9)
    with pytest.raises(StoreError, match="the store of scores is damaged"):
        ScoreStore(tmp_path / "scores.sqlite")
