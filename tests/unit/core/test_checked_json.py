"""JSON with a checksum: what was written comes back, and nothing else does."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.checked_json import DamagedJsonError, checked_json, read_checked_json

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.text().filter(lambda key: key != "checksum"), VALUES, max_size=5)
WRITTEN = checked_json({"tokens": 4096, "pieces": 2})


@given(value=OBJECTS, indent=st.sampled_from([None, 2]))
def test_what_was_written_comes_back(value: dict[str, Any], indent: int | None) -> None:
    text = checked_json(value, indent=indent)
    if not any("\ud800" <= letter <= "\udfff" for letter in text):  # no UTF-8 says these
        assert read_checked_json(text.encode("utf-8")) == value


@given(value=OBJECTS)
def test_the_checksum_stands_last_and_depends_on_the_content_alone(value: dict[str, Any]) -> None:
    found = json.loads(checked_json(value))
    assert [*found] == [*value, "checksum"]
    turned = dict(reversed(value.items()))
    assert json.loads(checked_json(turned, indent=2))["checksum"] == found["checksum"]


def test_keys_that_are_numbers_and_tuples_come_back_as_json_has_them() -> None:
    text = checked_json({"steps": {1: (0.5, 2)}})
    assert read_checked_json(text.encode()) == {"steps": {"1": [0.5, 2]}}


def test_another_form_of_the_same_object_is_as_good() -> None:
    spaced = json.dumps(json.loads(WRITTEN), indent=4, sort_keys=True)
    assert read_checked_json(spaced.encode()) == {"tokens": 4096, "pieces": 2}


def test_an_object_of_before_there_were_checksums_is_taken_as_it_is() -> None:
    assert read_checked_json(b'{"tokens": 4096}') == {"tokens": 4096}


@pytest.mark.parametrize(
    "changed",
    [
        WRITTEN.replace("4096", "4097"),
        WRITTEN.replace("pieces", "pieced"),
        WRITTEN.replace('"pieces": 2, ', ""),
        WRITTEN.replace('"checksum": "', '"checksum": "0'),
    ],
)
def test_another_value_key_or_checksum_is_found(changed: str) -> None:
    assert changed != WRITTEN
    with pytest.raises(DamagedJsonError, match="its checksum is another"):
        read_checked_json(changed.encode())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not valid JSON"),
        (WRITTEN.encode()[:-5], "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1, 2]", "no JSON object but list"),
        (b"null", "no JSON object but NoneType"),
    ],
)
def test_what_is_no_json_object_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DamagedJsonError, match=reason):
        read_checked_json(data)
