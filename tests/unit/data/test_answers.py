"""Numbers as people write them, and boxed answers, in time that no text can stretch."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data.answers import last_boxed, parse_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("-3", -3),
        ("−3", -3),  # the minus sign of typesetting
        ("+5", 5),
        ("1,234,567.50", Fraction("1234567.5")),
        ("$18.00", 18),
        ("18.", 18),
        ("50%", 50),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (".5", Fraction(1, 2)),
        ("2e3", 2000),
        ("**12**", 12),
        (r"12\text{ cm}", 12),
    ],
)
def test_numbers_have_their_exact_value(text: str, value: Fraction) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text", ["", "twelve", "12 apples", "1/0", "1,23", "1e999999999", "9" * 41, "4 5x", "x"]
)
def test_what_is_no_plain_number_has_none(text: str) -> None:
    assert parse_number(text) is None


@given(st.text(alphabet="0123456789.,-/eE$ \\{}frac", max_size=60))
def test_no_text_breaks_the_reading_of_numbers(text: str) -> None:
    parse_number(text)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        ("none", None),
        (r"\boxed{" * 50_000, None),
    ],
)
def test_the_last_closed_box_counts(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed
