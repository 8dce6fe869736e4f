"""A selection between generating and training, through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.core.records import read_records

from .conftest import Command, write_recipe


@pytest.fixture
def recipe(tmp_path: Path, small: dict[str, Any]) -> Path:
    """The small recipe without logits: the student is trained on the traces that are selected for it."""
    steps = small["steps"]
    del steps["logits"]
    steps["traces"] |= {"logprobs": 1, "temperature": 1.0, "samples": 2}
    steps["student"]["data"] = "picked"
    small["steps"] = {
        "traces": steps["traces"],
        "pruned": steps["pruned"],
        "picked": {"do": "select", "data": "traces", "student": "pruned", "keep": {"top": 0.5}},
        "student": steps["student"],
        "exam": steps["exam"],
    }
    return write_recipe(tmp_path / "recipe.yaml", small)


def test_a_student_is_trained_on_what_was_selected(potstill: Command, recipe: Path, tmp_path: Path) -> None:
    done = potstill("run", recipe)
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "small"
    picked = list(read_records(run / "picked" / "records.parquet"))
    traces = list(read_records(run / "traces" / "records.parquet"))
    held_out = [record.id for record in traces if record.held_out]
    assert [record.id for record in picked if record.held_out] == held_out
    trained = [record for record in picked if not record.held_out]
    assert len(trained) == -(-(len(traces) - len(held_out)) // 2)
    assert all(record.scores["divergence"] for record in trained)
    dropped = (run / "picked" / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(dropped) == len(traces) - len(picked)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Which traces were selected" in page
    assert (run / "report.figures" / "picked-scores.png").is_file()
    again = potstill("run", recipe)
    assert "picked: select already made" in again.err


def test_a_sweep_over_controls_scores_no_row_twice(potstill: Command, recipe: Path, tmp_path: Path) -> None:
    assert potstill("run", recipe).code == 0
    done = potstill("run", recipe, "picked.control=random", "--json", "--output", "runs/random")
    assert done.code == 0, done.err
    events = [json.loads(line) for line in done.out.splitlines()]
    assert {one["step"] for one in events if one.get("event") == "step_reused"} == {"traces", "pruned"}
    picked = {
        name: [record.id for record in read_records(tmp_path / "runs" / name / "picked" / "records.parquet")]
        for name in ("small", "random")
    }
    assert len(picked["small"]) == len(picked["random"])
    assert picked["small"] != picked["random"]


def test_one_command_selects_from_a_run(potstill: Command, recipe: Path, tmp_path: Path) -> None:
    assert potstill("run", recipe).code == 0
    run = tmp_path / "runs" / "small"
    done = potstill(
        "select",
        f"data={run / 'traces'}",
        f"student={run / 'pruned'}",
        "keep.per_prompt=1",
        "--output",
        "runs/one",
    )
    assert done.code == 0, done.err
    picked = list(read_records(tmp_path / "runs" / "one" / "select" / "records.parquet"))
    prompts = [record.prompt_id for record in picked if not record.held_out]
    assert len(prompts) == len({*prompts}) > 0


def test_a_plan_says_what_is_missing_before_anything_is_spent(
    potstill: Command, recipe: Path, small: dict[str, Any]
) -> None:
    assert potstill("plan", recipe).code == 0
    planned = potstill("plan", recipe, "traces.logprobs=null")
    assert planned.code == 1
    assert "set `traces.logprobs=1`" in planned.out


def test_an_error_names_its_step_once(potstill: Command, recipe: Path) -> None:
    done = potstill("run", recipe, "picked.keep.top=null", "picked.keep.threshold=0.999")
    assert done.code == 1
    assert "no row reaches the threshold of 0.999" in done.err
    assert "step picked: step picked" not in done.err
