"""Data files give rows with their places; malformed rows are told apart from unreadable files."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from potstill.core.errors import DataError
from potstill.data.files import read_rows
from potstill.data.shapes import BadRow

Write = Callable[[str, str], Path]


def rows(path: Path) -> list[Any]:
    return [str(row) if isinstance(row, BadRow) else row for _, row in read_rows(path)]


def places(path: Path) -> list[str]:
    return [place for place, _ in read_rows(path)]


class TestJsonLines:
    def test_a_line_is_a_row_and_blank_lines_are_none(self, write: Write) -> None:
        path = write("a.jsonl", '\ufeff{"a": 1}\n\n{"a": "é"}\r\n')
        assert rows(path) == [{"a": 1}, {"a": "é"}]
        assert places(path) == ["a.jsonl, line 1", "a.jsonl, line 3"]

    def test_malformed_lines_are_told_and_the_rest_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 2}\n')
        found = rows(path)
        assert found[0] == {"a": 1}
        assert found[-1] == {"a": 2}
        assert [
            word in text for word, text in zip(("JSON", "list", "UTF-8", ""), found[1:5], strict=True)
        ] == [True] * 4
        assert len(found) == 6


class TestJson:
    def test_a_list_of_objects_is_rows(self, write: Write) -> None:
        assert rows(write("a.json", '[{"a": 1}, 3, {"a": 2}]')) == [
            {"a": 1},
            "not a JSON object but int",
            {"a": 2},
        ]

    def test_lines_under_the_name_json_are_read_as_lines(self, write: Write) -> None:
        assert rows(write("a.json", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]

    @pytest.mark.parametrize("text", ["[{", "3", '"text"', ""])
    def test_anything_else_is_refused(self, write: Write, text: str) -> None:
        with pytest.raises(DataError, match="a list of objects"):
            rows(write("a.json", text))


class TestCsv:
    def test_the_first_line_names_the_columns(self, write: Write) -> None:
        path = write("a.csv", '\ufeffprompt,response\r\n"a, b","two\nlines"\r\nc,d\r\n')
        assert rows(path) == [{"prompt": "a, b", "response": "two\nlines"}, {"prompt": "c", "response": "d"}]

    def test_rows_of_another_width_are_told(self, write: Write) -> None:
        found = rows(write("a.csv", "prompt,response\na\nb,c,d\ne,f\n"))
        assert found == [
            "1 fields under 2 column names",
            "3 fields under 2 column names",
            {"prompt": "e", "response": "f"},
        ]

    def test_two_columns_of_one_name_are_refused(self, write: Write) -> None:
        with pytest.raises(DataError, match=r"a\.csv, line 1: two columns are named 'answer'"):
            rows(write("a.csv", "answer,prompt,answer\n1,2,3\n"))

    def test_long_fields_are_read(self, write: Write) -> None:
        assert len(rows(write("a.csv", "prompt\n" + "x" * 300_000 + "\n"))[0]["prompt"]) == 300_000

    def test_an_unclosed_quote_is_refused_with_its_line(self, write: Write) -> None:
        with pytest.raises(DataError, match=r"a\.csv, line \d"):
            rows(write("a.csv", 'prompt\n"open\n'))


class TestParquet:
    def test_rows_come_in_order_with_numbers(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"question": ["a", "b"], "choices": [["x", "y"], ["z", "w"]]}), path)
        assert rows(path) == [
            {"question": "a", "choices": ["x", "y"]},
            {"question": "b", "choices": ["z", "w"]},
        ]
        assert places(path) == ["a.parquet, row 1", "a.parquet, row 2"]

    def test_another_content_is_refused(self, write: Write) -> None:
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            rows(write("a.parquet", "no table"))


class TestText:
    def test_a_paragraph_is_a_row(self, write: Write) -> None:
        path = write("wiki.txt", " \n = Title = \n \n One line\nand another .\n\n\n Last")
        assert rows(path) == [{"text": "= Title ="}, {"text": "One line\nand another ."}, {"text": "Last"}]
        assert places(path) == ["wiki.txt, line 2", "wiki.txt, line 4", "wiki.txt, line 8"]

    def test_bytes_that_are_no_text_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"fine\n\n\xff\xfe\x00")
        with pytest.raises(DataError, match="not UTF-8"):
            rows(path)


class TestFiles:
    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"nowhere\.jsonl: no such data file"):
            read_rows(tmp_path / "nowhere.jsonl")

    def test_an_unknown_ending_is_refused_with_the_known_ones(self, write: Write) -> None:
        with pytest.raises(DataError, match=r"'\.xlsx'") as caught:
            read_rows(write("a.xlsx", ""))
        assert ".jsonl, .json, .csv, .parquet, .txt" in str(caught.value)


def _parquet_bytes() -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.table({"question": ["why", "när"] * 40, "choices": [["x", "y"]] * 80}), written)
    return written.getvalue()


PARQUET = _parquet_bytes()
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
LINES = st.lists(
    JSON_VALUES.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=30)
    | st.sampled_from(
        [b'{"a": ' + b"1" * 5000 + b"}", b"[" * 5000, b'{"a": "\\ud800"}', b"\xef\xbb\xbf", b'"', b"\x00"]
    ),
    max_size=6,
).map(b"\n".join)
# The folder is the same for all examples of a test: each overwrites the file of the one before.
ANY_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


class TestAnyBytes:
    """Whatever a file holds, its rows are rows or told to be malformed, or it is refused by name."""

    @staticmethod
    def read(path: Path, content: bytes) -> None:
        path.write_bytes(content)
        try:
            found = [*read_rows(path)]
        except DataError as error:
            found, refused = [], str(error)
        else:
            refused = ""
        assert not refused or path.name in refused
        for place, row in found:
            assert place.startswith(f"{path.name}, ")
            if path.suffix.startswith(".json") and not isinstance(row, BadRow):
                json.dumps(row, ensure_ascii=False).encode()

    @ANY_FOLDER
    @given(content=st.binary(max_size=200) | LINES)
    @example(content=b'{"a": ' + b"1" * 5000 + b"}")
    @example(content=b'{"a": "\\ud800"}')
    @pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt", ".parquet"])
    def test_any_bytes(self, tmp_path: Path, ending: str, content: bytes) -> None:
        self.read(tmp_path / f"a{ending}", content)

    @ANY_FOLDER
    @given(content=LINES)
    def test_good_lines_among_bad_ones_are_kept(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"a": 1}\n' + content + b'\n{"a": 2}\n')
        found = [row for _, row in read_rows(path)]
        assert (found[0], found[-1]) == ({"a": 1}, {"a": 2})

    @ANY_FOLDER
    @given(changes=st.lists(st.tuples(st.integers(0, len(PARQUET) - 1), st.integers(0, 255)), max_size=4))
    def test_a_damaged_parquet_file(self, tmp_path: Path, changes: list[tuple[int, int]]) -> None:
        content = bytearray(PARQUET)
        for place, byte in changes:
            content[place] = byte
        self.read(tmp_path / "a.parquet", bytes(content))

    @ANY_FOLDER
    @given(size=st.integers(0, len(PARQUET)))
    def test_a_parquet_file_cut_off(self, tmp_path: Path, size: int) -> None:
        self.read(tmp_path / "a.parquet", PARQUET[:size])
