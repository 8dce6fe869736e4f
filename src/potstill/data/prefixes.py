"""Which first tokens rows have in common, and batches that keep such rows together."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from potstill.data.chat import Rendered

__all__ = ["PrefixTree", "Segment", "batches_by_prefix", "prefix_tree", "shared_prefix"]


class Segment(NamedTuple):
    """Tokens `start` to `end` of row number `row`, which other rows have at the same place.

    `behind` is the number of the segment that ends where this one starts; None where nothing does.
    """

    row: int
    start: int
    end: int
    behind: int | None


class PrefixTree(NamedTuple):
    """Segments, each after the one that it is behind, and by row the number of its last one."""

    segments: list[Segment]
    behind: list[int | None]


def shared_prefix(rows: Sequence[Rendered]) -> int:
    """How many first tokens all rows share, short of the first that predicts a supervised token.

    One row shares nothing.
    """
    if len(rows) < 2:
        return 0
    end = max(0, min(map(_context_tokens, rows)))
    # In the order of lists, what the first and the last share all between them do.
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)
    return next((at for at in range(end) if first[at] != last[at]), end)


def _context_tokens(row: Rendered) -> int:
    """The tokens before the one that predicts the first supervised one."""
    return (row.mask.index(1) if 1 in row.mask else len(row.mask)) - 1


def prefix_tree(rows: Sequence[Rendered], *, start: int = 0, worth: int) -> PrefixTree:
    """What rows share beyond their first `start` tokens, which all have: a tree of segments of their tokens.

    A segment spares at least `worth` tokens: it is that long, times the rows that have it but one. No token
    of a segment predicts a supervised one.
    """
    segments: list[Segment] = []
    behind: list[int | None] = [None] * len(rows)
    todo: list[tuple[list[int], int, int | None]] = [(list(range(len(rows))), start, None)]
    while todo:
        members, begin, last = todo.pop()
        end = shared_prefix([rows[number] for number in members])
        if (len(members) - 1) * (end - begin) >= worth:
            segments.append(Segment(members[0], begin, end, last))
            begin, last = end, len(segments) - 1
        parts: defaultdict[int, list[int]] = defaultdict(list)
        for number in members:
            behind[number] = last
            if _context_tokens(rows[number]) > end:
                parts[rows[number].ids[end]].append(number)
        todo.extend((part, begin, last) for part in parts.values() if len(part) > 1)
    return PrefixTree(segments, behind)


def batches_by_prefix(rows: Sequence[Rendered], max_tokens: int, *, start: int = 0) -> list[list[int]]:
    """Row numbers in batches of at most `max_tokens` tokens, those that begin alike together.

    Tokens that a row shares with the one before it in its batch are not counted, nor are the first `start`,
    which all have. A batch ends where its later rows have the least in common. A row that is longer than
    `max_tokens` is alone.
    """
    order = sorted(range(len(rows)), key=lambda number: rows[number].ids)
    alike = [start, *(shared_prefix([rows[a], rows[b]]) for a, b in itertools.pairwise(order))]
    batches: list[list[int]] = []
    first = 0
    while first < len(order):
        end, tokens = first + 1, len(rows[order[first]].ids) - start
        while end < len(order) and (tokens := tokens + len(rows[order[end]].ids) - alike[end]) <= max_tokens:
            end += 1
        if end < len(order):
            end = min(range(end, (first + end) // 2, -1), key=alike.__getitem__)
        batches.append(order[first:end])
        first = end
    return batches
