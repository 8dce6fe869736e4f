"""Combinations of depth and width within a number of parameters."""

import math
from collections.abc import Callable
from dataclasses import replace

from potstill.student.sizes import Sizes

__all__ = ["candidates"]

# What gets narrower: everything, only what is inside the blocks, or only what runs through them.
_WAYS = ("even", "inner", "outer")
_UNIT = 8  # channels: sizes that are no multiple of it run slower
_STEPS = 64


def candidates(
    have: Sizes,
    budget: int,
    count: int,
    parameters: Callable[[Sizes], int],
    *,
    queries_a_group: int,
    head_size: int | None,
) -> list[Sizes]:
    """At most `count` different sizes of at most `budget` parameters, each as large as it can be.

    The first has the full width, where that leaves a block; the others have evenly spaced depths above it,
    each with all widths cut alike, with those inside the blocks, or with the hidden size alone. `head_size`
    is given where it fixes the hidden size to heads times head size.
    """
    only = max(
        (
            layers
            for layers in range(1, have.layers + 1)
            if parameters(replace(have, layers=layers)) <= budget
        ),
        default=0,
    )
    found = [replace(have, layers=only)] if only else []
    depths = max(1, math.ceil((count - len(found)) / len(_WAYS)))
    for number in range(1, depths + 1):
        layers = only + round((have.layers - only) * number / depths)
        for way in _WAYS:
            fitted = _fit(
                replace(have, layers=max(layers, 1)), way, budget, parameters, queries_a_group, head_size
            )
            if fitted is not None and fitted not in found:
                found.append(fitted)
    return found[:count]


def _fit(
    have: Sizes,
    way: str,
    budget: int,
    parameters: Callable[[Sizes], int],
    queries_a_group: int,
    head_size: int | None,
) -> Sizes | None:
    """What one way of narrowing gives, by the share that keeps to itself and fills the budget best.

    Hidden size and heads are rounded, and the feed-forward layers take what that leaves of the budget.
    """
    best = None
    for share in (step / _STEPS for step in range(_STEPS, 0, -1)):
        hidden, groups = _rounded(have, way, share, queries_a_group, head_size)
        sizes = _with_feed_forward(replace(have, hidden_size=hidden, groups=groups), budget, parameters)
        if sizes is None:
            continue
        wanted = share if way in ("even", "inner") else 1.0
        found = sizes.intermediate_size / have.intermediate_size
        cost = abs(found - wanted) + 1 - parameters(sizes) / budget
        if best is None or cost < best[0]:
            best = cost, sizes
    return None if best is None else best[1]


def _rounded(
    have: Sizes, way: str, share: float, queries_a_group: int, head_size: int | None
) -> tuple[int, int]:
    """About a share of the hidden size and of the groups of heads, where a way narrows them."""
    inside, through = way in ("even", "inner"), way in ("even", "outer")
    # Heads that fix the hidden size go with it.
    cuts_heads = inside if head_size is None else through
    groups = max(1, round(have.groups * share)) if cuts_heads else have.groups
    if head_size is not None:
        return groups * queries_a_group * head_size, groups
    if not through or share == 1:
        return have.hidden_size, groups
    # Some families refuse a hidden size that the heads do not divide.
    unit = math.lcm(_UNIT, groups * queries_a_group)
    return min(max(round(have.hidden_size * share / unit), 1) * unit, have.hidden_size), groups


def _with_feed_forward(sizes: Sizes, budget: int, parameters: Callable[[Sizes], int]) -> Sizes | None:
    """The widest feed-forward layers, up to those stated, that fit into the budget; None where none do."""
    if parameters(sizes) <= budget:
        return sizes
    one, two = (parameters(replace(sizes, intermediate_size=size)) for size in (_UNIT, 2 * _UNIT))
    units = (budget - one) // (two - one) + 1
    return replace(sizes, intermediate_size=int(units) * _UNIT) if units >= 1 else None
