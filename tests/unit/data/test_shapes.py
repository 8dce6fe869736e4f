"""Rows of the known shapes give prompt, response and gold answer; others are refused."""

from typing import Any

import pytest

from potstill.core.errors import DataError
from potstill.data.shapes import BadRow, Example, Shape, parse_row, recognise

CHOICES = ["red", "green", "blue"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def parsed(row: dict[str, Any], shape: Shape = "auto") -> Example:
    found = recognise(row, shape)
    assert found is not None
    return parse_row(row, found)


class TestRecognition:
    @pytest.mark.parametrize(
        ("columns", "shape"),
        [
            (("prompt",), "prompt_response"),
            (("prompt", "response", "task"), "prompt_response"),
            (("question", "answer"), "question_answer"),
            (("problem", "solution", "answer"), "question_answer"),
            (("messages", "source"), "messages"),
            (("system", "conversations"), "conversations"),
            (("instruction", "input", "output"), "alpaca"),
            (("problem", "deepseek_reasoning", "deepseek_solution"), "openthoughts"),
            (("question", "choices", "answer", "subject"), "multiple_choice"),
            (("question", "options", "answerKey"), "multiple_choice"),
            (("text",), "text"),
            (("lyrics", "title"), None),
            ((), None),
        ],
    )
    def test_columns_tell_the_shape(self, columns: tuple[str, ...], shape: str | None) -> None:
        assert recognise(columns) == shape

    def test_a_stated_shape_needs_its_columns(self) -> None:
        assert recognise(("prompt", "text"), "text") == "text"
        assert recognise(("prompt",), "alpaca") is None
        assert recognise(("conversations",), "openthoughts") == "openthoughts"


class TestQuestionAnswer:
    def test_gsm8k_gives_the_final_answer_and_no_calculator_marks(self) -> None:
        example = parsed({"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 1,024"})
        assert example == Example(
            "How many?", [user("How many?")], "48/2 = 24 clips.\n#### 1,024", "1024", "math"
        )

    def test_a_boxed_answer_is_the_reference(self) -> None:
        example = parsed({"problem": "x?", "solution": r"So \boxed{\frac{1}{2}}."})
        assert (example.reference, example.task) == (r"\frac{1}{2}", "math")

    def test_a_separate_answer_is_the_reference_of_the_solution(self) -> None:
        example = parsed({"problem": "x?", "solution": "Because it is so.", "answer": 12})
        assert (example.response, example.reference, example.task) == ("Because it is so.", "12", "math")

    def test_a_prose_answer_has_no_verifier(self) -> None:
        example = parsed({"question": "Who?", "answer": "A poet."})
        assert (example.response, example.reference, example.task) == ("A poet.", None, None)

    def test_a_question_alone_is_a_prompt(self) -> None:
        assert parsed({"question": "Who?"}) == Example("Who?", [user("Who?")])


class TestMultipleChoice:
    @pytest.mark.parametrize("answer", [1, "B", "green", " green "])
    def test_index_letter_and_text_name_the_same_choice(self, answer: Any) -> None:
        example = parsed({"question": "Which?", "choices": CHOICES, "answer": answer})
        assert example.messages == [
            user(
                "Which?\n\nA. red\nB. green\nC. blue\n\n"
                "Give the letter of the right choice in the form: Answer: <letter>"
            )
        ]
        assert (example.reference, example.task, example.response) == ("B", "choice", "Answer: B")
        assert example.meta == {"choices": CHOICES}

    def test_labels_of_the_data_set_name_choices(self) -> None:
        row = {"question": "Which?", "choices": {"text": CHOICES, "label": ["1", "2", "3"]}, "answerKey": "3"}
        assert parsed(row).reference == "C"

    @pytest.mark.parametrize("answer", [3, -1, "D", "purple", None, True, 1.0, ""])
    def test_an_answer_that_names_no_choice_is_refused(self, answer: Any) -> None:
        with pytest.raises(DataError, match="names none of the 3 choices") as caught:
            parsed({"question": "Which?", "choices": CHOICES, "answer": answer})
        assert "an index from 0 to 2, a letter A to C" in str(caught.value)

    def test_the_same_question_with_other_choices_is_another_prompt(self) -> None:
        one, other = ({"question": "Which?", "choices": some, "answer": 0} for some in (CHOICES, ["x", "y"]))
        assert parsed(one).question != parsed(other).question

    @pytest.mark.parametrize("choices", [["only"], "red, green", None, ["x"] * 27])
    def test_choices_that_are_no_list_are_told(self, choices: Any) -> None:
        with pytest.raises(BadRow, match="2 to 26"):
            parsed({"question": "Which?", "choices": choices, "answer": 0})


class TestConversations:
    def test_the_last_assistant_turn_is_the_response(self) -> None:
        turns = [
            {"role": "system", "content": "Be brief."},
            user("Hi"),
            {"role": "assistant", "content": "Hello"},
            user("Bye"),
        ]
        example = parsed({"messages": [*turns, {"role": "assistant", "content": "So long"}]})
        assert (example.messages, example.response) == (turns, "So long")
        assert parsed({"messages": turns}).response is None

    def test_sharegpt_names_are_translated(self) -> None:
        turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
        example = parsed({"conversations": turns, "system": "Be brief."})
        assert example.messages == [{"role": "system", "content": "Be brief."}, user("Hi")]
        assert example.response == "Hello"

    def test_openthoughts_marks_become_a_think_block_and_their_system_prompt_goes(self) -> None:
        thought = "<|begin_of_thought|>\n\nten\n\n<|end_of_thought|>"
        answer = f"{thought}\n\n<|begin_of_solution|>\n\n11\n\n<|end_of_solution|>"
        row = {
            "system": "Use <|begin_of_thought|> and so on.",
            "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": answer}],
        }
        for shape in ("auto", "openthoughts"):
            example = parsed(row, shape)  # type: ignore[arg-type]  # both are shapes
            assert example.messages == [user("Hi")]
            assert example.response == "<think>\nten\n</think>\n\n11"

    def test_openthoughts_columns_become_the_same(self) -> None:
        row = {
            "problem": "Hi",
            "deepseek_reasoning": "ten",
            "deepseek_solution": "11",
            "ground_truth_solution": "#### 11",
        }
        example = parsed(row)
        assert (example.response, example.reference) == ("<think>\nten\n</think>\n\n11", "11")

    def test_content_in_parts_is_joined(self) -> None:
        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
        assert parsed({"messages": [{"role": "user", "content": parts}]}).messages == [user("Hello")]

    def test_a_prompt_is_the_same_in_every_shape(self) -> None:
        rows = (
            {"messages": [{"role": "system", "content": "s"}, user("Hi")]},
            {"question": "Hi"},
            {"prompt": "Hi"},
        )
        assert {parsed(row).question for row in rows} == {"Hi"}

    @pytest.mark.parametrize(
        "turns",
        [
            [],
            "text",
            [{"role": "assistant", "content": "unasked"}],
            [{"role": "tool", "content": "x"}],
            [{"content": "x"}],
            [user("  ")],
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            [None],
        ],
    )
    def test_conversations_that_ask_nothing_are_told(self, turns: Any) -> None:
        with pytest.raises(BadRow):
            parsed({"messages": turns})


class TestOthers:
    def test_alpaca_joins_instruction_and_input(self) -> None:
        row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
        assert parsed(row) == Example("Add.\n\n1, 2", [user("Add.\n\n1, 2")], "3")
        assert parsed({**row, "input": ""}).messages == [user("Add.")]

    def test_prompt_response_may_state_what_verifies_it(self) -> None:
        row = {"prompt": "1+1?", "completion": "It is 2.", "reference": "2", "task": "math"}
        assert parsed(row) == Example("1+1?", [user("1+1?")], "It is 2.", "2", "math")

    def test_plain_text_has_no_prompt(self) -> None:
        assert parsed({"text": "Once."}) == Example("Once.", [], "Once.")

    @pytest.mark.parametrize("row", [{"prompt": None}, {"prompt": "  "}, {"text": ""}, {"prompt": ["x"]}])
    def test_an_empty_prompt_is_told(self, row: dict[str, Any]) -> None:
        with pytest.raises(BadRow, match="no text in"):
            parsed(row)
