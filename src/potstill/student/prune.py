"""Methods `prune` and `copy`: a student of the model's own blocks, channels and heads.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor

from potstill.core.errors import ModelError
from potstill.models import share_weights
from potstill.student import InitSettings
from potstill.student.anatomy import Anatomy, dissect
from potstill.student.depth import block_importance, bypass, choose_blocks, decoder_blocks, drop_blocks
from potstill.student.making import Made, Original, check_same
from potstill.student.search import candidates
from potstill.student.sizes import Sizes, asked_layers, asked_sizes, stated_blocks
from potstill.student.width import Importance, Kept, cut, masked, measure, most_important

__all__ = ["copy_blocks", "described", "prune", "stated_sizes"]


def prune(original: Original) -> Made:
    """Keep what weighs most on the calibration traces: of stated sizes, or of the best within a target."""
    settings = original.settings
    if settings.target_params is not None or settings.target_ratio is not None:
        return _search(original)
    kept, metrics = _blocks(original)
    if not _states_width(settings):
        made = _with_blocks(original, kept)
    else:
        shallow = _Shallow.of(original, kept)
        made = _narrow(original, shallow, stated_sizes(original, shallow.anatomy))
    made.metrics |= metrics
    return made


def copy_blocks(original: Original) -> Made:
    """Keep blocks that are evenly spaced from the first to the last (after Sanh et al. 2019)."""
    kept = stated_blocks(original.settings, len(decoder_blocks(original.model)))
    assert kept is not None
    return _with_blocks(original, kept)


def _states_width(settings: InitSettings) -> bool:
    widths = (settings.hidden_size, settings.intermediate_size, settings.attention_heads)
    return any(one is not None for one in widths)


def _blocks(original: Original) -> tuple[list[int], dict[str, Any]]:
    """The blocks that stay, and what was measured to choose them."""
    settings, count = original.settings, len(decoder_blocks(original.model))
    if (kept := stated_blocks(settings, count)) is not None:
        return kept, {}
    worth = _Worth(original)
    kept = choose_blocks(worth, count, asked_layers(settings, count), settings.depth_choice)
    return kept, worth.metrics


class _Worth:
    """What leaving out blocks costs, by `depth_by`; that of single blocks is measured once, and shown."""

    def __init__(self, original: Original) -> None:
        self._original = original
        self._first: Sequence[float] | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """What the manifest says of it."""
        if self._first is None:
            return {}
        return {"block_importance": [*self._first], "importance_is": self._original.settings.depth_by}

    def __call__(self, dropped: Sequence[int], run: int) -> Sequence[float]:
        if not dropped and run == 1:
            if self._first is None:
                self._first = self._measure(dropped, run)
            return self._first
        return self._measure(dropped, run)

    def _measure(self, dropped: Sequence[int], run: int) -> Sequence[float]:
        original = self._original
        model, count = original.model, len(decoder_blocks(original.model))
        if original.settings.depth_by == "block_importance":
            with bypass(model, dropped), original.measuring():
                return block_importance(model, original.batches("measuring blocks"), run=run)
        losses = []
        for first in range(count - run + 1):
            if first in dropped:
                losses.append(float("inf"))
                continue
            with bypass(model, {*dropped, *range(first, first + run)}):
                losses.append(original.loss(model, f"without block {first}"))
        return losses


def _with_blocks(original: Original, kept: Sequence[int]) -> Made:
    """The model's blocks at some indices, and what it computes when the others hand their input through."""
    count = len(decoder_blocks(original.model))
    dropped = [index for index in range(count) if index not in kept]
    with bypass(original.model, dropped):
        expected_BTV = original.logits(original.model)
    student = share_weights(original.model)
    drop_blocks(student, kept)
    return Made(
        student,
        f"{len(kept)} of {count} blocks kept; left out: {', '.join(map(str, dropped)) or 'none'}",
        counts={"blocks": len(kept)},
        metrics={"kept_blocks": [*kept]},
        expected_BTV=expected_BTV,
    )


@dataclass(frozen=True)
class _Shallow:
    """The model with some of its blocks at its full width, and what weighs in it."""

    made: Made
    anatomy: Anatomy
    importance: Importance

    @classmethod
    def of(cls, original: Original, kept: Sequence[int]) -> "_Shallow":
        made = _with_blocks(original, kept)
        assert made.expected_BTV is not None
        family, where = made.model.config.model_type, str(original.settings.model)
        check_same(original.logits(made.model), made.expected_BTV, family, where)
        anatomy = dissect(made.model)
        batches = original.batches("measuring channels and heads")
        with original.measuring():
            importance = measure(made.model, anatomy, batches, original.settings.width_by)
        return cls(made, anatomy, importance)


def stated_sizes(original: Original, anatomy: Anatomy) -> Sizes:
    """The sizes that the settings state of a model of some blocks."""
    head_size = anatomy.head_size if anatomy.heads_fix_width else None
    return asked_sizes(original.settings, anatomy.sizes, anatomy.queries_a_group, head_size)


def _narrow(original: Original, shallow: _Shallow, sizes: Sizes) -> Made:
    """The most important channels and heads of some blocks, checked against the model without the others."""
    anatomy, importance, model = shallow.anatomy, shallow.importance, shallow.made.model
    kept = most_important(importance, sizes)
    student = cut(model, anatomy, kept, importance.energy)
    # Norms over fewer channels give other values; all else must come out as with the others silenced.
    inner = most_important(
        importance,
        replace(
            sizes,
            hidden_size=anatomy.sizes.hidden_size,
            groups=anatomy.sizes.groups if anatomy.heads_fix_width else sizes.groups,
        ),
    )
    with masked(anatomy, inner):
        expected_BTV = original.logits(model)
    cuts_hidden = sizes.hidden_size < anatomy.sizes.hidden_size
    reference = cut(model, anatomy, inner) if cuts_hidden else student
    family, where = model.config.model_type, str(original.settings.model)
    check_same(original.logits(reference), expected_BTV, family, where)
    return Made(
        student,
        f"{shallow.made.said}; {described(sizes, anatomy)}",
        counts={**shallow.made.counts, **_counts(sizes, anatomy)},
        metrics={**shallow.made.metrics, "width": _width_metrics(importance, kept)},
        expected_BTV=None if cuts_hidden else expected_BTV,
    )


def _counts(sizes: Sizes, anatomy: Anatomy) -> dict[str, int]:
    return {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "attention_heads": sizes.groups * anatomy.queries_a_group,
    }


def described(sizes: Sizes, anatomy: Anatomy) -> str:
    """A student's widths beside its model's, for the person watching."""
    queries = anatomy.queries_a_group
    return (
        f"hidden size {sizes.hidden_size} of {anatomy.sizes.hidden_size}, feed-forward "
        f"{sizes.intermediate_size} of {anatomy.sizes.intermediate_size}, heads {sizes.groups * queries} of "
        f"{anatomy.sizes.groups * queries}"
    )


def _width_metrics(importance: Importance, kept: Kept) -> dict[str, Any]:
    """The importance that was measured and what was kept; of feed-forward channels, being many, shares."""

    def share(values: Tensor, units: Tensor) -> float:
        return float(values[units].sum() / values.sum())

    return {
        "hidden_importance": importance.hidden.tolist(),
        "kept_hidden": kept.hidden.tolist(),
        "group_importance": [one.tolist() for one in importance.groups],
        "kept_groups": [one.tolist() for one in kept.groups],
        "kept_channel_importance": [
            share(values, units) for values, units in zip(importance.channels, kept.channels, strict=True)
        ],
    }


def _search(original: Original) -> Made:
    """Try combinations of depth and width within the target, and keep the one with the lowest loss."""
    settings = original.settings
    try:
        anatomy = dissect(original.model)
    except ModelError as error:
        raise ModelError(
            f"a target is searched for over depth and width, and {error.what}",
            where=str(settings.model),
            expected=error.expected,
            mend=error.mend,
        ) from error
    whole = anatomy.parameters(anatomy.sizes)
    budget = settings.target_params or int(whole * (settings.target_ratio or 0.0))
    head_size = anatomy.head_size if anatomy.heads_fix_width else None
    found = candidates(
        anatomy.sizes,
        budget,
        settings.candidates,
        anatomy.parameters,
        queries_a_group=anatomy.queries_a_group,
        head_size=head_size,
    )
    if budget >= whole or not found:
        what = "no smaller than the model itself" if budget >= whole else "too small for any student of it"
        raise ModelError(
            f"{budget:,} parameters are {what}, which has {whole:,}",
            where=str(settings.model),
            expected="a target below the model's parameters that leaves room for its embedding",
        )
    worth, count = _Worth(original), anatomy.sizes.layers

    @cache
    def shallow(layers: int) -> _Shallow:
        return _Shallow.of(original, choose_blocks(worth, count, layers, settings.depth_choice))

    tried, best = [], None
    for number, sizes in enumerate(found, start=1):
        part = shallow(sizes.layers)
        made = _narrow(original, part, sizes)
        loss = original.loss(made.model, f"candidate {number} of {len(found)}")
        tried.append({**made.counts, "parameters": anatomy.parameters(sizes), "loss": loss})
        if best is None or loss < best[0]:
            best = loss, number - 1, made
    assert best is not None
    _, place, made = best
    made.metrics |= {**worth.metrics, "candidates": tried, "chosen_candidate": place}
    made.said = f"{len(found)} candidates within {budget:,} parameters tried; the best: {made.said}"
    return made
