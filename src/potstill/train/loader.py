"""The rows as optimiser steps of micro-batches; of several processes (ranks) each makes its part of them."""

import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch.utils.data import DataLoader, Sampler

from potstill.data.batches import epoch_plan, micro_batches, packs, share
from potstill.data.chat import Rendered
from potstill.train.rows import Rows, SignalSource
from potstill.train.student import MicroBatch, make_micro_batch

__all__ = ["EpochPlan", "MicroBatches", "OptimiserStep", "StepLoader"]


class EpochPlan(Sampler[list[int]]):
    """The row numbers of each optimiser step of one epoch; `together` neighbours count as one row."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, together: int = 1) -> None:
        starts = range(0, len(lengths), together)
        self.lengths = array("i", (sum(lengths[one : one + together]) for one in starts))
        self.batch, self.seed, self.together, self.epoch = batch, seed, together, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is; transformers and accelerate call this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for step in epoch_plan(self.lengths, self.batch, self.seed, self.epoch):
            yield [one * self.together + place for one in step for place in range(self.together)]

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch)

    def steps_of(self, tokens: int) -> int:
        """The number of the step, from the first epoch on, in which so many tokens have been trained on."""
        epochs, left = divmod(tokens - 1, sum(self.lengths))
        steps = epoch_plan(self.lengths, self.batch, self.seed, epochs)
        ends = itertools.accumulate(sum(self.lengths[row] for row in rows) for rows in steps)
        return epochs * len(self) + 1 + sum(end <= left for end in ends)


class OptimiserStep(NamedTuple):
    """The numbers of a step's rows, over all ranks, and the micro-batches of those that are this rank's."""

    numbers: tuple[int, ...]
    batches: list[MicroBatch]


@dataclass
class MicroBatches:
    """Makes micro-batches of row numbers, in whatever process: it knows neither model nor device.

    What it is asked for are the rows of all ranks, and every rank knows which of them are whose. `in_step`
    is for ranks that meet in every block of every pass, as those of a divided student do: all make as many
    micro-batches, and a pass each.
    """

    rows: Rows
    teacher: SignalSource | None
    max_tokens: int
    packed: bool
    rank: int = 0
    ranks: int = 1
    in_step: bool = False

    def __call__(self, numbers: Sequence[int]) -> OptimiserStep:
        """The step of these rows."""
        return OptimiserStep(tuple(numbers), list(self.one_by_one(numbers)))

    def split(self, numbers: Sequence[int], rank: int) -> list[list[int]]:
        """The row numbers of each micro-batch of a rank; none where there are fewer rows than ranks."""
        lengths = [self.rows.length(number) for number in numbers]
        split = packs if self.packed else micro_batches
        own = share(lengths, self.ranks)[rank]
        return [[numbers[position] for position in group] for group in split(lengths, own, self.max_tokens)]

    def one_by_one(self, numbers: Sequence[int]) -> Iterator[MicroBatch]:
        """This rank's micro-batches of any number of rows, at least one, each made when it is its turn."""
        groups, factors = self.split(numbers, self.rank), self.rows.factors(numbers)
        for members in groups:
            made = make_micro_batch(
                [self.rows[number] for number in members],
                None if self.teacher is None else self.teacher(self.rows, members),
                tuple(self.rows.id(number) for number in members),
                packed=self.packed,
                factors=None if factors is None else tuple(factors[number] for number in members),
            )
            # A prefix would be a pass of its own, which other ranks may not make.
            yield replace(made, shared_prefix=0) if self.in_step else made
        others = range(self.ranks) if self.in_step else ()
        wanted = max([1, *(len(self.split(numbers, rank)) for rank in others)])
        for _ in range(wanted - len(groups)):
            yield self._idle(min(numbers, key=self.rows.length))

    def _idle(self, number: int) -> MicroBatch:
        """Without a token that counts, where other ranks have rows: all take part in what they exchange.

        The row, which counts in another place, lends its tokens and the kind of its signal.
        """
        signal = None if self.teacher is None else self.teacher(self.rows, [number]).rows(slice(0, 0))
        ids = self.rows[number].ids
        made = make_micro_batch([Rendered(ids, [0] * len(ids))], signal, packed=self.packed)
        return replace(made, lengths=(0,))


class StepLoader(DataLoader[int]):
    """Yields one optimiser step at a time."""

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is; transformers calls this."""
        plan = self.batch_sampler
        assert isinstance(plan, EpochPlan)
        plan.set_epoch(epoch)
