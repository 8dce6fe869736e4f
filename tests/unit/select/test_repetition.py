"""The share of repeated n-grams: what it is, and that a loop is seen wherever it stands."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data.words import marked_words
from potstill.select.repetition import repeated_share

# No two of its 8-grams are equal.
PROSE = " ".join(f"word{number}" for number in range(2000))


def share_of(items: list[str], ngram: int) -> float:
    """The definition, the slow way: over every ending that counts."""
    ngrams = [tuple(items[start : start + ngram]) for start in range(len(items) - ngram + 1)]
    lengths = {len(ngrams), *(64 * 2**power for power in range(12))}
    endings = [ngrams[-length:] for length in lengths if 0 < length <= len(ngrams)]
    return max((1 - len(set(ending)) / len(ending) for ending in endings), default=0.0)


class TestShare:
    def test_text_that_never_repeats_has_none(self) -> None:
        assert repeated_share(PROSE, 8) == 0
        assert repeated_share("", 8) == 0
        assert repeated_share("one two three", 8) == 0

    def test_it_is_one_less_the_distinct_share(self) -> None:
        assert repeated_share("a b a b a b", 2) == pytest.approx(1 - 2 / 5)
        assert repeated_share("a b c a b c", 3) == pytest.approx(1 - 3 / 4)

    @given(st.lists(st.sampled_from("ab.c"), max_size=300), st.integers(1, 9))
    def test_it_is_the_greatest_of_all_endings(self, items: list[str], ngram: int) -> None:
        assert repeated_share(" ".join(items), ngram) == pytest.approx(share_of(items, ngram))


class TestLoops:
    @pytest.mark.parametrize("period", [1, 3, 20, 50, 200])
    def test_a_loop_at_the_end_of_a_long_text_is_seen(self, period: int) -> None:
        rounds = max(8, 160 // period)
        loop = " ".join(f"again{number}" for number in range(period))
        assert repeated_share(f"{PROSE} {' '.join([loop] * rounds)}", 8) >= 1 - 2 / rounds - 0.05

    def test_a_loop_cut_off_inside_a_word_is_seen(self) -> None:
        assert repeated_share(f"{PROSE} {'wait, let me check that once more. ' * 40}"[:-4], 8) > 0.8

    @pytest.mark.parametrize(
        "loop", ["哈" * 300, "我们再看一遍。" * 60, "na" * 500, "=" * 200, "ไม่รู้" * 80, "- 0\n" * 90]
    )
    def test_a_loop_without_spaces_is_seen(self, loop: str) -> None:
        assert repeated_share(f"{PROSE}\n{loop}", 8) > 0.8

    def test_a_refrain_here_and_there_is_no_loop(self) -> None:
        text = " ".join(
            f"{PROSE[start : start + 900]} so the answer must be checked again now"
            for start in range(0, 9000, 900)
        )
        assert repeated_share(text, 8) < 0.1

    def test_long_texts_take_no_longer_than_their_length_asks(self) -> None:
        started = time.process_time()
        repeated_share("na" * 200_000, 8)
        assert time.process_time() - started < 3


class TestWords:
    def test_words_of_scripts_without_spaces_are_characters(self) -> None:
        assert marked_words("你好, हिन्दी ok") == ["你", "好", ",", "हिन्दी", "ok"]

    def test_a_run_longer_than_any_word_comes_in_pieces(self) -> None:
        assert marked_words("x" * 40) == ["x" * 16, "x" * 16, "x" * 8]
