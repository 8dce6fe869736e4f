"""Stages of a training are shown together: on one chart, in one table, with where the later one began."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from potstill.report import RunView, StepView, write_report
from potstill.report.stages import stage_sections
from potstill.report.training import curves_of, loss_rows, training_sections

RunBuilder = Callable[..., RunView]


def history(first: float, last: float, steps: int = 34) -> list[dict[str, float]]:
    points: list[dict[str, float]] = [{"step": 0, "eval_loss": first + 0.1}]
    for step in range(1, steps + 1):
        loss = last + (first - last) * math.exp(-step / 8)
        points.append(
            {"step": step, "loss": loss, "grad_norm": 1 / step, "epoch": 3 * step / steps, "tokens": 100}
            | {"learning_rate": 1e-4 * (1 - step / (steps + 1))}
        )
    points.append({"step": steps, "epoch": 3.0, "eval_loss": last})
    return points


def staged(run: RunView, second: tuple[float, float], **changes: Any) -> RunView:
    """The run with a first and a second stage in the place of its student."""
    student = next(step for step in run.steps if step.kind == "train")
    assert student.manifest is not None

    def stage(name: str, on: str, needs: list[str], points: list[dict[str, float]]) -> StepView:
        assert student.manifest is not None
        manifest = student.manifest.model_copy(
            update={
                "settings": {**student.manifest.settings, "student": on},
                "counts": {"rows": 81, "parameters": 4_000_000, "trained_parameters": 16_400},
                "metrics": {"history": points, "eval_loss": points[-1]["eval_loss"]},
                "seconds": 423.0,
            }
        )
        return replace(student, name=name, needs=needs, manifest=manifest)

    stages = [
        stage("stage1", "pruned", ["pruned", "traces"], history(2.02, 1.27)),
        stage("stage2", "stage1", ["stage1", "traces"], history(*second)),
    ]
    others = [step for step in run.steps if step.kind != "train"]
    return replace(run, steps=[*others, *stages], **changes)


def test_a_stage_that_goes_on_from_the_one_before_starts_below_its_mean(build_run: RunBuilder) -> None:
    (section,) = stage_sections(staged(build_run(), (1.33, 1.19)))
    mean = sum(point["loss"] for point in history(2.02, 1.27) if "loss" in point) / 34
    first = sum(point["loss"] for point in history(1.33, 1.19)[1:6]) / 5
    (finding,) = section["findings"]
    assert finding.startswith(f"stage2 starts at a training loss of {first:.2f} over its first 5 steps, ")
    assert finding.endswith(f"below stage1's mean of {mean:.2f}.")


def test_one_that_starts_no_lower_is_not_said_to(build_run: RunBuilder) -> None:
    (section,) = stage_sections(staged(build_run(), (2.5, 1.9)))
    assert "not below stage1's mean" in section["findings"][0]


def test_the_table_has_a_row_a_stage_with_what_was_trained(build_run: RunBuilder) -> None:
    (section,) = stage_sections(staged(build_run(), (1.33, 1.19)))
    rows = [dict(zip(section["head"], row, strict=True)) for row in section["rows"]]
    assert [row["stage"] for row in rows] == ["stage1", "stage2"]
    assert rows[0]["trained parameters"] == "16,400 (0.41%)"
    assert rows[0]["peak rate"] == "9.7e-05"
    assert rows[0]["gradient norm"] == "1.00 → 0.03"
    assert rows[0]["held-out loss"] == "2.120 → 1.270"
    assert rows[0]["time"] == "7 min 03 s"


def test_the_second_stages_curve_begins_where_the_firsts_ends(
    build_run: RunBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def draw(title: str, curves: Any, **labels: Any) -> str:
        drawn[title] = curves
        return "<svg/>"

    monkeypatch.setattr("potstill.report.stages.line_chart", draw)
    stage_sections(staged(build_run(), (1.33, 1.19)))
    loss, norm = drawn["stage2: Loss over the stages"], drawn["stage2: Gradient norm over the stages"]
    assert list(loss) == ["stage1", "held-out stage1", "stage2", "held-out stage2"]
    assert list(norm) == ["stage1", "stage2"]
    assert (loss["stage1"][-1][0], loss["stage2"][0][0], loss["stage2"][-1][0]) == (34, 35, 68)
    assert [x for x, _ in loss["held-out stage2"]] == [34, 68]


def test_the_page_shows_both_stages_and_each_by_itself(build_run: RunBuilder, tmp_path: Path) -> None:
    write_report(staged(build_run(), (1.33, 1.19)), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h3>stage1 → stage2</h3>" in text
    assert "stage2: Loss over the stages" in text
    assert text.count("Loss and gradient norm, step by step") == 2
    assert "16,400 trained parameters (0.41%)" in text


def test_one_stage_alone_is_no_chain(build_run: RunBuilder) -> None:
    assert stage_sections(build_run()) == []


def test_a_teacher_that_was_trained_in_the_run_is_no_stage_before(build_run: RunBuilder) -> None:
    run = staged(build_run(), (1.33, 1.19))
    steps = []
    for step in run.steps:
        if step.name == "stage2":
            assert step.manifest is not None
            settings = {**step.manifest.settings, "student": "pruned", "teacher": "stage1"}
            step = replace(step, manifest=step.manifest.model_copy(update={"settings": settings}))
        steps.append(step)
    assert stage_sections(replace(run, steps=steps)) == []


def test_a_stage_that_is_not_finished_is_shown_as_far_as_it_came(build_run: RunBuilder) -> None:
    run = staged(
        build_run(),
        (1.33, 1.19),
        recipe_text="steps:\n  stage2: {do: train, student: stage1}\n",
        events=[
            {"event": "step_started", "step": "stage2", "fingerprint": "f"},
            {"event": "train_log", "step": "stage2", "optimiser_step": 1, "loss": 1.3, "tokens": 9},
        ],
    )
    steps = [replace(step, manifest=None) if step.name == "stage2" else step for step in run.steps]
    (section,) = stage_sections(replace(run, steps=steps))
    assert section["rows"][1][-1] == "unfinished"
    assert "1.30 in its first step, below" in section["findings"][0]


def test_instances_of_each_are_chained_one_to_one(build_run: RunBuilder) -> None:
    run = staged(build_run(), (1.33, 1.19))
    renamed = {"stage1": "stage1[math]", "stage2": "stage2[math]"}
    steps = [
        replace(
            step, name=renamed.get(step.name, step.name), needs=[renamed.get(one, one) for one in step.needs]
        )
        for step in run.steps
    ]
    (section,) = stage_sections(replace(run, steps=steps))
    assert section["name"] == "stage1[math] → stage2[math]"


def test_the_loss_table_has_means_since_the_row_before(build_run: RunBuilder) -> None:
    run = staged(build_run(), (1.33, 1.19))
    curves = curves_of(run, next(step for step in run.steps if step.name == "stage1"))
    rows = loss_rows(curves)
    assert [row[0] for row in rows] == [5, 10, 15, 20, 25, 30, 34]
    losses = [point["loss"] for point in history(2.02, 1.27) if "loss" in point]
    assert [row[3] for row in rows] == pytest.approx(
        [sum(losses[at : at + 5]) / len(losses[at : at + 5]) for at in range(0, 34, 5)]
    )
    assert rows[0][1] == pytest.approx(15 / 34)
    assert rows[0][2] == pytest.approx(sum(1 / step for step in range(1, 6)) / 5)
    (section, _) = training_sections(run)
    assert section["losses"][0] == ["5", "0.44", f"{rows[0][3]:.4f}", f"{rows[0][2]:.3f}", "–"]
    assert section["losses"][-1][-1] == "1.2700"
