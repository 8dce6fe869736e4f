"""Which rows make which optimiser step and micro-batch, and how rows become tensors.

Shapes: B rows, T tokens.
"""

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from potstill.core.hashing import derive_seed
from potstill.data.chat import Rendered

if TYPE_CHECKING:
    import torch

__all__ = ["collate", "collate_packed", "epoch_plan", "many_micro_batches", "micro_batches", "packs", "share"]

# Rows are sorted by length within groups of this many steps: enough that a step's rows are alike in length,
# few enough that which rows meet in a step stays random.
_STEPS_PER_BUCKET_GROUP = 32


def epoch_plan(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """The optimiser steps of one epoch as lists of row numbers; each row appears once.

    `lengths` are tokens a row, `batch` is rows a step. Rows of similar length share a step; which rows meet
    and the order of the steps depend only on (seed, epoch). A last step with the remaining rows is kept. In
    memory a row costs four bytes.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    chance = random.Random(derive_seed(seed, "epoch", epoch))
    order = array("i", range(len(lengths)))
    chance.shuffle(order)
    whole = len(order) - len(order) % batch
    group = batch * _STEPS_PER_BUCKET_GROUP
    for start in range(0, whole, group):
        part = slice(start, min(start + group, whole))
        order[part] = array("i", sorted(order[part], key=lengths.__getitem__))
    starts = array("i", range(0, whole, batch))
    chance.shuffle(starts)
    if whole < len(order):
        starts.append(whole)
    return (order[start : start + batch].tolist() for start in starts)


def share(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """One step's rows by rank, as positions in `lengths`: each rank gets about as many tokens as the others.

    Longest rows first, each to the rank with the fewest tokens. Of fewer rows than ranks, some get none.
    """
    tokens = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for position in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        rank = tokens.index(min(tokens))
        tokens[rank] += lengths[position]
        shares[rank].append(position)
    return [sorted(own) for own in shares]


def micro_batches(
    lengths: Sequence[int], rows: Sequence[int], max_tokens: int, *, pass_tokens: int | None = None
) -> list[list[int]]:
    """One step's rows in micro-batches of at most `max_tokens` tokens, padding counted; longest rows first.

    A row that is longer than `max_tokens` is alone in its micro-batch. Micro-batches are filled, or, where a
    pass costs as much as `pass_tokens` tokens, made so that passes and padded tokens cost the least.
    """
    order = sorted(rows, key=lengths.__getitem__, reverse=True)
    if pass_tokens is not None:
        return _cheapest(lengths, order, max_tokens, pass_tokens)
    return [*_filled(lengths, order, max_tokens)]


def many_micro_batches(lengths: "array[int]", rows: "array[int]", max_tokens: int) -> Iterator[list[int]]:
    """`micro_batches` of rows that are too many for a list: while it is planned a row costs some 16 bytes."""
    import numpy as np

    numbers = np.asarray(rows)
    order = numbers[np.argsort(-np.asarray(lengths)[numbers], kind="stable")]
    return _filled(lengths, order, max_tokens)


def _filled(lengths: Sequence[int], order: Iterable[int], max_tokens: int) -> Iterator[list[int]]:
    """Rows, longest first, in micro-batches that hold as many as fit."""
    batch: list[int] = []
    room = 0
    for row in map(int, order):
        if room == 0 and batch:
            yield batch
            batch = []
        if not batch:
            room = max(1, max_tokens // max(1, lengths[row]))
        batch.append(row)
        room -= 1
    if batch:
        yield batch


def _cheapest(
    lengths: Sequence[int], order: Sequence[int], max_tokens: int, pass_tokens: int
) -> list[list[int]]:
    """Rows, longest first, in micro-batches of neighbours: a shortest way, found from its end."""
    costs, ends = [0] * (len(order) + 1), [0] * len(order)
    for first in reversed(range(len(order))):
        width = max(1, lengths[order[first]])
        most = max(1, max_tokens // width)
        costs[first], ends[first] = min(
            (pass_tokens + (end - first) * width + costs[end], end)
            for end in range(first + 1, min(first + most, len(order)) + 1)
        )
    batches: list[list[int]] = []
    first = 0
    while first < len(order):
        batches.append([*order[first : ends[first]]])
        first = ends[first]
    return batches


def packs(lengths: Sequence[int], rows: Sequence[int], max_tokens: int) -> list[list[int]]:
    """One step's rows in micro-batches of at most `max_tokens` tokens without padding, by first fit.

    Longest rows first, each into the first micro-batch that has room for it; a row that is longer than
    `max_tokens` is alone.
    """
    batches: list[list[int]] = []
    rooms: list[int] = []
    for row in sorted(rows, key=lengths.__getitem__, reverse=True):
        place = next((at for at, room in enumerate(rooms) if lengths[row] <= room), None)
        if place is None:
            batches.append([row])
            rooms.append(max_tokens - lengths[row])
        else:
            batches[place].append(row)
            rooms[place] -= lengths[row]
    return batches


def collate_packed(rows: Sequence[Rendered]) -> dict[str, "torch.Tensor"]:
    """Rows one behind the other as one: input_ids 1T (int64), loss_mask 1T (bool), position_ids 1T (int64).

    Positions begin again with each row. The first token of a row is never supervised, so that nothing is
    predicted from the row before.
    """
    import torch

    assert all(row.mask[0] == 0 for row in rows)
    return {
        "input_ids": torch.tensor([[id_ for row in rows for id_ in row.ids]], dtype=torch.int64),
        "loss_mask": torch.tensor([[one for row in rows for one in row.mask]], dtype=torch.bool),
        "position_ids": torch.tensor([[at for row in rows for at in range(len(row.ids))]], dtype=torch.int64),
    }


def collate(rows: Sequence[Rendered], pad_id: int) -> dict[str, "torch.Tensor"]:
    """Right-padded tensors: input_ids BT and attention_mask BT (int64), loss_mask BT (bool).

    Padding is known by length alone: pad_id may be a token that the rows hold as well.
    """
    import torch

    width = max(len(row.ids) for row in rows)
    input_ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros((len(rows), width), dtype=torch.int64)
    loss_mask_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    for number, row in enumerate(rows):
        length = len(row.ids)
        input_ids_BT[number, :length] = torch.tensor(row.ids, dtype=torch.int64)
        attention_mask_BT[number, :length] = 1
        loss_mask_BT[number, :length] = torch.tensor(row.mask, dtype=torch.bool)
    return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "loss_mask": loss_mask_BT}
