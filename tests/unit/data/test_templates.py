"""Templates put a row's values where its columns are named, and say so when they cannot."""

from pathlib import Path

import pytest

from potstill.core.errors import DataError
from potstill.data.templates import columns_of, fill, template_text


def test_values_take_the_place_of_their_columns() -> None:
    assert fill("{a} and {b c}", {"a": 1, "b c": "two", "d": 3}) == "1 and two"


def test_doubled_braces_and_json_stay_as_text() -> None:
    assert fill('{{a}} {a} {"key": 1} {}', {"a": "x"}) == '{a} x {"key": 1} {}'
    assert columns_of('{{a}} {a} {"key": 1} {}') == ["a"]


def test_values_are_not_filled_in_again() -> None:
    assert fill("{a}", {"a": "{b}", "b": "x"}) == "{b}"


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(DataError, match="'lyric'") as caught:
        fill("{lyric}", {"lyrics": "la", "title": "x"})
    assert "lyrics, title" in str(caught.value)


def test_a_template_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "analysis.txt"
    path.write_text("Analyse:\n{lyrics}", encoding="utf-8")
    assert template_text(str(path)) == "Analyse:\n{lyrics}"


def test_a_missing_file_and_a_text_without_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        template_text("nowhere.txt")
    path = tmp_path / "same.txt"
    path.write_text("Say hello", encoding="utf-8")
    with pytest.raises(DataError, match="every prompt would be the same"):
        template_text(str(path))
