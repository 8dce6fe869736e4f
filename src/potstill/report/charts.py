"""Charts as inline SVG: the same bytes for the same figures, colours left to the page's style sheet."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bar_chart", "line_chart"]

_HELD_OUT = "held-out"
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


def _svg(title: str, draw: Any) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt makes the ids of clip paths the same in every run, and different in every chart of a page.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure: Figure = Figure(figsize=(5.6, 2.9), layout="constrained")
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
