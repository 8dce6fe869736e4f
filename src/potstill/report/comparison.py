"""Several runs side by side: what differs in their recipes, and what came of it."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from potstill.core.events import format_seconds
from potstill.core.store import write_atomically
from potstill.evaluate.intervals import Estimate
from potstill.report.arms import cost_of
from potstill.report.charts import interval_chart
from potstill.report.html import render
from potstill.report.page import flatten
from potstill.report.paired import Arms, Pairing, Standing, arms_of, pair
from potstill.report.results import (
    Better,
    Figure,
    Measure,
    Results,
    clear_among,
    format_figure,
    format_interval,
    p_value_of,
    results_of,
)
from potstill.report.text import aligned
from potstill.report.training import curves_of, end_value, loss_comparison, peak_memory
from potstill.report.view import RunView, StepView

__all__ = ["comparison_table", "write_comparison"]

_MOST_SETTINGS = 8
# Two runs in which one of these differs were trained on two functions, whose values do not compare.
_LOSS_SETTINGS: dict[str, Any] = {
    "alpha": None,  # by whether there is a teacher
    "temperature": 1.0,
    "divergence": "forward_kl",
    "beta": 0.5,
    "skew": 0.1,
    "renormalise": False,
    "kl_reduction": "token",
    "top_k": None,
    "base_kl": 0.0,
    "router_aux_loss_coef": None,
    "feature": None,
    "label_weight": None,
    "mask_prefix": False,
}
_FEATURE_SETTINGS = {
    "weight": 1.0,
    "layers": "uniform",
    "embeddings": False,
    "tokens": "supervised",
    "relation_heads": None,
}
_CACHE_SETTINGS = ("top_k", "codec", "draws")


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
    """A measure of each run's student, and the differences to the best one where the rows are known."""

    measure: Measure
    standing: list[Standing | None]
    figures: list[Figure | None]
    pairing: Pairing | None

    @property
    def header(self) -> str:
        """Label and unit; where there are several students, the one that the figures are of."""
        unit = f", {self.measure.unit}" if self.measure.unit in ("nats", "tokens", "tokens/s") else ""
        several = any(one is not None and len(one.results.judged) > 1 for one in self.standing)
        role = f" ({next(iter(self.roles))})" if several and len(self.roles) == 1 else ""
        return f"{self.measure.label}{unit}{role}"

    @property
    def roles(self) -> dict[str, list[str]]:
        """The models that the figures are of, each with the names of its runs."""
        found: dict[str, list[str]] = {}
        for one in self.standing:
            if one is not None:
                found.setdefault(one.role, []).append(one.run.name)
        return found

    @property
    def best(self) -> int | None:
        """The run that is clearly best: by the differences, else by intervals that lie apart."""
        if self.pairing is None:
            return _clear_best(self.measure.better, self.figures)
        clear = all(one.low > 0 or one.high < 0 for one in self.pairing.differences if one is not None)
        return self.pairing.best if clear else None

    @property
    def p_value(self) -> float | None:
        """The chance that the best run is so far from the next where there is no difference; None unknown."""
        if self.pairing is not None:
            gaps = [(one.value, one.low, one.high) for one in self.pairing.differences if one is not None]
        else:
            gaps = _unpaired_gaps(self.measure.better, self.figures)
        return max((p_value_of(*gap) for gap in gaps), default=None)

    @property
    def differences(self) -> Sequence[Estimate | None]:
        """Each run's difference to the best; None for the best and where it is not known."""
        known = None if self.pairing is None else self.pairing.differences
        return known or [None] * len(self.figures)

    @property
    def note(self) -> str | None:
        """What a reader must know: that the runs do not compare, or do on a part of their rows alone."""
        if self.pairing is None:
            return None
        if self.pairing.refusal is not None:
            return f"{self.measure.label} is not compared: {self.pairing.refusal}."
        if self.pairing.shared < self.pairing.largest:
            return (
                f"{self.measure.label} is compared on the {self.pairing.shared:,} rows that all runs share, "
                f"of up to {self.pairing.largest:,}."
            )
        return None


def comparison_table(runs: Sequence[RunView]) -> str:
    """One row a run in ASCII: the student's figures with intervals, final losses, settings that differ.

    Behind it one row an arm, where runs of several seeds were measured on the same held-out traces.
    """
    runs = _told_apart(runs)
    compared = _compared(runs)
    table = _table(runs, compared, ascii_only=True)
    notes = _notes(compared)
    rows = [table.header]
    for row in table.rows:
        rows.append([cell.text + (" *" if cell.best else "") or "-" for cell in row])
        if any(cell.interval for cell in row):
            rows.append([cell.interval for cell in row])
    marked = any(cell.best for row in table.rows for cell in row)
    text = aligned(rows) + (f"\n\n* best: {_rule(compared)}" if marked else "")
    if notes:
        text += "\n\n" + "\n".join(notes)
    for arms in _arms(runs, compared):
        text += "\n\n" + aligned([_arms_head(arms), *_arms_cells(arms)])
    return text


def write_comparison(runs: Sequence[RunView], path: Path) -> None:
    """Write a comparison of runs as one offline HTML file."""
    runs = _told_apart(runs)
    same_loss = _same_loss(runs)
    recipes = [_flat_recipe(run) for run in runs]
    shared = {
        key: value for key, value in recipes[0].items() if all(one.get(key) == value for one in recipes)
    }
    compared = _compared(runs)
    table = _table(runs, compared, ascii_only=False)
    text = render(
        "comparison.html.j2",
        names=[run.name for run in runs],
        headline=_headline(runs, compared),
        table=table,
        arms=[
            {"head": _arms_head(one), "rows": _arms_cells(one), "label": one.measure.label}
            for one in _arms(runs, compared)
        ],
        rule=_rule(compared),
        notes=_notes(compared),
        figures=_figure_charts(runs, compared),
        losses=loss_comparison(runs) if same_loss else [],
        same_loss=same_loss,
        shared=list(shared.items()),
        recipes=[(run.name, run.recipe_text) for run in runs],
    )
    write_atomically(path, text)


def _told_apart(runs: Sequence[RunView]) -> Sequence[RunView]:
    """Runs of one name under their folders' paths; the others as they are."""
    names = Counter(run.name for run in runs)
    return [
        replace(run, name=str(run.folder)) if names[run.name] > 1 and run.folder is not None else run
        for run in runs
    ]


def _arms(runs: Sequence[RunView], compared: Sequence[_Compared]) -> Iterator[Arms]:
    return arms_of(runs, [(one.measure, one.standing) for one in compared])


def _arms_head(arms: Arms) -> list[str]:
    return ["arm", "seeds", arms.measure.heading, f"minus {arms.arms[0].arm}", "each seed alone", "finding"]


def _arms_cells(arms: Arms) -> list[list[str]]:
    measure = arms.measure
    worded = (
        {True: "closer", False: "further"} if measure.unit == "nats" else {True: "better", False: "worse"}
    )
    is_log = measure.unit == "perplexity"

    def shown(value: float, *, difference: bool) -> str:
        value = math.exp(value) if is_log else value
        return format_figure(value, measure.unit, difference=difference, ascii_only=True)

    def with_ends(one: Estimate, *, difference: bool) -> str:
        if not one.is_bounded:
            return shown(one.value, difference=difference)
        value, low, high = (shown(end, difference=difference) for end in (one.value, one.low, one.high))
        return f"{value} ({low.removesuffix(' %')} to {high.removesuffix(' %')})"

    cells = []
    for row in arms.arms:
        gap = row.difference
        line = [row.arm, str(row.seeds), with_ends(row.figure, difference=False)]
        if gap is None:
            cells.append([*line, "-", "-", ""])
            continue
        finding = "no clear difference"
        if not gap.low <= 0 <= gap.high:
            finding = worded[(gap.value < 0) == (measure.better == "lower")]
        each = ", ".join(shown(one, difference=True) for one in row.by_seed) or "-"
        cells.append([*line, with_ends(gap, difference=True), each, finding])
    return cells


def _clearly_best(compared: Sequence[_Compared]) -> list[_Compared]:
    """The measures in which one run is best, and stays so when their number is reckoned with (Holm 1979)."""
    judged = [(one, p_value) for one in compared if (p_value := one.p_value) is not None]
    clear = clear_among([(one.best is not None, p_value) for one, p_value in judged])
    return [one for (one, _), is_clear in zip(judged, clear, strict=True) if is_clear]


def _notes(compared: Sequence[_Compared]) -> list[str]:
    """What a reader must know of the marks."""
    notes = [one.note for one in compared if one.note is not None]
    for one in compared:
        if len(one.roles) > 1:
            each = "; ".join(f"{role} ({', '.join(names)})" for role, names in one.roles.items())
            notes.append(f"{one.measure.label} is of other models in each run: {each}.")
    lasting = [one.measure.label for one in _clearly_best(compared)]
    marked = [one.measure.label for one in compared if one.best is not None]
    if alone := [label for label in marked if label not in lasting]:
        notes.append(
            f"Clear by itself, and not among the {len(compared)} measures that are compared (Holm's "
            f"correction): {', '.join(alone)}."
        )
    return notes


def _headline(runs: Sequence[RunView], compared: Sequence[_Compared]) -> str:
    wins: dict[str, list[str]] = {}
    for one in _clearly_best(compared):
        if one.best is not None:
            wins.setdefault(runs[one.best].name, []).append(one.measure.label)
    if wins:
        said = [f"{name} ({', '.join(labels)})" for name, labels in wins.items()]
        return f"Clearly best: {'; '.join(said)}."
    for one in compared:
        if one.pairing is not None and one.pairing.best is not None:
            gaps = one.pairing.differences
            level = [
                run.name
                for number, (run, gap) in enumerate(zip(runs, gaps, strict=True))
                if number == one.pairing.best or (gap is not None and gap.low <= 0 <= gap.high)
            ]
            if len(level) <= sum(gap is not None for gap in gaps):
                return f"Best in {one.measure.label}, and not told apart: {', '.join(level)}."
    return "No run is clearly best."


def _rule(compared: Sequence[_Compared]) -> str:
    """When a value is marked as the best."""
    overlap = "no other run's 95 % interval overlaps this one"
    pairs = "the 95 % interval of no other run's difference to it, on the same prompts, holds 0"
    alone = [one.measure.label for one in compared if one.pairing is None]
    if len(alone) == len(compared):
        return overlap
    return f"{pairs}; of {', '.join(alone)}, {overlap}" if alone else pairs


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
    found = [one for one in map(_loss_function, runs) if one is not None]
    return all(one == found[0] for one in found)


def _loss_function(run: RunView) -> dict[str, Any] | None:
    """What the last train step minimised, with the defaults of what is left out; None without such a step."""
    steps = [step for step in run.steps_of("train") if curves_of(run, step)]
    if not steps:
        return None
    given = _settings_of(run, steps[-1])
    caches = [step for step in run.steps if step.kind == "cache" and step.name in steps[-1].needs]
    found = {
        name: default if given.get(name) is None else given[name] for name, default in _LOSS_SETTINGS.items()
    }
    if found["alpha"] is None:
        found["alpha"] = 0.5 if caches or given.get("teacher") is not None else 0.0
    if isinstance(found["feature"], dict):
        found["feature"] = {**_FEATURE_SETTINGS, **found["feature"], "projection_lr_multiplier": None}
    cached = [{name: _settings_of(run, step).get(name) for name in _CACHE_SETTINGS} for step in caches]
    return {**found, "cached": cached}


def _settings_of(run: RunView, step: StepView) -> dict[str, Any]:
    """A step's settings as the recipe has them; of a recipe that cannot be read, the manifest's."""
    steps = _recipe(run).get("steps")
    given = steps.get(step.name) if isinstance(steps, dict) else None
    if not isinstance(given, dict):
        given = None if step.manifest is None else step.manifest.settings
    return given or {}


def _table(runs: Sequence[RunView], compared: Sequence[_Compared], *, ascii_only: bool) -> _Table:
    header, columns = ["run"], [[_Cell(run.name) for run in runs]]
    for one in compared:
        header.append(one.header)
        columns.append(_figure_cells(one, ascii_only=ascii_only))
        if any(one.differences) and one.measure.unit == "nats":
            header.append("above the lowest")
            columns.append(_difference_cells(one.differences, ascii_only=ascii_only))
    losses = (("training loss", "loss"), ("held-out loss", "held-out loss")) if _same_loss(runs) else ()
    for label, name in losses:
        ends = [_last_value(run, name) for run in runs]
        if any(end is not None for end in ends):
            header.append(label)
            columns.append([_Cell("" if end is None else f"{end:.3f}", is_figure=True) for end in ends])
    tokens = [sum(step.manifest.tokens for step in run.steps_of("train") if step.manifest) for run in runs]
    if any(tokens):
        header.append("tokens trained on")
        columns.append([_Cell(f"{one:,}" if one else "", is_figure=True) for one in tokens])
    header.append("time")
    columns.append([_Cell(format_seconds(sum(step.seconds or 0 for step in run.steps))) for run in runs])
    costs = [cost_of(run.steps) for run in runs]
    if any(costs):
        header.append("cost")
        columns.append([_Cell(one, is_figure=True) for one in costs])
    peaks = [peak_memory([step.manifest for step in run.steps_of("train") if step.manifest]) for run in runs]
    if any(peaks):
        header.append("memory of training")
        columns.append([_Cell(one, is_figure=True) for one in peaks])
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
    """Every measure that says which run is better, of a student that all runs have, if there is one."""
    measured = [_last_measures(run) for run in runs]
    found = []
    for label in dict.fromkeys(label for measures in measured for label in measures):
        tables = [measures.get(label) for measures in measured]
        judged = [results.judged for results, _ in filter(None, tables)]
        shared = [role for role in judged[0] if all(role in roles for roles in judged)]
        standing: list[Standing | None] = []
        figures: list[Figure | None] = []
        for run, table in zip(runs, tables, strict=True):
            role = "" if table is None else (shared or table[0].judged)[0]
            figures.append(None if table is None else table[1].values.get(role))
            known = table is not None and role in table[1].values
            standing.append(Standing(run, table[0], role) if table is not None and known else None)
        measure = next(measure for _, measure in filter(None, tables))
        if any(standing):
            found.append(_Compared(measure, standing, figures, pair(measure, standing)))
    return found


def _last_measures(run: RunView) -> dict[str, tuple[Results, Measure]]:
    """Every measure by its label; of several evaluations that have it, in the last one.

    Of the steps of one `each` stands together what can be pooled, the rest under their own names.
    """
    tables = results_of(run)
    pooled = {part: {one.label for one in results.measures} for results in tables for part in results.parts}
    found = {}
    for results in tables:
        if results.step.endswith("]"):
            together = pooled.get(results.step, ())
            measures = [
                replace(one, label=f"{results.step}: {one.label}")
                for one in results.measures
                if one.label not in together
            ]
            results = replace(results, measures=measures)
        for measure in results.measures:
            # Each run's own report has those of reasoning.
            if measure.aspect != "reasoning" and measure.better != "neither":
                found[measure.label] = (results, measure)
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
        ends = Figure(gap.value, gap.low, gap.high) if gap.is_bounded else Figure(gap.value)
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
        for run, figure, gap in zip(runs, one.figures, one.differences, strict=True):
            if figure is not None and gap is not None and gap.is_bounded:
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


def _unpaired_gaps(better: Better, figures: list[Figure | None]) -> list[tuple[float, float, float]]:
    """How far the best figure is from each other one, with the ends of the interval, as if independent."""
    known = [
        (one.value, one.value - one.low, one.high - one.value)
        for one in figures
        if one is not None and one.low is not None and one.high is not None
    ]
    if better == "neither" or len(known) < 2:
        return []
    best = max(known) if better == "higher" else min(known)
    others = [one for one in known if one is not best]
    gaps = []
    for value, below, above in others:
        half = math.hypot(best[1], above) if better == "higher" else math.hypot(best[2], below)
        gap = abs(best[0] - value)
        gaps.append((gap, gap - half, gap + half))
    return gaps


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
