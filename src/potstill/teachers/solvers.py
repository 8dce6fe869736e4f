"""Solvers that come with potstill: they write a problem's solution step by step, in a think block."""

import re

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.chat import THINK_CLOSE, THINK_OPEN

__all__ = ["chain_sum"]

_SUM = re.compile(r"-?\d+(?: [+-] -?\d+)+")
_STEP = re.compile(r" ([+-]) (-?\d+)")


def chain_sum(record: Record) -> str:
    """Add and subtract from left to right, one decimal place a line in a think block, then the result.

    `4 - 17` becomes `4-10=-6`, `-6-7=-13` and -13: a place at a time, no line carries more than once. The sum
    is the problem's own expression, else the first one in the prompt. DataError when there is none.
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
    total, lines = int(first), []
    for sign, term in _STEP.findall(found[0]):
        sign = sign if int(term) >= 0 else {"+": "-", "-": "+"}[sign]
        for part in _places(abs(int(term))):
            result = total + part if sign == "+" else total - part
            lines.append(f"{total}{sign}{part}={result}")
            total = result
    return "\n".join([THINK_OPEN, *lines, THINK_CLOSE, str(total)])


def _places(number: int) -> list[int]:
    """A number as the sum of its decimal places, largest first: 407 is 400 and 7."""
    digits = str(number)
    parts = [int(digit) * 10 ** (len(digits) - 1 - place) for place, digit in enumerate(digits)]
    return [part for part in parts if part] or [0]
