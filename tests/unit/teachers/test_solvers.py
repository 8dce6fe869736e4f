"""The chain_sum solver works each problem out aloud and arrives at the data set's own answer."""

import re

import pytest

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.chat import split_reasoning
from potstill.data.tasks import task_rows
from potstill.teachers.solvers import chain_sum, worked
from potstill.verifiers import verify


def holds(line: str) -> bool:
    """Whether both sides of an equation such as 12-7=5 or 4-17=-(17-4) are worth the same."""

    def worth(side: str) -> int:
        if side.startswith("-("):
            return -worth(side[2:-1])
        numbers = [int(number) for number in re.findall(r"^-?\d+|[+-]\d+", side)]
        return sum(numbers)

    left, _, right = line.partition("=")
    return worth(left) == worth(right)


def problem(question: str, **meta: str) -> Record:
    return Record("p", [{"role": "user", "content": question}], meta=dict(meta))


@pytest.mark.parametrize(
    ("expression", "lines", "result"),
    [
        ("4 + 17 + 207 + 0", ["4+10=14", "14+7=21", "21+200=221", "221+7=228", "228+0=228"], "228"),
        ("65 - 33 + 61", ["65+60=125", "125+1=126", "126-30=96", "96-3=93"], "93"),
        ("4 - 17 - 20", ["17+20=37", "4-37=-(37-4)", "37-4=33"], "-33"),
        ("9 - 4 - 5", ["4+5=9", "9-9=0"], "0"),
        ("3 - -4", ["3+4=7"], "7"),
        ("-3 - 4", ["3+4=7", "0-7=-(7-0)", "7-0=7"], "-7"),
    ],
)
def test_what_is_added_and_what_is_taken_away_are_summed_apart_place_by_place(
    expression: str, lines: list[str], result: str
) -> None:
    trace = chain_sum(problem("?", expression=expression))
    assert trace == "\n".join(["<think>", *lines, "</think>", result])


def test_the_prompt_is_read_where_no_expression_is_given() -> None:
    question = "State the final answer to the following arithmetic problem: 12 + 7 - 30 ="
    reasoning = "12+7=19\n19-30=-(30-19)\n30-10=20\n20-9=11"
    assert split_reasoning(chain_sum(problem(question))) == (reasoning, "-11")


@pytest.mark.parametrize("negation", [False, True])
@pytest.mark.parametrize("digits", [1, 2, 3, 4])
@pytest.mark.parametrize("terms", [2, 3, 4, 5, 6])
def test_it_agrees_with_the_data_set(terms: int, digits: int, negation: bool) -> None:
    parameters = {"min_terms": terms, "max_terms": terms, "min_digits": digits, "max_digits": digits}
    for row in task_rows("chain_sum", {**parameters, "allow_negation": negation}, 25, 1):
        messages = [{"role": "user", "content": row["question"]}]
        for meta in (row["meta"], {}):
            record = Record("p", messages, reference=row["answer"], task="reasoning_gym:chain_sum", meta=meta)
            trace = chain_sum(record)
            reasoning, answer = split_reasoning(trace)
            assert all(holds(line) for line in (reasoning or "").splitlines())
            assert answer == row["answer"]
            assert verify(record, trace) == {"well_formed": True, "correct": True}


@pytest.mark.parametrize("question", ["What is love?", "5 =", ""])
def test_a_prompt_without_a_sum_is_refused(question: str) -> None:
    with pytest.raises(DataError, match="no sum to solve"):
        chain_sum(problem(question))


@pytest.mark.parametrize(
    ("task", "parameters", "steps"),
    [
        ("chain_sum", {"max_terms": 3}, True),
        ("count_bits", {"max_n": 511}, True),
        ("letter_counting", {"min_words": 3, "max_words": 6}, True),
        ("spell_backward", {}, True),
        ("syllogism", {}, False),
    ],
)
def test_worked_answers_are_right_with_steps_where_they_are_known(
    task: str, parameters: dict[str, int], steps: bool
) -> None:
    for row in task_rows(task, parameters, 30, 1):
        name, asked = f"reasoning_gym:{task}", [{"role": "user", "content": row["question"]}]
        record = Record("p", asked, reference=row["answer"], task=name, meta=row["meta"])
        text = worked(record)
        assert verify(record, text)["correct"], text
        assert (split_reasoning(text)[0] is not None) is steps


def test_a_number_is_halved_and_a_word_spelled_letter_by_letter() -> None:
    bits = Record("p", [], reference="2", task="reasoning_gym:count_bits", meta={"number": 6})
    assert worked(bits) == "<think>\n6 0\n3 1\n1 1\n</think>\n2"
    word = Record("p", [], reference="nus", task="reasoning_gym:spell_backward", meta={"word": "sun"})
    assert worked(word) == "<think>\ns u n\nn u s\n</think>\nnus"


def test_a_problem_without_a_gold_answer_is_refused() -> None:
    with pytest.raises(DataError, match="no gold answer"):
        worked(Record("p", [], task="reasoning_gym:countdown"))
