"""Epoch plans use every row once; micro-batches keep to their tokens; padding is known by length."""

import random
import statistics
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data.batches import (
    collate,
    collate_packed,
    epoch_plan,
    many_micro_batches,
    micro_batches,
    packs,
    share,
)
from potstill.data.chat import Rendered

LENGTHS = st.lists(st.integers(1, 200), min_size=0, max_size=120)


class TestEpochPlan:
    @given(LENGTHS, st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 5))
    def test_every_row_is_in_one_step_of_an_epoch(
        self, lengths: list[int], batch: int, seed: int, epoch: int
    ) -> None:
        steps = [*epoch_plan(lengths, batch, seed, epoch)]
        assert sorted(row for step in steps for row in step) == list(range(len(lengths)))

    @given(LENGTHS, st.integers(1, 20))
    def test_only_the_last_step_is_short_and_it_is_kept(self, lengths: list[int], batch: int) -> None:
        steps = [*epoch_plan(lengths, batch, 0, 0)]
        assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
        assert len(steps) == -(-len(lengths) // batch)

    def test_seed_and_epoch_decide_the_plan(self) -> None:
        lengths = list(range(1, 65))
        first, again, other_seed, other_epoch = (
            [*epoch_plan(lengths, 4, seed, epoch)] for seed, epoch in ((1, 0), (1, 0), (2, 0), (1, 1))
        )
        assert first == again
        assert first != other_seed
        assert first != other_epoch

    def test_rows_of_a_step_are_alike_in_length_and_steps_are_in_no_order(self) -> None:
        lengths = [1 + 37 * row % 200 for row in range(400)]
        steps = [*epoch_plan(lengths, 8, 3, 0)]
        spreads = [
            max(map(lengths.__getitem__, step)) - min(map(lengths.__getitem__, step)) for step in steps
        ]
        assert statistics.mean(spreads) < 10
        longest = [max(map(lengths.__getitem__, step)) for step in steps]
        assert longest != sorted(longest)
        assert longest != sorted(longest, reverse=True)

    def test_the_short_step_is_not_always_the_longest_rows(self) -> None:
        lengths = list(range(1, 30))
        left_over = {[*epoch_plan(lengths, 4, 0, epoch)][-1][0] for epoch in range(20)}
        assert len(left_over) > 10

    def test_a_batch_of_none_is_refused(self) -> None:
        with pytest.raises(ValueError, match="batch is 0"):
            epoch_plan([1], 0, 0, 0)


class TestShare:
    @given(LENGTHS, st.integers(1, 9))
    def test_every_row_is_one_ranks_and_no_rank_has_a_row_more_than_it_must(
        self, lengths: list[int], ranks: int
    ) -> None:
        shares = share(lengths, ranks)
        assert len(shares) == ranks
        assert sorted(position for own in shares for position in own) == list(range(len(lengths)))
        tokens = [sum(lengths[position] for position in own) for own in shares]
        # Whoever has the most got its last, shortest row while no other had fewer tokens.
        most = tokens.index(max(tokens))
        shortest = min((lengths[position] for position in shares[most]), default=0)
        assert tokens[most] - shortest <= min(tokens)

    def test_alone_a_rank_has_all_rows_in_their_order(self) -> None:
        assert share([3, 9, 1], 1) == [[0, 1, 2]]

    def test_of_fewer_rows_than_ranks_some_get_none(self) -> None:
        assert share([5], 3) == [[0], [], []]


class TestMicroBatches:
    @given(LENGTHS, st.integers(1, 600))
    def test_padded_tokens_keep_to_the_limit_unless_one_row_is_longer(
        self, lengths: list[int], max_tokens: int
    ) -> None:
        batches = micro_batches(lengths, range(len(lengths)), max_tokens)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        for batch in batches:
            padded = len(batch) * max(lengths[row] for row in batch)
            assert padded <= max_tokens or len(batch) == 1

    def test_rows_share_a_batch_when_they_fit(self) -> None:
        assert micro_batches([4, 2, 2, 9], [0, 1, 2, 3], 8) == [[3], [0, 1], [2]]

    @given(st.lists(st.integers(0, 9)), st.integers(1, 40), st.randoms())
    def test_those_of_arrays_are_those_of_lists(
        self, lengths: list[int], max_tokens: int, chance: random.Random
    ) -> None:
        rows = sorted(chance.sample(range(len(lengths)), chance.randint(0, len(lengths))))
        found = many_micro_batches(array("i", lengths), array("i", rows), max_tokens)
        assert [*found] == micro_batches(lengths, rows, max_tokens)

    @given(st.lists(st.integers(1, 30), max_size=9), st.integers(1, 80), st.integers(0, 20), st.randoms())
    def test_where_a_pass_has_a_price_passes_and_padding_cost_the_least(
        self, lengths: list[int], max_tokens: int, pass_tokens: int, chance: random.Random
    ) -> None:
        batches = micro_batches(lengths, range(len(lengths)), max_tokens, pass_tokens=pass_tokens)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))

        def cost(batches: list[list[int]]) -> int:
            return sum(pass_tokens + len(one) * max(lengths[row] for row in one) for one in batches)

        for batch in batches:
            assert len(batch) * max(lengths[row] for row in batch) <= max_tokens or len(batch) == 1
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        for _ in range(30):
            other: list[list[int]] = []
            for row in order:
                fits = other and (len(other[-1]) + 1) * lengths[other[-1][0]] <= max_tokens
                if fits and chance.random() < 0.7:
                    other[-1].append(row)
                else:
                    other.append([row])
            assert cost(batches) <= cost(other)

    def test_a_short_row_is_not_padded_to_the_length_of_a_long_one(self) -> None:
        assert micro_batches([30, 28, 3], range(3), 100) == [[0, 1, 2]]
        assert micro_batches([30, 28, 3], range(3), 100, pass_tokens=4) == [[0, 1], [2]]


class TestPacks:
    @given(LENGTHS, st.integers(1, 600))
    def test_tokens_keep_to_the_limit_and_no_two_packs_would_fit_into_one(
        self, lengths: list[int], max_tokens: int
    ) -> None:
        batches = packs(lengths, range(len(lengths)), max_tokens)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        for batch in batches:
            assert sum(lengths[row] for row in batch) <= max_tokens or len(batch) == 1
        sizes = sorted(sum(lengths[row] for row in batch) for batch in batches)
        assert len(sizes) < 2 or sizes[0] + sizes[1] > max_tokens

    def test_a_short_row_fills_the_room_that_longer_ones_left(self) -> None:
        assert packs([4, 3, 9, 5], [0, 1, 2, 3], 12) == [[2, 1], [3, 0]]

    def test_positions_begin_again_and_nothing_is_predicted_across_rows(self) -> None:
        tensors = collate_packed([Rendered([5, 6, 2], [0, 1, 1]), Rendered([7, 2], [0, 1])])
        assert tensors["input_ids"].tolist() == [[5, 6, 2, 7, 2]]
        assert tensors["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
        assert tensors["loss_mask"].tolist() == [[False, True, True, False, True]]


class TestCollate:
    def test_rows_are_padded_on_the_right_and_masked_by_length(self) -> None:
        tensors = collate([Rendered([5, 6, 2], [0, 1, 1]), Rendered([7, 2], [0, 1])], pad_id=2)
        assert tensors["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
        assert tensors["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert tensors["loss_mask"].tolist() == [[False, True, True], [False, True, False]]
