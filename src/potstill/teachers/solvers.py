"""Solvers that come with potstill: they write a problem's solution step by step, in a think block."""

import re

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.chat import THINK_CLOSE, THINK_OPEN

__all__ = ["chain_sum"]

_SUM = re.compile(r"-?\d+(?: [+-] -?\d+)+")
_STEP = re.compile(r" ([+-]) (-?\d+)")


def chain_sum(record: Record) -> str:
    """Add and subtract from left to right, one operation a line in a think block, then the result.

    `4 - 1 - 7` becomes `4 - 1 = 3`, `3 - 7 = -4` and -4. The sum is the problem's own expression, else the
    first one in the prompt. DataError when there is none.
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
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join([THINK_OPEN, *lines, THINK_CLOSE, str(total)])
