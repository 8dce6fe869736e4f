from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from potstill.report import RunView, comparison_table, write_comparison

RunBuilder = Callable[..., RunView]


@pytest.fixture
def sweep(build_run: RunBuilder) -> list[RunView]:
    """Three runs of one recipe at three learning rates; the second is right far more often."""
    runs = []
    for lr, right, kl in (("0.0001", 0.1, 1.9), ("0.0003", 0.8, 1.18), ("0.001", 0.5, 1.2)):
        run = build_run(f"lr={lr}")
        manifest: Any = run.steps[4].manifest
        student = manifest.metrics["models"]["student"]
        student["tasks"]["chain_sum"]["verdicts"]["correct"] = {
            "value": right,
            "low": right - 0.08,
            "high": right + 0.08,
        }
        student["held_out"]["kl_nats_per_token"] = {"value": kl, "low": kl - 0.05, "high": kl + 0.05}
        runs.append(
            replace(run, recipe_text=run.recipe_text.replace("3.0e-4", lr).replace("quickstart", run.name))
        )
    return runs


def _columns(table: str) -> list[list[str]]:
    rule = table.splitlines()[1]
    starts = [
        index for index, sign in enumerate(rule) if sign == "-" and (index == 0 or rule[index - 1] == " ")
    ]
    ends = [*starts[1:], None]
    return [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in table.splitlines()]


def test_a_sweep_shows_what_differs_and_what_came_of_it(sweep: list[RunView]) -> None:
    table = comparison_table(sweep)
    assert table.isascii()
    rows = _columns(table)
    assert rows[0][:4] == ["run", "student.lr", "training loss", "held-out loss"]
    assert "time" in rows[0]
    assert [row[0] for row in rows[2:8:2]] == ["lr=0.0001", "lr=0.0003", "lr=0.001"]
    assert [row[1] for row in rows[2:8:2]] == ["0.0001", "0.0003", "0.001"]


def test_best_is_said_only_where_intervals_do_not_overlap(sweep: list[RunView]) -> None:
    rows = _columns(comparison_table(sweep))
    right = rows[0].index("chain_sum, right answers")
    closeness = rows[0].index("KL to the teacher, nats")
    assert [row[right] for row in rows[2:8:2]] == ["10.0 %", "80.0 % *", "50.0 %"]
    assert [row[closeness] for row in rows[2:8:2]] == ["1.90", "1.18", "1.20"]
    assert rows[3][right] == "2.0 to 18.0"


def test_a_run_without_an_evaluation_has_its_row(sweep: list[RunView], tmp_path: Path) -> None:
    stopped = replace(sweep[0], steps=sweep[0].steps[:3])
    rows = _columns(comparison_table([stopped, *sweep[1:]]))
    assert rows[2][0] == "lr=0.0001"
    assert "-" in rows[2]
    write_comparison([stopped, *sweep[1:]], tmp_path / "comparison.html")


def test_recipes_that_have_little_in_common_are_not_listed_key_by_key(sweep: list[RunView]) -> None:
    other = replace(
        sweep[1], recipe_text="name: other\nsteps:\n" + "".join(f"  s{n}: {{do: train}}\n" for n in range(20))
    )
    assert _columns(comparison_table([sweep[0], other]))[0][:2] == ["run", "training loss"]


def test_a_recipe_that_cannot_be_read_does_not_stop_the_comparison(sweep: list[RunView]) -> None:
    broken = replace(sweep[1], recipe_text="a: [")
    assert "lr=0.0003" in comparison_table([sweep[0], broken])


def test_the_page_names_the_clear_winner_and_draws_the_losses(sweep: list[RunView], tmp_path: Path) -> None:
    write_comparison(sweep, tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "Clearly best: lr=0.0003 (chain_sum, right answers)." in text
    assert text.count('<svg class="chart"') == 1
    for run in sweep:
        assert f">{run.name}</text>" in text


def test_without_a_clear_winner_none_is_named(sweep: list[RunView], tmp_path: Path) -> None:
    write_comparison([sweep[1], replace(sweep[1], name="again")], tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "No run is clearly best" in text
