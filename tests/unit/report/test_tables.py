"""Figures that no single evaluate step has are those of one evaluation of all its rows."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from potstill.core.errors import StoreError
from potstill.evaluate.intervals import paired_share_difference, wilson_interval
from potstill.evaluate.rows import SCORES_FILE
from potstill.report import model_card, write_report
from potstill.report.arms import arm_costs
from potstill.report.conclusion import conclusion
from potstill.report.results import results_of
from potstill.report.tables import across_tasks
from potstill.report.text import terminal_table
from potstill.report.view import StepView

from .evaluations import evaluation, run, step

LOGIC = {"undivided": [True, False, False, False], "specialist": [True, True, True, False]}
WORDS = {"undivided": [False] * 6, "specialist": [False, True, True, True, True, True]}


def domains(root: Path, words: str = "words") -> list[StepView]:
    """Two specialists, each on its own domain beside the undivided model."""
    trained = [
        step("undivided", "train", seconds=80.0, tokens=1000),
        step("specialist[logic]", "train", seconds=30.0, tokens=400),
        step("specialist[words]", "train", seconds=50.0, tokens=600),
    ]
    parts = [
        evaluation(
            root / domain,
            f"own-domain[{domain}]",
            {"own": (prompts, right)},
            needs=["undivided", f"specialist[{domain}]"],
        )
        for domain, prompts, right in (("logic", "logic", LOGIC), ("words", words, WORDS))
    ]
    return [*trained, *parts]


def test_specialists_on_their_own_domains_are_one_model_against_the_undivided_one(tmp_path: Path) -> None:
    *parts, whole = results_of(run("cascade", domains(tmp_path)))
    assert [one.title for one in (*parts, whole)] == [
        "own-domain[logic]",
        "own-domain[words]",
        "own-domain, all together",
    ]
    [right] = whole.of("task")
    first, second = ([*LOGIC[role], *WORDS[role]] for role in ("undivided", "specialist"))
    assert right.prompts == 10
    figure, gap = right.values["specialist"], right.differences["specialist"]
    assert (figure.value, right.values["undivided"].value) == (0.8, 0.1)
    wilson = wilson_interval(8, 10)
    assert (figure.low, figure.high) == pytest.approx((wilson.low, wilson.high))
    oracle = paired_share_difference(first, second)
    assert (gap.value, gap.low, gap.high) == (oracle.value, oracle.low, oracle.high)
    by_domain = {one.label: one for one in whole.of("group")}
    assert [*by_domain] == ["own, logic, right answers", "own, words, right answers"]
    assert [one.prompts for one in by_domain.values()] == [4, 6]
    for one, part in zip(by_domain.values(), parts, strict=True):
        [of_part] = part.of("task")
        assert (one.values, one.differences) == (of_part.values, of_part.differences)
    assert (found := conclusion(whole)) is not None
    assert found.headline == "specialist is right more often than undivided."


def test_all_specialists_together_cost_what_each_of_them_does_and_in_parallel_the_longest(
    tmp_path: Path,
) -> None:
    made = run("cascade", domains(tmp_path))
    table = arm_costs(made, results_of(made)[-1])
    assert table is not None
    rows = {row[0]: dict(zip(table["head"], row, strict=True)) for row in table["rows"]}
    assert rows["specialist"]["trained steps"] == "2"
    assert rows["specialist"]["own tokens"] == "1,000"
    assert rows["specialist"]["training"] == rows["undivided"]["training"] == "1 min 20 s"
    assert rows["specialist"]["training, in parallel"] == "50.0 s"
    write_report(made, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("What each arm cost") == 1, "of all together, and not of every domain again"
    assert "own-domain, all together" in page
    assert "own-domain, all together" in terminal_table(made)


def test_steps_of_one_each_on_the_same_prompts_are_no_parts_of_a_whole(tmp_path: Path) -> None:
    steps = domains(tmp_path, words="logic")
    assert [one.step for one in results_of(run("ranks", steps))] == ["own-domain[logic]", "own-domain[words]"]


def test_nothing_is_pooled_before_all_parts_are_made_nor_without_their_rows(tmp_path: Path) -> None:
    *steps, last = domains(tmp_path)
    unmade = StepView(last.name, last.kind, last.needs, None, False, None, None)
    assert [one.step for one in results_of(run("half", [*steps, unmade]))] == ["own-domain[logic]"]
    (tmp_path / "words" / SCORES_FILE).unlink()
    assert len(results_of(run("gone", [*steps, last]))) == 2


def test_damaged_rows_are_told_by_the_step_to_make_again(tmp_path: Path) -> None:
    steps = domains(tmp_path)
    (tmp_path / "words" / SCORES_FILE).write_bytes(b"PAR1 and no more")
    with pytest.raises(StoreError, match=r"--force own-domain\[words\]"):
        results_of(run("damaged", steps))


BARE = {"without": [True, False, False, False, False, False], "with": [False] * 6}
FOUND = {"without": [True, False, True, False, False, False], "with": [True, True, True, True, True, False]}


def test_a_model_with_passages_is_compared_with_one_that_has_none(tmp_path: Path) -> None:
    exam = evaluation(tmp_path / "exam", "exam", {"bare": ("q", BARE), "found": ("q", FOUND)})
    [(tasks, gaps)] = across_tasks(exam, "without")
    assert tasks == ["bare", "found"]
    assert [*gaps] == [("without", "found"), ("with", "bare"), ("with", "found")]
    oracle = paired_share_difference(BARE["without"], FOUND["with"])
    gap = gaps["with", "found"]
    assert (gap["value"], gap["low"], gap["high"]) == (oracle.value, oracle.low, oracle.high)
    write_report(run("kard", [exam]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The same questions in several tasks" in page
    assert "their difference to without on bare, paired by question" in page
    table = page.partition("The same questions in several tasks")[2].partition("</table>")[0]
    assert [cell.count('<span class="chip') for cell in table.split("<tr>")[2:]] == [1, 2]


def test_tasks_of_other_questions_are_not_put_beside_each_other(tmp_path: Path) -> None:
    exam = evaluation(tmp_path / "exam", "exam", {"bare": ("q", BARE), "others": ("r", FOUND)})
    assert across_tasks(exam, "without") == []
    write_report(run("two", [exam]), tmp_path / "report.html")
    assert "The same questions" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_card_has_the_parts_under_their_names_and_not_all_together(tmp_path: Path) -> None:
    steps = domains(tmp_path)
    card = model_card(run("cascade", steps), steps[0])
    headings = [line for line in card.splitlines() if line.startswith("## What was measured")]
    assert headings == [
        r"## What was measured: own-domain\[logic\]",
        r"## What was measured: own-domain\[words\]",
    ]


def test_figures_are_read_without_the_texts_of_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns: list[str] = []
    read = pq.read_table

    def noted(*arguments: Any, **options: Any) -> Any:
        columns.extend(options["columns"])
        return read(*arguments, **options)

    monkeypatch.setattr(pq, "read_table", noted)
    *_, whole = results_of(run("cascade", domains(tmp_path)))
    assert whole.parts
    assert "verdicts" in columns
    assert not {"prompt", "response", "note"} & {*columns}
