"""Solvers that come with potstill: they write a problem's solution step by step, in a think block."""

import re
from collections.abc import Callable

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.chat import THINK_CLOSE, THINK_OPEN
from potstill.data.tasks import TASK_PREFIX

__all__ = ["chain_sum", "worked"]

_SUM = re.compile(r"-?\d+(?: [+-] -?\d+)+")
_STEP = re.compile(r" ([+-]) (-?\d+)")


def chain_sum(record: Record) -> str:
    """Add up what is added and what is taken away, then subtract, one decimal place a line; then the result.

    `4 - 17 + 20` becomes `4+20=24`, `24-10=14`, `14-7=7` and 7. Every subtraction takes less from more, so no
    line holds a negative number but the one that turns a result below zero round: `4-17=-(17-4)`. The sum is
    the problem's own expression, else the first one in the prompt. DataError when there is none.
    """
    prompt = record.messages[-1]["content"] if record.messages else ""
    found = _SUM.search(str(record.meta.get("expression") or prompt))
    if found is None:
        raise DataError(
            "there is no sum to solve in the prompt",
            where=f"record {record.id}",
            expected="whole numbers joined by + and -, such as 4 - 1 + 7 =",
        )
    first, _, _ = found[0].partition(" ")
    terms = [int(first), *(int(term) * (1 if sign == "+" else -1) for sign, term in _STEP.findall(found[0]))]
    lines: list[str] = []
    added = _fold([term for term in terms if term >= 0], "+", lines)
    taken = _fold([-term for term in terms if term < 0], "+", lines)
    if taken <= added:
        result = _fold([added, taken], "-", lines) if taken else added
    else:
        lines.append(f"{added}-{taken}=-({taken}-{added})")
        result = -_fold([taken, added], "-", lines)
    return "\n".join([THINK_OPEN, *lines, THINK_CLOSE, str(result)])


def _fold(numbers: list[int], sign: str, lines: list[str]) -> int:
    """The first number with all others added or taken away, a line for each of their decimal places."""
    total, *others = numbers or [0]
    for part in (part for number in others for part in _places(number)):
        result = total + part if sign == "+" else total - part
        lines.append(f"{total}{sign}{part}={result}")
        total = result
    return total


def _places(number: int) -> list[int]:
    """A number as the sum of its decimal places, largest first: 407 is 400 and 7."""
    digits = str(number)
    parts = [int(digit) * 10 ** (len(digits) - 1 - place) for place, digit in enumerate(digits)]
    return [part for part in parts if part] or [0]


def worked(record: Record) -> str:
    """The steps to a problem's answer where they are known, and its gold answer; without steps that alone.

    Steps are known of chain_sum, count_bits (halving), letter_counting (word by word) and spell_backward
    (letter by letter). DataError for a problem without a gold answer.
    """
    task = (record.task or "").removeprefix(TASK_PREFIX)
    if task == "chain_sum":
        return chain_sum(record)
    if record.reference is None:
        raise DataError(
            "the problem has no gold answer that could be written",
            where=f"record {record.id}",
            expected="a task with one right answer",
        )
    steps = _STEPS[task](record) if task in _STEPS else []
    return "\n".join([THINK_OPEN, *steps, THINK_CLOSE, record.reference]) if steps else record.reference


def _halved(record: Record) -> list[str]:
    """The bits from the last one on: 6 is `6 0`, `3 1`, `1 1`."""
    number = int(record.meta["number"])
    return [f"{number >> place} {number >> place & 1}" for place in range(number.bit_length())]


def _counted(record: Record) -> list[str]:
    """Each word that holds the letter, and how many there are up to its end."""
    letter, total, lines = record.meta["target_letter"], 0, []
    for word in record.meta["span"]:
        if found := word.lower().count(letter):
            total += found
            lines.append(f"{word} {total}")
    return lines or ["0"]


def _spelled(record: Record) -> list[str]:
    """The word letter by letter, forwards and backwards."""
    letters = [*record.meta["word"]]
    return [" ".join(letters), " ".join(reversed(letters))]


_STEPS: dict[str, Callable[[Record], list[str]]] = {
    "count_bits": _halved,
    "letter_counting": _counted,
    "spell_backward": _spelled,
}
