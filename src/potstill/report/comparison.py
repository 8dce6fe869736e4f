"""Several runs side by side: what differs in their recipes, and what came of it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from potstill.core.events import format_seconds
from potstill.core.store import write_atomically
from potstill.evaluate.intervals import Estimate
from potstill.evaluate.paired import PairedKL
from potstill.report.charts import interval_chart
from potstill.report.html import render
from potstill.report.page import flatten
from potstill.report.paired import arms_of, differences_to_best
from potstill.report.results import Better, Figure, Measure, format_figure, format_interval, results_of
from potstill.report.text import aligned
from potstill.report.training import curves_of, end_value, loss_comparison
from potstill.report.view import RunView

__all__ = ["comparison_table", "write_comparison"]

_MOST_SETTINGS = 8
# Two runs in which one of these differs were trained on two functions, whose values do not compare.
_LOSS_SETTINGS = frozenset(
    [
        "alpha",
        "temperature",
        "divergence",
        "beta",
        "skew",
        "renormalise",
        "kl_reduction",
        "base_kl",
        "top_k",
        "codec",
        "draws",
    ]
)


@dataclass(frozen=True)
class _Cell:
    text: str
    interval: str = ""
    best: bool = False
    is_figure: bool = False
    is_setting: bool = False


@dataclass(frozen=True)
class _Table:
    header: list[str]
    rows: list[list[_Cell]]


@dataclass(frozen=True)
class _Compared:
    """A measure of each run's student, and of the held-out traces each one's difference to the best."""

    measure: Measure
    figures: list[Figure | None]
    differences: list[Estimate | None] | None

    @property
    def best(self) -> int | None:
        """The run that is clearly best: by the differences, else by intervals that lie apart."""
        if self.differences is None:
            return _clear_best(self.measure.better, self.figures)
        gaps = [one for one in self.differences if one is not None]
        clear = all(one.low > 0 or one.high < 0 for one in gaps)
        return self.differences.index(None) if clear else None


def comparison_table(runs: Sequence[RunView]) -> str:
    """One row a run in ASCII: the student's figures with intervals, final losses, settings that differ.

    Behind it one row an arm, where runs of several seeds were measured on the same held-out traces.
    """
    compared = _compared(runs)
    table = _table(runs, compared, ascii_only=True)
    rows = [table.header]
    for row in table.rows:
        rows.append([cell.text + (" *" if cell.best else "") or "-" for cell in row])
        if any(cell.interval for cell in row):
            rows.append([cell.interval for cell in row])
    marked = any(cell.best for row in table.rows for cell in row)
    text = aligned(rows) + (f"\n\n* best: {_rule(compared)}" if marked else "")
    if arms := arms_of(runs):
        text += "\n\n" + aligned([_arms_head(arms), *_arms_cells(arms)])
    return text


def write_comparison(runs: Sequence[RunView], path: Path) -> None:
    """Write a comparison of runs as one offline HTML file."""
    recipes = [_flat_recipe(run) for run in runs]
    shared = {
        key: value for key, value in recipes[0].items() if all(one.get(key) == value for one in recipes)
    }
    compared = _compared(runs)
    table, arms = _table(runs, compared, ascii_only=False), arms_of(runs)
    text = render(
        "comparison.html.j2",
        names=[run.name for run in runs],
        headline=_headline(runs, compared),
        table=table,
        arms_head=_arms_head(arms) if arms else [],
        arms=_arms_cells(arms),
        rule=_rule(compared),
        figures=_figure_charts(runs, compared),
        losses=loss_comparison(runs) if _same_loss(runs) else [],
        same_loss=_same_loss(runs),
        shared=list(shared.items()),
        recipes=[(run.name, run.recipe_text) for run in runs],
    )
    write_atomically(path, text)


def _arms_head(arms: Sequence[PairedKL]) -> list[str]:
    return ["arm", "seeds", "held-out KL, nats", f"minus {arms[0].arm}", "each seed alone", "finding"]


def _arms_cells(arms: Sequence[PairedKL]) -> list[list[str]]:
    cells = []
    for row in arms:
        kl, gap = row.kl, row.difference
        line = [row.arm, str(row.seeds), f"{kl.value:.3f} ({kl.low:.3f} to {kl.high:.3f})"]
        if gap is None:
            cells.append([*line, "-", "-", ""])
            continue
        finding = "closer" if gap.high < 0 else "further" if gap.low > 0 else "no clear difference"
        each = ", ".join(f"{one:+.3f}" for one in row.by_seed) or "-"
        cells.append([*line, f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})", each, finding])
    return cells


def _headline(runs: Sequence[RunView], compared: Sequence[_Compared]) -> str:
    wins: dict[str, list[str]] = {}
    for one in compared:
        if one.best is not None:
            wins.setdefault(runs[one.best].name, []).append(one.measure.label)
    if wins:
        said = [f"{name} ({', '.join(labels)})" for name, labels in wins.items()]
        return f"Clearly best: {'; '.join(said)}."
    for one in compared:
        if one.differences is not None:
            level = [
                run.name
                for run, gap in zip(runs, one.differences, strict=True)
                if gap is None or gap.low <= 0 <= gap.high
            ]
            if len(level) < len(runs):
                return f"Best in {one.measure.label}, and not told apart: {', '.join(level)}."
    return "No run is clearly best."


def _rule(compared: Sequence[_Compared]) -> str:
    """When a value is marked as the best."""
    overlap = "no other run's 95 % interval overlaps this one"
    pairs = "the 95 % interval of no other run's difference to it, on the same held-out prompts, holds 0"
    rules = [one.differences is not None for one in compared]
    if not any(rules):
        return overlap
    return pairs if all(rules) else f"{pairs}; of verified answers, {overlap}"


def _recipe(run: RunView) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(run.recipe_text)
    except yaml.YAMLError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _flat_recipe(run: RunView) -> dict[str, str]:
    return {
        key.removeprefix("steps."): value
        for key, value in flatten(_recipe(run))
        if key not in ("name", "description")
    }


def _settings(runs: Sequence[RunView]) -> list[dict[str, str]]:
    """Each run's settings by dotted key; a step that some runs lack is one setting, "yes" where it is.

    What refers to such a step is left out: it differs for that reason alone.
    """
    steps = [recipe.get("steps") for recipe in map(_recipe, runs)]
    names = [set(one) if isinstance(one, dict) else set() for one in steps]
    partial = set.union(*names) - set.intersection(*names)
    flat = [
        {key: value for key, value in _flat_recipe(run).items() if key.partition(".")[0] not in partial}
        for run in runs
    ]
    wired = {key for recipe in flat for key, value in recipe.items() if value in partial}
    found = []
    for recipe, present in zip(flat, names, strict=True):
        kept = {key: value for key, value in recipe.items() if key not in wired}
        found.append({**kept, **dict.fromkeys(sorted(partial & present), "yes")})
    return found


def _differing(runs: Sequence[RunView]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs, with each run's value.

    Settings of several steps that have one name and the same values, as those of a student's stages do, are
    one. Empty where the recipes have little in common.
    """
    recipes = _settings(runs)
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        values = tuple(recipe.get(key, "") for recipe in recipes)
        if len(set(values)) > 1:
            groups.setdefault((key.rpartition(".")[2], values), []).append(key)
    if len(groups) > _MOST_SETTINGS:
        return {}
    return {
        keys[0] if len(keys) == 1 else f"{name} ({', '.join(key.partition('.')[0] for key in keys)})": [
            *values
        ]
        for (name, values), keys in groups.items()
    }


def _same_loss(runs: Sequence[RunView]) -> bool:
    """Whether all runs minimised one function, so that their losses can be compared."""
    recipes = [
        {
            (name, value)
            for key, value in _flat_recipe(run).items()
            if (name := key.rpartition(".")[2]) in _LOSS_SETTINGS
        }
        for run in runs
    ]
    return all(one == recipes[0] for one in recipes)


def _table(runs: Sequence[RunView], compared: Sequence[_Compared], *, ascii_only: bool) -> _Table:
    header, columns = ["run"], [[_Cell(run.name) for run in runs]]
    for one in compared:
        unit = f", {one.measure.unit}" if one.measure.unit in ("nats", "tokens", "tokens/s") else ""
        header.append(one.measure.label + unit)
        columns.append(_figure_cells(one, ascii_only=ascii_only))
        if one.differences is not None and one.measure.unit == "nats":
            header.append("above the lowest")
            columns.append(_difference_cells(one.differences, ascii_only=ascii_only))
    for label, name in (("training loss", "loss"), ("held-out loss", "held-out loss")):
        ends = [_last_value(run, name) for run in runs]
        if any(end is not None for end in ends) and _same_loss(runs):
            header.append(label)
            columns.append([_Cell("" if end is None else f"{end:.3f}", is_figure=True) for end in ends])
    tokens = [sum(step.manifest.tokens for step in run.steps_of("train") if step.manifest) for run in runs]
    if any(tokens):
        header.append("tokens trained on")
        columns.append([_Cell(f"{one:,}" if one else "", is_figure=True) for one in tokens])
    header.append("time")
    columns.append([_Cell(format_seconds(sum(step.seconds or 0 for step in run.steps))) for run in runs])
    for name, values in _differing(runs).items():
        header.append(name)
        # A list or mapping is there as JSON, whose signs say nothing in a cell of their own.
        columns.append([_Cell(re.sub(r'[\[\]{}"]', "", value), is_setting=True) for value in values])
    return _Table(header, [list(row) for row in zip(*columns, strict=True)])


def _last_value(run: RunView, name: str) -> float | None:
    for step in reversed(run.steps_of("train")):
        if (end := end_value(step, curves_of(run, step), name)) is not None:
            return end
    return None


def _compared(runs: Sequence[RunView]) -> list[_Compared]:
    """Every measure that says which run is better."""
    measured = [_student_measures(run) for run in runs]
    found = []
    for label in dict.fromkeys(label for measures in measured for label in measures):
        pairs = [measures.get(label) for measures in measured]
        measure = next(one for one in pairs if one is not None)[0]
        figures = [None if one is None else one[1] for one in pairs]
        differences = None if None in figures else differences_to_best(runs, label, measure.better)
        found.append(_Compared(measure, figures, differences))
    return found


def _student_measures(run: RunView) -> dict[str, tuple[Measure, Figure]]:
    """The student's figure of each measure; of several evaluations the last one that has it."""
    found = {}
    for results in results_of(run):
        for measure in results.measures:
            if results.judged in measure.values and measure.better != "neither":
                found[measure.label] = (measure, measure.values[results.judged])
    return found


def _figure_cells(compared: _Compared, *, ascii_only: bool) -> list[_Cell]:
    unit, cells = compared.measure.unit, []
    for index, figure in enumerate(compared.figures):
        if figure is None:
            cells.append(_Cell("", is_figure=True))
            continue
        text = format_figure(figure.value, unit, ascii_only=ascii_only)
        interval = format_interval(figure, unit, ascii_only=ascii_only)
        cells.append(_Cell(text, interval, index == compared.best, is_figure=True))
    return cells


def _difference_cells(differences: Sequence[Estimate | None], *, ascii_only: bool) -> list[_Cell]:
    cells = []
    for gap in differences:
        if gap is None:
            cells.append(_Cell(""))
            continue
        text = format_figure(gap.value, "nats", difference=True, ascii_only=ascii_only)
        ends = Figure(gap.value, gap.low, gap.high)
        interval = format_interval(ends, "nats", difference=True, ascii_only=ascii_only)
        cells.append(_Cell(text, interval, is_figure=True))
    return cells


def _figure_charts(runs: Sequence[RunView], compared: Sequence[_Compared]) -> list[dict[str, str]]:
    """A chart of every measure that two runs or more have an interval of; a clearly best run is in colour."""
    charts = []
    for one in compared:
        points: dict[str, tuple[float, float, float]] = {}
        for run, figure in zip(runs, one.figures, strict=True):
            if figure is not None and figure.low is not None and figure.high is not None:
                points[run.name] = (figure.value, figure.low, figure.high)
        if len(points) < 2 or one.measure.aspect == "other":
            continue
        paired = {}
        for run, figure, gap in zip(runs, one.figures, one.differences or [None] * len(runs), strict=True):
            if figure is not None and gap is not None:
                low, high = gap.low - gap.value, gap.high - gap.value
                if one.measure.unit == "perplexity":
                    paired[run.name] = (figure.value * math.exp(low), figure.value * math.exp(high))
                else:
                    paired[run.name] = (figure.value + low, figure.value + high)
        unit = "" if one.measure.unit in ("share", "perplexity") else f", {one.measure.unit} a token"
        svg = interval_chart(
            one.measure.label,
            points,
            x_label=f"{one.measure.label}{unit}; {one.measure.better} is better",
            paired=paired,
            best=None if one.best is None else runs[one.best].name,
            percent=one.measure.unit == "share",
        )
        charts.append({"title": one.measure.label, "svg": svg})
    return charts


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
