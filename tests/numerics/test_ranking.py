"""The reranker's loss against loops in float64, and its gradient against the formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from potstill.losses.ranking import ranking_kl

SCORES = st.floats(-20, 20, width=32)
PAIRS = st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=9)
TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0])


def softmax(values: list[float], temperature: float) -> list[float]:
    weights = [math.exp((value - max(values)) / temperature) for value in values]
    return [weight / math.fsum(weights) for weight in weights]


def oracle(relevance: list[float], scores: list[float], t1: float, t2: float) -> float:
    target, found = softmax(relevance, t1), softmax(scores, t2)
    return math.fsum(p * (math.log(p) - math.log(q)) for p, q in zip(target, found, strict=True))


def loss(relevance: torch.Tensor, scores: torch.Tensor, t1: float, t2: float) -> torch.Tensor:
    return ranking_kl(relevance, scores, relevance_temperature=t1, score_temperature=t2)


@given(pairs=PAIRS, t1=TEMPERATURES, t2=TEMPERATURES)
def test_it_is_the_divergence_of_both_softmaxes(
    pairs: list[tuple[float, float]], t1: float, t2: float
) -> None:
    relevance, scores = map(list, zip(*pairs, strict=True))
    found = loss(torch.tensor(relevance).double(), torch.tensor(scores).double(), t1, t2)
    assert found.item() == pytest.approx(oracle(relevance, scores, t1, t2), rel=1e-9, abs=1e-12)
    assert found.item() >= -1e-12


@given(pairs=PAIRS, t1=TEMPERATURES, t2=TEMPERATURES)
def test_its_gradient_is_the_difference_of_both_by_the_temperature(
    pairs: list[tuple[float, float]], t1: float, t2: float
) -> None:
    relevance, scores = map(list, zip(*pairs, strict=True))
    given_C = torch.tensor(relevance, dtype=torch.float64, requires_grad=True)
    scores_C = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    loss(given_C, scores_C, t1, t2).backward()
    wanted = [(q - p) / t2 for p, q in zip(softmax(relevance, t1), softmax(scores, t2), strict=True)]
    assert scores_C.grad is not None
    assert scores_C.grad.tolist() == pytest.approx(wanted, abs=1e-10)
    assert given_C.grad is None, "what the rationale finds is given"


def test_it_is_nothing_where_scores_differ_by_a_constant_and_in_fp32_for_halves() -> None:
    relevance_C = torch.tensor([3.0, 1.0, -2.0])
    assert loss(relevance_C, relevance_C + 5, 1.0, 1.0).item() == pytest.approx(0, abs=1e-6)
    assert loss(relevance_C, relevance_C.bfloat16(), 1.0, 1.0).dtype == torch.float32


def test_the_direction_punishes_what_the_reranker_leaves_out() -> None:
    sure, unsure = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 0.0])
    assert loss(unsure, sure, 1.0, 1.0) > loss(sure, unsure, 1.0, 1.0)
