"""The training part of a report: loss curves and a few facts."""

import math
from collections.abc import Sequence
from typing import Any

from potstill.core.events import format_seconds
from potstill.core.store import Manifest
from potstill.report.charts import line_chart
from potstill.report.experts import expert_section
from potstill.report.view import RunView, StepView

__all__ = [
    "Curve",
    "curves_of",
    "end_value",
    "loss_comparison",
    "loss_rows",
    "peak_memory",
    "thinned",
    "training_sections",
    "training_table",
]

Curve = list[tuple[float, float]]
"""(optimiser step, value) points in order."""

_DRAWN_POINTS = 160
_TABLE_ROWS = 7
_SHARE = "share of tokens"
_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "loss, nats per token", {"loss": "training", "held-out loss": "held-out"}),
    (
        "Its parts",
        "nats per token",
        {
            "cross_entropy": "cross-entropy",
            "held-out cross_entropy": "held-out cross-entropy",
            "kl": "KL to the teacher",
            "held-out kl": "held-out KL to the teacher",
            "base_kl": "KL to the base",
            "held-out base_kl": "held-out KL to the base",
        },
    ),
    (
        "Routers' auxiliary loss",
        "times the experts a token",
        {"router_aux": "training", "held-out router_aux": "held-out"},
    ),
    (
        "Feature loss",
        "mean over tokens and layers",
        {"feature": "training", "held-out feature": "held-out"},
    ),
    (
        "Top-1 agreement with the teacher",
        _SHARE,
        {"agreement": "training", "held-out agreement": "held-out"},
    ),
    ("Gradient norm", "norm before clipping", {"grad_norm": "gradient norm"}),
)


def curves_of(run: RunView, step: StepView) -> dict[str, Curve]:
    """The curves that a train step recorded, by figure: "loss", "kl", "held-out loss" ...; empty without any.

    An unfinished step has them in the run's events alone, where a resumed attempt may have repeated some
    points.
    """
    if step.manifest is not None:
        history: list[dict[str, Any]] = step.manifest.metrics.get("history", [])
    else:
        history = [
            {key: value for key, value in event.items() if key not in ("time", "tokens_per_s")}
            | {"step": event["optimiser_step"]}
            for event in run.logged(step, "train_log")
            if "optimiser_step" in event
        ]
    found: dict[str, dict[float, float]] = {}
    for point in history:
        for key, value in point.items():
            if (
                key not in ("step", "optimiser_step")
                and isinstance(value, int | float)
                and math.isfinite(value)
            ):
                name = f"held-out {key.removeprefix('eval_')}" if key.startswith("eval_") else key
                found.setdefault(name, {})[point["step"]] = float(value)
    return {name: sorted(points.items()) for name, points in found.items()}


def end_value(step: StepView, curves: dict[str, Curve], name: str) -> float | None:
    """A curve's last value, and of the held-out loss that of the weights that were kept."""
    kept = step.manifest.metrics.get("eval_loss") if step.manifest and name == "held-out loss" else None
    if isinstance(kept, int | float):
        return float(kept)
    return curves[name][-1][1] if name in curves else None


def training_sections(run: RunView) -> list[dict[str, Any]]:
    """For each train step that logged something its name, facts, charts and table of parameter groups."""
    sections = []
    for step in run.steps:
        curves = curves_of(run, step) if step.kind == "train" else {}
        if not curves:
            continue
        charts: list[dict[str, Any]] = []
        drawn: list[list[Curve]] = []
        for title, y_label, names in _PANELS:
            shown = {label: thinned(curves[name]) for name, label in names.items() if name in curves}
            if shown and [*shown.values()] not in drawn:  # a loss of one part is no second chart
                drawn.append([*shown.values()])
                svg = line_chart(
                    f"{step.name}: {title}",
                    shown,
                    x_label="optimiser step",
                    y_label=y_label,
                    percent=y_label == _SHARE,
                )
                charts.append({"title": title, "svg": svg})
        sections.append(
            {
                "name": step.name,
                "facts": _facts(step, curves),
                "charts": charts,
                "losses": _loss_table(curves),
                "groups": _groups(step),
                "experts": expert_section(run, step),
            }
        )
    return sections


def peak_memory(manifests: Sequence[Manifest]) -> str:
    """The most that any of the steps took: on the GPU where it was used, else of the process; or nothing."""
    gpu = max((one.peak_gpu_memory_bytes or 0 for one in manifests), default=0)
    process = max((one.peak_memory_bytes or 0 for one in manifests), default=0)
    if gpu:
        return f"{gpu / 1e9:.2f} GB of GPU"
    return f"{process / 1e9:.2f} GB" if process else ""


def training_table(run: RunView) -> dict[str, Any] | None:
    """What each train step cost, side by side; None where there are fewer than two."""
    made = [(step.name, step.manifest) for step in run.steps_of("train") if step.manifest is not None]
    if len(made) < 2:
        return None
    rows = []
    for name, manifest in made:
        speed = f"{manifest.tokens / manifest.seconds:,.0f}" if manifest.seconds > 0 else "–"
        counts = [manifest.counts.get(key) for key in ("rows", "steps")]
        rows.append(
            [
                name,
                *("–" if count is None else f"{count:,}" for count in counts),
                f"{manifest.tokens:,}",
                format_seconds(manifest.seconds),
                speed,
                peak_memory([manifest]) or "–",
            ]
        )
    return {"head": ["step", "rows", "steps", "tokens", "time", "tokens/s", "memory"], "rows": rows}


def loss_rows(curves: dict[str, Curve]) -> list[tuple[float, float | None, float | None, float]]:
    """A row each few steps: their last step, its epoch, and the means of gradient norm and training loss.

    Steps are parted evenly into at most _TABLE_ROWS groups, the last of them perhaps a smaller one.
    """
    loss, epochs, norms = (curves.get(name, []) for name in ("loss", "epoch", "grad_norm"))
    epoch_at, norm_at = dict(epochs), dict(norms)
    size = max(1, -(-len(loss) // _TABLE_ROWS))
    rows = []
    for start in range(0, len(loss), size):
        part = loss[start : start + size]
        known = [norm_at[step] for step, _ in part if step in norm_at]
        rows.append(
            (
                part[-1][0],
                epoch_at.get(part[-1][0]),
                sum(known) / len(known) if known else None,
                sum(value for _, value in part) / len(part),
            )
        )
    return rows


def _loss_table(curves: dict[str, Curve]) -> list[list[str]]:
    """Step, epoch, training loss, gradient norm, and the held-out loss if measured since the row before."""
    rows, before = [], 0.0
    for step, epoch, norm, loss in loss_rows(curves):
        measured = [value for at, value in curves.get("held-out loss", []) if before < at <= step]
        before = step
        rows.append(
            [
                f"{step:,.0f}",
                "–" if epoch is None else f"{epoch:.2f}",
                f"{loss:.4f}",
                "–" if norm is None else f"{norm:.3f}",
                f"{measured[-1]:.4f}" if measured else "–",
            ]
        )
    return rows


def _groups(step: StepView) -> list[list[str]]:
    """What each pattern over parameter names matched; empty where one rate was everybody's."""
    groups = step.manifest.metrics.get("parameter_groups", []) if step.manifest else []
    if not isinstance(groups, list) or len(groups) < 2:
        return []
    return [
        [
            group["match"],
            f"{group['tensors']:,}",
            f"{group['parameters']:,}",
            f"{group['lr']:g}" if group["lr"] else "frozen",
            f"{group['weight_decay']:g}",
        ]
        for group in groups
    ]


def _facts(step: StepView, curves: dict[str, Curve]) -> list[str]:
    facts = []
    if curves.get("loss"):
        facts.append(f"{curves['loss'][-1][0]:,.0f} optimiser steps")
    if step.manifest is None:
        facts.append("unfinished")
    else:
        tokens, seconds, counts = step.manifest.tokens, step.manifest.seconds, step.manifest.counts
        if every := counts.get("parameters"):
            trained = counts.get("trained_parameters", 0)
            facts.append(f"{trained:,} trained parameters ({trained / every:.2%})")
        if tokens:
            facts.append(f"{tokens:,} tokens")
        facts.append(format_seconds(seconds))
        if tokens and seconds > 0:
            facts.append(f"{tokens / seconds:,.0f} tokens/s")
    held_out = curves.get("held-out loss", [])
    if len(held_out) > 1:
        end = end_value(step, curves, "held-out loss")
        facts.append(f"held-out loss {held_out[0][1]:.3f} → {end:.3f}")
    return facts


def thinned(curve: Curve) -> Curve:
    """At most _DRAWN_POINTS points, each the mean of its neighbours."""
    size = -(-len(curve) // _DRAWN_POINTS)
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def loss_comparison(runs: Sequence[RunView]) -> list[dict[str, Any]]:
    """Held-out (else training) loss of each run's last train step in one chart; empty with fewer than two."""
    for name, label in (("held-out loss", "held-out loss"), ("loss", "training loss")):
        shown = {}
        for run in runs:
            steps = [step for step in run.steps_of("train") if name in curves_of(run, step)]
            if steps:
                shown[run.name] = thinned(curves_of(run, steps[-1])[name])
        if len(shown) > 1:
            svg = line_chart(label, shown, x_label="optimiser step", y_label=f"{label}, nats per token")
            return [{"title": label.capitalize(), "svg": svg}]
    return []
