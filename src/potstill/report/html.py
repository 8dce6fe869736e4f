"""The page's templates. Whatever comes from a run is escaped; nothing is loaded and nothing is executed.

The templates call two things safe: our style sheet, and drawings, which escape the words in them.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill import __version__
from potstill.report.results import Figure, Measure, Verdict, format_figure, format_interval

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["evidence", "render", "verdict_words"]

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """A page from a template of this package."""
    style = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    return _environment().get_template(template).render(style=style, version=__version__, **values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=_figure, interval=_interval, place=_place, evidence=evidence, verdict_words=verdict_words
    )
    return environment


def _figure(figure: Figure, measure: Measure, difference: bool = False) -> str:
    return format_figure(figure.value, measure.unit, difference=difference)


def _interval(figure: Figure, measure: Measure, difference: bool = False) -> str:
    return format_interval(figure, measure.unit, difference=difference)


def _place(figure: Figure, measure: Measure) -> tuple[float, float, float] | None:
    """Where low, value and high lie on a scale of 0 to 100 that all models of a measure share."""
    if figure.low is None or figure.high is None:
        return None
    highest = (
        1.0 if measure.unit == "share" else max(one.high or one.value for one in measure.values.values())
    )
    if highest <= 0:
        return None
    low, value, high = (
        round(min(max(end / highest, 0.0), 1.0) * 100, 2) for end in (figure.low, figure.value, figure.high)
    )
    # A dot on the very edge would be cut in half.
    return low, min(max(value, 1.0), 99.0), high


def verdict_words(verdict: Verdict | None) -> str:
    """How a verdict is said."""
    return {"better": "better", "worse": "worse", "unclear": "no clear difference", None: ""}[verdict]


def evidence(measure: Measure, results: Any, *, ascii_only: bool = False) -> str:
    """One line of proof, such as "KL to the teacher: 6.61 → 1.31 nats (−5.30, 95 % interval …)"."""

    def show(value: float, difference: bool = False) -> str:
        return format_figure(value, measure.unit, difference=difference, ascii_only=ascii_only)

    unit = " nats" if measure.unit == "nats" else ""
    arrow = "->" if ascii_only else "→"
    before, after = measure.values.get(results.baseline), measure.values.get(results.student)
    gap = measure.differences[results.student]
    points = " points" if measure.unit == "share" else ""
    interval = format_interval(gap, measure.unit, difference=True, ascii_only=ascii_only)
    change = f"{show(gap.value, True)}{points}, 95 % interval {interval}"
    if before is None or after is None:
        return f"{measure.label}: {change}"
    return f"{measure.label}: {show(before.value)} {arrow} {show(after.value)}{unit} ({change})"
