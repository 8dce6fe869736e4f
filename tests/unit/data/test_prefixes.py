"""Shared beginnings are found whatever the rows' order, and no token of a batch is counted twice."""

from hypothesis import given
from hypothesis import strategies as st

from potstill.data.chat import Rendered
from potstill.data.prefixes import batches_by_prefix, prefix_tree, shared_prefix


def row(context: list[int], response: list[int]) -> Rendered:
    return Rendered([*context, *response], [0] * len(context) + [1] * len(response))


# Few ids, so that rows begin alike.
ROWS = st.lists(
    st.builds(
        row,
        st.lists(st.integers(0, 2), min_size=1, max_size=9),
        st.lists(st.integers(0, 2), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=12,
)


class TestSharedPrefix:
    def test_it_ends_before_the_token_that_predicts_the_first_supervised_one(self) -> None:
        twin = row([1, 2, 3], [4, 5])
        assert shared_prefix([twin, twin]) == 2
        assert shared_prefix([twin, row([1, 9, 3], [4])]) == 1
        assert shared_prefix([twin, row([7], [4])]) == 0

    def test_one_row_shares_nothing(self) -> None:
        assert shared_prefix([row([1, 2, 3], [4])]) == 0


class TestPrefixTree:
    @given(ROWS, st.integers(1, 6))
    def test_the_segments_behind_which_a_row_is_are_its_first_tokens(
        self, rows: list[Rendered], worth: int
    ) -> None:
        segments, behind = prefix_tree(rows, worth=worth)
        assert len(behind) == len(rows)
        for one, last in zip(rows, behind, strict=True):
            end, expected = None, last
            while last is not None:
                segment = segments[last]
                ids = rows[segment.row].ids[segment.start : segment.end]
                assert ids == one.ids[segment.start : segment.end]
                assert end in {None, segment.end}
                assert segment.behind is None or segment.behind < last
                end, last = segment.start, segment.behind
            assert end in {None, 0}
            if expected is not None:
                assert segments[expected].end < one.mask.index(1)

    @given(ROWS, st.integers(1, 6))
    def test_every_segment_spares_what_it_is_worth(self, rows: list[Rendered], worth: int) -> None:
        segments, behind = prefix_tree(rows, worth=worth)
        users = [0] * len(segments)
        for last in behind:
            while last is not None:
                users[last] += 1
                last = segments[last].behind
        for segment, count in zip(segments, users, strict=True):
            assert (count - 1) * (segment.end - segment.start) >= worth

    @given(ROWS)
    def test_where_everything_is_worth_it_no_two_rows_run_the_same_token(self, rows: list[Rendered]) -> None:
        segments, behind = prefix_tree(rows, worth=1)
        run = sum(one.end - one.start for one in segments)
        run += sum(
            len(one.ids) - (0 if last is None else segments[last].end)
            for one, last in zip(rows, behind, strict=True)
        )
        places = {tuple(one.ids[: at + 1]) for one in rows for at in range(one.mask.index(1) - 1)}
        assert run == len(places) + sum(one.supervised_tokens + 1 for one in rows)

    def test_a_question_stands_behind_the_system_prompt(self) -> None:
        system = [1, 2, 3, 4]
        rows = [row([*system, *question, 9], [6]) for question in ([5, 5], [7], [5, 5], [7])]
        segments, behind = prefix_tree(rows, worth=1)
        assert [(one.start, one.end, one.behind) for one in segments] == [(0, 4, None), (4, 5, 0), (4, 6, 0)]
        assert behind == [2, 1, 2, 1]
        segments, behind = prefix_tree(rows, start=4, worth=2)
        assert [(one.start, one.end, one.behind) for one in segments] == [(4, 6, None)]
        assert behind == [0, None, 0, None]


class TestBatchesByPrefix:
    @given(ROWS, st.integers(1, 60))
    def test_every_row_is_in_one_batch_which_keeps_to_its_tokens(
        self, rows: list[Rendered], max_tokens: int
    ) -> None:
        batches = batches_by_prefix(rows, max_tokens)
        assert sorted(number for batch in batches for number in batch) == list(range(len(rows)))
        for batch in batches:
            some = [rows[number] for number in batch]
            places = {tuple(one.ids[: at + 1]) for one in some for at in range(one.mask.index(1) - 1)}
            tokens = len(places) + sum(one.supervised_tokens + 1 for one in some)
            assert tokens <= max_tokens or len(batch) == 1

    def test_the_candidates_of_a_prompt_stay_together(self) -> None:
        prompts = [[1, 1, 1, at, at, at] for at in range(2, 6)]
        rows = [row(prompt, [sample, sample]) for sample in (7, 8, 9) for prompt in prompts]
        batches = batches_by_prefix(rows, 20, start=3)
        assert [len(batch) for batch in batches] == [3, 3, 3, 3]
        assert all(len({tuple(rows[number].ids[:6]) for number in batch}) == 1 for batch in batches)
