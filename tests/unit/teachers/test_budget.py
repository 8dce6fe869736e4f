import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.errors import BudgetError
from potstill.teachers.budget import Budget
from potstill.teachers.openai import Price
from potstill.teachers.protocol import Usage
from potstill.teachers.request_store import Bought

PRICE = Price(input=1.0, output=10.0)


def budget_of(bought: Bought | None = None, **bounds: float | None) -> Budget:
    bounds = {"max_cost": None, "max_tokens": None, **bounds}
    return Budget(bought or Bought(), price=PRICE, **bounds)  # type: ignore[arg-type]


def test_prompts_and_responses_have_prices_of_their_own():
    budget = budget_of()
    budget.count(Usage(200_000, 30_000))
    assert budget.cost == pytest.approx(0.2 + 0.3)
    assert budget.projected(left=3) == pytest.approx(4 * 0.5)
    assert budget.figures(left=3) == {"tokens": "230,000", "spent": "$0.5000", "projected": "$2.00"}


def test_without_bounds_the_engine_alone_says_how_many_at_once():
    assert budget_of().places(64) == 64


def test_one_is_asked_first_and_then_twice_as_many_as_are_known():
    budget = budget_of(max_cost=1000.0)
    found = []
    for _ in range(4):
        found.append(budget.places(64))
        budget.count(Usage(10, 10))
    assert found == [1, 3, 5, 7]


@pytest.mark.parametrize("bound", [{"max_tokens": 300}, {"max_cost": 300 * 10e-6 / 2 + 300 * 1e-6 / 2}])
def test_answers_of_one_size_use_a_budget_up_to_the_last(bound):
    budget, asked = budget_of(**bound), 0
    while places := budget.places(8):
        asked += places
        for _ in range(places):
            budget.count(Usage(5, 5))
    assert asked == 30
    assert budget.tokens == 300


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 64), st.integers(1, 10**6))
def test_a_bound_is_passed_by_less_than_what_was_under_way(seed, at_once, bound):
    drawn = random.Random(seed)
    budget = budget_of(max_tokens=bound)
    for _ in range(300):
        if not (places := budget.places(at_once)):
            break
        for _ in range(places):
            budget.count(Usage(drawn.randint(1, 500), drawn.randint(1, 8000)))
    assert budget.tokens <= bound + 8500 * at_once


def test_what_earlier_runs_bought_counts():
    bought = Bought(answers=10, prompt_tokens=100, response_tokens=400)
    assert budget_of(bought, max_tokens=500).places(64) == 0
    assert budget_of(bought, max_tokens=549).places(64) == 0  # less than one answer is left
    assert budget_of(bought, max_tokens=550).places(64) == 1
    assert budget_of(bought, max_tokens=10_000).places(64) == 21
    assert budget_of(bought, max_tokens=700).figures(left=2)["tokens"] == "500/700"


def test_an_answer_without_counts_ends_what_has_a_bound_and_nothing_else():
    budget_of().count(Usage(None, 5))
    with pytest.raises(BudgetError, match="does not say how many tokens"):
        budget_of(max_tokens=5).count(Usage(None, 5))


def test_the_error_says_how_much_would_do():
    budget = budget_of(Bought(10, 1000, 1000), max_cost=0.02)
    error = budget.used_up(left=30, where="model big", kept="10 answers are kept")
    assert "$0.0110 bought, 30 requests are left" in str(error)
    assert "max_cost $0.0200" in str(error)
    assert "about 8,000 tokens, $0.0440 in all" in str(error)
    assert "10 answers are kept" in str(error)


def test_what_costs_nothing_has_no_bound():
    budget = Budget(Bought(5, 5, 5), price=Price(input=0, output=0), max_cost=1.0, max_tokens=None)
    assert budget.places(9) == 9
