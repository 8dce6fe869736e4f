"""The selection part of a report: each step's scores and cut, its rule beside what chance would keep."""

from pathlib import Path
from typing import Any

from potstill.report.charts import Histogram, histogram_chart, save_histogram
from potstill.report.view import RunView, StepView

__all__ = ["save_score_histograms", "selection_sections"]

_ARMS = {
    "all": "all rows",
    "rule": "the rule's",
    "random": "as many at random",
    "length": "as many of like length",
}
_FIGURES = {
    "rows": ("rows", "{:,.0f}"),
    "mean_tokens": ("tokens a response", "{:,.1f}"),
    "mean_divergence": ("divergence", "{:+.4f}"),
    "mean_teacher_probability": ("P(teacher)", "{:.4f}"),
    "mean_student_probability": ("P(student)", "{:.4f}"),
    "mean_distilled_probability": ("P(distilled)", "{:.4f}"),
    "mean_sentences": ("sentences", "{:.2f}"),
    "mean_teacher_sentences": ("teacher sentences", "{:.2f}"),
    "mean_student_sentences": ("student sentences", "{:.2f}"),
    "mean_shared_sentences": ("shared sentences", "{:.2f}"),
    "mean_boosted_sentences": ("boosted sentences", "{:.2f}"),
}


def selection_sections(run: RunView) -> list[dict[str, Any]]:
    """For each select step with a rule its name, facts, warnings, histogram and the table of its arms."""
    sections = []
    for step in run.steps_of("select"):
        assert step.manifest is not None
        metrics = step.manifest.metrics
        if "arms" not in metrics:
            continue
        sections.append(
            {
                "name": step.name,
                "facts": _facts(step),
                "warnings": metrics["warnings"],
                "svg": histogram_chart(_title(step), _histogram(step)),
                **_table(metrics),
            }
        )
    return sections


def save_score_histograms(run: RunView, folder: Path) -> None:
    """The histogram of each select step as `STEP-scores.png` and `.svg` in a folder, made where needed."""
    for step in run.steps_of("select"):
        if step.manifest is not None and "histogram" in step.manifest.metrics:
            folder.mkdir(parents=True, exist_ok=True)
            save_histogram(folder / f"{step.name}-scores", _title(step), _histogram(step))


def _title(step: StepView) -> str:
    return f"{step.name}: scores"


def _histogram(step: StepView) -> Histogram:
    assert step.manifest is not None
    metrics = step.manifest.metrics
    bars = metrics["histogram"]
    score = metrics["score"]
    return Histogram(
        bars["edges"],
        {"kept": bars["kept"], "dropped": bars["dropped"]},
        metrics["effective_threshold"],
        x_label="P(teacher) − P(student)" if score == "divergence" else score,
        y_label="rows",
    )


def _facts(step: StepView) -> list[str]:
    assert step.manifest is not None
    metrics, arms = step.manifest.metrics, step.manifest.metrics["arms"]
    kept, rows = arms["rule"]["rows"], arms["all"]["rows"]
    facts = [f"{kept:,} of {rows:,} rows kept ({kept / rows:.0%})"]
    if metrics["effective_threshold"] is not None:
        facts.append(f"lowest score kept {metrics['effective_threshold']:.4g}")
    gaps = metrics["divergence"]
    facts.append(f"divergence {gaps['mean']:+.4f} on average, {gaps['low']:+.4f} to {gaps['high']:+.4f}")
    if metrics["kept_by"] != "rule":
        facts.append(f"kept in the rule's place: {_ARMS[metrics['kept_by']]}")
    return facts


def _table(metrics: dict[str, Any]) -> dict[str, Any]:
    arms = {name: label for name, label in _ARMS.items() if name in metrics["arms"]}
    rows = []
    for key, (label, form) in _FIGURES.items():
        values = [metrics["arms"][name].get(key) for name in arms]
        if any(value is not None for value in values):
            rows.append((label, ["–" if value is None else form.format(value) for value in values]))
    return {
        "arms": [(label, name == metrics["kept_by"]) for name, label in arms.items()],
        "rows": rows,
    }
