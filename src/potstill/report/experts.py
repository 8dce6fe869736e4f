"""How evenly a mixture's experts are used: a map of layers and experts, a sentence, and a table by layer."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from potstill.models import dead_experts, load_entropy
from potstill.report.view import RunView, StepView

__all__ = ["expert_section", "load_map"]

_COLUMNS = ("entropy", "dead", "busiest, times even")
_Counts = Mapping[str, Sequence[int]]

# In the units of the other charts, which are 403 wide.
_WIDTH, _LEFT, _TOP, _BOTTOM = 403.0, 30.0, 4.0, 44.0
_LARGEST_ROW, _SMALLEST_ROW, _ROWS_HEIGHT = 16.0, 3.0, 190.0
_MOST_LABELS = 12
# Up to so many times its even share an expert's cell has this share of the colour.
_SHADES = ((0.25, 0.08), (0.5, 0.2), (1.0, 0.38), (2.0, 0.58), (4.0, 0.8), (float("inf"), 1.0))
_DEAD = "fill:var(--series-2)"
_LABELS = ("¼", "½", "1", "2", "4", "more")


def expert_section(run: RunView, step: StepView) -> dict[str, Any] | None:
    """Sentence, maps and table of a train step's expert load, first and last; None of a dense student."""
    if step.manifest is not None:
        points = step.manifest.metrics.get("expert_load", [])
    else:
        points = run.logged(step, "expert_load")
        points = [points[0], points[-1]] if len(points) > 1 else points
    if not points:
        return None
    loads: list[_Counts] = [point["counts"] for point in points]
    names = ["before training", "after training" if step.manifest is not None else "so far"]
    return {
        "findings": _findings(loads, names),
        "charts": [
            {
                "title": f"Load of the experts {name}",
                "svg": load_map(f"{step.name}: load of the experts {name}", load),
            }
            for name, load in zip(names, loads, strict=False)
        ],
        "head": ["layer", *(f"{what} {name}" for what in _COLUMNS for name in names[: len(loads)])],
        "rows": _rows(loads),
    }


def _rows(loads: Sequence[_Counts]) -> list[list[str]]:
    rows = []
    for router, layer in zip(loads[0], _layers(loads[0]), strict=True):
        counts = [load[router] for load in loads]
        rows.append(
            [
                layer,
                *(f"{load_entropy(one):.3f}" for one in counts),
                *(f"{len(dead_experts(one)):,} of {len(one):,}" for one in counts),
                *(f"{_times_even(one)[1]:.1f}" for one in counts),
            ]
        )
    return rows


def _findings(loads: Sequence[_Counts], names: Sequence[str]) -> list[str]:
    """What the maps say, in words."""
    dead = [sum(len(dead_experts(one)) for one in load.values()) for load in loads]
    entropy = [sum(map(load_entropy, load.values())) / len(load) for load in loads]
    every = sum(map(len, loads[-1].values()))
    before = f", {dead[0]:,} before" if len(loads) > 1 else ""
    entropy_before = f", {entropy[0]:.3f} before" if len(loads) > 1 else ""
    router, layer = max(
        zip(loads[-1], _layers(loads[-1]), strict=True), key=lambda one: _times_even(loads[-1][one[0]])[1]
    )
    expert, times = _times_even(loads[-1][router])
    choices = max(map(sum, loads[-1].values()))
    said = (
        f"{dead[-1]:,} of {every:,} experts in {len(loads[-1]):,} layers are dead "
        f"{names[len(loads) - 1]}{before}; the load's entropy is {entropy[-1]:.3f}{entropy_before}, where 1 "
        f"is even. The busiest, expert {expert} of layer {layer}, has {times:.1f} times its even share."
    )
    note = (
        f"Of {choices:,} choices a layer on held-out rows. Dead: chosen less than a hundredth as often as if "
        "all were chosen alike."
    )
    return [said, note]


def _times_even(counts: Sequence[int]) -> tuple[int, float]:
    """The expert that was chosen most, and how many times as often as if all were chosen alike."""
    most = max(counts)
    return list(counts).index(most), most * len(counts) / max(1, sum(counts))


def _layers(load: _Counts) -> list[str]:
    """What the routers' layers are called: their number in the model, else their place."""
    found = [re.search(r"\.(\d+)\.", f".{name}.") for name in load]
    numbers = [match[1] if match else str(place) for place, match in enumerate(found)]
    return numbers if len(set(numbers)) == len(numbers) else [str(place) for place in range(len(numbers))]


def load_map(title: str, load: _Counts) -> str:
    """A row a layer, from the top, and a cell an expert: the darker the more it has; dead ones stand out."""
    widest = max(map(len, load.values()))
    cell = (_WIDTH - _LEFT) / widest
    row = min(_LARGEST_ROW, max(_SMALLEST_ROW, _ROWS_HEIGHT / len(load)))
    gap = min(0.6, 0.1 * cell, 0.1 * row)
    cells: dict[str, list[str]] = {}
    for place, counts in enumerate(load.values()):
        dead, even = set(dead_experts(counts)), max(1, sum(counts)) / len(counts)
        for expert, count in enumerate(counts):
            shade = next(opacity for most, opacity in _SHADES if count / even <= most)
            style = _DEAD if expert in dead else _style(shade)
            left, top = _LEFT + expert * cell, _TOP + place * row
            square = f"M{left:.1f} {top:.1f}h{cell - gap:.1f}v{row - gap:.1f}h-{cell - gap:.1f}z"
            cells.setdefault(style, []).append(square)
    bottom = _TOP + len(load) * row
    every = _label_step(len(load))
    labels = [
        _text(_LEFT - 5, _TOP + (place + 0.5) * row + 3.2, layer, "end")
        for place, layer in enumerate(_layers(load))
        if place % every == 0
    ]
    every = _label_step(widest)
    labels += [
        _text(_LEFT + (expert + 0.5) * cell, bottom + 10, str(expert), "middle")
        for expert in range(0, widest, every)
    ]
    labels += [_text(_WIDTH, bottom + 22, "layers down, experts across", "end")]
    height = bottom + _BOTTOM
    paths = "".join(f'<path style="{style}" d="{"".join(parts)}"/>' for style, parts in cells.items())
    return (
        f'<svg class="chart load" viewBox="0 0 {_WIDTH:g} {height:.1f}" role="img" '
        f'aria-label="{escape(title)}">{paths}{"".join(labels)}{_legend(height - 12)}</svg>'
    )


def _label_step(count: int) -> int:
    """Every how many there is a label: a power of two."""
    step = 1
    while count > step * _MOST_LABELS:
        step *= 2
    return step


def _style(opacity: float) -> str:
    return f"fill:var(--series-1);fill-opacity:{opacity:g}"


def _legend(top: float) -> str:
    """What the shades mean, in multiples of an even share."""
    parts, left = [_text(0, top + 7, "up to so many times its even share:", "start")], 162.0
    keys = [*zip((_style(opacity) for _, opacity in _SHADES), _LABELS, strict=True), (_DEAD, "dead")]
    for style, label in keys:
        parts.append(f'<path style="{style}" d="M{left:g} {top:.1f}h8v8h-8z"/>')
        parts.append(_text(left + 11, top + 7, label, "start"))
        left += 17 + 5.2 * len(label)
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
