"""The part of an optimiser step that is a rank's: all rows together, none twice, and one for who has none."""

from collections.abc import Sequence

import pytest
import torch

from potstill.data.chat import Rendered
from potstill.losses.types import Dense
from potstill.train.loader import EpochPlan, MicroBatches
from potstill.train.rows import Rows


def rows(count: int = 7) -> Rows:
    made = Rows()
    for number in range(count):
        made.append(Rendered(list(range(10, 14 + number)), [0, 0] + [1] * (2 + number)), f"r{number}")
    return made


def signal(some: Rows, numbers: Sequence[int]) -> Dense:
    return Dense(torch.zeros(sum(map(some.supervised, numbers)), 30))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_of_a_step_have_each_row_once(ranks: int, packed: bool) -> None:
    numbers = [6, 1, 3, 0, 5]
    makers = [MicroBatches(rows(), signal, 20, packed, rank, ranks) for rank in range(ranks)]
    steps = [make(numbers) for make in makers]
    assert all(step.numbers == tuple(numbers) for step in steps)
    ids = [[row_id for batch in step.batches for row_id in batch.row_ids] for step in steps]
    assert sorted(one for own in ids for one in own) == ["r0", "r1", "r3", "r5", "r6"]
    assert all(own for own in ids)
    # Each rank knows which rows are another's, micro-batch by micro-batch.
    for rank, step in enumerate(steps):
        split = [[f"r{number}" for number in group] for group in makers[0].split(numbers, rank)]
        assert split == [list(batch.row_ids) for batch in step.batches]


@pytest.mark.parametrize("packed", [False, True])
def test_a_rank_without_rows_has_a_micro_batch_without_supervised_tokens(packed: bool) -> None:
    (batch,) = MicroBatches(rows(), signal, 20, packed, 1, 2)([4]).batches
    assert (batch.supervised, batch.row_ids) == (0, ())
    assert not batch.loss_mask_BT.any()
    assert isinstance(batch.teacher, Dense)
    assert batch.teacher.logits_NV.shape == (0, 30)
    (batch,) = MicroBatches(rows(), None, 20, packed, 1, 2)([4]).batches
    assert batch.teacher is None


@pytest.mark.parametrize("packed", [False, True])
def test_ranks_in_step_make_as_many_micro_batches_with_each_row_once(packed: bool) -> None:
    numbers = [6, 0, 1]
    alone = [MicroBatches(rows(), signal, 8, packed, rank, 2)(numbers).batches for rank in range(2)]
    assert len(alone[0]) != len(alone[1])
    steps = [MicroBatches(rows(), signal, 8, packed, rank, 2, in_step=True)(numbers) for rank in range(2)]
    first, second = (step.batches for step in steps)
    assert len(first) == len(second) == max(map(len, alone))
    ids = [row_id for batch in (*first, *second) for row_id in batch.row_ids]
    assert sorted(ids) == ["r0", "r1", "r6"]
    for batch in (*first, *second):
        assert batch.shared_prefix == 0
        if not batch.row_ids:
            assert batch.supervised == 0
            assert batch.input_ids_BT.shape[1] == 4, "of the shortest row"


def test_rows_of_ranks_in_step_share_no_pass_of_a_prefix() -> None:
    made = Rows()
    for number in range(2):
        made.append(Rendered([*range(10, 30), 40 + number], [0] * 20 + [1]), f"r{number}")
    (alone,) = MicroBatches(made, None, 100, packed=False)([0, 1]).batches
    assert alone.shared_prefix > 0
    (in_step,) = MicroBatches(made, None, 100, packed=False, in_step=True)([0, 1]).batches
    assert in_step.shared_prefix == 0


@pytest.mark.parametrize("tokens", [1, 23, 24, 80, 81, 160, 161, 400])
def test_training_by_tokens_ends_with_the_step_in_which_they_are_reached(tokens: int) -> None:
    plan = EpochPlan([4, 20, 6, 9, 11, 30], 2, seed=5)
    steps = plan.steps_of(tokens)
    trained, ends = 0, []
    for epoch in range(6):
        plan.set_epoch(epoch)
        for rows in plan:
            trained += sum(plan.lengths[row] for row in rows)
            ends.append(trained)
    assert ends[steps - 1] >= tokens
    assert steps == 1 or ends[steps - 2] < tokens
