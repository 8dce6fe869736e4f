"""Verdicts: what counts as the answer, when it is right, and that no text can stall or break the judging."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.verifiers import is_well_formed, verify
from potstill.verifiers.bounded import call_bounded
from potstill.verifiers.choice import chosen_letter
from potstill.verifiers.math import equal_answers, final_answer
from potstill.verifiers.reasoning_gym import answer_candidates
from potstill.verifiers.sandbox import confinement


def gold(reference: str | None, task: str | None = "math", **meta: Any) -> Record:
    return Record("p", [{"role": "user", "content": "?"}], reference=reference, task=task, meta=meta)


class TestWellFormed:
    @pytest.mark.parametrize(
        "text",
        [
            "<think>\nten\n</think>\n11",
            "  <think>ten</think>11 \n",
            "<|begin_of_thought|>ten<|end_of_thought|><|begin_of_solution|>11<|end_of_solution|>",
        ],
    )
    def test_one_block_then_an_answer(self, text: str) -> None:
        assert is_well_formed(text)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "11",
            "<think>ten</think>",
            "<think>ten</think>  \n",
            "<think> \n</think>11",
            "<think>ten",
            "ten</think>11",
            "Well, <think>ten</think>11",
            "<think>ten</think><think>one</think>11",
            "<think><think>ten</think>11",
            "<think>ten</think>11</think>",
            "</think>ten<think>11",
        ],
    )
    def test_anything_else_is_not(self, text: str) -> None:
        assert not is_well_formed(text)


class TestVerify:
    def test_a_record_without_a_task_is_judged_by_form_alone(self) -> None:
        assert verify(gold(None, task=None), "<think>ten</think>11") == {"well_formed": True}

    def test_only_what_follows_the_think_block_is_the_answer(self) -> None:
        assert verify(gold("11"), "<think>is it 12?</think>It is 11.") == {
            "well_formed": True,
            "correct": True,
        }
        assert not verify(gold("12"), "<think>is it 12?</think>It is 11.")["correct"]
        assert not verify(gold("12"), "<think>is it 12")["correct"]
        assert verify(gold("11"), "is it 12?</think>11")["correct"]

    def test_an_unknown_task_names_the_known_ones(self) -> None:
        with pytest.raises(DataError, match="no verifier is called 'maths'") as caught:
            verify(gold("1", task="maths"), "1")
        assert "math, choice, reasoning_gym:<task>" in str(caught.value)

    def test_a_missing_gold_answer_is_an_error(self) -> None:
        with pytest.raises(DataError, match="needs a gold answer"):
            verify(gold(None), "1")


class TestMath:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            (r"First 3, so \boxed{\frac{1}{2}}. The answer is 7", r"\frac{1}{2}"),
            ("48/2 = 24\n#### 1,024\nbye 5", "1,024"),
            ("The answer is 5. No: the answer is 72 clips.\nReally 9", "72 clips."),
            ("**Answer:** $18", "** $18"),
            ("so we get 12, then 3.5 and that is it", "3.5"),
            ("nothing", None),
            ("", None),
        ],
    )
    def test_the_final_answer_is_found(self, text: str, answer: str | None) -> None:
        assert final_answer(text) == answer

    @pytest.mark.parametrize(
        ("reference", "text"),
        [
            ("72", "#### 72"),
            ("72", "The answer is 72 clips."),
            ("72", "The answer is 70 + 2 = 72."),
            ("1000", "**Answer:** $1,000.00"),
            ("-4", "<think>\n3 - 7 = -4\n</think>\n-4"),
            ("0.5", r"\boxed{\frac{1}{2}}"),
            ("1/3", "0.33333333"),
            (r"\frac{3}{4}", "3/4"),
            ("x", r"\boxed{x}"),
            ("(1,2)", r"\boxed{\left(1, 2\right)}"),
        ],
    )
    def test_equal_answers_are_right_however_written(self, reference: str, text: str) -> None:
        assert verify(gold(reference), text)["correct"]

    @pytest.mark.parametrize(
        ("reference", "text"),
        [("72", "72 + 1 = 73"), ("72", "720"), ("72", "I do not know"), ("72", ""), ("4", "-4"), ("0", "x")],
    )
    def test_other_answers_are_wrong(self, reference: str, text: str) -> None:
        assert not verify(gold(reference), text)["correct"]

    @pytest.mark.parametrize(
        ("reference", "given_"),
        [("x^2+1", "1+x^2"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"), ("4", r"2\sqrt{4}")],
    )
    def test_expressions_are_compared_as_mathematics(self, reference: str, given_: str) -> None:
        assert equal_answers(reference, given_)
        assert not equal_answers(reference, f"{given_}+1")

    def test_symbolic_comparison_works_in_threads(self) -> None:
        found: list[bool] = []
        threads = [
            threading.Thread(target=lambda: found.append(equal_answers("x+1", r"\frac{2x+2}{2}")))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 4

    def test_an_endless_computation_is_cut_off_and_the_next_one_works(self) -> None:
        call_bounded("symbolic", "1", "1", timeout_s=60)
        started = time.monotonic()
        assert call_bounded("symbolic", "2", "9^{9^{9^{9^{9}}}}", timeout_s=0.5) is None
        assert time.monotonic() - started < 5
        assert call_bounded("symbolic", "x+1", "1+x", timeout_s=60) is True


class TestChoice:
    CHOICES = ("the red one", "the green one", "10", "1")

    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("Answer: B", "B"),
            ("answer: (b)", "B"),
            ("The correct answer is **C**.", "C"),
            ("The answer is A. Wait: the answer is B.", "B"),
            ("Answer: <D>", "D"),
            (r"\boxed{B}", "B"),
            (r"so \boxed{\text{C}}", "C"),
            ("B", "B"),
            ("b.", "B"),
            ("B. the green one", "B"),
            ("(B) the green one", "B"),
            ("It must be (C)", "C"),
            ("The green one.", "B"),
            ("Thinking.\nSo it is the red one", "A"),
            ("10", "C"),
            ("A dog barks", None),
            ("Answer: E", None),
            ("the red one or the green one", None),
            ("", None),
        ],
    )
    def test_the_letter_that_a_text_settles_on(self, text: str, letter: str | None) -> None:
        assert chosen_letter(text, list(self.CHOICES)) == letter

    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("Ответ: B", "B"),
            ("Правильный ответ — (C).", "C"),
            ("**Ответ:** D", "D"),
            ("Рассуждаю.\nВерный вариант: A", "A"),
            ("Ответ: вариант B", "B"),
            ("Сначала ответ: A, но нет.\nОтвет: C", "C"),
            # Cyrillic letters that look Latin.
            ("Ответ: В", "B"),
            ("Ответ: (С)", "C"),
            ("А", "A"),
            ("с.", "C"),
            # Such a letter is also a word, and the text of an option begins with it.
            ("Ответ: В Москве", "D"),
            ("Думаю, что в Москве", "D"),
            ("Ответ: В Твери", None),
            ("Ответ: Ж", None),
        ],
    )
    def test_the_letter_that_a_russian_text_settles_on(self, text: str, letter: str | None) -> None:
        assert chosen_letter(text, ["Волга", "Обь", "Дон", "В Москве"]) == letter

    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("Answer: A dog\nSure.", "B"),
            ("The answer is a dog.", "B"),
            ("Answer: A", "A"),
            ("Answer: A, since a dog barks", "A"),
        ],
    )
    def test_an_announced_text_of_an_option_is_no_letter(self, text: str, letter: str) -> None:
        assert chosen_letter(text, ["A cat", "A dog"]) == letter

    @pytest.mark.parametrize(
        "text",
        [
            "Option C is right",
            "C is correct",
            "C is correct\nRed burns",
            "Red burns; thus, C is correct.",
            "Option A is correct at first sight.\n**C** is the best choice!",
            "Statement A is true.\nSo, (C).",
            "I choose C because it fits.",
            "I'd go with option (C).",
            "The correct letter is C. The first letter is A.",
            "<answer>A</answer> No: <answer> C </answer>",
            "<answer>C. blue</answer>",
            "<answer>blue</answer>",
            "Правильный ответ находится под буквой C",
            "Вариант под буквой А неверен, верен вариант C.",
            "Выбираю C",
            "Итак, C.",
            "верен вариант C",
            "Вариант С верен, так как он синий.",
            "C — это верный ответ",
            "Правильная буква: C",
        ],
    )
    def test_a_sentence_may_settle_on_a_letter_in_other_words(self, text: str) -> None:
        assert chosen_letter(text, ["red", "green", "blue", "grey"]) == "C"

    @pytest.mark.parametrize(
        "text",
        [
            "If option C is right, the others are not",
            "I doubt that option C is correct.",
            "Option C is right only if it rains",
            "option C is right?",
            "Option C is not right.",
            "Option C is right-handed",
            "Option C is the right ventricle",
            "C is the right ventricle",
            "Vitamin C is correct.",
            "I choose A dog",
            "I choose vitamin C.",
            "So C is wrong",
            "So, I.",
            "The first letter is C",
            "неверен вариант C",
            "не верен вариант C.",
            "Если верен вариант C, то нет",
            "Вариант C неверный.",
            "Вариант под буквой C неверен",
            "Не выбираю C.",
            "Выбираю витамин C",
            "<answer>none</answer>",
        ],
    )
    def test_a_letter_that_is_supposed_denied_or_no_option_settles_nothing(self, text: str) -> None:
        assert chosen_letter(text, ["red", "green", "blue", "grey"]) is None

    @pytest.mark.parametrize(
        ("text", "letter"),
        [("Ответ: Б", "B"), ("б.", "B"), ("(Б) Обь", "B"), ("Б бы выбрал не я", None), ("Ответ: Г", None)],
    )
    def test_the_second_letter_in_russian_is_the_second_option(self, text: str, letter: str | None) -> None:
        assert chosen_letter(text, ["Волга", "Обь", "Дон", "Нева"]) == letter

    def test_an_announced_letter_counts_before_what_is_said_of_another(self) -> None:
        assert chosen_letter("Option A is right.\nAnswer: B", ["red", "green"]) == "B"

    @pytest.mark.parametrize(
        "part", ["So ", "Option A ", "I choose A ", "<answer>", " ", "\n", "верен вариант ", "A is "]
    )
    def test_long_texts_are_read_quickly(self, part: str) -> None:
        started = time.monotonic()
        chosen_letter(part * 20_000 + "x", ["red", "green"])
        assert time.monotonic() - started < 5

    def test_the_verdict_compares_letters(self) -> None:
        record = gold("B", task="choice", choices=list(self.CHOICES))
        assert verify(record, "<think>Answer: A?</think>\nAnswer: B") == {
            "well_formed": True,
            "correct": True,
        }
        assert not verify(record, "Answer: A")["correct"]
        assert not verify(record, "no idea")["correct"]


class TestReasoningGym:
    SUM = "reasoning_gym:chain_sum"

    @pytest.mark.parametrize(
        ("text", "candidates"),
        [
            ("-4", ["-4"]),
            ("3 - 7 = -4", ["3 - 7 = -4", "-4"]),
            ("First 3.\nThe answer is -4.", ["First 3.\nThe answer is -4.", "The answer is -4.", "-4"]),
            ("12 or <answer> 5 </answer>", ["5"]),
            (r"12, so \boxed{5}", ["5"]),
            ("", []),
        ],
    )
    def test_what_may_be_the_answer(self, text: str, candidates: list[str]) -> None:
        assert answer_candidates(text, numeric=True) == candidates

    # This scorer evaluates the gold answer of a row, which may come from anywhere.
    @staticmethod
    def evaluates_to_nine(condition: str) -> bool:
        task = "reasoning_gym:number_sorting"
        record = gold(f"[9.0 * bool({condition})]", task=task, direction="ascending")
        return verify(record, "['9']")["correct"]

    def test_a_row_that_a_scorer_runs_sees_no_keys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SOME_API_KEY", "sk-canary-4711")
        monkeypatch.setenv("LANG", "C.UTF-8")
        assert self.evaluates_to_nine("'LANG' in __import__('os').environ")
        assert not self.evaluates_to_nine("'SOME_API_KEY' in __import__('os').environ")

    @pytest.mark.skipif("files" not in confinement(), reason="the kernel has no Landlock")
    def test_a_row_that_a_scorer_runs_reads_and_writes_no_files(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("9", encoding="utf-8")
        assert not self.evaluates_to_nine(f"open({str(tmp_path / 'secret')!r}).read()")
        assert not self.evaluates_to_nine(f"open({str(tmp_path / 'new')!r}, 'w')")
        assert [one.name for one in tmp_path.iterdir()] == ["secret"]

    @pytest.mark.skipif("processes and network" not in confinement(), reason="there is no seccomp")
    @pytest.mark.parametrize("run", ["__import__('os').system('true') == 0", "__import__('socket').socket()"])
    def test_a_row_that_a_scorer_runs_starts_and_reaches_nothing(self, run: str) -> None:
        assert not self.evaluates_to_nine(run)

    def test_the_librarys_scorer_decides(self) -> None:
        record = gold("-4", task=self.SUM)
        for right in ("-4", "-4.0", "<think>4 - 1 = 3</think>\n-4", "The answer is -4."):
            assert verify(record, right)["correct"], right
        for wrong in ("4", "-44", "", "<think>-4</think>", "-4 or 5"):
            assert not verify(record, wrong)["correct"], wrong

    def test_an_unknown_task_names_the_nearest(self) -> None:
        with pytest.raises(DataError, match="did you mean chain_sum"):
            verify(gold("1", task="reasoning_gym:chain_sums"), "2")

    def test_an_endless_answer_is_wrong_in_bounded_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("potstill.verifiers.reasoning_gym._SCORE_TIMEOUT_S", 0.5)
        record = gold(None, task="reasoning_gym:countdown", numbers=[9, 9], target=18)
        assert verify(record, "9 + 9")["correct"]
        started = time.monotonic()
        assert not verify(record, "9**9**9**9")["correct"]
        assert time.monotonic() - started < 10


class TestAdversarialText:
    @pytest.mark.parametrize(
        "text",
        [
            "1" * 300_000,
            "1," * 150_000,
            "answer is " * 40_000,
            r"\boxed{" * 40_000,
            "(" * 300_000,
            "<think>" * 40_000,
            "#### " * 60_000,
            "$" * 300_000,
            "A. " * 100_000,
            "answer" + " " * 300_000 + ":",
            "answer is" + "\n" * 300_000 + "x",
            "answer: option" + " " * 300_000 + "x",
            "-" * 300_000,
        ],
    )
    @pytest.mark.parametrize(("reference", "task"), [("5", "math"), ("B", "choice")])
    def test_long_texts_take_no_time(self, text: str, reference: str, task: str) -> None:
        record = gold(reference, task=task, choices=["x", "y"])
        started = time.monotonic()
        verify(record, text)
        assert time.monotonic() - started < 2

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=80))
    def test_no_text_breaks_the_judging(self, text: str) -> None:
        verify(gold("5"), text)
        verify(gold("B", task="choice", choices=["x", "y"]), text)
