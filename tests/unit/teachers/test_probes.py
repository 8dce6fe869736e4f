"""What tells log-probabilities at temperature 1 from those at the sampling temperature, and from none."""

import math
import random

import pytest

from potstill.core.errors import EngineError
from potstill.teachers.probes import PROBE_TEMPERATURE, check_scores, reported, turned

IDS = [7, 3, 9, 4]


def at(temperature: float, logits: dict[str, float]) -> dict[str, float]:
    """Log-probabilities of the three likeliest of these tokens."""
    scaled = {token: value / temperature for token, value in logits.items()}
    total = math.log(sum(map(math.exp, scaled.values())))
    likeliest = sorted(scaled, key=lambda token: -scaled[token])[:3]
    return {token: scaled[token] - total for token in likeliest}


def test_gaps_that_stay_are_of_temperature_1_and_gaps_that_double_of_the_sampling() -> None:
    chance = random.Random(1)
    for _ in range(100):
        logits = {token: chance.gauss(0, 3) for token in "abcdefgh"}
        assert reported(at(1, logits), at(1, logits)) == "at 1"
        assert reported(at(1, logits), at(PROBE_TEMPERATURE, logits)) == "at the sampling temperature"
        # Rounding to half precision and another batch move them a little.
        noisy = {token: value + chance.uniform(-0.01, 0.01) for token, value in at(1, logits).items()}
        assert reported(at(1, logits), noisy) == "at 1"


@pytest.mark.parametrize(
    ("at_one", "at_half"),
    [
        ({}, {}),
        ({"a": -0.1}, {"a": -0.1}),
        ({"a": -0.1, "b": -3.0}, {"c": -0.1, "d": -3.0}),
        ({"a": -1.00, "b": -1.01}, {"a": -1.0, "b": -1.02}),
        ({"a": -0.1, "b": -3.0}, {"a": -0.1, "b": -12.0}),
        ({"a": -0.1, "b": -math.inf}, {"a": -0.1, "b": -math.inf}),
        ({"a": math.nan, "b": -3.0}, {"a": -0.1, "b": -3.0}),
    ],
    ids=["none", "one", "others", "alike", "something else", "of no probability", "no number"],
)
def test_what_tells_nothing_is_said_to_tell_nothing(
    at_one: dict[str, float], at_half: dict[str, float]
) -> None:
    assert reported(at_one, at_half) is None


def test_the_other_text_begins_as_the_first_and_has_the_same_tokens() -> None:
    ids = list(range(41))
    other = turned(ids)
    assert other[:20] == ids[:20]
    assert other != ids
    assert sorted(other) == ids


def said(*own: float) -> list[dict[int, float]]:
    return [{id_: value, 11: -3.0} for id_, value in zip(IDS[1:], own, strict=True)]


def test_the_same_answer_twice_is_what_it_should_be() -> None:
    check_scores(said(-1, -2, -math.inf), said(-1, -2.1, -math.inf), IDS, where="there")
    check_scores(said(-1, -2, -1), said(-1, -2, -1), IDS, where="there", expected_T=[-1.1, -2.2, -1])


@pytest.mark.parametrize(
    ("first", "again", "expected", "message"),
    [
        (said(4, -2, -1), said(4, -2, -1), None, "they add up to 54.6"),
        (said(1e6, -2, -1), said(1e6, -2, -1), None, "are no log-probabilities"),
        (
            said(-1, -2, -1),
            said(-1, -2, -1.3),
            None,
            "differently once it has scored another .*: by 0.1 nats",
        ),
        (said(-1, -2, -1), said(-1, -2, -math.inf), None, "by inf nats"),
        (
            said(-1, -2, -1),
            said(-1, -2, -1),
            [-1, -1, -2],
            "0.67 nats a token from those that the same weights",
        ),
    ],
    ids=["logits", "large", "another time", "gone", "another model"],
)
def test_what_it_should_not_be_is_said_with_how_to_serve(
    first: list[dict[int, float]], again: list[dict[int, float]], expected: list[float] | None, message: str
) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        check_scores(first, again, IDS, where="there", expected_T=expected)
    assert "vLLM" in str(caught.value)
