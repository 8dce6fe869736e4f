"""The blinded sheet: nothing in it tells who wrote what, spreadsheets do it no harm, and it is read back."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.evaluate.rating import RATING_KEY_FILE, RATING_SHEET_FILE, _cell, rate, write_sheet
from potstill.evaluate.rows import AnswerRow
from potstill.report import rating_table

MODELS = ("student", "base")


@pytest.fixture
def sheet(tmp_path: Path) -> Callable[..., list[list[str]]]:
    """`sheet(answers by model)`: writes the sheet of one task and gives its rows."""

    def write(given_answers: dict[str, list[str]] | None = None, *, count: int = 100) -> list[list[str]]:
        texts = given_answers or {model: [f"{model[0]}{number}" for number in range(12)] for model in MODELS}
        answers = {
            model: {
                "task": [
                    AnswerRow(f"r{number}", f"p{number}", "[]", text, "stop", 1, 1)
                    for number, text in enumerate(written)
                ]
            }
            for model, written in texts.items()
        }
        size = len(next(iter(texts.values())))
        prompts = {
            "task": [
                Record(f"p{one}", [{"role": "user", "content": f"question {one}"}]) for one in range(size)
            ]
        }
        write_sheet(tmp_path, answers, prompts, baseline="base", count=count, seed=1)
        return read(tmp_path / RATING_SHEET_FILE)

    return write


def read(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))


def filled(tmp_path: Path, name: str, score: Callable[[str], Any], delimiter: str = ",") -> Path:
    """A copy of the sheet with `score(answer)` behind every answer."""
    rows = read(tmp_path / RATING_SHEET_FILE)
    for row in rows[1:]:
        for column in range(2, len(row), 2):
            row[column + 1] = str(score(row[column]))
    with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return tmp_path / name


class TestTheSheet:
    def test_it_shows_each_prompt_with_every_answer_and_room_for_scores(self, sheet: Any) -> None:
        rows = sheet()
        assert rows[0] == ["item", "prompt", "answer A", "score A (1-5)", "answer B", "score B (1-5)"]
        assert {row[1] for row in rows[1:]} == {f"question {number}" for number in range(12)}
        for row in rows[1:]:
            number = row[1].removeprefix("question ")
            assert {row[2], row[4]} == {f"s{number}", f"b{number}"}
            assert row[3] == row[5] == ""

    def test_no_name_is_in_it_and_the_order_is_each_rows_own(self, sheet: Any, tmp_path: Path) -> None:
        rows = sheet()
        text = (tmp_path / RATING_SHEET_FILE).read_text(encoding="utf-8")
        assert not any(model in text for model in MODELS)
        assert {row[2][0] for row in rows[1:]} == {"s", "b"}
        key = json.loads((tmp_path / RATING_KEY_FILE).read_text(encoding="utf-8"))
        for row in rows[1:]:
            assert key["items"][row[0]]["models"][0][0] == row[2][0]

    def test_reasoning_is_left_out_and_an_empty_answer_is_called_so(self, sheet: Any) -> None:
        rows = sheet({"base": ["<think>hm</think>yes"], "student": ["<think>only</think>"]})
        assert {rows[1][2], rows[1][4]} == {"yes", "(no answer)"}

    def test_it_is_the_same_every_time_and_has_so_many_prompts_as_are_asked_for(self, sheet: Any) -> None:
        assert sheet() == sheet()
        assert len(sheet(count=5)) == 6

    @given(st.text(max_size=50))
    def test_no_cell_begins_as_a_formula(self, text: str) -> None:
        cell = _cell(text)
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
        assert cell.removeprefix("'") == text.removeprefix("'") or cell == text

    @pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)"])
    def test_formulas_come_as_text(self, sheet: Any, text: str) -> None:
        rows = sheet({"base": [text], "student": ["fine"]})
        assert {rows[1][2], rows[1][4]} == {f"'{text}", "fine"}

    def test_a_cell_is_no_longer_than_a_spreadsheet_takes(self, sheet: Any) -> None:
        rows = sheet({"base": ["x" * 50_000], "student": ["fine"]})
        longest = max(rows[1], key=len)
        assert len(longest) < 32_767
        assert longest.endswith("(cut)")


class TestReadingBack:
    def test_scores_preferences_and_differences_are_by_model(self, sheet: Any, tmp_path: Path) -> None:
        sheet()
        [found] = rate(tmp_path, [filled(tmp_path, "one.csv", lambda text: 4 if text[0] == "s" else 2)])
        assert list(found.scores) == ["base", "student"]
        assert (found.items, found.raters, found.agreement) == (12, 1, None)
        assert (found.scores["student"].value, found.scores["base"].value) == (4, 2)
        assert found.differences["student"].value == 2
        assert found.preferred["student"].value == 1

    def test_equal_gaps_on_few_prompts_stay_within_the_scale_and_are_no_verdict(
        self, sheet: Any, tmp_path: Path
    ) -> None:
        sheet({"base": ["b0", "b1"], "student": ["s0", "s1"]})
        [found] = rate(tmp_path, [filled(tmp_path, "one.csv", lambda text: 5 if text[0] == "s" else 4)])
        gap, score = found.differences["student"], found.scores["student"]
        assert -4 <= gap.low < 0 < gap.value == 1 < gap.high <= 4
        assert 1 <= score.low < score.value == score.high == 5

    def test_several_raters_are_averaged_and_their_agreement_is_told(
        self, sheet: Any, tmp_path: Path
    ) -> None:
        sheet()
        high = filled(tmp_path, "a.csv", lambda text: 1 + int(text[1:]) % 5)
        low = filled(tmp_path, "b.csv", lambda text: max(1, int(text[1:]) % 5))
        [found] = rate(tmp_path, [high, low])
        assert found.raters == 2
        assert found.agreement is not None
        assert 0.5 < found.agreement < 1
        assert found.preferred["student"].value == 0.5, "every prompt is a tie"
        assert found.differences["student"].value == 0
        [alike] = rate(tmp_path, [high, high])
        assert alike.agreement == 1

    def test_scores_may_be_missing_and_rows_in_any_order(self, sheet: Any, tmp_path: Path) -> None:
        rows = sheet()
        key = json.loads((tmp_path / RATING_KEY_FILE).read_text(encoding="utf-8"))["items"]
        wanted = rows[3]
        wanted[3], wanted[5] = "5", "3,5"
        path = tmp_path / "few.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=";").writerows([rows[0], *reversed(rows[1:])])
        [found] = rate(tmp_path, [path])
        assert found.items == 1
        assert found.scores[key[wanted[0]]["models"][1]].value == 3.5

    @pytest.mark.parametrize("score", ["6", "0", "good", "nan", "-1"])
    def test_what_is_no_score_is_told_with_its_place(self, sheet: Any, tmp_path: Path, score: str) -> None:
        sheet()
        with pytest.raises(DataError, match="is no score") as caught:
            rate(tmp_path, [filled(tmp_path, "bad.csv", lambda text: score)])
        assert "bad.csv, line 2, score A" in str(caught.value)

    def test_an_answer_that_is_rated_twice_is_told_with_its_place(self, sheet: Any, tmp_path: Path) -> None:
        sheet()
        path = filled(tmp_path, "mine.csv", lambda answer: 3)
        rows = read(path)
        with path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([*rows[1][:3], 5, *rows[1][4:]])
        with pytest.raises(DataError, match=rf"mine\.csv, line 14: the item '{rows[1][0]}' has two scores"):
            rate(tmp_path, [path])

    def test_a_column_of_scores_that_lost_its_name_is_told(self, sheet: Any, tmp_path: Path) -> None:
        sheet()
        path = filled(tmp_path, "mine.csv", lambda answer: 3)
        path.write_text(path.read_text(encoding="utf-8").replace("score B (1-5)", "B"), encoding="utf-8")
        with pytest.raises(DataError, match=r"the scores of 'answer B' have no column"):
            rate(tmp_path, [path])

    def test_a_key_that_was_changed_is_told(self, sheet: Any, tmp_path: Path) -> None:
        sheet()
        path = filled(tmp_path, "mine.csv", lambda answer: 3)
        for text in ("{oops", "[]", "{}"):
            (tmp_path / RATING_KEY_FILE).write_text(text, encoding="utf-8")
            with pytest.raises(DataError, match="the key of the rating sheet cannot be read"):
                rate(tmp_path, [path])

    def test_a_sheet_of_another_evaluation_is_refused(self, sheet: Any, tmp_path: Path) -> None:
        sheet()
        (tmp_path / "other.csv").write_text(
            "item,prompt,answer A,score A (1-5)\nzz,q,a,3\n", encoding="utf-8"
        )
        with pytest.raises(DataError, match="none of this evaluation's"):
            rate(tmp_path, [tmp_path / "other.csv"])

    @pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
    def test_what_is_no_sheet_is_refused(self, sheet: Any, tmp_path: Path, text: str) -> None:
        sheet()
        (tmp_path / "none.csv").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="no rating sheet"):
            rate(tmp_path, [tmp_path / "none.csv"])

    def test_an_unfilled_sheet_another_encoding_and_a_folder_without_key_are_told(
        self, sheet: Any, tmp_path: Path
    ) -> None:
        sheet()
        with pytest.raises(DataError, match="no sheet holds a score"):
            rate(tmp_path, [tmp_path / RATING_SHEET_FILE])
        (tmp_path / "old.csv").write_bytes("item,prompt\nä".encode("latin-1"))
        with pytest.raises(DataError, match="not in UTF-8"):
            rate(tmp_path, [tmp_path / "old.csv"])
        with pytest.raises(DataError, match="cannot be read"):
            rate(tmp_path, [tmp_path / "gone.csv"])
        (tmp_path / RATING_KEY_FILE).unlink()
        with pytest.raises(DataError, match="no key of a rating sheet"):
            rate(tmp_path, [tmp_path / RATING_SHEET_FILE])

    def test_the_command_prints_the_table_or_json(self, sheet: Any, tmp_path: Path) -> None:
        from typer.testing import CliRunner

        from potstill.cli import app

        sheet()
        path = str(filled(tmp_path, "one.csv", lambda text: 4 if text[0] == "s" else 2))
        shown = CliRunner().invoke(app, ["rate", str(tmp_path), path])
        assert shown.exit_code == 0, shown.output
        assert "student" in shown.output
        printed = CliRunner().invoke(app, ["rate", str(tmp_path), path, "--json"])
        assert json.loads(printed.output)[0]["differences"]["student"]["value"] == 2

    def test_the_table_is_ascii_and_names_models_and_agreement(self, sheet: Any, tmp_path: Path) -> None:
        sheet()
        path = filled(tmp_path, "one.csv", lambda text: 1 + int(text[1:]) % 5)
        table = rating_table(rate(tmp_path, [path, path]))
        assert table.isascii()
        assert "task: 12 prompts, 2 raters" in table
        assert "alpha 1.00" in table
        assert "difference to base" in table
        assert "student" in table
