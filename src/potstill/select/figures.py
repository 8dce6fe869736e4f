"""What is reported of a selection: each arm's figures, the histogram of scores, and what looks wrong."""

import itertools
import math
import statistics
from collections.abc import Iterable

from potstill.select.candidates import Arm, Candidates
from potstill.select.settings import SelectSettings

__all__ = ["arm", "histogram", "warnings"]

_MOST_BARS = 40
_TELLING_LENGTH_RATIO = 1.2


def arm(candidates: Candidates, name: Arm) -> dict[str, float]:
    """How many rows, their mean length in tokens, and the mean of each score, by its name."""
    rows = candidates.count(name)
    figures = {"rows": rows, "mean_tokens": _mean(candidates.values("tokens", name), rows)}
    names = candidates.score_names if rows else ()
    return figures | {f"mean_{one}": _mean(candidates.scores(one, name), rows) for one in names}


def histogram(candidates: Candidates) -> dict[str, list[float]]:
    """Rows by score: `edges` of the bars, and how many rows each has of those `kept` and those `dropped`."""
    low, high = candidates.extremes("score")
    bars = max(1, min(_MOST_BARS, 2 * math.isqrt(candidates.count())))
    width = (high - low) / bars
    if all(value.is_integer() for value in candidates.values("score")):
        # Counts: a bar holds the same number of whole numbers as any other, the first from half below `low`.
        width = max(1, math.ceil((high - low + 1) / bars))
        bars, low = math.ceil((high - low + 1) / width), low - 0.5
    width = width or 1.0
    counts = {"kept": [0.0] * bars, "dropped": [0.0] * bars}
    for score, kept in candidates.rows("SELECT score, by_rule FROM candidates"):
        bar = min(bars - 1, int((score - low) / width))
        counts["kept" if kept else "dropped"][bar] += 1
    return {"edges": [low + width * number for number in range(bars + 1)], **counts}


def warnings(settings: SelectSettings, candidates: Candidates) -> list[str]:
    """What makes a rule select nothing or something else than it seems to, and what to do about it."""
    assert settings.keep is not None
    found: list[str] = []
    rows, kept = candidates.count(), candidates.count("rule")
    if kept == rows:
        least, most = candidates.extremes("score")
        found.append(
            f"the rule keeps all {kept:,} rows, so that it selects nothing; the scores go from "
            f"{least:.3g} to {most:.3g}: keep a share of them (`keep: {{top: 0.6}}`), or set a "
            f"`threshold` among them, such as {_median(candidates):.3g}, their median"
        )
    smallest, largest = candidates.extremes("divergence")
    if rows > 1 and (smallest > 0 or largest < 0):
        surer = "teacher" if smallest > 0 else "student"
        found.append(
            f"every divergence is {'positive' if surer == 'teacher' else 'negative'} ({smallest:+.3g} to "
            f"{largest:+.3g}): the {surer} is surer of every trace, so that the rule ranks how much, and "
            "a threshold near 0 means nothing. Keep a share (`top`), or sentences of a prompt's candidates "
            "(`level: sentence`); a student nearer to the teacher tells more. Where this surprises, see that "
            "the teacher's log-probabilities are at temperature 1 and that the student has its own chat "
            "template"
        )
    before = _mean(candidates.values("tokens"), rows)
    after = _mean(candidates.values("tokens", "rule"), kept)
    if kept < rows and not 1 / _TELLING_LENGTH_RATIO < after / before < _TELLING_LENGTH_RATIO:
        found.append(
            f"the kept responses have {after:,.0f} tokens on average, all of them {before:,.0f}: part of "
            "what training gains from the selection may be their length. `control: length` keeps as many "
            "rows of the same lengths, to compare with"
        )
    return found


def _mean(values: Iterable[float], count: int) -> float:
    return math.fsum(values) / count if count else math.nan


def _median(candidates: Candidates) -> float:
    """The median of the scores."""
    count = candidates.count()
    ranked = (score for (score,) in candidates.rows("SELECT score FROM candidates ORDER BY score"))
    median: float = statistics.median(itertools.islice(ranked, (count - 1) // 2, count // 2 + 1))
    return median
