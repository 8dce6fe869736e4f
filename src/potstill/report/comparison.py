"""Several runs side by side: what differs in their recipes, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from potstill.core.events import format_seconds
from potstill.core.store import write_atomically
from potstill.report.html import render
from potstill.report.page import flatten
from potstill.report.results import Better, Figure, Measure, format_figure, format_interval, results_of
from potstill.report.text import aligned
from potstill.report.training import curves_of, end_value, loss_comparison
from potstill.report.view import RunView

__all__ = ["comparison_table", "write_comparison"]

_MOST_KEYS = 8


@dataclass(frozen=True)
class _Cell:
    text: str
    interval: str = ""
    best: bool = False
    is_figure: bool = False


@dataclass(frozen=True)
class _Table:
    header: list[str]
    rows: list[list[_Cell]]


def comparison_table(runs: Sequence[RunView]) -> str:
    """One row a run in ASCII: settings that differ, final losses, the student's figures with intervals."""
    table = _table(runs, ascii_only=True)
    rows = [table.header]
    for row in table.rows:
        rows.append([cell.text + (" *" if cell.best else "") or "-" for cell in row])
        if any(cell.interval for cell in row):
            rows.append([cell.interval for cell in row])
    marked = any(cell.best for row in table.rows for cell in row)
    return aligned(rows) + ("\n\n* best: no other run's 95 % interval overlaps this one" if marked else "")


def write_comparison(runs: Sequence[RunView], path: Path) -> None:
    """Write a comparison of runs as one offline HTML file."""
    recipes = [_flat_recipe(run) for run in runs]
    shared = {
        key: value for key, value in recipes[0].items() if all(one.get(key) == value for one in recipes)
    }
    table = _table(runs, ascii_only=False)
    text = render(
        "comparison.html.j2",
        names=[run.name for run in runs],
        headline=_headline(table),
        table=table,
        charts=loss_comparison(runs),
        shared=list(shared.items()),
        recipes=[(run.name, run.recipe_text) for run in runs],
    )
    write_atomically(path, text)


def _headline(table: _Table) -> str:
    wins = []
    for row in table.rows:
        labels = [label for label, cell in zip(table.header, row, strict=True) if cell.best]
        if labels:
            wins.append(f"{row[0].text} ({', '.join(labels)})")
    if not wins:
        return "No run is clearly best: their 95 % intervals overlap."
    return f"Clearly best: {'; '.join(wins)}."


def _flat_recipe(run: RunView) -> dict[str, str]:
    try:
        recipe = yaml.safe_load(run.recipe_text)
    except yaml.YAMLError:
        return {}
    if not isinstance(recipe, dict):
        return {}
    return {
        key.removeprefix("steps."): value
        for key, value in flatten(recipe)
        if key not in ("name", "description")
    }


def _differing_keys(runs: Sequence[RunView]) -> list[str]:
    """Recipe keys whose values are not the same in all runs; none where the recipes have little in common."""
    recipes = [_flat_recipe(run) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    differing = [key for key in keys if len({recipe.get(key) for recipe in recipes}) > 1]
    return differing if len(differing) <= _MOST_KEYS else []


def _table(runs: Sequence[RunView], *, ascii_only: bool) -> _Table:
    keys = _differing_keys(runs)
    recipes = [_flat_recipe(run) for run in runs]
    header, columns = ["run", *keys], [[_Cell(run.name) for run in runs]]
    columns += [[_Cell(recipe.get(key, "")) for recipe in recipes] for key in keys]
    for label, name in (("training loss", "loss"), ("held-out loss", "held-out loss")):
        ends = [_last_value(run, name) for run in runs]
        if any(end is not None for end in ends):
            header.append(label)
            columns.append([_Cell("" if end is None else f"{end:.3f}", is_figure=True) for end in ends])
    measured = [_student_measures(run) for run in runs]
    for label in dict.fromkeys(label for measures in measured for label in measures):
        found = [measures.get(label) for measures in measured]
        first = next(one for one in found if one is not None)[0]
        unit = f", {first.unit}" if first.unit in ("nats", "tokens", "tokens/s") else ""
        header.append(label + unit)
        columns.append(
            _figure_cells(first, [one[1] if one else None for one in found], ascii_only=ascii_only)
        )
    header.append("time")
    columns.append([_Cell(format_seconds(sum(step.seconds or 0 for step in run.steps))) for run in runs])
    return _Table(header, [list(row) for row in zip(*columns, strict=True)])


def _last_value(run: RunView, name: str) -> float | None:
    for step in reversed(run.steps_of("train")):
        if (end := end_value(step, curves_of(run, step), name)) is not None:
            return end
    return None


def _student_measures(run: RunView) -> dict[str, tuple[Measure, Figure]]:
    """The student's figure of each measure; of several evaluations the last one that has it."""
    found = {}
    for results in results_of(run):
        role = results.student or (results.roles[-1] if results.roles else None)
        for measure in results.measures:
            if role in measure.values and measure.better != "neither":
                found[measure.label] = (measure, measure.values[role])
    return found


def _figure_cells(measure: Measure, figures: list[Figure | None], *, ascii_only: bool) -> list[_Cell]:
    best = _clear_best(measure.better, figures)
    cells = []
    for index, figure in enumerate(figures):
        if figure is None:
            cells.append(_Cell("", is_figure=True))
            continue
        text = format_figure(figure.value, measure.unit, ascii_only=ascii_only)
        interval = format_interval(figure, measure.unit, ascii_only=ascii_only)
        cells.append(_Cell(text, interval, index == best, is_figure=True))
    return cells


def _clear_best(better: Better, figures: list[Figure | None]) -> int | None:
    """The figure whose interval no other one overlaps, or None."""
    known: list[tuple[int, float, float]] = [
        (index, one.low, one.high)
        for index, one in enumerate(figures)
        if one is not None and one.low is not None and one.high is not None
    ]
    if better == "neither" or len(known) < 2:
        return None
    if better == "higher":
        winner = max(known, key=lambda one: one[1])
        clear = all(other[2] < winner[1] for other in known if other is not winner)
    else:
        winner = min(known, key=lambda one: one[2])
        clear = all(other[1] > winner[2] for other in known if other is not winner)
    return winner[0] if clear else None
