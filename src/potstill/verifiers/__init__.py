"""Verdicts on a response's text: is the final answer right, is the reasoning well formed."""

from collections.abc import Callable, Iterable
from itertools import islice

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.chat import THINK_CLOSE, THINK_OPEN, split_reasoning, tag_reasoning
from potstill.data.shapes import CODE_TASK
from potstill.data.tasks import TASK_PREFIX
from potstill.verifiers.choice import is_right_choice
from potstill.verifiers.judgement import Judgement
from potstill.verifiers.math import is_right_number
from potstill.verifiers.reasoning_gym import is_right_task_answer
from potstill.verifiers.settings import CodeVerifier, FieldsVerifier, FunctionVerifier, Verifier

__all__ = ["Judgement", "Verifier", "check_verifiable", "is_well_formed", "judge", "verify"]

_JUDGES: dict[str, Callable[[Record, str], bool]] = {"math": is_right_number, "choice": is_right_choice}


def judge(record: Record, response_text: str, verifier: Verifier | None = None) -> Judgement:
    """Judge a response: `well_formed` always, `correct` and more where there is a verifier or a task.

    The verifier stands in the place of the record's own. Only what follows the think block counts as the
    answer; a response cut off inside the block has none. What a model wrote in marks of its own, or in a
    block that its prompt opened, is to be read by `Renderer.read_response` first. Bounded in time on any text
    and safe in threads. DataError for an unknown task, a missing gold answer, or code that the recipe does
    not allow to be run.
    """
    found = _judgement(record, split_reasoning(response_text)[1].strip(), verifier)
    verdicts = {"well_formed": is_well_formed(response_text), **found.verdicts}
    return Judgement(verdicts, found.scores, found.note)


def verify(record: Record, response_text: str, verifier: Verifier | None = None) -> dict[str, bool]:
    """The verdicts of `judge`."""
    return judge(record, response_text, verifier).verdicts


def check_verifiable(records: Iterable[Record], verifier: Verifier | None, *, where: str) -> None:
    """Raise DataError for a row that no verifier can judge, before anything is decoded or bought.

    The user's own function is tried on the first row alone.
    """
    if isinstance(verifier, FunctionVerifier):
        records = islice(records, 1)
    for number, record in enumerate(records, start=1):
        try:
            judge(record, "", verifier)
        except DataError as error:
            place = f"{where}, prompt {number}, {error.where}"
            raise DataError(error.what, where=place, expected=error.expected, mend=error.mend) from error


def _judgement(record: Record, answer: str, verifier: Verifier | None) -> Judgement:
    match verifier:
        case FunctionVerifier():
            from potstill.verifiers.function import judge_by_function

            return judge_by_function(record, answer, verifier)
        case FieldsVerifier():
            from potstill.verifiers.fields import judge_fields

            return judge_fields(record, answer, verifier)
        case CodeVerifier():
            from potstill.verifiers.code import judge_code

            return judge_code(record, answer, verifier)
    return Judgement() if record.task is None else Judgement({"correct": _judge(record)(record, answer)})


def is_well_formed(text: str) -> bool:
    """Whether the text is one think block with something in it, then an answer."""
    text = tag_reasoning(text.strip())
    if text.count(THINK_OPEN) != 1 or text.count(THINK_CLOSE) != 1 or not text.startswith(THINK_OPEN):
        return False
    reasoning, _, answer = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    return bool(reasoning.strip()) and bool(answer.strip())


def _judge(record: Record) -> Callable[[Record, str], bool]:
    assert record.task is not None
    if record.task.startswith(TASK_PREFIX):
        return is_right_task_answer
    if record.task == CODE_TASK:
        raise DataError(
            "the answer is code, and code that a model wrote is not run unless the recipe says so",
            where=f"record {record.id}",
            expected="`verifier: {allow_code: true}` beside the data",
            mend="read in docs/how-to/evaluate.md what it is kept from, then allow it",
        )
    if record.task not in _JUDGES:
        raise DataError(
            f"no verifier is called {record.task!r}",
            where=f"record {record.id}",
            expected=f"one of {', '.join(_JUDGES)}, {TASK_PREFIX}<task>",
        )
    if record.reference is None:
        raise DataError(
            f"the task {record.task!r} needs a gold answer to compare with",
            where=f"record {record.id}",
            expected="a row with a reference",
        )
    return _JUDGES[record.task]
