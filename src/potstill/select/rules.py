"""Which of the scored candidates stay, and which chance would keep; the order they come in never matters."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from potstill.core.hashing import derive_seed
from potstill.select.settings import Keep

__all__ = ["Candidate", "at_random", "best", "of_like_length"]

_MOST_LENGTH_BINS = 50


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scored trace: its row in the data, its response's tokens, and what it is ranked by.

    Between equal scores the divergence decides, then the id.
    """

    row: int
    id: str
    prompt_id: str
    tokens: int
    score: float
    divergence: float


def best(candidates: Iterable[Candidate], keep: Keep) -> list[Candidate]:
    """Those that the rule keeps, highest scores first; a share is rounded up."""
    ranked = sorted(candidates, key=lambda one: (-one.score, -one.divergence, one.id, one.row))
    if keep.threshold is not None:
        return [one for one in ranked if one.score >= keep.threshold]
    if keep.top is not None:
        return ranked[: math.ceil(Fraction(str(keep.top)) * len(ranked))]
    assert keep.per_prompt is not None
    return _fill(ranked, Counter({one.prompt_id: keep.per_prompt for one in ranked}), _prompt)


def at_random(
    candidates: Iterable[Candidate], kept: Sequence[Candidate], keep: Keep, seed: int
) -> list[Candidate]:
    """As many as the rule keeps, drawn at random; of each prompt as many where the rule goes by prompts."""
    group = _all if keep.per_prompt is None else _prompt
    return _fill(_shuffled(candidates, seed, "random"), Counter(map(group, kept)), group)


def of_like_length(
    candidates: Sequence[Candidate], kept: Sequence[Candidate], keep: Keep, seed: int
) -> list[Candidate]:
    """As many as the rule keeps, and as many of each length, otherwise drawn at random.

    Lengths are compared in bins that hold about equally many candidates. Where the rule goes by prompts, each
    prompt gives as many rows as it did, of the bins that are then furthest from full, so that lengths agree
    as nearly as the prompts' rows allow.
    """
    bins = _length_bins(candidates)

    def bin_of(one: Candidate) -> Hashable:
        return bins[one.row]

    shuffled = _shuffled(candidates, seed, "length")
    wanted = Counter(map(bin_of, kept))
    if keep.per_prompt is None:
        return _fill(shuffled, wanted, bin_of)
    rows_of: dict[str, list[Candidate]] = {}
    for one in shuffled:
        rows_of.setdefault(one.prompt_id, []).append(one)
    quotas, left, chosen = Counter(map(_prompt, kept)), Counter(map(bin_of, candidates)), []
    for prompt_id, rows in rows_of.items():
        for _ in range(quotas[prompt_id]):
            one = max(rows, key=lambda row: wanted[bin_of(row)] / left[bin_of(row)])
            rows = [row for row in rows if row is not one]
            wanted[bin_of(one)] -= 1
            left[bin_of(one)] -= 1
            chosen.append(one)
        left.subtract(map(bin_of, rows))
    return chosen


def _all(one: Candidate) -> Hashable:
    return None


def _prompt(one: Candidate) -> Hashable:
    return one.prompt_id


def _fill(
    ranked: Iterable[Candidate],
    quotas: Counter[Hashable],
    group: Callable[[Candidate], Hashable],
) -> list[Candidate]:
    """The first of each group, as many as its quota."""
    left, chosen = quotas.copy(), []
    for one in ranked:
        if left[group(one)] > 0:
            left[group(one)] -= 1
            chosen.append(one)
    return chosen


def _shuffled(candidates: Iterable[Candidate], seed: int, purpose: str) -> list[Candidate]:
    return sorted(candidates, key=lambda one: (derive_seed(seed, purpose, one.id), one.id, one.row))


def _length_bins(candidates: Sequence[Candidate]) -> dict[int, int]:
    """Each row's bin; rows of one length share it."""
    ordered = sorted(one.tokens for one in candidates)
    count = max(1, min(_MOST_LENGTH_BINS, math.isqrt(len(ordered)) // 2))
    edges = [ordered[len(ordered) * place // count] for place in range(1, count)]
    return {one.row: sum(one.tokens >= edge for edge in edges) for one in candidates}
