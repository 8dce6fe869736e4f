"""What is reported of a selection: each arm's figures, the histogram of scores, and what looks wrong."""

import math
import statistics
from collections.abc import Mapping, Sequence

from potstill.select.rules import Candidate
from potstill.select.settings import SelectSettings

__all__ = ["arm", "histogram", "warnings"]

_MOST_BARS = 40
_TELLING_LENGTH_RATIO = 1.2


def arm(rows: Sequence[Candidate], scores: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """How many rows, their mean length in tokens, and the mean of each score, by its name."""
    figures = {"rows": len(rows), "mean_tokens": _mean([one.tokens for one in rows])}
    names = scores[rows[0].row] if rows else {}
    return figures | {f"mean_{name}": _mean([scores[one.row][name] for one in rows]) for name in names}


def histogram(candidates: Sequence[Candidate], kept: Sequence[Candidate]) -> dict[str, list[float]]:
    """Rows by score: `edges` of the bars, and how many rows each has of those `kept` and those `dropped`."""
    values = [one.score for one in candidates]
    low, high = min(values), max(values)
    bars = max(1, min(_MOST_BARS, 2 * math.isqrt(len(values))))
    width = (high - low) / bars
    if all(value.is_integer() for value in values):
        # Counts: a bar holds the same number of whole numbers as any other, the first from half below `low`.
        width = max(1, math.ceil((high - low + 1) / bars))
        bars, low = math.ceil((high - low + 1) / width), low - 0.5
    width = width or 1.0
    rows = {one.row for one in kept}
    counts = {"kept": [0.0] * bars, "dropped": [0.0] * bars}
    for one in candidates:
        bar = min(bars - 1, int((one.score - low) / width))
        counts["kept" if one.row in rows else "dropped"][bar] += 1
    return {"edges": [low + width * number for number in range(bars + 1)], **counts}


def warnings(
    settings: SelectSettings, candidates: Sequence[Candidate], kept: Sequence[Candidate]
) -> list[str]:
    """What makes a rule select nothing or something else than it seems to, and what to do about it."""
    assert settings.keep is not None
    found, scores = [], [one.score for one in candidates]
    if len(kept) == len(candidates):
        found.append(
            f"the rule keeps all {len(kept):,} rows, so that it selects nothing; the scores go from "
            f"{min(scores):.3g} to {max(scores):.3g}: keep a share of them (`keep: {{top: 0.6}}`), or set a "
            f"`threshold` among them, such as {statistics.median(scores):.3g}, their median"
        )
    gaps = [one.divergence for one in candidates]
    if len(gaps) > 1 and (min(gaps) > 0 or max(gaps) < 0):
        surer = "teacher" if min(gaps) > 0 else "student"
        found.append(
            f"every divergence is {'positive' if surer == 'teacher' else 'negative'} ({min(gaps):+.3g} to "
            f"{max(gaps):+.3g}): the {surer} is surer of every trace, so that the rule ranks how much, and "
            "a threshold near 0 means nothing. Keep a share (`top`), or sentences of a prompt's candidates "
            "(`level: sentence`); a student nearer to the teacher tells more. Where this surprises, see that "
            "the teacher's log-probabilities are at temperature 1 and that the student has its own chat "
            "template"
        )
    before, after = (_mean([one.tokens for one in rows]) for rows in (candidates, kept))
    if len(kept) < len(candidates) and not 1 / _TELLING_LENGTH_RATIO < after / before < _TELLING_LENGTH_RATIO:
        found.append(
            f"the kept responses have {after:,.0f} tokens on average, all of them {before:,.0f}: part of "
            "what training gains from the selection may be their length. `control: length` keeps as many "
            "rows of the same lengths, to compare with"
        )
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
