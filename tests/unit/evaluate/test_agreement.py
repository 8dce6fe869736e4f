"""Agreement of raters: Krippendorff's own worked example, and a slow version by its definition."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.evaluate.agreement import krippendorff_alpha

# Four observers of twelve units (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011, C).
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
UNITS = [list(unit) for unit in zip(*OBSERVERS, strict=True)]


def test_the_worked_example_has_its_published_values() -> None:
    nominal, ordinal = (krippendorff_alpha(UNITS, level) for level in ("nominal", "ordinal"))
    assert nominal == pytest.approx(0.743, abs=5e-4)
    assert ordinal == pytest.approx(0.815, abs=5e-4)


def test_perfect_agreement_is_one_and_constant_or_single_ratings_tell_nothing() -> None:
    assert krippendorff_alpha([[1, 1], [5, 5], [3, 3]], "ordinal") == 1
    assert krippendorff_alpha([[2, 2], [2, 2]], "ordinal") is None
    assert krippendorff_alpha([[2, None], [None, 3]], "ordinal") is None
    assert krippendorff_alpha([], "nominal") is None


@given(st.lists(st.lists(st.sampled_from([None, 1, 2, 3]), min_size=2, max_size=4), min_size=1, max_size=8))
def test_it_is_one_less_observed_over_expected_disagreement(units: list[list[float | None]]) -> None:
    pairable = [[value for value in unit if value is not None] for unit in units]
    pairable = [unit for unit in pairable if len(unit) > 1]
    values = [value for unit in pairable for value in unit]
    expected = sum(a != b for a, b in itertools.permutations(values, 2))
    found = krippendorff_alpha(units, "nominal")
    if not expected:
        assert found is None
        return
    observed = sum(
        sum(a != b for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in pairable
    )
    count = len(values)
    assert found == pytest.approx(1 - (observed / count) / (expected / (count * (count - 1))))
