"""How far raters agree: Krippendorff's alpha (Content Analysis, 3rd ed., 2013, ch. 12)."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

__all__ = ["krippendorff_alpha"]

Level = Literal["nominal", "ordinal"]


def krippendorff_alpha(units: Sequence[Sequence[float | None]], level: Level) -> float | None:
    """1 where raters agree in all, 0 where they do as chance would have it; None where nothing can tell.

    `units` holds one entry a thing that was rated: each rater's value, None where there is none. Any number
    of raters, each of any of the units. Of two raters of nominal values without gaps it nears Cohen's kappa.
    None where no unit has two values, or where all values are the same.
    """
    pairs: Counter[tuple[float, float]] = Counter()
    for unit in units:
        values = [value for value in unit if value is not None]
        if len(values) > 1:
            for pair in itertools.permutations(values, 2):
                pairs[pair] += 1 / (len(values) - 1)  # type: ignore[assignment]  # weights, not counts
    totals: dict[float, float] = {}
    for (first, _), weight in sorted(pairs.items()):
        totals[first] = totals.get(first, 0.0) + weight
    count = sum(totals.values())
    apart = _distance(totals, level)
    expected = sum(
        totals[one] * totals[other] * apart(one, other) for one in totals for other in totals if one != other
    )
    if not expected:
        return None
    observed = sum(weight * apart(*pair) for pair, weight in pairs.items())
    return 1 - (count - 1) * observed / expected


def _distance(totals: Mapping[float, float], level: Level) -> Callable[[float, float], float]:
    """The squared difference of two values: 1, or how many ratings lie between their ranks."""
    if level == "nominal":
        return lambda one, other: float(one != other)

    def ordinal(one: float, other: float) -> float:
        low, high = min(one, other), max(one, other)
        between = sum(total for value, total in totals.items() if low <= value <= high)
        return (between - (totals[low] + totals[high]) / 2) ** 2

    return ordinal
