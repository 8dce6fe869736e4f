"""Rows of the known shapes give prompt, response and gold answer; others are refused."""

import datetime as dt
import json
from typing import Any, ClassVar

import pytest

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.shapes import (
    WRITTEN_SHAPES,
    BadRow,
    Example,
    Shape,
    WrittenShape,
    nested_columns,
    parse_row,
    recognise,
    write_row,
)

CHOICES = ["red", "green", "blue"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def parsed(row: dict[str, Any], shape: Shape = "auto") -> Example:
    found = recognise(row, shape)
    assert found is not None
    return parse_row(row, found)


def with_nested(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a source hands it on."""
    return {**nested_columns(row), **row}


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
            (("instruction", "context", "response", "category"), "alpaca"),
            (("prompt", "instruction", "response"), "prompt_response"),
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
        asked = parsed({"question": "How many?", "reference": 12})
        assert (asked.response, asked.reference, asked.task) == (None, "12", "math")

    @pytest.mark.parametrize("column", ["response", "completion", "output"])
    def test_a_response_is_what_is_learnt_and_an_answer_beside_it_the_gold_one(self, column: str) -> None:
        said = r"It is \boxed{5}, or so I think <<2+3=5>>."
        alone = parsed({"question": "2 + 3?", column: said})
        assert (alone.response, alone.reference, alone.task) == (said, None, None)
        for gold in ({"answer": 6}, {"solution": r"So \boxed{6}."}, {"reference": "6"}):
            found = parsed({"question": "2 + 3?", column: said, **gold})
            assert (found.response, found.reference, found.task) == (said, "6", "math")
        for other in (None, "", ["5"]):
            assert parsed({"question": "2 + 3?", column: other, "answer": "5"}).response == "5"
        with pytest.raises(BadRow, match=f"no text in {column}"):
            parsed({"question": "2 + 3?", column: ["5"]})


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


MERA = {
    "instruction": "Выберите ответ. {text} A {option_a} B {option_b} C {option_c} D {option_d} Ответ:",
    "inputs": {
        "text": "Какая река длиннее?",
        "option_a": "Волга",
        "option_b": "Обь",
        "option_c": "Дон",
        "option_d": "Нева",
        "subject": "география",
    },
    "outputs": "B",
    "meta": {"id": 3, "domain": "high_school_geography"},
}


class TestOtherLayoutsOfMultipleChoice:
    def test_meras_rows_are_asked_in_russian(self) -> None:
        example = parsed(with_nested(MERA))
        assert example.messages == [
            user(
                "Какая река длиннее?\n\nA. Волга\nB. Обь\nC. Дон\nD. Нева\n\n"
                "Назовите букву верного варианта в виде: Ответ: <буква>"
            )
        ]
        assert (example.reference, example.task, example.response) == ("B", "choice", "Ответ: B")
        assert example.meta == {
            "choices": ["Волга", "Обь", "Дон", "Нева"],
            "subject": "география",
            "domain": "high_school_geography",
        }

    def test_meras_columns_may_be_flat(self) -> None:
        flat = {name: value for name, value in with_nested(MERA).items() if "." in name or name == "outputs"}
        assert parsed(flat) == parsed(with_nested(MERA))

    def test_a_column_of_meras_that_is_no_short_value_is_left_out_as_any_other(self) -> None:
        row = {**with_nested(MERA), "meta.domain": dt.date(2026, 1, 1)}
        assert "domain" not in parsed(row).meta
        assert parsed(row).meta["subject"] == "география"

    def test_a_closed_test_set_holds_prompts_without_a_verifier(self) -> None:
        example = parsed(with_nested({**MERA, "outputs": ""}))
        assert (example.reference, example.task, example.response) == (None, None, None)
        assert len(example.messages) == 1

    @pytest.mark.parametrize(
        "row",
        [
            {"choices": CHOICES},
            {"option_a": "red", "option_b": "green", "option_c": "blue"},
            {"A": "red", "B": "green", "C": "blue", "right_one": "B"},
        ],
    )
    def test_options_without_a_known_answer_are_asked_and_not_judged(self, row: dict[str, Any]) -> None:
        example = parsed({"question": "Which?", **row})
        judged = parsed({"question": "Which?", "choices": CHOICES, "answer": "B"})
        assert (example.question, example.messages) == (judged.question, judged.messages)
        assert (example.reference, example.task, example.response) == (None, None, None)
        assert example.meta == {"choices": CHOICES}

    @pytest.mark.parametrize("name", ["answer", "answerKey", "correct_answer", "correct"])
    def test_the_right_option_is_read_of_any_column_that_data_sets_call_so(self, name: str) -> None:
        assert parsed({"question": "Which?", "choices": CHOICES, name: "B"}).reference == "B"

    @pytest.mark.parametrize("name", ["solution", "response", "completion", "output"])
    def test_a_response_in_full_beside_options_is_learnt(self, name: str) -> None:
        assert (
            parsed({"question": "Which?", "choices": CHOICES, name: "green, for ..."}).response
            == "green, for ..."
        )

    def test_whether_an_earlier_answer_was_right_does_not_say_which_option_is(self) -> None:
        example = parsed({"question": "Which?", "choices": CHOICES, "correct": True})
        assert (example.reference, example.task) == (None, None)

    def test_a_text_is_no_question_because_there_are_options(self) -> None:
        assert recognise(["text", "options"]) == "text"
        assert recognise(["text", "options", "answer"]) == "multiple_choice"

    @pytest.mark.parametrize("names", [("option_a", "option_b", "option_c"), ("A", "B", "C")])
    @pytest.mark.parametrize("answer", ["1", "B", "В", "green"])
    def test_options_may_have_a_column_each(self, names: tuple[str, ...], answer: str) -> None:
        row = {"question": "Which?", **dict(zip(names, CHOICES, strict=True)), "answer": answer}
        assert parsed(row) == parsed({"question": "Which?", "choices": CHOICES, "answer": 1})

    def test_a_column_without_text_ends_the_options(self) -> None:
        row = {"question": "Which?", "A": "red", "B": "green", "C": "", "D": "", "answer": "B"}
        assert parsed(row).meta["choices"] == ["red", "green"]

    def test_options_of_a_table_may_be_a_list_in_json(self) -> None:
        row = {"question": "Which?", "choices": json.dumps(CHOICES), "answer": "2"}
        assert parsed(row).reference == "C"

    def test_a_number_that_may_be_index_or_text_is_refused_where_columns_have_no_types(self) -> None:
        row = {"question": "1 + 1?", "A": "1", "B": "2", "C": "3", "answer": "2"}
        with pytest.raises(DataError, match="the index of one choice and the text of another"):
            parsed(row)
        assert parsed({**row, "answer": "B"}).reference == "B"
        assert parsed({"question": "1 + 1?", "choices": ["1", "2", "3"], "answer": "2"}).reference == "B"


class TestCode:
    HUMAN_EVAL: ClassVar = {
        "task_id": "HumanEval/0",
        "prompt": 'def one():\n    """One."""\n',
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1",
        "entry_point": "one",
    }

    def test_a_function_to_complete_is_asked_for_whole_and_checked_by_its_name(self) -> None:
        example = parsed(self.HUMAN_EVAL)
        assert "```python\ndef one():" in example.messages[0]["content"]
        assert example.task == "code"
        assert example.meta["code"]["tests"].endswith("\ncheck(one)\n")
        assert example.response == "```python\n" + self.HUMAN_EVAL["prompt"] + "    return 1\n```"

    @pytest.mark.parametrize("column", ["text", "prompt"])
    def test_a_list_of_tests_is_shown_and_run_after_what_sets_them_up(self, column: str) -> None:
        row = {column: "Add.", "test_list": ["assert add(1, 2) == 3"], "test_imports": ["import math"]}
        example = parsed(row)
        assert "assert add(1, 2) == 3" in example.messages[0]["content"]
        assert example.meta["code"] == {"tests": "import math\nassert add(1, 2) == 3\n"}
        assert example.response is None

    def test_pairs_of_input_and_output_are_cases(self) -> None:
        pairs = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "3\n"]}
        for given in (pairs, json.dumps(pairs)):
            example = parsed({"question": "Add one.", "input_output": given})
            assert example.meta["code"]["cases"][1] == {"input": "2\n", "output": "3\n"}

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"text": "Add.", "test_list": []}, "no list of tests"),
            ({"question": "Add.", "input_output": {"inputs": 1, "outputs": []}}, "no inputs and outputs"),
            ({"question": "Add.", "input_output": "{"}, "no inputs and outputs"),
            ({"question": "Add.", "input_output": '{"inputs": ["1"], "outputs": []}'}, "1 inputs and 0"),
            (
                {"question": "Add.", "input_output": '{"fn_name": "f", "inputs": [[1]], "outputs": [2]}'},
                "a function's arguments",
            ),
        ],
    )
    def test_rows_without_usable_tests_are_told(self, row: dict[str, Any], message: str) -> None:
        with pytest.raises(BadRow, match=message):
            parsed(row)


class TestOddRows:
    def test_what_looks_like_a_calculators_mark_in_code_stays(self) -> None:
        for code in ("kernel<<<grid, block>>>(x);", "kernel<<<a = b>>>(x);", "cout << a >> b;"):
            assert parsed({"question": "CUDA?", "answer": code}).response == code
        assert parsed({"question": "x?", "answer": "3*24=<<3*24=72>>72"}).response == "3*24=72"

    def test_a_missing_value_is_no_text(self) -> None:
        with pytest.raises(BadRow, match="no text in answer"):
            parsed({"question": "x?", "answer": float("nan")})

    def test_a_turn_that_is_nothing_is_told(self) -> None:
        with pytest.raises(BadRow, match="a message lacks 'from'"):
            parsed({"conversations": [None]})

    def test_choices_may_have_no_labels(self) -> None:
        row = {"question": "x?", "choices": {"label": None, "text": ["a", "b"]}, "answer": 1}
        assert parsed(row).reference == "B"

    def test_imports_may_be_one_text(self) -> None:
        row = {"text": "Add.", "test_list": ["assert add(1, 2) == 3"], "test_imports": "import math"}
        assert parsed(row).meta["code"] == {"tests": "import math\nassert add(1, 2) == 3\n"}


class TestReferences:
    def test_fields_to_compare_may_stand_as_they_are_or_as_json(self) -> None:
        for reference in ({"n": 1}, '{"n": 1}'):
            assert parsed({"prompt": "Hi", "reference": reference}).reference == '{"n": 1}'


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

    @pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
    def test_reasoning_apart_from_a_messages_content_becomes_a_think_block(self, key: str) -> None:
        said = {"role": "assistant", "content": "11", key: "ten\n"}
        example = parsed({"messages": [user("Hi"), said, user("Sure?"), {**said, "content": "12"}]})
        assert example.messages[1]["content"] == "<think>\nten\n</think>\n\n11"
        assert example.response == "<think>\nten\n</think>\n\n12"

    def test_reasoning_that_a_message_holds_itself_is_not_doubled(self) -> None:
        whole = "<think>\nten\n</think>\n\n11"
        for content in (whole, whole.removeprefix("<think>")):
            said = {"role": "assistant", "content": content, "reasoning_content": "ten"}
            assert parsed({"messages": [user("Hi"), said]}).response == content

    def test_reasoning_without_an_answer_is_told(self) -> None:
        said = {"role": "assistant", "content": "", "reasoning_content": "ten and"}
        with pytest.raises(BadRow, match="reasoning without an answer"):
            parsed({"messages": [user("Hi"), said]})

    def test_what_a_user_said_has_no_reasoning(self) -> None:
        assert parsed({"messages": [{**user("Hi"), "reasoning_content": "ten"}]}).messages == [user("Hi")]

    def test_openthoughts_system_prompt_goes_wherever_it_stands(self) -> None:
        asks = {"role": "system", "content": "Use <|begin_of_thought|> and so on."}
        assert parsed({"messages": [asks, user("Hi")]}).messages == [user("Hi")]
        with pytest.raises(BadRow, match="no user message"):
            parsed({"messages": [asks]})

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
    def test_alpacas_system_prompt_and_earlier_turns_are_messages(self) -> None:
        row = {
            "instruction": "And 5?",
            "output": "25",
            "system": "Square.",
            "history": [["3?", "9"], ["4?", "16"]],
        }
        example = parse_row(row, "alpaca")
        said = [(one["role"], one["content"]) for one in example.messages]
        asked = [("user", "3?"), ("assistant", "9"), ("user", "4?"), ("assistant", "16"), ("user", "And 5?")]
        assert said == [("system", "Square."), *asked]
        assert example.response == "25"
        assert example.question == [*map(list, asked)]
        with pytest.raises(BadRow, match="history is not a list of pairs"):
            parse_row({**row, "history": [["3?"]]}, "alpaca")
        assert parse_row({**row, "history": [], "system": ""}, "alpaca").question == "And 5?"

    def test_an_instruction_may_have_a_context_and_a_response(self) -> None:
        found = parsed({"instruction": "Who wrote it?", "context": "A sonnet.", "response": "A poet."})
        assert (found.messages, found.response) == ([user("Who wrote it?\n\nA sonnet.")], "A poet.")
        row = {"instruction": "Who?", "input": "", "context": "not for the prompt", "output": "A poet."}
        assert parsed(row).messages == [user("Who?")]

    def test_alpaca_joins_instruction_and_input(self) -> None:
        row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
        assert parsed(row) == Example("Add.\n\n1, 2", [user("Add.\n\n1, 2")], "3")
        assert parsed({**row, "input": ""}).messages == [user("Add.")]

    def test_prompt_response_may_state_what_verifies_it(self) -> None:
        row = {"prompt": "1+1?", "completion": "It is 2.", "reference": "2", "task": "math"}
        assert parsed(row) == Example("1+1?", [user("1+1?")], "It is 2.", "2", "math")

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "Hi", "response": "11"},
            {"question": "Hi", "answer": "11"},
            {"input": "Hi", "output": "11"},
        ],
    )
    def test_a_column_of_reasoning_stands_before_the_response(self, row: dict[str, str]) -> None:
        assert parsed({**row, "reasoning_content": "ten"}).response == "<think>\nten\n</think>\n\n11"
        assert parsed({**row, "reasoning_content": None}).response == "11"

    def test_plain_text_has_no_prompt(self) -> None:
        assert parsed({"text": "Once."}) == Example("Once.", [], "Once.")

    @pytest.mark.parametrize("row", [{"prompt": None}, {"prompt": "  "}, {"text": ""}, {"prompt": ["x"]}])
    def test_an_empty_prompt_is_told(self, row: dict[str, Any]) -> None:
        with pytest.raises(BadRow, match="no text in"):
            parsed(row)


class TestHubRows:
    """Rows as the data sets on the hub have them, read without any setting."""

    def test_gsm8k(self) -> None:
        worked = "Each box has 24, so 3*24=<<3*24=72>>72.\n72-10=<<72-10=62>>62.\n#### 62"
        example = parsed({"question": "How many crayons are left?", "answer": worked})
        assert example.messages == [user("How many crayons are left?")]
        assert (example.reference, example.task) == ("62", "math")
        assert example.response == "Each box has 24, so 3*24=72.\n72-10=62.\n#### 62"

    def test_openthoughts_114k(self) -> None:
        thought = "<|begin_of_thought|>\n\nOkay, three twos.\n\nThat is six.\n\n<|end_of_thought|>"
        solution = "<|begin_of_solution|>\n\nThe answer is \\boxed{6}.\n\n<|end_of_solution|>"
        row = {
            "system": "Your role is ... <|begin_of_thought|> {thought} <|end_of_thought|> ...",
            "conversations": [
                {"from": "user", "value": "Return your final response within \\boxed{}. 3 * 2?"},
                {"from": "assistant", "value": f"{thought}\n\n{solution}"},
            ],
        }
        example = parsed(row)
        assert [one["role"] for one in example.messages] == ["user"]
        assert example.response == (
            "<think>\nOkay, three twos.\n\nThat is six.\n</think>\n\nThe answer is \\boxed{6}."
        )

    def test_openthoughts_114k_with_its_metadata(self) -> None:
        row = {
            "problem": "3 * 2?",
            "deepseek_reasoning": "Three twos are six.",
            "deepseek_solution": "6",
            "ground_truth_solution": "so \\boxed{6}",
            "domain": "math",
            "source": "olympiads",
            "test_cases": None,
            "starter_code": None,
        }
        example = parsed(row)
        assert (example.reference, example.task) == ("6", "math")
        assert example.response == "<think>\nThree twos are six.\n</think>\n\n6"


def trace(*messages: dict[str, str], response: str | None, **fields: Any) -> Record:
    return Record("p", [*messages], response=response, **{"finish_reason": "stop", **fields})


SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT = "<think>\nten and one\n</think>\n\n11"


class TestWriting:
    @pytest.mark.parametrize("shape", WRITTEN_SHAPES)
    def test_what_is_written_is_read_again(self, shape: WrittenShape) -> None:
        row = write_row(trace(user("Hi"), response=THOUGHT, reference="11", task="math"), shape)
        assert isinstance(row, dict)
        assert recognise(row) is not None
        example = parsed(row)
        assert (example.messages, example.response) == ([user("Hi")], THOUGHT)
        if shape == "question_answer":
            assert (example.reference, example.task) == ("11", "math")

    @pytest.mark.parametrize("shape", ["openthoughts", "messages"])
    def test_a_conversation_keeps_its_system_message_and_earlier_turns(self, shape: WrittenShape) -> None:
        said = [SYSTEM, user("Hi"), {"role": "assistant", "content": "Hello"}, user("Bye")]
        row = write_row(trace(*said, response="So long"), shape)
        assert isinstance(row, dict)
        example = parsed(row)
        assert (example.messages, example.response) == (said, "So long")

    def test_openthoughts_rows_have_its_columns_and_tags(self) -> None:
        row = write_row(trace(user("Hi"), response=THOUGHT), "openthoughts")
        assert isinstance(row, dict)
        assert list(row) == ["system", "conversations"]
        assert "<|begin_of_thought|>" in row["system"]
        asked, told = row["conversations"]
        assert asked == {"from": "user", "value": "Hi"}
        assert told["from"] == "assistant"
        assert told["value"] == (
            "<|begin_of_thought|>\n\nten and one\n\n<|end_of_thought|>\n\n"
            "<|begin_of_solution|>\n\n11\n\n<|end_of_solution|>"
        )

    def test_a_block_that_the_generation_prompt_opened_is_written_whole(self) -> None:
        record = trace(
            user("Hi"), response="ten and one\n</think>\n\n11", reasoning="ten and one", answer="11"
        )
        row = write_row(record, "question_answer")
        assert isinstance(row, dict)
        assert row["answer"] == THOUGHT

    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            (trace(response="plain"), "without a prompt"),
            (trace(user("Hi"), response=None), "no response"),
            (trace(user("Hi"), response="ten and", finish_reason="length"), "unfinished"),
            (trace(SYSTEM, user("Hi"), response="11"), "a conversation"),
        ],
    )
    def test_what_has_no_place_in_a_row_is_told(self, record: Record, reason: str) -> None:
        found = write_row(record, "question_answer")
        assert isinstance(found, str)
        assert reason in found

    def test_a_reference_that_is_a_number_is_judged_as_one(self) -> None:
        example = parsed({"question": "x?", "answer": "so it is 3", "reference": "3"})
        assert (example.reference, example.task) == ("3", "math")
        assert parsed({"question": "x?", "answer": "a poet", "reference": "Homer"}).task is None
