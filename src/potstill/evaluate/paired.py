"""Arms of an experiment against each other on the same rows, paired over prompts and seeds."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypedDict

from potstill.evaluate.intervals import Estimate, bootstrap_ratio, bootstrap_ratio_difference

__all__ = ["MeasuredRows", "PairedArm", "paired_arms"]

MeasuredRows = Mapping[str, tuple[str, float, float]]
"""By a row's id: its prompt's id, and the two sums that the measure is the ratio of: nats and tokens, say."""

_Keys = list[tuple[int, str]]
_Rows = dict[tuple[int, str], tuple[str, float, float]]
"""By the run's seed and the row's id."""


class _Bounds(TypedDict):
    seed: int
    within: tuple[float, float]
    pseudo: float | None


@dataclass(frozen=True)
class PairedArm:
    """An arm's figure, and how much that is more than the first arm's.

    `difference` is over the rows that both arms were measured on, seed by seed, and `by_seed` the same of
    each seed alone; None and empty for the first arm and where no row is the same.
    """

    arm: str
    seeds: int
    figure: Estimate
    difference: Estimate | None
    by_seed: list[float]


def paired_arms(
    runs: Iterable[tuple[str, int, MeasuredRows]],
    *,
    within: tuple[float, float] = (-math.inf, math.inf),
    pseudo: float | None = None,
) -> list[PairedArm]:
    """Each arm's ratio with a bootstrap interval over prompts, and its paired difference to the first arm.

    A run is its arm, its seed and its rows. A prompt is a cluster: its samples of all seeds are drawn
    together, and for both arms at once, so that more seeds do not pass for more prompts. Intervals tell of
    the prompts; how much other seeds would change is seen in `by_seed`. Arms without rows are left out.
    `within` and `pseudo` are those of a bootstrap.
    Raises ValueError for two runs of one arm and seed.
    """
    arms: dict[str, _Rows] = {}
    bounds: _Bounds = {"seed": 0, "within": within, "pseudo": pseudo}
    known: set[tuple[str, int]] = set()
    for arm, seed, measured in runs:
        if (arm, seed) in known:
            raise ValueError(f"two runs of the arm {arm!r} have the seed {seed}; expected one a seed")
        known.add((arm, seed))
        arms.setdefault(arm, {}).update({(seed, key): row for key, row in measured.items()})
    arms = {arm: rows for arm, rows in arms.items() if rows}
    found: list[PairedArm] = []
    for arm, rows in arms.items():
        first = next(iter(arms.values()))
        common = [key for key in first if key in rows] if rows is not first else []
        seeds = sorted({seed for seed, _ in common})
        found.append(
            PairedArm(
                arm,
                len({seed for seed, _ in rows}),
                bootstrap_ratio(*_columns(rows, list(rows)), [row[0] for row in rows.values()], **bounds),
                _difference(first, rows, common, bounds) if common else None,
                [
                    _difference(first, rows, [key for key in common if key[0] == seed], bounds).value
                    for seed in seeds
                ]
                if len(seeds) > 1
                else [],
            )
        )
    return found


def _difference(first: _Rows, second: _Rows, keys: _Keys, bounds: _Bounds) -> Estimate:
    clusters = [first[key][0] for key in keys]
    return bootstrap_ratio_difference(_columns(first, keys), _columns(second, keys), clusters, **bounds)


def _columns(rows: _Rows, keys: _Keys) -> tuple[list[float], list[float]]:
    return [rows[key][1] for key in keys], [rows[key][2] for key in keys]
