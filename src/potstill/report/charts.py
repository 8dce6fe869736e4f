"""Charts as inline SVG: the same bytes for the same figures, colours left to the page's style sheet."""

import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Histogram", "bar_chart", "histogram_chart", "interval_chart", "line_chart", "save_histogram"]

_HELD_OUT = "held-out"
_LONGEST_LABEL = 32
# Stand-ins for the page's colours, which differ in light and dark; replaced when the SVG is written.
_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"
_SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line"} | {
    colour: f"--series-{index}" for index, colour in enumerate(_SERIES, start=1)
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "text.color": _INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.left": False,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}


def line_chart(
    title: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
) -> str:
    """One line a curve through its (x, y) points; curves named "held-out" or "held-out ..." carry markers.

    With `percent` values are shares, shown as such.
    """
    # A held-out curve has the colour of the training curve that it belongs to.
    families = list(dict.fromkeys(name.removeprefix(_HELD_OUT).strip() for name in curves))

    def draw(axes: "Axes") -> None:
        for name, points in curves.items():
            held_out = name.startswith(_HELD_OUT)
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=_SERIES[families.index(name.removeprefix(_HELD_OUT).strip()) % len(_SERIES)],
                linewidth=1.8 if held_out else 1.3,
                marker="o" if held_out or len(points) == 1 else None,
                markersize=4,
                # A leading underscore would keep the name out of the legend.
                label=f" {name}" if name.startswith("_") else name,
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.0) if low < 0.35 * high else low, high)
        axes.margins(x=0.01)
        if percent:
            axes.yaxis.set_major_formatter(lambda share, _: f"{share * 100:.0f} %")
        if len(curves) > 1:
            legend = axes.legend(loc="best", handlelength=1.6, borderaxespad=0.0)
            for text in legend.get_texts():
                text.set_parse_math(False)

    return _svg(title, draw)


def bar_chart(
    title: str,
    labels: Sequence[str],
    values: Sequence[float],
    *,
    kept: Iterable[int],
    x_label: str,
    y_label: str,
) -> str:
    """One bar a value; bars whose position is in `kept` are in colour, the others are muted."""
    keep = set(kept)

    def draw(axes: "Axes") -> None:
        for name, colour, wanted in (("kept", _SERIES[0], True), ("removed", _MUTED, False)):
            chosen = [index for index in range(len(values)) if (index in keep) is wanted]
            if chosen:
                axes.bar(chosen, [values[index] for index in chosen], color=colour, width=0.72, label=name)
        every = max(1, -(-len(labels) // 16))
        axes.set_xticks(
            range(0, len(labels), every), [labels[index] for index in range(0, len(labels), every)]
        )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        axes.margins(x=0.01)
        axes.legend(loc="upper right", ncols=2, handlelength=1.0, borderaxespad=0.0)

    return _svg(title, draw)


@dataclass(frozen=True)
class Histogram:
    """Bars between `edges`, stacked by the names of `counts`, and where the cut is, if anywhere."""

    edges: Sequence[float]
    counts: Mapping[str, Sequence[float]]
    cut: float | None
    x_label: str
    y_label: str

    def draw(self, axes: "Axes", colours: Mapping[str, str]) -> None:
        """Draw on axes; `colours` says what stands in for the page's."""
        below = [0.0] * (len(self.edges) - 1)
        widths = [high - low for low, high in itertools.pairwise(self.edges)]
        for (name, counts), colour in zip(self.counts.items(), (_SERIES[0], _MUTED), strict=False):
            axes.bar(
                self.edges[:-1],
                counts,
                width=widths,
                bottom=below,
                align="edge",
                color=colours.get(colour, colour),
                linewidth=0,
                label=name,
            )
            below = [low + count for low, count in zip(below, counts, strict=True)]
        if self.cut is not None:
            axes.axvline(
                self.cut,
                color=colours.get(_INK, _INK),
                linewidth=1.2,
                linestyle="--",
                label=f"cut {self.cut:.3g}",
            )
        axes.set_xlabel(self.x_label)
        axes.set_ylabel(self.y_label)
        axes.grid(axis="y")
        axes.margins(x=0.01)
        axes.legend(loc="best", handlelength=1.2, borderaxespad=0.0)


def histogram_chart(title: str, histogram: Histogram) -> str:
    """A histogram as a drawing in the page."""
    return _svg(title, lambda axes: histogram.draw(axes, {}))


def save_histogram(stem: Path, title: str, histogram: Histogram) -> None:
    """A histogram as `stem`.png and `stem`.svg, in the page's light colours."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = _light_colours()
    style = {key: colours.get(value, value) for key, value in _STYLE.items()}
    with mpl.rc_context({**style, "svg.hashsalt": title}):
        figure: Figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        histogram.draw(axes, colours)
        axes.set_title(title, fontsize=9.5).set_parse_math(False)
        figure.savefig(f"{stem}.png", dpi=160, metadata={"Software": None})
        figure.savefig(f"{stem}.svg", metadata={"Date": None, "Creator": None})


def _light_colours() -> dict[str, str]:
    """The page's own colours, the light ones, for each stand-in."""
    style = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for variable, colour in re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", style):
        found.setdefault(variable, colour)  # the light ones stand first
    return {stand_in: found[variable] for stand_in, variable in _VARIABLES.items()}


def interval_chart(
    title: str,
    points: Mapping[str, tuple[float, float, float]],
    *,
    x_label: str,
    paired: Mapping[str, tuple[float, float]],
    best: str | None = None,
    percent: bool = False,
) -> str:
    """One row a name, from the top: a point at its value and a line from low to high; `best` is in colour.

    `paired` has the ends of a second, thicker bar, for names that have one. With `percent` values are shares,
    shown as such.
    """

    def draw(axes: "Axes") -> None:
        for place, (name, (value, low, high)) in enumerate(points.items()):
            colour = _SERIES[0] if name == best else _MUTED
            axes.plot([low, high], [place, place], color=colour, linewidth=1.2, solid_capstyle="butt")
            if name in paired:
                ends = paired[name]
                axes.plot(ends, [place, place], color=colour, alpha=0.4, linewidth=6.0, solid_capstyle="butt")
            axes.plot([value], [place], color=colour, marker="o", markersize=5)
        axes.set_yticks(range(len(points)), [_shortened(name) for name in points])
        for text in axes.get_yticklabels():
            text.set_parse_math(False)
            text.set_color(_INK)
        axes.set_ylim(len(points) - 0.5, -0.5)
        axes.set_xlabel(x_label)
        axes.grid(axis="x")
        axes.margins(x=0.04)
        if percent:
            axes.xaxis.set_major_formatter(lambda share, _: f"{share * 100:.0f} %")

    return _svg(title, draw, height=0.75 + 0.27 * max(len(points), 3))


def _shortened(name: str) -> str:
    """A long name without its middle: what tells names of a sweep apart stands at either end."""
    half = _LONGEST_LABEL // 2
    return name if len(name) <= _LONGEST_LABEL else f"{name[: half - 1]}…{name[-half:]}"


def _svg(title: str, draw: Any, height: float = 2.9) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt makes the ids of clip paths the same in every run, and different in every chart of a page.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure: Figure = Figure(figsize=(5.6, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(file.getvalue(), title)


def _for_page(svg: str, title: str) -> str:
    """Only the drawing, without the file's header, fixed size, unused ids and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None
    head = f'<svg class="chart" viewBox="{view[1]}" role="img" aria-label="{escape(title)}">'
    svg = re.sub(r"<svg[^>]*>", lambda match: head, svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()
