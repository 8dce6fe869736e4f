"""The students of several runs on the same prompts: differences paired by prompt, or why there are none.

An interval of each student alone is mostly about which prompts happened to be measured, and that they share.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from potstill.core.settings import ModelRef
from potstill.evaluate.intervals import Estimate, bootstrap_ratio_difference, paired_share_difference
from potstill.evaluate.paired import MeasuredRows, PairedArm, paired_arms
from potstill.evaluate.rows import FORGETTING_FILE, HELD_OUT_FILE, SCORES_FILE
from potstill.report.results import Measure, Results
from potstill.report.tables import read_table
from potstill.report.view import RunView, StepView

__all__ = ["Arms", "Pairing", "Standing", "arms_of", "pair"]

# The sums in a trace's row that a measure is the mean of.
_SUMS = {
    "kl_nats_per_token": "kl_nats",
    "top1_agreement": "agreed_tokens",
    "perplexity": "cross_entropy_nats",
}
_OF_A_TRACE = ("record_id", "prompt_id", "supervised_tokens")
_OF_ANSWERS = ("verdicts", "scores")
_SHARES, _ANY = (0.0, 1.0), (-math.inf, math.inf)


@dataclass(frozen=True)
class Standing:
    """The model that stands for its run by a measure: its role in a table of the run."""

    run: RunView
    results: Results
    role: str


@dataclass(frozen=True)
class Pairing:
    """Runs on the rows that all of them share: the best one, and each other one's difference to it.

    `differences` has None for the best and for runs without the measure; of perplexities the logarithms are
    subtracted. `refusal` says why there is no best where the runs were not measured on the same.
    """

    best: int | None = None
    differences: tuple[Estimate | None, ...] = ()
    shared: int = 0
    largest: int = 0
    refusal: str | None = None


def pair(measure: Measure, standing: Sequence[Standing | None]) -> Pairing | None:
    """The runs' models by a measure, None for a run without it, paired; None where rows were not kept."""
    chosen = [number for number, one in enumerate(standing) if one is not None]
    found = [_measured_rows(one, measure) for one in standing if one is not None]
    known = [one for one in found if one is not None]
    if len(known) < max(2, len(found)):
        return None
    tables = [rows for rows, _ in known]
    common = [key for key in tables[0] if all(key in rows for rows in tables)]
    if (refusal := _refusal(measure, known, any_common=bool(common))) is not None:
        return Pairing(refusal=refusal)
    clusters = [tables[0][key][0] for key in common]
    columns = [([rows[key][1] for key in common], [rows[key][2] for key in common]) for rows in tables]
    sums = [sum(tops) for tops, _ in columns]
    best = sums.index(max(sums) if measure.better == "higher" else min(sums))
    gaps: dict[int, Estimate] = {
        number: _difference(columns[best], one, clusters, measure)
        for place, (number, one) in enumerate(zip(chosen, columns, strict=True))
        if place != best
    }
    return Pairing(
        best=chosen[best],
        differences=tuple(gaps.get(number) for number in range(len(standing))),
        shared=len(common),
        largest=max(map(len, tables)),
    )


def _refusal(measure: Measure, known: Sequence["_Measured"], *, any_common: bool) -> str | None:
    """Why runs cannot be compared by a measure, or None where they can."""
    if measure.aspect == "closeness" and any(teacher != known[0][1] for _, teacher in known):
        return "another teacher in each run"
    if not any_common:
        return "other prompts in each run"
    sizes: dict[str, float] = {}
    if any(sizes.setdefault(key, row[2]) != row[2] for rows, _ in known for key, row in rows.items()):
        if (measure.row_value or ("",))[0] in _OF_ANSWERS:
            return "a prompt has another number of judged answers in each run"
        return "the same text makes other tokens in each run"
    return None


_Measured = tuple[MeasuredRows, Any]
"""A run's rows behind a measure, and what the teacher is that it was measured to."""
_Column = tuple[list[float], list[float]]


def _difference(best: _Column, other: _Column, clusters: list[str], measure: Measure) -> Estimate:
    """The other's ratio less the best's; of one verdict a prompt with an interval that holds near 0 and 1."""
    if len(set(clusters)) == len(clusters) and set(best[1]) == {1.0} and {*best[0], *other[0]} <= {0.0, 1.0}:
        return paired_share_difference([top == 1 for top in best[0]], [top == 1 for top in other[0]])
    within, pseudo = _bounds(measure)
    return bootstrap_ratio_difference(best, other, clusters, seed=0, within=within, pseudo=pseudo)


def _bounds(measure: Measure) -> tuple[tuple[float, float], float | None]:
    """A measure's bounds, and how much an observation at a bound weighs: a prompt, or a token of traces."""
    if (measure.row_value or ("",))[0] in _OF_ANSWERS:
        return _SHARES, None
    return (_SHARES if measure.unit == "share" else _ANY), 1.0


def _measured_rows(standing: Standing, measure: Measure) -> _Measured | None:
    """A model's rows behind a measure and the teacher it was measured to; None where they were not kept."""
    parts = standing.results.parts or [standing.results.step]
    steps = [step for step in standing.run.steps_of("evaluate") if step.name in parts]
    rows = {key: row for step in steps for key, row in _rows(step, standing.role, measure).items()}
    manifest = steps[0].manifest
    if not rows or manifest is None:
        return None
    teacher = ModelRef(manifest.metrics.get("teacher"))
    return rows, (manifest.inputs.get(teacher), teacher.view)


def _rows(step: StepView, model: str, measure: Measure) -> MeasuredRows:
    column, name = measure.row_value or ("", "")
    if column == "held_out":
        return _trace_rows(read_table(step, HELD_OUT_FILE, [*_OF_A_TRACE, _SUMS[name]], model), _SUMS[name])
    if column == "given":
        columns = ["task", *_OF_A_TRACE, "cross_entropy_nats"]
        table = read_table(step, FORGETTING_FILE, columns, model)
        return _trace_rows([row for row in table if row["task"] == measure.task], "cross_entropy_nats")
    if column not in _OF_ANSWERS:
        return {}
    table = read_table(step, SCORES_FILE, ["task", "prompt_id", column], model)
    return _answer_rows([row for row in table if row["task"] == measure.task], column, name)


def _trace_rows(table: list[dict[str, Any]], name: str) -> MeasuredRows:
    return {
        row["record_id"]: (row["prompt_id"], float(row[name]), float(row["supervised_tokens"]))
        for row in table
        if row[name] is not None
    }


def _answer_rows(table: list[dict[str, Any]], column: str, name: str) -> MeasuredRows:
    """One verdict or score of a task by prompt: the sum over its answers, and how many there are."""
    rows: dict[str, tuple[str, float, float]] = {}
    for row in table:
        values = json.loads(row[column])
        if name in values:
            prompt = row["prompt_id"]
            _, total, answers = rows.get(prompt, (prompt, 0.0, 0.0))
            rows[prompt] = (prompt, total + float(values[name]), answers + 1.0)
    return rows


@dataclass(frozen=True)
class Arms:
    """A measure of each arm over several seeds, the first of them the one that others are compared with.

    Of a perplexity the figures are cross-entropies.
    """

    measure: Measure
    arms: list[PairedArm]


def arms_of(
    runs: Sequence[RunView], measured: Iterable[tuple[Measure, Sequence[Standing | None]]]
) -> Iterator[Arms]:
    """What the arms of a comparison over several seeds came to: on held-out traces, and on every task.

    `measured` are measures with the models that stand for the runs. An arm is a run's name without its seed:
    `rule,seed=1` and `rule,seed=2` are two runs of one arm. A second run of the same arm and seed is an arm
    of its own. Where runs differ in nothing but the seed, the models of their evaluation are the arms, its
    baseline first. Of the measures on held-out traces the first one stands for all. Empty for fewer than two
    arms, where each has one seed only, and by a measure that the runs cannot be compared by.
    """
    names = _arms(runs)
    any_of_traces = False
    for measure, standing in measured:
        of_traces = (measure.row_value or ("",))[0] == "held_out"
        if (of_traces and any_of_traces) or not (of_traces or measure.aspect in ("task", "forgetting")):
            continue
        any_of_traces = any_of_traces or of_traces
        placed = [(*name, one) for name, one in zip(names, standing, strict=True) if one is not None]
        if len({arm for arm, _ in names}) == 1:
            placed = [
                (role, seed, replace(one, role=role))
                for role in _shared_roles([one for *_, one in placed], measure)
                for _, seed, one in placed
            ]
        found = [(arm, seed, _measured_rows(one, measure)) for arm, seed, one in placed]
        if _refusal(measure, [rows for *_, rows in found if rows is not None], any_common=True) is not None:
            continue
        within, pseudo = _bounds(measure)
        arms = paired_arms(
            ((arm, seed, rows[0]) for arm, seed, rows in found if rows is not None),
            within=within,
            pseudo=pseudo,
        )
        if len(arms) > 1 and any(one.seeds > 1 for one in arms):
            yield Arms(measure, arms)


def _shared_roles(standing: Sequence[Standing], measure: Measure) -> list[str]:
    """The models of an evaluation, but for teachers, that all runs have by a measure; the baseline first."""
    measured = [
        {role for own in one.results.measures if own.label == measure.label for role in own.values}
        - {*one.results.teachers}
        for one in standing
    ]
    shared = [role for role in standing[0].results.roles if all(role in roles for roles in measured)]
    return sorted(shared, key=lambda role: role != standing[0].results.baseline)


def _arms(runs: Sequence[RunView]) -> list[tuple[str, int]]:
    """The arm and the seed of each run; a second run of both is an arm of its own, numbered."""
    runs_of: Counter[tuple[str, int]] = Counter()
    found: list[tuple[str, int]] = []
    names = [_arm(run.name) for run in runs]
    for run, name in zip(runs, names, strict=True):
        arm, seed = name or ("as it is" if any(names) else ""), _seed(run)
        runs_of[arm, seed] += 1
        number = runs_of[arm, seed]
        found.append((arm if number == 1 else f"{arm} ({number})", seed))
    return found


def _arm(name: str) -> str:
    return ",".join(part for part in name.split(",") if not part.startswith("seed="))


def _seed(run: RunView) -> int:
    try:
        found = yaml.safe_load(run.recipe_text)
    except yaml.YAMLError:
        return 0
    return int(found.get("seed", 0)) if isinstance(found, dict) else 0
