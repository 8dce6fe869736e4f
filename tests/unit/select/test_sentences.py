"""Sentences cover a text; every token lies in exactly one."""

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.errors import DataError
from potstill.select.sentences import sentences, tokens_of_spans


def split(text: str) -> list[str]:
    data = text.encode("utf-8", "surrogatepass")
    return [data[start:end].decode("utf-8", "surrogatepass") for start, end in sentences(text)]


class TestWithinALine:
    @pytest.mark.parametrize(
        "text",
        [
            "Pi is 3.14159 and e is 2.718.",
            "Cities, e.g. Paris, i.e. The capital.",
            "Dr. X met Mr. Smith and Prof. Lee.",
            "The U.S. Army and Ph.D. students.",
            "Read Smith et al. (2020) and Fig. 3 on p. 7.",
            "No. 5 fails.",
            "Wait... let me see.",
            "Is it so? asked he.",
            "So 5! = 120 and n! > 2.",
            "See https://a.example/b?c=d.Then and v2.0.1.",
            "Books by J. K. Rowling and John F. Kennedy.",
            "Поэт А. С. Пушкин родился в 1799 г. в Москве, т. е. давно.",
            "Das ist z.B. Unsinn, d.h. Quatsch.",
            "1. First do this.",
            "  a. First do this.",
            "**2.** First do this.",
            "Step 3. Compute the sum.",
            "B. The second option.",
        ],
    )
    def test_a_stop_that_belongs_to_a_word_ends_nothing(self, text: str) -> None:
        assert split(text) == [text]

    @pytest.mark.parametrize(
        "text",
        [
            "So x = 1.| Then y = 2.| y = 3 as well.",
            "The answer is B.| Because A is wrong.",
            "Let P be a point in Q.| Then stop.",
            "Five remain.| 3 + 4 = 7.| $6 is left.",
            "Is it?| Yes!| Really?!| Hmm...| Then no.",
            'He said "Go."| "Why?" she asked.| (Really.)| Yes.',
            "**Done.**| *Next* one.| `code` too.",
            r"So \(x = 1.\)| Then \boxed{5}.| \(y\) is free.",
            "It ended at 5 p.m.| He left etc.| No more.",
            "Is it prime?| No.| It is even.",
        ],
    )
    def test_a_stop_before_something_new_ends_a_sentence(self, text: str) -> None:
        assert split(text.replace("|", "")) == text.split("|")

    @pytest.mark.parametrize(
        "text",
        [
            "你好。|我们来算：1+1=2！|对吗？|“是的。”|他说。",
            "これは本です。|「はい！」|そうか……まあ",
            "यह एक वाक्य है।| यह दूसरा है।| क्या?",
            "هل هذا صحيح؟| نعم.| حسنا.",
            "Привет!| Как дела?| И т. д.| Затем дальше.",
            "Er sagte: „Ja.“| Dann ging er.",
            "Il dit « Oui. »| Puis il part.",
            "¿Qué es?| ¡Nada!| «Bien.»| Vale.",
            "Սա նախադասություն է։| Սա էլ։",
        ],
    )
    def test_stops_of_other_languages_end_sentences(self, text: str) -> None:
        assert split(text.replace("|", "")) == text.split("|")


class TestLines:
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028", "\n\n  \n"])
    def test_the_end_of_a_line_ends_a_sentence_and_belongs_to_it(self, end: str) -> None:
        assert split(f"- one{end}- two{end}") == [f"- one{end}", f"- two{end}"]

    def test_an_equation_a_line_is_a_sentence_a_line(self) -> None:
        assert split("x = 1\ny = x + 2. \n3") == ["x = 1\n", "y = x + 2. \n", "3"]

    @pytest.mark.parametrize("equation", ["$$\nx = 1. Y\n+ 2\n$$\n", "\\[\nx = 1. Y\n\\\\ + 2\n\\]\n"])
    def test_a_display_equation_is_one_sentence(self, equation: str) -> None:
        assert split(f"We have\n{equation}Thus so.") == ["We have\n", equation, "Thus so."]

    def test_an_equation_that_is_never_closed_swallows_nothing(self) -> None:
        assert split("$$ x\n\nOne. Two.\n\nand $$5") == ["$$ x\n\n", "One.", " Two.\n\n", "and $$5"]

    def test_code_is_split_at_lines_alone_and_keeps_its_fences(self) -> None:
        assert split("Run:\n```python\n\na = 1. Foo\nb()\n```\nDone. Ok.") == [
            "Run:\n",
            "```python\n\na = 1. Foo\n",
            "b()\n```\n",
            "Done.",
            " Ok.",
        ]

    def test_what_says_nothing_joins_a_neighbour(self) -> None:
        assert split("\n  Hi.\n\n---\n\nBye.\n***") == ["\n  Hi.\n\n---\n\n", "Bye.\n***"]
        assert split("... Then go.") == ["... Then go."]
        assert split("-- \n\n") == ["-- \n\n"]


class TestThinkTags:
    def test_an_opening_tag_leads_a_sentence_and_a_closing_one_ends_it(self) -> None:
        assert split("<think>\nFirst. Then.\n</think>\n\nThe answer is 5.") == [
            "<think>\nFirst.",
            " Then.\n</think>\n\n",
            "The answer is 5.",
        ]

    def test_tags_part_sentences_within_a_line(self) -> None:
        assert split("<think>so it is</think>five <answer>5</answer>") == [
            "<think>so it is</think>",
            "five ",
            "<answer>5</answer>",
        ]

    def test_a_tag_ends_code_that_was_never_closed(self) -> None:
        assert split("<think>\n```\na\n</think>\nOne. Two.") == [
            "<think>\n```\na\n</think>\n",
            "One.",
            " Two.",
        ]

    def test_an_empty_block_stays_apart_from_the_answer(self) -> None:
        assert split("<think>\n</think>\nFive.") == ["<think>\n</think>\n", "Five."]

    def test_the_marks_of_openthoughts_are_tags(self) -> None:
        text = "<|begin_of_thought|>\nSo.\n<|end_of_thought|>\nFive."
        assert split(text) == ["<|begin_of_thought|>\nSo.\n<|end_of_thought|>\n", "Five."]


TEXT = st.text(
    st.characters() | st.sampled_from([*"..!?。 \n\r\"'$\\[]`AaБя1…।", "\ud800"]), max_size=60
) | st.lists(
    st.sampled_from(
        [
            "One",
            "e.g.",
            "3.14",
            ". ",
            "! ",
            "。",
            "\n",
            "\n\n",
            "<think>",
            "</think>",
            "```",
            "$$",
            "\\[",
            "\\]",
            " ",
            "A.",
        ]
    ),
    max_size=30,
).map("".join)


class TestAnyText:
    @given(TEXT)
    def test_sentences_cover_the_text_in_order_and_none_is_empty(self, text: str) -> None:
        spans = sentences(text)
        size = len(text.encode("utf-8", "surrogatepass"))
        assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), size]
        assert all(start < end for start, end in spans)
        assert bool(spans) == bool(text)

    @given(TEXT)
    def test_no_character_is_cut_in_two(self, text: str) -> None:
        assert "".join(split(text)) == text

    @given(TEXT, TEXT)
    def test_what_stands_behind_a_closed_block_changes_nothing_before_it(
        self, first: str, second: str
    ) -> None:
        one, both = (sentences(f"{first}b</think>{rest}") for rest in ("", f"\n{second}c"))
        assert both[: len(one) - 1] == one[:-1]

    @pytest.mark.parametrize(
        "unit",
        [
            "A. ",
            "1. ",
            "a. B",
            ". ",
            "$$",
            "$$a\n",
            "\\[",
            "```\n",
            "<think>",
            "“。",
            "x.)",
            "… ",
            "((((",
            "a",
            "\n",
        ],
    )
    def test_the_time_is_linear(self, unit: str) -> None:
        def seconds(characters: int) -> float:
            text = unit * (characters // len(unit))
            started = time.process_time()
            sentences(text)
            return time.process_time() - started

        seconds(1000)
        # Quadratic time would be a hundredfold.
        assert seconds(60_000) <= 40 * max(seconds(6000), 0.002)


def tokens_by_byte(spans: list[tuple[int, int]], token_bytes: list[int], before: int) -> list[int]:
    """Each byte inside of the text votes for the span it lies in; the slow and obvious way."""
    chosen, at, size = [], -before, spans[-1][1]
    for length in token_bytes:
        outside = min(max(at - (at > 0), 0), size - 1)
        places = [byte for byte in range(at, at + length) if 0 <= byte < size] or [outside]
        votes = [sum(start <= place < end for place in places) for start, end in spans]
        chosen.append(votes.index(max(votes)))
        at += length
    return chosen


@st.composite
def tokenised(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[int]]:
    """Spans of some text and any cutting of its bytes into tokens."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=8))
    ends = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    cuts = draw(st.lists(st.integers(0, ends[-1]), max_size=12).map(sorted))
    return [*pairwise(ends)], [end - start for start, end in pairwise([0, *cuts, ends[-1]])]


class TestTokens:
    def test_a_token_belongs_to_the_sentence_with_most_of_its_bytes(self) -> None:
        spans = sentences("Yes. No way.")
        assert spans == [(0, 4), (4, 12)]
        assert tokens_of_spans(spans, [3, 1, 3, 4, 1]) == [0, 0, 1, 1, 1]
        assert tokens_of_spans(spans, [5, 7]) == [0, 1]
        assert tokens_of_spans(spans, [2, 5, 5]) == [0, 1, 1]

    def test_of_equal_shares_the_earlier_sentence_gets_it(self) -> None:
        assert tokens_of_spans([(0, 4), (4, 8)], [2, 4, 2]) == [0, 0, 1]

    def test_a_token_may_span_whole_sentences(self) -> None:
        assert tokens_of_spans([(0, 2), (2, 7), (7, 8)], [8]) == [1]

    def test_a_token_of_no_bytes_belongs_to_what_ends_there(self) -> None:
        assert tokens_of_spans([(0, 4), (4, 8)], [0, 4, 0, 4, 0]) == [0, 0, 0, 1, 1]

    def test_bytes_outside_of_the_text_are_told_apart(self) -> None:
        spans = [(0, 4), (4, 8)]
        assert tokens_of_spans(spans, [1, 4, 4, 10], before=1, after=10) == [0, 0, 1, 1]
        assert tokens_of_spans(spans, [3, 3], before=-2) == [0, 1]
        assert tokens_of_spans(spans, [8, 3], before=8, after=-5) == [0, 0]

    @pytest.mark.parametrize("token_bytes", [[4, 3], [4, 5], []])
    def test_lengths_that_do_not_add_up_are_an_error(self, token_bytes: list[int]) -> None:
        with pytest.raises(DataError, match=f"{sum(token_bytes)} bytes, but the text has 8"):
            tokens_of_spans([(0, 4), (4, 8)], token_bytes)

    def test_a_negative_length_is_an_error(self) -> None:
        with pytest.raises(DataError, match="negative length"):
            tokens_of_spans([(0, 4)], [5, -1])

    def test_an_empty_text_has_no_tokens(self) -> None:
        assert tokens_of_spans([], []) == []
        with pytest.raises(DataError, match="empty text"):
            tokens_of_spans([], [3], after=3)

    @given(tokenised(), st.integers(-6, 6), st.integers(-6, 6))
    def test_any_tokens_are_parted_as_their_bytes_vote(
        self, text: tuple[list[tuple[int, int]], list[int]], before: int, after: int
    ) -> None:
        spans, token_bytes = text
        # The text is made smaller or greater than what the tokens say.
        size = sum(token_bytes) - before - after
        spans = [(min(start, size), min(end, size)) for start, end in spans if start < size]
        if not spans:
            return
        spans[-1] = (spans[-1][0], size)
        chosen = tokens_of_spans(spans, token_bytes, before=before, after=after)
        assert chosen == tokens_by_byte(spans, token_bytes, before)
        assert chosen == sorted(chosen)

    @given(TEXT, st.data())
    def test_any_text_cut_into_tokens_anywhere(self, text: str, data: st.DataObject) -> None:
        spans = sentences(text)
        size = spans[-1][1] if spans else 0
        cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=10))) if size else []
        token_bytes = [end - start for start, end in pairwise([0, *cuts, size])] if size else []
        assert tokens_of_spans(spans, token_bytes) == (
            tokens_by_byte(spans, token_bytes, 0) if token_bytes else []
        )
