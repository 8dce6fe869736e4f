"""Mathematical answers: the final answer of a worked text, and whether it equals the gold one."""

import re

from potstill.core.records import Record
from potstill.data.answers import NUMBER_PATTERN, last_boxed, parse_number
from potstill.verifiers.bounded import call_bounded

__all__ = ["equal_answers", "final_answer", "is_right_number", "symbolically_equal"]

_ANNOUNCED = re.compile(r"\banswer(?:\s+is|\s*[:=])[ \t]*:?[ \t]*", re.IGNORECASE)
_NUMBER = re.compile(rf"(?<![\w.])(?:{NUMBER_PATTERN})(?:/\d{{1,40}})?")
_DECORATION = re.compile(r"\\(?:left|right|displaystyle|[,;!: ])|[\s$*`]|\\[()\[\]]|\.$")
_RELATIVE_TOLERANCE = 1e-6
_LONGEST_ANSWER = 300
_SYMBOLIC_TIMEOUT_S = 5.0


def is_right_number(record: Record, answer: str) -> bool:
    """Whether the final answer of a text equals the record's reference."""
    found = final_answer(answer)
    return found is not None and equal_answers(record.reference or "", found)


def final_answer(text: str) -> str | None:
    r"""Extract the final answer: the last `\boxed{}`, else what follows the last `####`, else `answer is`.

    Without any of these it is the last number. None when there is no number either.
    """
    if (boxed := last_boxed(text)) is not None:
        return boxed
    _, marked, rest = text.rpartition("####")
    if marked and rest.strip():
        return rest.strip().splitlines()[0]
    for announced in [*_ANNOUNCED.finditer(text)][-1:]:
        if rest := text[announced.end() :].strip():
            return rest.splitlines()[0].strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def equal_answers(reference: str, given: str) -> bool:
    """Whether two answers are the same number, text or expression.

    Numbers may differ by one part in a million. A sentence counts as its number: the first one behind its
    last equals sign. Expressions are compared by math-verify.
    """
    reference, given = reference[:_LONGEST_ANSWER], given[:_LONGEST_ANSWER]
    gold, number = parse_number(reference), parse_number(given)
    if gold is not None and number is None and "\\" not in given and "^" not in given:
        found = _NUMBER.search(given.rpartition("=")[2])
        number = parse_number(found[0]) if found else None
    if gold is not None and number is not None:
        return abs(gold - number) <= _RELATIVE_TOLERANCE * max(abs(gold), abs(number))
    bare_reference, bare_given = _DECORATION.sub("", reference), _DECORATION.sub("", given)
    if bare_reference == bare_given:
        return bool(bare_reference)
    if not bare_given or (gold is not None and "\\" not in given and "^" not in given):
        return False
    return bool(call_bounded("symbolic", reference, given, timeout_s=_SYMBOLIC_TIMEOUT_S))


def symbolically_equal(reference: str, given: str) -> bool:
    """Whether math-verify finds two LaTeX expressions equal. Unbounded in time: see `call_bounded`."""
    import math_verify

    def parsed(text: str) -> list[object]:
        expressions: list[object] = math_verify.parse(f"${text.strip().strip('$')}$", parsing_timeout=None)
        return expressions

    return bool(math_verify.verify(parsed(reference), parsed(given), timeout_seconds=None))
