"""Candidates keep to the budget, come close to it, and differ in depth and in what is narrower."""

import pytest

from potstill.student.search import candidates
from potstill.student.sizes import Sizes

# SmolLM2-135M: 9 query heads on 3 key and value heads of 64, a tied embedding.
SMOLLM = Sizes(layers=30, hidden_size=576, intermediate_size=1536, groups=3)
VOCABULARY, HEAD_SIZE, QUERIES = 49152, 64, 3


def parameters(sizes: Sizes) -> int:
    attention = 2 * sizes.hidden_size * (sizes.groups * QUERIES + sizes.groups) * HEAD_SIZE
    block = attention + 3 * sizes.hidden_size * sizes.intermediate_size + 2 * sizes.hidden_size
    return VOCABULARY * sizes.hidden_size + sizes.layers * block + sizes.hidden_size


def search(budget: int, count: int = 8, head_size: int | None = None) -> list[Sizes]:
    return candidates(SMOLLM, budget, count, parameters, queries_a_group=QUERIES, head_size=head_size)


def test_the_counts_are_those_of_the_model() -> None:
    assert parameters(SMOLLM) == 134_515_008


@pytest.mark.parametrize("budget", [40_000_000, 60_000_000, 100_000_000])
def test_no_candidate_is_over_the_budget_and_each_is_near_it(budget: int) -> None:
    found = search(budget)
    assert len(found) == len({*found}) == 8
    for sizes in found:
        assert 0.85 * budget < parameters(sizes) <= budget, sizes


def test_the_first_has_the_full_width_and_others_trade_depth_for_each_kind_of_width() -> None:
    first, *others = search(60_000_000)
    assert first == Sizes(8, 576, 1536, 3), "nine blocks would be 60.2M"
    assert max(one.layers for one in others) == 30
    assert any(one.hidden_size == 576 and one.intermediate_size < 1536 for one in others)
    assert any(one.hidden_size < 576 and one.intermediate_size == 1536 for one in others)
    assert any(one.groups < 3 for one in others)


def test_heads_divide_every_hidden_size() -> None:
    assert all(one.hidden_size % (one.groups * QUERIES) == 0 for one in search(70_000_000, 16))


def test_where_heads_make_up_the_hidden_size_they_go_together() -> None:
    for one in search(70_000_000, 16, HEAD_SIZE):
        assert one.hidden_size == one.groups * QUERIES * HEAD_SIZE


def test_a_budget_below_the_smallest_student_has_no_candidates() -> None:
    assert search(10_000) == []
