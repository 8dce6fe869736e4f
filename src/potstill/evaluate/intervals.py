"""95 % intervals: of shares, of means over rows, and of differences between two models on equal prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "Estimate",
    "bootstrap_ratio",
    "bootstrap_ratio_difference",
    "clustered_share",
    "clustered_share_difference",
    "independent_share_difference",
    "mcnemar_exact",
    "paired_share_difference",
    "pass_at_k",
    "share_of_error",
    "wilson_interval",
]

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point
_STUDENT_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)
RESAMPLES = 4000
_RESAMPLE_CELLS = (
    4_000_000  # counts drawn at once, so that memory stays bounded however many prompts there are
)


@dataclass(frozen=True)
class Estimate:
    """A figure with the ends of its 95 % interval, all in the figure's own unit."""

    value: float
    low: float
    high: float

    @property
    def is_bounded(self) -> bool:
        """Whether the interval has two ends."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def as_dict(self) -> dict[str, float]:
        """The JSON form used in metrics: value, low, high; without the ends where they are not bounded."""
        if not self.is_bounded:
            return {"value": self.value}
        return {"value": self.value, "low": self.low, "high": self.high}


def wilson_interval(successes: int, trials: int) -> Estimate:
    """A share in 0..1 with Wilson's score interval (Wilson 1927), right for small counts and at 0 and 1."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(
            f"{successes} of {trials} is no share; expected 0 <= successes <= trials and trials > 0"
        )
    return _wilson(successes / trials, trials)


def _wilson(share: float, trials: float) -> Estimate:
    z2 = Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # At 0 and 1 the bound is exact; rounding would leave it a hair off.
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return Estimate(share, low, high)


def share_of_error(share: float, standard_error: float) -> Estimate:
    """A share strictly between 0 and 1 of which no more than its standard error is known.

    Wilson's interval for as many answers as have that error: share (1 - share) / error² (Korn & Graubard
    1998). Unlike 1.96 errors on either side it stays within 0..1.
    """
    return _wilson(share, share * (1 - share) / standard_error**2)


def clustered_share(values: Sequence[float], *, samples: int) -> Estimate:
    """The mean of values in 0..1, one a prompt, each a mean over (or a function of) `samples` answers.

    Wilson's interval for as many independent answers as have the variance that the prompts show (Korn &
    Graubard 1998): p (1 - p) / (variance of the mean), at most all answers, and the number of prompts where
    all values are 0 or all 1. With one sample a prompt it is Wilson's own. Unlike a bootstrap it has a width
    where all values are alike.
    """
    prompts = len(values)
    mean = min(max(math.fsum(values) / prompts, 0.0), 1.0)
    spread = mean * (1 - mean)
    if spread == 0 or prompts == 1:
        return _wilson(mean, prompts)
    squares = math.fsum((value - mean) ** 2 for value in values)
    variance = squares / prompts / (prompts if samples == 1 else prompts - 1)
    answers = prompts * samples
    return _wilson(mean, min(spread / variance, answers) if variance else answers)


def clustered_share_difference(first: Sequence[float], second: Sequence[float], *, samples: int) -> Estimate:
    """mean(second) - mean(first) of values in 0..1, one a prompt, over the same prompts.

    The two means' limits joined by the correlation of the prompts' values, as Newcombe does with single
    answers (Zou & Donner 2008).
    """
    one, two = clustered_share(second, samples=samples), clustered_share(first, samples=samples)
    mean_first, mean_second = two.value, one.value
    pairs = [(a - mean_first, b - mean_second) for a, b in zip(first, second, strict=True)]
    squares = math.fsum(a * a for a, _ in pairs) * math.fsum(b * b for _, b in pairs)
    product = math.fsum(a * b for a, b in pairs)
    return _joined(one, two, product / math.sqrt(squares) if squares > 0 else 0.0)


def independent_share_difference(first: Estimate, second: Estimate) -> Estimate:
    """How much the second share is more than the first, of other answers (Newcombe 1998b, method 10)."""
    return _joined(second, first, 0.0)


def _joined(one: Estimate, two: Estimate, correlation: float) -> Estimate:
    """The first less the second, from the limits of each and the correlation between them."""

    def reach(ours: float, theirs: float) -> float:
        return math.sqrt(max(ours**2 - 2 * correlation * ours * theirs + theirs**2, 0.0))

    difference = one.value - two.value
    low = difference - reach(one.value - one.low, two.high - two.value)
    high = difference + reach(one.high - one.value, two.value - two.low)
    return Estimate(difference, low, high)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k answers is right, from `right` ones among `samples` (Chen et al. 2021, eq. 1).

    1 - C(samples - right, k) / C(samples, k): unbiased, which 1 - (1 - right / samples)^k is not. Raises
    ValueError for a k above the number of samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be told from {samples} samples; expected 1 <= k <= {samples}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def paired_share_difference(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """share(second) - share(first) over the same prompts, in -1..1.

    Newcombe's hybrid score interval for paired shares (Statistics in Medicine 17, 1998, p. 2635, method 10):
    the Wilson limits of each share, joined by the correlation of the pairs with his continuity correction. It
    needs no resampling, so it is the same every time, and it keeps its coverage at shares near 0 and 1.
    """
    both, only_first, only_second, neither = _pairs(first, second)
    trials = both + only_first + only_second + neither
    one, two = wilson_interval(both + only_second, trials), wilson_interval(both + only_first, trials)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    product: float = both * neither - only_first * only_second
    if product > 0:
        product = max(product - trials / 2, 0)
    return _joined(one, two, product / math.sqrt(margins) if margins else 0.0)


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> float:
    """McNemar's exact two-sided p-value: the chance of discordant pairs that split at least so unevenly."""
    _, only_first, only_second, _ = _pairs(first, second)
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, tail / 2 ** (discordant - 1)) if discordant else 1.0


def _pairs(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, int, int]:
    """How many prompts both, only the first, only the second and neither got right."""
    if len(first) != len(second) or not first:
        raise ValueError(f"pairs need the same prompts on both sides, not {len(first)} and {len(second)}")
    both = sum(a and b for a, b in zip(first, second, strict=True))
    right_first, right_second = sum(map(bool, first)), sum(map(bool, second))
    return both, right_first - both, right_second - both, len(first) - right_first - right_second + both


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[str],
    *,
    seed: int,
    within: tuple[float, float] = (-math.inf, math.inf),
    pseudo: float | None = None,
) -> Estimate:
    """sum(numerators) / sum(denominators) with a percentile bootstrap interval over clusters.

    One entry a row; rows of one cluster (the samples of one prompt) are drawn together, since they are not
    independent. A mean per token is nats over tokens; a plain mean of rows has ones below. The ends are moved
    out by what they are too near with few clusters (Hesterberg 2015, sec. 4.1): sqrt(n / (n - 1)) times the
    97.5 % points of Student's t and the normal distribution, one by the other.

    `within` are the values that the ratio can have. Where both are bounds, draws are from the clusters and
    two more, one at each bound (as Agresti & Caffo 2000 add a success and a failure to a share): what did not
    occur among so few could have, so that the interval has a width where all clusters are alike. `pseudo` is
    their denominator, by default the mean of the clusters'. Without such bounds the interval of one cluster,
    and of clusters that are all alike, is unbounded.
    """
    columns = _by_cluster(clusters, numerators, denominators)
    draws, centre, spreads = _draws(columns, within, pseudo, seed)
    value = sum(numerators) / sum(denominators)
    return _percentiles(value, centre, draws, len(columns[0]), spreads=spreads, within=within)


def bootstrap_ratio_difference(
    first: tuple[Sequence[float], Sequence[float]],
    second: tuple[Sequence[float], Sequence[float]],
    clusters: Sequence[str],
    *,
    seed: int,
    within: tuple[float, float] = (-math.inf, math.inf),
    pseudo: float | None = None,
) -> Estimate:
    """ratio(second) - ratio(first) on the same rows, each drawn for both at once (a paired bootstrap).

    `within` are the values that each ratio can have: of the two clusters that are added, each has one ratio
    at one bound and the other at the other.
    """
    columns = _by_cluster(clusters, *first, *second)
    draws, centre, spreads = _draws(columns, within, pseudo, seed)
    value = sum(second[0]) / sum(second[1]) - sum(first[0]) / sum(first[1])
    reach = within[1] - within[0]
    return _percentiles(value, centre, draws, len(columns[0]), spreads=spreads, within=(-reach, reach))


def _draws(
    columns: list["NDArray[np.float64]"], within: tuple[float, float], pseudo: float | None, seed: int
) -> tuple["NDArray[np.float64]", float, bool]:
    """Resampled ratios or differences of two, what they lie around, and whether they differ at all."""
    import numpy as np

    if all(map(math.isfinite, within)):
        below = [float(one.mean()) if pseudo is None else pseudo for one in columns[1::2]]
        # The first ratio at one bound and the second at the other, and the other way round.
        ends = [(low * size, size) for low, size in zip(within, below, strict=False)]
        turned = [(high * size, size) for high, size in zip(reversed(within), below, strict=False)]
        added = np.array([[value for pair in one for value in pair] for one in (ends, turned)])
        columns = [np.append(column, added[:, place]) for place, column in enumerate(columns)]
    sums = _resampled_sums(seed, *columns)
    totals = np.array([[column.sum() for column in columns]])
    ratios, centres = (one[:, ::2] / one[:, 1::2] for one in (sums, totals))
    draws, centre = (one[:, -1] - (one[:, 0] if one.shape[1] == 2 else 0.0) for one in (ratios, centres))
    # Sums of equal ratios differ by their rounding.
    spreads = bool(np.ptp(draws) > 1e-12 * np.abs(ratios).max())
    return draws, float(centre[0]), spreads


def _by_cluster(clusters: Sequence[str], *columns: Sequence[float]) -> list["NDArray[np.float64]"]:
    import numpy as np

    number = {cluster: index for index, cluster in enumerate(dict.fromkeys(clusters))}
    rows = np.array([number[cluster] for cluster in clusters])
    sums = (np.bincount(rows, weights=np.asarray(column), minlength=len(number)) for column in columns)
    return [one.astype(np.float64) for one in sums]


def _resampled_sums(seed: int, *columns: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """RESAMPLES x columns: each column's sum over clusters drawn with replacement."""
    import numpy as np

    values = np.stack(columns, axis=1)
    count = len(values)
    generator, sums, left = np.random.default_rng(seed), [], RESAMPLES
    while left:
        size = min(left, max(1, _RESAMPLE_CELLS // count))
        times_drawn = generator.multinomial(count, np.full(count, 1 / count), size=size)
        sums.append(times_drawn @ values)
        left -= size
    return np.concatenate(sums)


def _percentiles(
    value: float,
    centre: float,
    draws: "NDArray[np.float64]",
    clusters: int,
    *,
    spreads: bool,
    within: tuple[float, float],
) -> Estimate:
    import numpy as np

    if clusters == 1 or not spreads:
        return Estimate(value, *within)
    wider = math.sqrt(clusters / (clusters - 1)) * _student_95(clusters - 1) / Z_95
    low, high = (centre + wider * (float(end) - centre) for end in np.quantile(draws, [0.025, 0.975]))
    return Estimate(value, max(min(low, value), within[0]), min(max(high, value), within[1]))


def _student_95(freedom: int) -> float:
    """The 97.5 % point of Student's t: looked up where the expansion in 1 / freedom is not yet exact."""
    if freedom <= len(_STUDENT_95):
        return _STUDENT_95[freedom - 1]
    z = Z_95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, start=1))
