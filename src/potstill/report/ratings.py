"""What human raters' sheets say, as tables for the terminal."""

from collections.abc import Sequence

from potstill.evaluate.rating import Rating
from potstill.report.results import Figure, format_figure, format_interval
from potstill.report.text import aligned

__all__ = ["rating_table"]


def rating_table(ratings: Sequence[Rating]) -> str:
    """A table a task: each model's mean score, its paired difference to the baseline, how often preferred."""
    return "\n\n".join(map(_table, ratings))


def _table(rating: Rating) -> str:
    first = next(iter(rating.scores))
    rows = [["", "mean score (1-5)", f"difference to {first}", f"preferred to {first}"]]
    for model, score in rating.scores.items():
        cells = [model, _shown(score.as_dict(), "score")]
        gap, share = rating.differences.get(model), rating.preferred.get(model)
        cells.append("" if gap is None else _shown(gap.as_dict(), "score", difference=True))
        cells.append("" if share is None else _shown(share.as_dict(), "share"))
        rows.append(cells)
    raters = "1 rater" if rating.raters == 1 else f"{rating.raters} raters"
    head = f"{rating.task}: {rating.items:,} prompts, {raters}"
    if rating.agreement is not None:
        head += f", who agree by Krippendorff's alpha {rating.agreement:.2f} (1 in all, 0 as by chance)"
    return f"{head}\n{aligned(rows)}"


def _shown(estimate: dict[str, float], unit: str, *, difference: bool = False) -> str:
    figure = Figure(estimate["value"], estimate.get("low"), estimate.get("high"))
    value = format_figure(figure.value, unit, difference=difference, ascii_only=True)
    interval = format_interval(figure, unit, difference=difference, ascii_only=True)
    return f"{value} ({interval})" if interval else value
