"""The training part of a report says what was kept."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from potstill.report import RunView
from potstill.report.comparison import comparison_table
from potstill.report.training import training_sections


@pytest.mark.parametrize("kept", [None, 1.234])
def test_the_held_out_loss_is_that_of_the_weights_that_were_kept(
    build_run: Callable[..., RunView], kept: float | None
) -> None:
    run = build_run()
    steps = []
    for step in run.steps:
        if step.kind == "train":
            assert step.manifest is not None
            metrics = {**step.manifest.metrics, **({} if kept is None else {"eval_loss": kept})}
            step = replace(step, manifest=step.manifest.model_copy(update={"metrics": metrics}))
            last = metrics["history"][-1]["eval_loss"]
        steps.append(step)
    run = replace(run, steps=steps)
    (section,) = training_sections(run)
    assert section["facts"][-1].startswith("held-out loss ")
    assert section["facts"][-1].endswith(f"→ {last if kept is None else kept:.3f}")
    _head, _rule, row, *_ = (line.split("  ") for line in comparison_table([run, run]).splitlines())
    assert f"{last if kept is None else kept:.3f}" in map(str.strip, row)


def test_the_feature_loss_has_a_chart_of_its_own_where_there_is_one(
    build_run: Callable[..., RunView],
) -> None:
    run = build_run()
    assert "Feature loss" not in [chart["title"] for chart in training_sections(run)[0]["charts"]]
    steps = []
    for step in run.steps:
        if step.kind == "train":
            assert step.manifest is not None
            history = [
                {**point, "eval_feature" if "eval_loss" in point else "feature": 0.25}
                for point in step.manifest.metrics["history"]
            ]
            metrics = {**step.manifest.metrics, "history": history}
            step = replace(step, manifest=step.manifest.model_copy(update={"metrics": metrics}))
        steps.append(step)
    (section,) = training_sections(replace(run, steps=steps))
    (chart,) = [chart for chart in section["charts"] if chart["title"] == "Feature loss"]
    assert "mean over tokens and layers" in chart["svg"]
    assert "held-out" in chart["svg"]
