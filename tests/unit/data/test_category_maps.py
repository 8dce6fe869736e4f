from collections.abc import Callable
from pathlib import Path

import pytest

from potstill.core.errors import DataError
from potstill.data.category_maps import read_category_map

Write = Callable[[str, str], Path]
MAP = {"anatomy": "Other", "1": "Math & CS"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.csv", "subject,category\nanatomy,Other\n1, Math & CS\n\n"),
        ("map.yaml", "anatomy: Other\n1: Math & CS\n"),
        ("map.json", '{"anatomy": "Other", "1": "Math & CS"}'),
    ],
)
def test_a_map_may_be_a_table_or_a_mapping(write: Write, name: str, text: str) -> None:
    assert read_category_map(write(name, text)) == MAP


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("map.csv", "subject,category\na,b,c\n", "a line holds"),
        ("map.csv", "subject,category\na,\n", "a line holds"),
        ("map.csv", "subject,category\na,b\na,c\n", "'a' has two labels, 'b' and 'c'"),
        ("map.csv", "subject,category\n", "holds no labels"),
        ("map.yaml", "- a\n- b\n", "no mapping from values to texts"),
        ("map.yaml", "Other: [anatomy]\n", "no mapping from values to texts"),
        ("map.yaml", "a: [", "cannot be read as labels"),
        ("map.json", "{", "cannot be read as labels"),
    ],
)
def test_what_is_no_map_is_refused_with_its_place(write: Write, name: str, text: str, what: str) -> None:
    path = write(name, text)
    with pytest.raises(DataError, match=what) as caught:
        read_category_map(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file of labels"):
        read_category_map(tmp_path / "none.csv")
