"""What the models of an evaluation cost to train, with all that they were trained from."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from potstill.core.events import format_seconds
from potstill.report.results import Results
from potstill.report.view import RunView, StepView

__all__ = ["arm_costs", "cost_of"]

_HEAD = (
    "arm",
    "trained steps",
    "own tokens",
    "training tokens",
    "training FLOPs",
    "training",
    "training, in parallel",
    "writing traces",
    "all, in parallel",
)


def arm_costs(run: RunView, results: Results) -> dict[str, Any] | None:
    """For each model that a train step made its costs and those of every step behind it; None without any.

    The cost in dollars stands there where any of these steps has one.
    """
    made = {step.name: step for step in run.steps if step.manifest is not None}
    rows = []
    for role in results.roles:
        makers = _makers(str(results.models[role].get("reference", "")), made, results, run)
        if (row := _row(role, makers, made, run)) is not None:
            rows.append(row)
    if not rows:
        return None
    if any(row[-1] for row in rows):
        return {"head": (*_HEAD, "cost"), "rows": [[*row[:-1], row[-1] or "–"] for row in rows]}
    return {"head": _HEAD, "rows": [row[:-1] for row in rows]}


def cost_of(steps: Iterable[StepView]) -> str:
    """What the answers that steps bought cost, in dollars; empty where none has a known price."""
    bought = [step.manifest.metrics.get("bought", {}) for step in steps if step.manifest is not None]
    costs = [one["cost_usd"] for one in bought if "cost_usd" in one]
    return f"${sum(costs):,.2f}" if costs else ""


def _makers(reference: str, made: dict[str, StepView], results: Results, run: RunView) -> list[StepView]:
    """The steps that made a role's model: of several `each` values, those that the evaluation needs."""
    name = reference.partition(":")[0]
    if name in made:
        return [made[name]]
    parts = results.parts or [results.step]
    needs = dict.fromkeys(need for step in run.steps if step.name in parts for need in step.needs)
    found = [made[need] for need in needs if need in made and need.startswith(f"{name}[")]
    return found if results.parts else found[:1]


def _row(role: str, makers: Sequence[StepView], made: dict[str, StepView], run: RunView) -> list[str] | None:
    behind = _behind(makers, made)
    trained = [step for step in behind if step.kind == "train"]
    if not trained:
        return None
    written = [step for step in behind if step.kind == "generate"]
    tokens = [step.manifest.tokens for step in trained if step.manifest is not None]
    flops = sum(step.manifest.metrics.get("flops", 0.0) for step in trained if step.manifest is not None)
    own = sum(maker.manifest.tokens for maker in makers if maker.manifest is not None)
    return [
        role,
        f"{len(trained)}",
        f"{own:,}",
        f"{sum(tokens):,}",
        f"{flops:.2e}" if flops else "–",
        format_seconds(_sum(trained)),
        _in_parallel(run, trained, _longest(makers, made, lambda step: step.kind == "train")),
        format_seconds(_sum(written)),
        _in_parallel(run, behind, _longest(makers, made, lambda step: True)),
        cost_of(behind),
    ]


def _in_parallel(run: RunView, steps: Sequence[StepView], estimate: float) -> str:
    """How long steps took side by side, else how long the longest way through them would take."""
    measured = run.side_by_side(steps)
    return format_seconds(estimate) if measured is None else f"{format_seconds(measured[0])}, measured"


def _behind(steps: Sequence[StepView], made: dict[str, StepView]) -> list[StepView]:
    """Steps and every one that they need, each once."""
    found: dict[str, StepView] = {}
    open_steps = [*steps]
    while open_steps:
        one = open_steps.pop()
        if one.name not in found:
            found[one.name] = one
            open_steps += [made[need] for need in one.needs if need in made]
    return [*found.values()]


def _sum(steps: Sequence[StepView]) -> float:
    return sum(step.seconds or 0.0 for step in steps)


def _longest(
    steps: Sequence[StepView], made: dict[str, StepView], counts: Callable[[StepView], bool]
) -> float:
    """Seconds of the longest way to the end of the last of some steps, over the steps that count."""
    ends: dict[str, float] = {}

    def end(one: StepView) -> float:
        if one.name not in ends:
            before = max((end(made[need]) for need in one.needs if need in made), default=0.0)
            ends[one.name] = before + (one.seconds or 0.0) * counts(one)
        return ends[one.name]

    return max(map(end, steps))
