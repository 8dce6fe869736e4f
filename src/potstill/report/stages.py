"""Train steps that go on from one another: on one chart, in one table, and where the later one began."""

import itertools
from typing import Any

import yaml

from potstill.core.events import format_seconds
from potstill.report.charts import line_chart
from potstill.report.training import Curve, curves_of, end_value, loss_rows, thinned
from potstill.report.view import RunView, StepView

__all__ = ["stage_sections"]

_PANELS = (
    ("Loss over the stages", "loss, nats per token", ("loss", "held-out loss")),
    ("Gradient norm over the stages", "gradient norm", ("grad_norm",)),
)
_HEAD = (
    "stage",
    "rows",
    "steps",
    "trained parameters",
    "peak rate",
    "training loss",
    "held-out loss",
    "gradient norm",
    "time",
)


def stage_sections(run: RunView) -> list[dict[str, Any]]:
    """For each chain of train steps, each of which trains on what the one before made: charts and table."""
    return [_section(run, chain) for chain in _chains(run)]


def _chains(run: RunView) -> list[list[StepView]]:
    """Chains of two stages or more that logged something, each from its first stage to its last."""
    trained = {step.name: step for step in run.steps if step.kind == "train" and curves_of(run, step)}
    before = {
        name: found for name, step in trained.items() if (found := _trained_before(run, step)) in trained
    }
    ends = [name for name in before if name not in before.values()]
    chains = []
    for end in ends:
        chain = [end]
        while (earlier := before.get(chain[0])) is not None:
            chain.insert(0, earlier)
        chains.append([trained[name] for name in chain])
    return chains


def _trained_before(run: RunView, step: StepView) -> str | None:
    """The step whose model a train step trains on, if a step made it."""
    if step.manifest is not None:
        student = step.manifest.settings.get("student")
    else:
        try:
            student = yaml.safe_load(run.recipe_text)["steps"][step.name.partition("[")[0]]["student"]
        except (yaml.YAMLError, KeyError, TypeError):
            return None
    # A step with the same `each` value is meant where the reference names none.
    return next((need for need in step.needs if need == student or need.startswith(f"{student}[")), None)


def _section(run: RunView, chain: list[StepView]) -> dict[str, Any]:
    curves = {step.name: curves_of(run, step) for step in chain}
    charts = []
    for title, y_label, names in _PANELS:
        shown: dict[str, Curve] = {}
        behind = 0.0
        for step in chain:
            for name in names:
                if name in curves[step.name]:
                    label = step.name if name == names[0] else f"held-out {step.name}"
                    shown[label] = thinned([(behind + x, y) for x, y in curves[step.name][name]])
            behind += max((curve[-1][0] for curve in curves[step.name].values()), default=0.0)
        if shown:
            svg = line_chart(
                f"{chain[-1].name}: {title}",
                shown,
                x_label="optimiser step, stage after stage",
                y_label=y_label,
            )
            charts.append({"title": title, "svg": svg})
    return {
        "name": " → ".join(step.name for step in chain),
        "charts": charts,
        "head": _HEAD,
        "rows": [_row(step, curves[step.name]) for step in chain],
        "findings": [
            _beginning(earlier.name, curves[earlier.name], later.name, curves[later.name])
            for earlier, later in itertools.pairwise(chain)
            if curves[earlier.name].get("loss") and curves[later.name].get("loss")
        ],
    }


def _mean(curve: Curve) -> float:
    return sum(value for _, value in curve) / len(curve)


def _row(step: StepView, curves: dict[str, Curve]) -> list[str]:
    manifest = step.manifest
    counts = manifest.counts if manifest else {}
    trained, every = counts.get("trained_parameters"), counts.get("parameters")
    loss, norm, held_out = (curves.get(name, []) for name in ("loss", "grad_norm", "held-out loss"))
    peak = max((rate for _, rate in curves.get("learning_rate", [])), default=None)
    end = end_value(step, curves, "held-out loss")
    return [
        step.name,
        f"{counts['rows']:,}" if "rows" in counts else "–",
        f"{loss[-1][0]:,.0f}" if loss else "–",
        f"{trained:,} ({trained / every:.2%})" if trained and every else "–",
        f"{peak:.2g}" if peak is not None else "–",
        f"{_mean(loss):.3f} on average, {loss[-1][1]:.3f} at the end" if loss else "–",
        f"{held_out[0][1]:.3f} → {end:.3f}" if held_out and end is not None else "–",
        f"{norm[0][1]:.2f} → {norm[-1][1]:.2f}" if norm else "–",
        format_seconds(manifest.seconds) if manifest else "unfinished",
    ]


def _beginning(earlier: str, before: dict[str, Curve], later: str, after: dict[str, Curve]) -> str:
    """Whether a stage goes on from what the one before learned, in a sentence."""
    (last_step, *_, first), mean = loss_rows(after)[0], _mean(before["loss"])
    steps = "in its first step" if last_step == 1 else f"over its first {last_step:g} steps"
    where = "below" if first < mean else "not below"
    return (
        f"{later} starts at a training loss of {first:.2f} {steps}, {where} {earlier}'s mean of {mean:.2f}."
    )
