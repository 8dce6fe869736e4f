"""An SQLite file: all of a write or nothing, shared by several, and failures that a person understands."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from potstill.core.database import CheckedValues, Database
from potstill.core.errors import StoreError

TABLE = "numbers (number INTEGER PRIMARY KEY, name TEXT)"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "deep" / "numbers.sqlite", "numbers", [TABLE]) as made:
        yield made


def names(database: Database) -> list[str]:
    return [name for (name,) in database.rows("SELECT name FROM numbers ORDER BY number")]


INSERT = "INSERT INTO numbers VALUES (?, ?)"


class TestDatabase:
    def test_what_was_written_is_found_by_row_and_by_rows(self, database: Database) -> None:
        database.write((INSERT, [(1, "one"), (2, "two")]), ("DELETE FROM numbers WHERE number = ?", [(1,)]))
        assert database.row("SELECT name FROM numbers WHERE number = ?", 2) == ("two",)
        assert database.row("SELECT name FROM numbers WHERE number = ?", 1) is None
        assert names(database) == ["two"]

    def test_a_write_that_fails_keeps_nothing_of_all_its_statements(self, database: Database) -> None:
        database.write((INSERT, [(1, "one")]))
        with pytest.raises(StoreError, match=r"the store of numbers cannot be used \(UNIQUE constraint"):
            database.write((INSERT, [(2, "two")]), (INSERT, [(3, "three"), (1, "another")]))
        assert names(database) == ["one"]
        database.write((INSERT, [(2, "two")]))
        assert names(database) == ["one", "two"]

    def test_rows_of_a_write_may_come_one_at_a_time(self, database: Database) -> None:
        database.write((INSERT, ((number, str(number)) for number in range(3))))
        assert names(database) == ["0", "1", "2"]

    def test_a_write_is_there_for_others_at_once_and_stays(self, database: Database) -> None:
        with Database(database.path, "numbers", [TABLE]) as other:
            database.write((INSERT, [(1, "one")]))
            assert names(other) == ["one"]
            other.write((INSERT, [(2, "two")]))
        assert names(database) == ["one", "two"]

    def test_others_read_while_one_reads_row_by_row(self, database: Database) -> None:
        database.write((INSERT, [(number, str(number)) for number in range(100)]))
        rows = database.rows("SELECT number FROM numbers")
        next(rows)
        database.write((INSERT, [(100, "100")]))
        assert len([*rows]) >= 99

    def test_a_closed_one_says_that_it_cannot_be_used(self, database: Database) -> None:
        database.close()
        with pytest.raises(StoreError, match="cannot be used"):
            names(database)

    def test_a_file_that_is_no_database_is_damaged_and_how_to_save_it_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "a.sqlite").write_text("no database at all " * 100, encoding="utf-8")
        with pytest.raises(StoreError, match=r"numbers is damaged(.|\n)*a\.sqlite \.recover"):
            Database(tmp_path / "a.sqlite", "numbers", [TABLE])

    def test_a_folder_that_cannot_be_made_is_said_so(self, tmp_path: Path) -> None:
        (tmp_path / "folder").write_text("a file", encoding="utf-8")
        with pytest.raises(StoreError, match=r"numbers cannot be used(.|\n)*POTSTILL_STORE"):
            Database(tmp_path / "folder" / "a.sqlite", "numbers", [TABLE])

    def test_a_lost_page_is_found_when_it_is_read(self, database: Database) -> None:
        database.write((INSERT, [(number, "x" * 1000) for number in range(100)]))
        database.close()
        data = bytearray(database.path.read_bytes())
        page = int.from_bytes(data[16:18], "big")
        data[page : 2 * page] = bytes(page)
        database.path.write_bytes(data)
        with (
            pytest.raises(StoreError, match="numbers is damaged"),
            Database(database.path, "numbers", [TABLE]) as again,
        ):
            names(again)


def kept(path: Path, value: str = "answer TEXT") -> CheckedValues:
    return CheckedValues(path, "answers", "key TEXT", value, [TABLE])


class TestCheckedValues:
    def test_a_value_comes_back_as_bytes_by_its_key(self, tmp_path: Path) -> None:
        with kept(tmp_path / "a.sqlite") as values:
            values.keep([("a", "naïve"), ("b", "")])
            assert values.value("a") == "naïve".encode()
            assert values.value("b") == b""
            assert values.value("c") is None
            assert "a" in values
            assert "c" not in values

    def test_bytes_are_kept_as_they_are(self, tmp_path: Path) -> None:
        with kept(tmp_path / "a.sqlite", "answer BLOB") as values:
            values.keep([("a", b"\xff\x00")])
            assert values.value("a") == b"\xff\x00"

    def test_a_keys_first_value_stays(self, tmp_path: Path) -> None:
        with kept(tmp_path / "a.sqlite") as values:
            values.keep([("a", "first"), ("a", "second")])
            values.keep([("a", "third")])
            assert values.value("a") == b"first"

    def test_values_and_further_statements_are_kept_together_or_not_at_all(self, tmp_path: Path) -> None:
        with kept(tmp_path / "a.sqlite") as values:
            values.keep([("a", "first")], (INSERT, [(1, "one")]))
            with pytest.raises(StoreError, match="UNIQUE constraint"):
                values.keep([("b", "second")], (INSERT, [(1, "again")]))
            assert "b" not in values
            assert names(values) == ["one"]

    def test_a_value_that_changed_on_the_disk_is_taken_out_with_all_others_that_did(
        self, tmp_path: Path
    ) -> None:
        with kept(tmp_path / "a.sqlite") as values:
            values.keep([(key, f"the answer of {key}") for key in "abc"])
            values.write(("UPDATE answers SET answer = ? WHERE key = ?", [("changed", "a"), (b"\xff", "c")]))
            assert values.value("b") == b"the answer of b"
            with pytest.raises(StoreError, match=r"2 answers were damaged(.|\n)*the same command again"):
                values.value("c")
            assert [key for key in "abc" if key in values] == ["b"]
            values.keep([("a", "made anew")])
            assert values.value("a") == b"made anew"

    def test_a_file_of_before_there_were_checksums_is_taken_on_unchecked(self, tmp_path: Path) -> None:
        path = tmp_path / "old.sqlite"
        with sqlite3.connect(path) as old:
            old.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            old.execute("INSERT INTO answers VALUES ('a', 'old')")
        old.close()
        for _ in range(2):  # the column is added once
            with kept(path) as values:
                assert values.value("a") == b"old"
                values.keep([("b", "new")])
        with kept(path) as values:
            values.write(("UPDATE answers SET answer = ?", [("changed",)]))
            assert values.value("a") == b"changed"
            with pytest.raises(StoreError, match="1 answers were damaged"):
                values.value("b")
