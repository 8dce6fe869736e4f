"""Verdicts on a response's text: is the final answer right, is the reasoning well formed."""

from collections.abc import Callable

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.chat import THINK_CLOSE, THINK_OPEN, split_reasoning
from potstill.data.tasks import TASK_PREFIX
from potstill.verifiers.choice import is_right_choice
from potstill.verifiers.math import is_right_number
from potstill.verifiers.reasoning_gym import is_right_task_answer

__all__ = ["is_well_formed", "verify"]

_JUDGES: dict[str, Callable[[Record, str], bool]] = {"math": is_right_number, "choice": is_right_choice}


def verify(record: Record, response_text: str) -> dict[str, bool]:
    """Judge a response: `well_formed` always, `correct` where the record has a task.

    Only what follows the think block counts as the answer; a response cut off inside the block has none.
    Where the chat template opens the block itself (`Renderer.opens_reasoning`), put "<think>" first.
    Bounded in time on any text and safe in threads. DataError for an unknown task or a missing gold answer.
    """
    verdicts = {"well_formed": is_well_formed(response_text)}
    if record.task is not None:
        verdicts["correct"] = _judge(record)(record, split_reasoning(response_text)[1].strip())
    return verdicts


def is_well_formed(text: str) -> bool:
    """Whether the text is one think block with something in it, then an answer."""
    text = text.strip()
    if text.count(THINK_OPEN) != 1 or text.count(THINK_CLOSE) != 1 or not text.startswith(THINK_OPEN):
        return False
    reasoning, _, answer = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    return bool(reasoning.strip()) and bool(answer.strip())


def _judge(record: Record) -> Callable[[Record, str], bool]:
    assert record.task is not None
    if record.task.startswith(TASK_PREFIX):
        return is_right_task_answer
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
