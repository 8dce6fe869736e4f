"""The graph of steps as inline SVG, laid out in columns from left to right."""

from html import escape
from itertools import pairwise

from potstill.core.events import format_seconds
from potstill.report.view import RunView, StepView

__all__ = ["draw_graph"]

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 164, 62, 48, 18, 2
_LANE = 10  # the height that a long edge takes on its way past a column of boxes
_NAME_LETTERS = 18

_Item = str | tuple[str, str]  # a step, or the edge (need, step) on its way past a column


def draw_graph(run: RunView) -> str:
    """An SVG of every step with its kind, time and state; empty for a run without steps."""
    if not run.steps:
        return ""
    layers = _layers(run)
    heights = [sum(_height(item) for item in layer) + _GAP_Y * (len(layer) - 1) for layer in layers]
    width = len(layers) * (_WIDTH + _GAP_X) - _GAP_X + 2 * _MARGIN
    height = max(heights) + 2 * _MARGIN
    corner: dict[str, tuple[float, float]] = {}
    lanes: dict[_Item, list[tuple[float, float]]] = {}
    for level, layer in enumerate(layers):
        left, top = _MARGIN + level * (_WIDTH + _GAP_X), (height - heights[level]) / 2
        for item in layer:
            if isinstance(item, str):
                corner[item] = (left, top)
            else:
                lanes.setdefault(item, []).append((left, top + _LANE / 2))
            top += _height(item) + _GAP_Y
    boxes = [_box(run, step, *corner[step.name]) for step in run.steps]
    edges = [
        _edge(corner[need], lanes.get((need, step.name), []), corner[step.name])
        for step in run.steps
        for need in step.needs
        if need in corner
    ]
    return (
        f'<svg class="graph" width="{width}" height="{height:g}" viewBox="0 0 {width} {height:g}" role="img" '
        f'aria-label="graph of steps">{"".join(edges)}{"".join(boxes)}</svg>'
    )


def _height(item: _Item) -> int:
    return _HEIGHT if isinstance(item, str) else _LANE


def _layers(run: RunView) -> list[list[_Item]]:
    """Steps by the longest way to them, with lanes for edges that pass a column, each near its origin."""
    depth: dict[str, int] = {}
    for step in run.steps:  # steps come in the order they run
        depth[step.name] = 1 + max((depth[need] for need in step.needs if need in depth), default=-1)
    layers: list[list[_Item]] = [[] for _ in range(1 + max(depth.values()))]
    before: dict[_Item, list[_Item]] = {}
    for step in run.steps:
        layers[depth[step.name]].append(step.name)
        before[step.name] = []
        for need in step.needs:
            if need in depth:
                lane = (need, step.name)
                passed = range(depth[need] + 1, depth[step.name])
                for level in passed:
                    layers[level].append(lane)
                before.setdefault(lane, [need])
                before[step.name].append(lane if passed else need)
    place: dict[_Item, float] = {}
    for layer in layers:
        wish = {item: [place[one] for one in before[item] if one in place] for item in layer}
        # A lane goes outside of the boxes that it passes, where it crosses least.
        layer.sort(
            key=lambda item: (
                sum(wish[item]) / len(wish[item]) if wish[item] else 0.0,
                not isinstance(item, str),
            )
        )
        place.update((item, index - (len(layer) - 1) / 2) for index, item in enumerate(layer))
    return layers


def _edge(start: tuple[float, float], lanes: list[tuple[float, float]], end: tuple[float, float]) -> str:
    """A curve from one box to another, straight through the lanes of the columns between."""
    points = [(start[0] + _WIDTH, start[1] + _HEIGHT / 2)]
    for x, y in lanes:
        points += [(x, y), (x + _WIDTH, y)]
    points.append((end[0], end[1] + _HEIGHT / 2))
    path = f"M{points[0][0]:g} {points[0][1]:g}"
    for (x1, y1), (x2, y2) in pairwise(points):
        bend = min(_GAP_X, x2 - x1) * 0.55
        path += f" C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2:g} {y2:g}"
    x, y = points[-1]
    return (
        f'<path class="edge" d="{path}"/>'
        f'<path class="tip" d="M{x - 7:g} {y - 3.5:g} L{x - 0.5:g} {y:g} L{x - 7:g} {y + 3.5:g} Z"/>'
    )


def _box(run: RunView, step: StepView, x: float, y: float) -> str:
    status = run.status(step)
    time = format_seconds(step.seconds) if step.seconds is not None else ""
    state = {"made": time, "reused": f"reused ({time})" if time else "reused"}.get(status, status)
    name = step.name if len(step.name) <= _NAME_LETTERS else step.name[: _NAME_LETTERS - 1] + "…"
    hint = escape(f"{step.name}: {step.kind}, {status}" + (f", {time}" if time else ""))
    return (
        f'<g class="step {status.replace(" ", "-")}"><title>{hint}</title>'
        f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="7"/>'
        f'<text class="name" x="{x + 12:g}" y="{y + 20:g}">{escape(name)}</text>'
        f'<text class="kind" x="{x + 12:g}" y="{y + 36:g}">{escape(step.kind)}</text>'
        f'<text class="time" x="{x + 12:g}" y="{y + 52:g}">{escape(state)}</text></g>'
    )
