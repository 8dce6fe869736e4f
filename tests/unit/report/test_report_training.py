"""The training part of a report says what was kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from potstill.report import RunView
from potstill.report.comparison import comparison_table
from potstill.report.training import peak_memory, training_sections, training_table

from .evaluations import with_metrics_of


def history_of(run: RunView) -> list[dict[str, Any]]:
    """What the train step of the run logged."""
    [manifest] = [step.manifest for step in run.steps_of("train") if step.manifest is not None]
    history: list[dict[str, Any]] = manifest.metrics["history"]
    return history


@pytest.mark.parametrize("kept", [None, 1.234])
def test_the_held_out_loss_is_that_of_the_weights_that_were_kept(
    build_run: Callable[..., RunView], kept: float | None
) -> None:
    run = with_metrics_of(build_run(), "train", **({} if kept is None else {"eval_loss": kept}))
    last = history_of(run)[-1]["eval_loss"]
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
    history = [
        {**point, "eval_feature" if "eval_loss" in point else "feature": 0.25} for point in history_of(run)
    ]
    (section,) = training_sections(with_metrics_of(run, "train", history=history))
    (chart,) = [chart for chart in section["charts"] if chart["title"] == "Feature loss"]
    assert "mean over tokens and layers" in chart["svg"]
    assert "held-out" in chart["svg"]


def test_train_steps_stand_side_by_side_with_what_they_cost(build_run: Callable[..., RunView]) -> None:
    run = build_run()
    assert training_table(run) is None, "one has nothing beside it"
    student = next(step for step in run.steps if step.kind == "train")
    assert student.manifest is not None
    cost = {"peak_memory_bytes": 1_320_000_000, "counts": {"rows": 145, "steps": 76}}
    other = replace(student, name="other", manifest=student.manifest.model_copy(update=cost))
    table = training_table(replace(run, steps=[*run.steps, other]))
    assert table is not None
    assert dict(zip(table["head"], table["rows"][1], strict=True)) == {
        "step": "other",
        "rows": "145",
        "steps": "76",
        "tokens": "55,680",
        "time": "3 min 25 s",
        "tokens/s": "272",
        "memory": "1.32 GB",
    }
    assert table["rows"][0][-1] == "–", "an artifact from before has no peak"


def test_the_peak_is_that_of_the_gpu_where_it_was_used(build_run: Callable[..., RunView]) -> None:
    manifest = build_run().steps[3].manifest
    assert manifest is not None
    peaks = {"peak_memory_bytes": 9_000_000_000, "peak_gpu_memory_bytes": 5_100_000_000}
    assert peak_memory([manifest]) == ""
    assert peak_memory([manifest, manifest.model_copy(update=peaks)]) == "5.10 GB of GPU"


@pytest.mark.parametrize(("kl", "shown"), [(None, False), (0.5, True)])
def test_the_parts_of_a_loss_are_drawn_where_there_are_several(
    build_run: Callable[..., RunView], kl: float | None, shown: bool
) -> None:
    run = build_run()
    history = [
        {
            key: value
            for key, value in {
                **point,
                **{name.replace("loss", "cross_entropy"): point[name] for name in point if "loss" in name},
                "kl": kl,
            }.items()
            if value is not None and not key.endswith("_kl")
        }
        for point in history_of(run)
    ]
    (section,) = training_sections(with_metrics_of(run, "train", history=history))
    assert ("Its parts" in [chart["title"] for chart in section["charts"]]) == shown
