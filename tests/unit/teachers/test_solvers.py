"""The chain_sum solver works each problem out aloud and arrives at the data set's own answer."""

import pytest

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.chat import split_reasoning
from potstill.data.tasks import task_rows
from potstill.teachers.solvers import chain_sum
from potstill.verifiers import verify


def problem(question: str, **meta: str) -> Record:
    return Record("p", [{"role": "user", "content": question}], meta=dict(meta))


def test_every_place_of_a_term_is_a_line_and_the_result_comes_last() -> None:
    trace = chain_sum(problem("?", expression="4 - 17 + 207 - 0"))
    assert trace == "<think>\n4-10=-6\n-6-7=-13\n-13+200=187\n187+7=194\n194-0=194\n</think>\n194"


def test_the_prompt_is_read_where_no_expression_is_given() -> None:
    question = "State the final answer to the following arithmetic problem: 12 + 7 - 30 ="
    assert split_reasoning(chain_sum(problem(question))) == ("12+7=19\n19-30=-11", "-11")


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
            assert terms - 1 <= trace.count("=") <= digits * (terms - 1)
            assert split_reasoning(trace)[1] == row["answer"]
            assert verify(record, trace) == {"well_formed": True, "correct": True}


@pytest.mark.parametrize("question", ["What is love?", "5 =", ""])
def test_a_prompt_without_a_sum_is_refused(question: str) -> None:
    with pytest.raises(DataError, match="no sum to solve"):
        chain_sum(problem(question))
