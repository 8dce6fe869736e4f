"""Code answers: the Python code in a text, run against a row's tests or its pairs of input and output."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.verifiers.judgement import Judgement
from potstill.verifiers.sandbox import Ran, run_program
from potstill.verifiers.settings import CodeVerifier

__all__ = ["found_code", "judge_code"]

_FENCE = re.compile(r"```[ \t]*+(\w*+)[^`\n]*+\n(.*?)(?:```|\Z)", re.DOTALL)
_PYTHON = frozenset({"", "python", "python3", "py"})
_NAME = re.compile(r"[A-Za-z_]\w*")
_TOP_LEVEL = re.compile(r"(?:async[ \t]+def|def|class|import|from|if __name__)\b|@|print\(")
_END_OF_BODY = re.compile(r"\n(?=\S)")
_DEFINED = re.compile(r"^(?:async[ \t]+)?(?:def|class)[ \t]+([A-Za-z_]\w*)", re.MULTILINE)


def judge_code(record: Record, answer: str, verifier: CodeVerifier) -> Judgement:
    """Run an answer's code: `correct` where all of the row's tests pass, `has_code` where there is any.

    `note` says what the first failure was. Raises DataError for a row without tests.
    """
    problem = record.meta.get("code")
    if not isinstance(problem, Mapping) or not (problem.get("tests") or problem.get("cases")):
        raise DataError(
            "there are no tests to run code against",
            where=f"record {record.id}",
            expected="columns as HumanEval's (prompt, test, entry_point), MBPP's (text or prompt, test_list) "
            "or APPS's (question, input_output)",
        )
    tests = str(problem.get("tests", ""))
    code = found_code(answer, wanted=frozenset(_NAME.findall(tests)))
    if not code.strip():
        return Judgement({"correct": False, "has_code": False}, note="no code in the answer")
    note = _failure(code, problem, verifier)
    return Judgement({"correct": note is None, "has_code": True}, note=note)


def found_code(text: str, wanted: frozenset[str] = frozenset()) -> str:
    """The code of a text: the last fenced block of Python that defines a wanted name, else the last block.

    Without a fence it is all of the text, as a base model goes on with a function's beginning.
    """
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in _PYTHON]
    if not blocks:
        return "" if "```" in text else text
    fitting = [body for body in blocks if wanted & set(_DEFINED.findall(body))]
    return str((fitting or blocks)[-1])


def _failure(code: str, problem: Mapping[str, Any], verifier: CodeVerifier) -> str | None:
    """What went wrong first, or None where nothing did."""
    limits: dict[str, Any] = {"timeout_s": verifier.timeout_s, "memory_mb": verifier.memory_mb}
    if "cases" not in problem:
        program = _whole(str(problem.get("beginning", "")), code)
        return run_program(program, tests=str(problem["tests"]), **limits).note
    for number, case in enumerate(problem["cases"], start=1):
        ran = run_program(code, given=str(case["input"]), **limits)
        if ran.note is not None or not _same_output(ran, str(case["output"])):
            return f"case {number}: {ran.note or 'another output'}"
    return None


def _whole(beginning: str, code: str) -> str:
    """A function's beginning (its imports, head and description) and the code that goes on from there.

    What a model wrote behind the function's end is cut off there, as a base model goes on until it is stopped
    (Chen et al. 2021, sec. 2.3).
    """
    lines = [line for line in code.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    last = beginning.rstrip().rpartition("\n")[2]
    indent = last[: len(last) - len(last.lstrip())]
    if not beginning or not lines or _TOP_LEVEL.match(lines[0]):
        # Code that has the function once more: the beginning is a function whose body is its description.
        return f"{beginning}\n\n{code}"
    if lines[0][0].isspace() or _lost_indent(lines, indent):
        body = code.strip("\n") if lines[0][0].isspace() else indent + code.strip()
        return beginning + _END_OF_BODY.split(body, maxsplit=1)[0]
    if _DEFINED.search(code):
        return f"{beginning}\n\n{code}"
    return beginning + textwrap.indent(code, indent)


def _lost_indent(lines: Sequence[str], indent: str) -> bool:
    """Whether a body's first line lost its indent, with the space around the answer, and no other did."""
    if len(lines) == 1:
        return True
    width = len(lines[1]) - len(lines[1].lstrip())
    if width == 0:
        return _TOP_LEVEL.match(lines[1]) is not None
    return width > len(indent) or not lines[0].rstrip().endswith((":", "(", "[", "{", ",", "\\"))


def _same_output(ran: Ran, expected: str) -> bool:
    """Whether outputs agree but for white space at the ends of lines and of the text."""
    given, wanted = (
        [line.rstrip() for line in text.rstrip().splitlines()] for text in (ran.output, expected)
    )
    return given == wanted
