"""What the models of an evaluation cost to train, with all that they were trained from."""

from collections.abc import Callable, Sequence
from typing import Any

from potstill.core.events import format_seconds
from potstill.report.results import Results
from potstill.report.view import RunView, StepView

__all__ = ["arm_costs"]

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
    """For each model that a train step made its costs and those of every step behind it; None without any."""
    made = {step.name: step for step in run.steps if step.manifest is not None}
    rows = []
    for role in results.roles:
        maker = _maker(str(results.models[role].get("reference", "")), made, results, run)
        if maker is not None and (row := _row(role, maker, made, run)) is not None:
            rows.append(row)
    return {"head": _HEAD, "rows": rows} if rows else None


def _maker(reference: str, made: dict[str, StepView], results: Results, run: RunView) -> StepView | None:
    """The step that made a model: of several `each` values, the one that the evaluation itself needs."""
    name = reference.partition(":")[0]
    if name in made:
        return made[name]
    evaluation = next(step for step in run.steps if step.name == results.step)
    return next(
        (made[need] for need in evaluation.needs if need in made and need.startswith(f"{name}[")), None
    )


def _row(role: str, maker: StepView, made: dict[str, StepView], run: RunView) -> list[str] | None:
    behind = _behind(maker, made)
    trained = [step for step in behind if step.kind == "train"]
    if not trained:
        return None
    written = [step for step in behind if step.kind == "generate"]
    tokens = [step.manifest.tokens for step in trained if step.manifest is not None]
    flops = sum(step.manifest.metrics.get("flops", 0.0) for step in trained if step.manifest is not None)
    assert maker.manifest is not None
    return [
        role,
        f"{len(trained)}",
        f"{maker.manifest.tokens:,}",
        f"{sum(tokens):,}",
        f"{flops:.2e}" if flops else "–",
        format_seconds(_sum(trained)),
        _in_parallel(run, trained, _longest(maker, made, lambda step: step.kind == "train")),
        format_seconds(_sum(written)),
        _in_parallel(run, behind, _longest(maker, made, lambda step: True)),
    ]


def _in_parallel(run: RunView, steps: Sequence[StepView], estimate: float) -> str:
    """How long steps took side by side, else how long the longest way through them would take."""
    measured = run.side_by_side(steps)
    return format_seconds(estimate) if measured is None else f"{format_seconds(measured[0])}, measured"


def _behind(step: StepView, made: dict[str, StepView]) -> list[StepView]:
    """A step and every one that it needs, each once."""
    found: dict[str, StepView] = {}
    open_steps = [step]
    while open_steps:
        one = open_steps.pop()
        if one.name not in found:
            found[one.name] = one
            open_steps += [made[need] for need in one.needs if need in made]
    return [*found.values()]


def _sum(steps: Sequence[StepView]) -> float:
    return sum(step.seconds or 0.0 for step in steps)


def _longest(step: StepView, made: dict[str, StepView], counts: Callable[[StepView], bool]) -> float:
    """Seconds of the longest way to a step's end, over the steps that count."""
    ends: dict[str, float] = {}

    def end(one: StepView) -> float:
        if one.name not in ends:
            before = max((end(made[need]) for need in one.needs if need in made), default=0.0)
            ends[one.name] = before + (one.seconds or 0.0) * counts(one)
        return ends[one.name]

    return end(step)
