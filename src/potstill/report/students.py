"""How students were made: what they are before any training, what was kept, and which sizes were tried."""

from typing import Any

from potstill.report.charts import bar_chart
from potstill.report.view import RunView

__all__ = ["student_sections"]

_COST = {
    "block_importance": "1 − cos(input, output)",
    "drop_one": "loss without it, nats per token",
}
_SIZES = {
    "blocks": "blocks",
    "hidden_size": "hidden size",
    "intermediate_size": "feed-forward",
    "attention_heads": "heads",
}


def student_sections(run: RunView) -> dict[str, Any] | None:
    """What the init steps made: a row of quality each, their charts, and tables of sizes and experts.

    None without any.
    """
    steps = run.steps_of("init")
    if not steps:
        return None
    rows, charts, tables = [], [], []
    for step in steps:
        assert step.manifest is not None
        counts, metrics = step.manifest.counts, step.manifest.metrics
        if isinstance(metrics.get("quality"), dict):
            rows.append([step.name, *_quality(counts, metrics)])
        charts += _charts(step.name, metrics)
        if isinstance(metrics.get("candidates"), list):
            tables.append(_search(step.name, metrics["candidates"], metrics["chosen_candidate"]))
        if isinstance(metrics.get("experts"), list):
            tables.append(_experts(step.name, metrics))
    head = ["checkpoint 0", "parameters", "KL, nats", "agreement", "perplexity", "measured on"]
    return {"head": head, "rows": rows, "charts": charts, "tables": tables}


def _quality(counts: dict[str, int], metrics: dict[str, Any]) -> list[str]:
    quality, parameters = metrics["quality"], counts["parameters"]
    share = parameters / metrics["parameters_before"]
    return [
        f"{parameters:,} ({share:.0%})",
        f"{quality['kl_nats_per_token']:.3f}",
        f"{quality['agreement']:.1%}",
        f"{quality['perplexity']:,.1f}",
        f"{quality['rows']:,} {quality['measured_on']} traces",
    ]


def _charts(name: str, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """How much each block weighed, and each hidden channel, with what was kept."""
    charts = []
    importance, kept = metrics.get("block_importance"), metrics.get("kept_blocks")
    if isinstance(importance, list) and isinstance(kept, list) and importance:
        svg = bar_chart(
            f"{name}: block importance",
            [str(index) for index in range(len(importance))],
            importance,
            kept=kept,
            x_label="block",
            y_label=_COST[metrics.get("importance_is", "block_importance")],
        )
        charts.append({"title": f"{name}: {len(kept)} of {len(importance)} blocks kept", "svg": svg})
    width = metrics.get("width")
    if isinstance(width, dict):
        importance, kept = width["hidden_importance"], set(width["kept_hidden"])
        if len(kept) < len(importance):
            order = sorted(range(len(importance)), key=importance.__getitem__, reverse=True)
            svg = bar_chart(
                f"{name}: hidden channels",
                [str(place) for place in range(len(order))],
                [importance[index] for index in order],
                kept=[place for place, index in enumerate(order) if index in kept],
                x_label="channel of the hidden states, by rank",
                y_label="activation behind all norms",
            )
            title = f"{name}: {len(kept)} of {len(importance)} hidden channels kept"
            charts.append({"title": title, "svg": svg})
    return charts


def _search(name: str, tried: list[dict[str, Any]], chosen: int) -> dict[str, Any]:
    """The combinations of depth and width that were tried within a target, the best first."""
    order = sorted(range(len(tried)), key=lambda place: tried[place]["loss"])
    rows = [
        [
            f"{place + 1}{' (chosen)' if place == chosen else ''}",
            *(f"{tried[place][key]:,}" for key in (*_SIZES, "parameters")),
            f"{tried[place]['loss']:.3f}",
        ]
        for place in order
    ]
    return {
        "title": f"{name}: sizes that were tried",
        "head": ["candidate", *_SIZES.values(), "parameters", "loss, nats"],
        "rows": rows,
        "note": "Loss: cross-entropy of the calibration traces before any training. Which of two candidates "
        "is ahead can change with training.",
    }


def _experts(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """What became of each layer's experts: how many are left, what they take, and what they have lost."""
    layers: list[dict[str, Any]] = metrics["experts"]
    columns: dict[str, list[str]] = {}
    columns["busiest expert"] = [f"{max(one['frequency']):.1%} of tokens" for one in layers]
    if all("kept" in one for one in layers):
        columns["experts"] = [f"{len(one['kept'])} of {len(one['frequency'])}" for one in layers]
    if all("parameters" in one for one in layers):
        columns["parameters"] = [_of(one["parameters"], one["parameters_before"]) for one in layers]
        columns["MB"] = [_of(one["bytes"] / 1e6, one["bytes_before"] / 1e6, ".1f") for one in layers]
    errors = ""
    if all("error" in one for one in layers):
        errors = "Errors: of a layer's outputs on the calibration traces, as a share of their norm. "
        for part, head in (("gate_up", "error of gate and up"), ("down", "error of down")):
            columns[head] = [f"{one['error'][part]:.1%}" for one in layers]
    cells = zip(*columns.values(), strict=True)
    memory = _of(metrics["weight_bytes"] / 1e6, metrics["weight_bytes_before"] / 1e6, ",.1f")
    return {
        "title": f"{name}: its experts",
        "head": ["layer", *columns],
        "rows": [[str(one["layer"]), *row] for one, row in zip(layers, cells, strict=True)],
        "note": f"{errors}All weights of the model take {memory} MB in the type that they were measured in.",
    }


def _of(now: float, before: float, form: str = ",") -> str:
    return f"{now:{form}} of {before:{form}}"
