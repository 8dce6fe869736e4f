"""Contamination: what a prompt may share with an evaluation set, and what it may not."""

import pytest

from potstill.core.records import Record
from potstill.select.contamination import EvaluationText

LONG = "Natalia sold clips to forty eight of her friends in April, and then half as many clips in May."
MIDDLE = "How many clips did Natalia sell altogether in April and May?"
SHORT = "What is 3 + 4?"


def prompt(text: str, record_id: str = "", role: str = "user") -> Record:
    return Record(f"p-{text}", [{"role": role, "content": text}], record_id)


def shared(evaluation: list[str], text: str, ngram: int = 13) -> tuple[str, str] | None:
    rows = [prompt(one, f"e{number}") for number, one in enumerate(evaluation)]
    return EvaluationText(rows, ngram).shared(prompt(text))


class TestShared:
    def test_thirteen_words_in_a_row_are_too_many(self) -> None:
        start = " ".join(LONG.split()[:13])
        assert shared([LONG], f"Solve: {start} ... end") == ("e0", start.casefold().replace(",", ""))

    def test_twelve_are_not(self) -> None:
        assert shared([LONG], f"Solve: {' '.join(LONG.split()[:12])} ... end") is None

    def test_case_punctuation_and_line_breaks_make_no_difference(self) -> None:
        assert shared([LONG], LONG.upper().replace(" ", ",\n")) is not None

    def test_arithmetic_signs_do(self) -> None:
        sum_ = "12 + 7 + 30 + 8 + 11 + 25 + 3"
        assert shared([sum_], f"Add: {sum_}") is not None
        assert shared([sum_], f"Add: {sum_.replace('+', '-')}") is None

    def test_a_shorter_paragraph_counts_whole_wherever_it_stands(self) -> None:
        assert shared([MIDDLE], f"Question: {MIDDLE}\nAnswer:") is not None
        assert shared([f"{MIDDLE}\n\nThink first."], f"Question: {MIDDLE}\nAnswer:") is not None
        assert shared([MIDDLE], f"Question: {MIDDLE[:-10]}\nAnswer:") is None

    def test_a_very_short_prompt_counts_only_as_all_of_a_prompt(self) -> None:
        assert shared([SHORT], "what is 3 + 4") is not None
        assert shared([SHORT], f"{SHORT} And what is 4 + 5?") is None

    def test_n_grams_do_not_reach_across_paragraphs(self) -> None:
        words = LONG.split()
        broken = f"{' '.join(words[:9])}\n\n{' '.join(words[9:])} Think first."
        assert shared([LONG], broken) is None

    def test_wording_that_many_prompts_share_tells_nothing(self) -> None:
        wording = (
            "Give the letter of the right choice, and nothing else, in the following form: Answer: <letter>"
        )
        questions = [
            f"Which of the things number {n} is it, in this year {n * 7} of ours?" for n in range(30)
        ]
        evaluation = [f"{question}\n\n{wording}" for question in questions]
        assert shared(evaluation, f"Another question.\n\n{wording}") is None
        assert shared(evaluation, f"{questions[4]}\n\n{wording}") is not None
        assert shared(evaluation[:5], f"Another question.\n\n{wording}") is not None

    def test_a_prompt_that_stands_in_the_set_many_times_is_no_wording(self) -> None:
        assert shared([LONG] * 30, LONG) is not None

    @pytest.mark.parametrize("ngram", [1, 5, 8])
    def test_fewer_words_may_be_asked_for(self, ngram: int) -> None:
        inside = " ".join(LONG.split()[4 : 4 + ngram])
        assert shared([LONG], f"xx {inside} yy", ngram) is not None
        assert shared([LONG], "xx yy zz", ngram) is None

    def test_the_prompt_is_what_the_user_says_or_all_of_a_plain_text(self) -> None:
        found = EvaluationText([prompt(LONG, "e")], 13)
        assert found.shared(prompt(LONG, role="system")) is None
        assert found.shared(Record("p", [], response=f"Once, {LONG}")) is not None

    def test_nothing_is_shared_with_empty_text(self) -> None:
        assert shared([LONG], "") is None
        assert shared(["..."], LONG) is None
