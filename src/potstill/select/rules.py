"""Which of the scored candidates stay, and which chance would keep; the order they come in never matters."""

# ruff: noqa: S608  # what is put into queries are our own columns and orders

import itertools
import math
from array import array
from collections import Counter
from fractions import Fraction

from potstill.select.candidates import Candidates
from potstill.select.settings import Keep

__all__ = ["keep_at_random", "keep_best", "keep_of_like_length"]

_MOST_LENGTH_BINS = 50
_RANK = "score DESC, divergence DESC, id, row"
_AT_RANDOM, _BY_LENGTH = "random_seed, id, row", "length_seed, id, row"


def keep_best(candidates: Candidates, keep: Keep) -> None:
    """Let the rule keep its rows, the highest scores; a share is rounded up."""
    if keep.threshold is not None:
        candidates.keep("rule", "SELECT row FROM candidates WHERE score >= ?", keep.threshold)
    elif keep.top is not None:
        count = math.ceil(Fraction(str(keep.top)) * candidates.count())
        candidates.keep("rule", f"SELECT row FROM candidates ORDER BY {_RANK} LIMIT ?", count)
    else:
        candidates.keep("rule", _first_of_each("prompt", _RANK, "?"), keep.per_prompt)


def keep_at_random(candidates: Candidates, keep: Keep) -> None:
    """As many as the rule keeps, drawn at random; of each prompt as many where the rule goes by prompts."""
    if keep.per_prompt is None:
        query = f"SELECT row FROM candidates ORDER BY {_AT_RANDOM} LIMIT ?"
        candidates.keep("random", query, candidates.count("rule"))
    else:
        candidates.keep("random", _first_of_each("prompt", _AT_RANDOM, "kept"))


def keep_of_like_length(candidates: Candidates, keep: Keep) -> None:
    """As many as the rule keeps, and as many of each length, otherwise drawn at random.

    Lengths are compared in bins that hold about equally many candidates. Where the rule goes by prompts, each
    prompt gives as many rows as it did, of the bins that are then furthest from full, so that lengths agree
    as nearly as the prompts' rows allow.
    """
    _set_bins(candidates)
    if keep.per_prompt is None:
        candidates.keep("length", _first_of_each("bin", _BY_LENGTH, "kept"))
        return
    bins = "SELECT bin, count(*) FROM candidates WHERE by_{} GROUP BY bin"
    wanted = Counter(dict(candidates.rows(bins.format("rule"))))
    left = Counter(dict(candidates.rows(bins.format("all"))))
    # Prompts as they come in the draw, each with its rows in that order.
    place = f"row_number() OVER (ORDER BY {_BY_LENGTH})"
    drawn = f"SELECT row, prompt, bin, by_rule, {place} AS place FROM candidates"
    query = (
        f"SELECT min(place) OVER of_prompt AS first, row, bin, sum(by_rule) OVER of_prompt FROM ({drawn}) "
        "WINDOW of_prompt AS (PARTITION BY prompt) ORDER BY first, place"
    )
    chosen = array("q")
    for _, group in itertools.groupby(candidates.rows(query), key=lambda found: found[0]):
        rows = [*group]
        for _ in range(rows[0][3]):
            one = max(rows, key=lambda row: wanted[row[2]] / left[row[2]])
            rows.remove(one)
            wanted[one[2]] -= 1
            left[one[2]] -= 1
            chosen.append(one[1])
        left.subtract(row[2] for row in rows)
    candidates.write(("UPDATE candidates SET by_length = 1 WHERE row = ?", ((row,) for row in chosen)))


def _first_of_each(group: str, order: str, quota: str) -> str:
    """A query for the first rows of each group in an order; `kept` is how many of it the rule keeps."""
    return (
        f"SELECT row FROM (SELECT row, sum(by_rule) OVER (PARTITION BY {group}) AS kept, "
        f"row_number() OVER (PARTITION BY {group} ORDER BY {order}) AS place FROM candidates) "
        f"WHERE place <= {quota}"
    )


def _set_bins(candidates: Candidates) -> None:
    """Give each row its bin; rows of one length share it."""
    rows = candidates.count()
    count = max(1, min(_MOST_LENGTH_BINS, math.isqrt(rows) // 2))
    places = {rows * place // count for place in range(1, count)}
    lengths = candidates.rows("SELECT tokens FROM candidates ORDER BY tokens")
    edges = [length for place, length in enumerate(lengths) if place in places]
    candidates.write(
        ("DELETE FROM edges", [()]),
        ("INSERT INTO edges VALUES (?)", edges),
        ("UPDATE candidates SET bin = (SELECT count(*) FROM edges WHERE edge <= tokens)", [()]),
    )
