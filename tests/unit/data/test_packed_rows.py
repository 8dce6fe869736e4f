"""Rows on disk: each comes back by its number, in some bytes of memory."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data.chat import Rendered
from potstill.data.packed_rows import PackedRows

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
ROW = IDS.map(lambda ids: Rendered(ids, [one % 2 for one in ids]))
ROWS = st.lists(st.tuples(ROW, st.text()), max_size=8)


@given(rows=ROWS)
def test_rows_come_back_by_number_whatever_was_added_before(rows: list[tuple[Rendered, str]]) -> None:
    packed = PackedRows()
    for count, (row, name) in enumerate(rows, start=1):
        packed.append(row, name)
        assert len(packed) == count
        assert (packed[count - 1], packed.id(count - 1)) == (row, name)
    assert [packed[number] for number in range(len(rows))] == [row for row, _ in rows]
    assert [packed.id(number) for number in range(len(rows))] == [name for _, name in rows]
    assert packed.lengths.tolist() == [packed.length(number) for number in range(len(rows))]
    assert packed.lengths.tolist() == [len(row.ids) for row, _ in rows]


def test_a_row_need_not_have_a_name() -> None:
    packed = PackedRows()
    packed.append(Rendered([1, 2], [0, 1]))
    assert packed.id(0) == ""


def test_half_a_character_in_a_name_is_kept() -> None:
    packed = PackedRows()
    packed.append(Rendered([1], [0]), "record \ud800")
    assert packed.id(0) == "record \ud800"


def test_a_row_past_the_last_is_an_error() -> None:
    packed = PackedRows()
    packed.append(Rendered([1], [0]))
    with pytest.raises(IndexError):
        packed[1]


def test_they_lie_in_the_folder_and_go_with_the_object(tmp_path: Path) -> None:
    packed = PackedRows(tmp_path)
    packed.append(Rendered([*range(1000)], [0] * 1000), "r")
    packed[0]
    [file] = tmp_path.iterdir()
    assert file.stat().st_size == 5 * 1000 + 1, "four bytes an id, one a mark, and the name"
    del packed
    assert not [*tmp_path.iterdir()]


def test_a_copy_in_a_worker_reads_the_same_rows(tmp_path: Path) -> None:
    packed = PackedRows(tmp_path)
    packed.append(Rendered([1, 2], [0, 1]), "r")
    other = pickle.loads(pickle.dumps(packed))
    assert (other[0], other.id(0)) == (packed[0], "r")
