"""Shapes of rows: which columns a data set has, what they hold, and records as such rows again. Pure."""

import json
import math
import re
import string
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from potstill.core.records import Record
from potstill.data.answers import last_boxed, parse_number
from potstill.data.chat import THINK_CLOSE, THINK_OPEN, tag_reasoning
from potstill.data.multiple_choice import (
    answer_announcement,
    answer_column,
    choice_columns,
    choice_index,
    choice_listing,
    has_choices,
    is_russian,
    question_column,
)
from potstill.data.reasoning import OPEN_THOUGHTS, split_reasoning
from potstill.data.responses import join_reasoning

__all__ = [
    "CODE_TASK",
    "WRITTEN_SHAPES",
    "BadRow",
    "Example",
    "Shape",
    "WrittenShape",
    "describe_shapes",
    "nested_columns",
    "parse_row",
    "recognise",
    "scalar_columns",
    "whole_response",
    "write_row",
]

Shape = Literal[
    "auto",
    "messages",
    "conversations",
    "openthoughts",
    "multiple_choice",
    "code",
    "alpaca",
    "question_answer",
    "prompt_response",
    "text",
]

WrittenShape = Literal["question_answer", "openthoughts", "messages"]

CODE_TASK = "code"


class BadRow(Exception):
    """A row that cannot be used; the others can."""


@dataclass(slots=True)
class Example:
    """A row understood, and from which of its columns.

    `question` is what makes the prompt's identity; plain text has no messages.
    """

    question: Any
    messages: list[dict[str, str]] = field(default_factory=list)
    response: str | None = None
    reference: str | None = None
    task: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    read_columns: frozenset[str] = field(default=frozenset(), compare=False)


class _NotedRow(dict[str, Any]):
    """A row that notes which of its columns were read."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.read_columns: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read_columns.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The column, or the default."""
        self.read_columns.add(name)
        return super().get(name, default)


Row = Mapping[str, Any]
Turns = list[tuple[str, str]]
"""(role, text) of each message."""

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
# OpenThoughts' system prompt asks for the very marks that are replaced in its responses.
_ASKS_FOR_MARKS = OPEN_THOUGHTS.open
_QUESTION_COLUMNS = frozenset({"prompt", "question", "problem"})
_RESPONSE_COLUMNS = ("response", "completion", "output")
# Where servers and data sets put what an assistant thought; the first is also a column beside a response.
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# GSM8K's <<48/2=24>>, and no kernel<<<grid, block>>> or shift.
_CALCULATOR_MARK = re.compile(r"(?<!<)<<[^<>\n]*=[^<>\n]*>>(?!>)")
# What MERA calls a question's field and its part of the field.
_MERA_LABELS = {"subject": "inputs.subject", "domain": "meta.domain"}
_OPEN_THOUGHTS_SYSTEM = (
    f"Think step by step between {OPEN_THOUGHTS.open} and {OPEN_THOUGHTS.close}, then give your "
    f"solution between {OPEN_THOUGHTS.answer_open} and {OPEN_THOUGHTS.answer_close}."
)


def _text(row: Row, *columns: str) -> str:
    """The text of the first of the columns that the row has."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
            return str(value)
    raise BadRow(f"no text in {' or '.join(columns)}")


def _optional_text(row: Row, *columns: str) -> str | None:
    return next((_text(row, column) for column in columns if row.get(column) not in (None, "")), None)


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _gold(worked: str) -> tuple[str | None, str | None]:
    """The gold answer inside a worked one and the task that judges it."""
    _, marked, final = worked.rpartition("####")
    found = final.strip() if marked else last_boxed(worked)
    if found is None and parse_number(worked) is not None:
        found = worked.strip()
    if found and parse_number(found) is not None:
        found = found.replace(",", "")
    return (found, "math") if found else (None, None)


def _question_answer(row: Row) -> Example:
    question = _text(row, "question", "problem")
    worked = _optional_text(row, "solution", "answer")
    # Beside an answer such a column may hold anything.
    said = [one for one in _RESPONSE_COLUMNS if worked is None or isinstance(row.get(one), str)]
    response = _optional_text(row, *said)
    if (stated := _reference(row)) is not None:
        judge = _optional_text(row, "task") or ("math" if parse_number(stated) is not None else None)
        return Example(question, _user(question), response or worked, stated, judge)
    if worked is None:
        return Example(question, _user(question), response)
    reference, task = _gold(_optional_text(row, "answer") or worked)
    if reference is None:
        reference, task = _gold(worked)
    return Example(question, _user(question), response or _CALCULATOR_MARK.sub("", worked), reference, task)


def _prompt_response(row: Row) -> Example:
    prompt = _text(row, "prompt" if "prompt" in row else "input")
    response = _optional_text(row, *_RESPONSE_COLUMNS)
    return Example(prompt, _user(prompt), response, _reference(row), _optional_text(row, "task"))


def _reference(row: Row) -> str | None:
    """The gold answer; fields to compare may stand as they are or as JSON."""
    if isinstance(value := row.get("reference"), Mapping):
        return json.dumps(value, ensure_ascii=False)
    return _optional_text(row, "reference")


def _alpaca(row: Row) -> Example:
    extra = _optional_text(row, "input" if "input" in row else "context")
    prompt = _text(row, "instruction") + (f"\n\n{extra}" if extra else "")
    turns: list[dict[str, str]] = []
    for pair in row.get("history") or ():
        if not isinstance(pair, list | tuple) or list(map(type, pair)) != [str, str]:
            raise BadRow("history is not a list of pairs of a question and its answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    turns += [*_user(prompt), {"role": "assistant", "content": _text(row, "output", "response")}]
    return _conversation(turns, "role", "content", system=_optional_text(row, "system"))


def _plain_text(row: Row) -> Example:
    text = _text(row, "text")
    return Example(text, [], text)


def _content(value: Any) -> str:
    if isinstance(value, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in value
    ):
        return "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise BadRow(f"a message's content is {type(value).__name__}, not text")
    return value


def _with_reasoning(row: Row, answer: str, keys: Iterable[str] = _REASONING_KEYS) -> str:
    """An answer behind the reasoning that stands apart from it, unless it holds some itself."""
    reasoning = next((text for key in keys if isinstance(text := row.get(key), str) and text.strip()), None)
    answer = tag_reasoning(answer)
    if reasoning is None or THINK_OPEN in answer or THINK_CLOSE in answer:
        return answer
    if not answer.strip():
        raise BadRow("reasoning without an answer")
    return join_reasoning(reasoning, answer)


def _conversation(turns: Any, role_key: str, content_key: str, system: str | None = None) -> Example:
    if not isinstance(turns, list) or not turns:
        raise BadRow("the conversation is empty or not a list")
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            raise BadRow(f"a message lacks {role_key!r} or {content_key!r}")
        role = str(turn[role_key])
        role = _ROLES.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise BadRow(f"a message has the role {role!r}; expected system, user or assistant")
        content = _content(turn[content_key])
        if role == "assistant":
            content = _with_reasoning(turn, content)
        elif role == "system" and _ASKS_FOR_MARKS in content:
            continue
        messages.append({"role": role, "content": content})
    if not messages:
        raise BadRow("no user message to answer")
    response = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    asked = [message for message in messages if message["role"] != "system"]
    if not any(message["role"] == "user" and message["content"].strip() for message in asked):
        raise BadRow("no user message to answer")
    question = asked[0]["content"] if len(asked) == 1 else [[one["role"], one["content"]] for one in asked]
    return Example(question, messages, response)


def _messages(row: Row) -> Example:
    return _conversation(row.get("messages"), "role", "content")


def _conversations(row: Row) -> Example:
    system = row.get("system")
    keep = isinstance(system, str) and _ASKS_FOR_MARKS not in system
    turns = row.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    keys = ("role", "content") if isinstance(first, Mapping) and "role" in first else ("from", "value")
    return _conversation(turns, *keys, system=system if keep else None)


def _openthoughts(row: Row) -> Example:
    if "conversations" in row:
        return _conversations(row)
    problem, solution = _text(row, "problem"), _text(row, "deepseek_solution")
    response = (
        f"{THINK_OPEN}\n{_text(row, 'deepseek_reasoning').strip()}\n{THINK_CLOSE}\n\n{solution.strip()}"
    )
    reference, task = _gold(_optional_text(row, "ground_truth_solution") or "")
    return Example(problem, _user(problem), response, reference, task)


def _multiple_choice(row: Row) -> Example:
    question = _text(row, question_column(row) or "question")
    choices, labels, answer = choice_columns(row)
    if not choices:
        raise BadRow("choices are not a list of 2 to 26 texts")
    russian = is_russian("".join([question, *choices]))
    messages = _user(f"{question}{choice_listing(choices, russian=russian)}")
    stated = {name: row[column] for name, column in _MERA_LABELS.items() if column in row}
    meta: dict[str, Any] = {"choices": choices, **scalar_columns(stated)}
    is_kept_apart = answer == "" and "outputs" in row  # by MERA, of its test sets
    if is_kept_apart or answer_column(row) is None:
        return Example([question, choices], messages, meta=meta)
    letter = string.ascii_uppercase[choice_index(answer, choices, labels)]
    response = f"{answer_announcement(russian=russian)}{letter}"
    return Example([question, choices], messages, response, letter, "choice", meta)


def _code(row: Row) -> Example:
    if "input_output" in row:
        return _program(row)
    if "entry_point" in row:
        beginning, name = _text(row, "prompt"), _text(row, "entry_point")
        problem = {"beginning": beginning, "tests": f"{_text(row, 'test')}\ncheck({name})\n"}
        prompt = f"Complete this Python function:\n\n{_fenced(beginning)}\n\nGive all of it"
        solution = _optional_text(row, "canonical_solution")
        question, response = beginning, None if solution is None else beginning + solution
    else:
        question, tests = _text(row, "text", "prompt"), row["test_list"]
        if not isinstance(tests, list) or not tests:
            raise BadRow("test_list is no list of tests")
        imports = row.get("test_imports") or []
        setup = _optional_text(row, "test_setup_code") or "\n".join(
            [imports] if isinstance(imports, str) else map(str, imports)
        )
        tests = "\n".join(map(str, tests))
        problem = {"tests": f"{setup}\n{tests}\n".lstrip("\n")}
        prompt = f"{question}\n\nYour code has to pass these tests:\n\n{_fenced(tests)}\n\nGive it"
        response = _optional_text(row, "code")
    return Example(
        question,
        _user(f"{prompt} in one block of Python code."),
        None if response is None else _fenced(response),
        task=CODE_TASK,
        meta={"code": problem},
    )


def _program(row: Row) -> Example:
    question, given = _text(row, "question", "prompt"), row["input_output"]
    try:
        pairs = json.loads(given) if isinstance(given, str) else given
        inputs, outputs = [*pairs["inputs"]], [*pairs["outputs"]]
    except (ValueError, TypeError, KeyError):
        raise BadRow("input_output holds no inputs and outputs") from None
    if "fn_name" in pairs or not all(isinstance(one, str) for one in (*inputs, *outputs)):
        raise BadRow("input_output is of a function's arguments, not of standard input and output")
    if not inputs or len(inputs) != len(outputs):
        raise BadRow(f"input_output has {len(inputs)} inputs and {len(outputs)} outputs")
    cases = [{"input": one, "output": other} for one, other in zip(inputs, outputs, strict=True)]
    prompt = (
        f"{question}\n\nWrite a Python program that reads standard input and prints the answer. "
        "Give it in one block of Python code."
    )
    return Example(question, _user(prompt), task=CODE_TASK, meta={"code": {"cases": cases}})


def _fenced(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


@dataclass(frozen=True)
class _ShapeSpec:
    columns: str
    fits: Callable[[Collection[str]], bool]
    parse: Callable[[Row], Example]


def _has(*names: str) -> Callable[[Collection[str]], bool]:
    """Fits when each name is a column; a name may give alternatives, as in `choices|options`."""
    return lambda columns: all(any(one in columns for one in name.split("|")) for name in names)


# In the order of recognition: what is more particular comes first.
_SHAPES: dict[Shape, _ShapeSpec] = {
    "messages": _ShapeSpec("messages (a list of {role, content})", _has("messages"), _messages),
    "conversations": _ShapeSpec(
        "conversations (a list of {from, value}), perhaps system", _has("conversations"), _conversations
    ),
    "openthoughts": _ShapeSpec(
        "problem, deepseek_reasoning, deepseek_solution, or conversations",
        _has("problem|conversations", "deepseek_reasoning|conversations", "deepseek_solution|conversations"),
        _openthoughts,
    ),
    "multiple_choice": _ShapeSpec(
        "question; choices, options, or columns option_a, option_b ... or A, B ...; perhaps answer, "
        "answerKey, correct_answer or correct (index from 0, letter or text); or MERA's inputs (text, "
        "option_a ...) and outputs",
        has_choices,
        _multiple_choice,
    ),
    "code": _ShapeSpec(
        "prompt, test, entry_point; or text or prompt, test_list; or question, input_output",
        lambda columns: (
            {"prompt", "test", "entry_point"} <= set(columns)
            or ("test_list" in columns and bool({"text", "prompt"} & set(columns)))
            or ("input_output" in columns and bool({"question", "prompt"} & set(columns)))
        ),
        _code,
    ),
    "alpaca": _ShapeSpec(
        "instruction, output or response, perhaps input or context, system, history",
        lambda columns: (
            "instruction" in columns
            and ("output" in columns or ("response" in columns and not _QUESTION_COLUMNS & set(columns)))
        ),
        _alpaca,
    ),
    "question_answer": _ShapeSpec(
        "question or problem, perhaps answer or solution, which is the gold one beside response, completion "
        "or output",
        _has("question|problem"),
        _question_answer,
    ),
    "prompt_response": _ShapeSpec(
        "prompt or input, perhaps response, completion or output, reference, task",
        lambda columns: "prompt" in columns or {"input", "output"} <= set(columns),
        _prompt_response,
    ),
    "text": _ShapeSpec("text", _has("text"), _plain_text),
}
assert set(get_args(Shape)) == {"auto", *_SHAPES}


def recognise(columns: Collection[str], stated: Shape = "auto") -> Shape | None:
    """The stated shape, or else the first one, if these columns can have it; otherwise None."""
    wanted = _SHAPES if stated == "auto" else [stated]
    return next((name for name in wanted if _SHAPES[name].fits(columns)), None)


def describe_shapes() -> str:
    """Each shape with its columns, for an error message."""
    return "; ".join(f"{name}: {shape.columns}" for name, shape in _SHAPES.items())


def parse_row(row: Row, shape: Shape) -> Example:
    """What a row of a known shape holds. BadRow when it cannot be used, DataError for a wrong answer."""
    noted = _NotedRow(row)
    example = _SHAPES[shape].parse(noted)
    example.read_columns = frozenset(noted.read_columns)
    if example.response is not None:
        example.response = _with_reasoning(row, example.response, _REASONING_KEYS[:1])
    return example


def whole_response(record: Record) -> str:
    """A record's raw response, with its think block opened where the generation prompt had opened it."""
    response = record.response or ""
    if record.reasoning is not None and THINK_OPEN not in response:
        return join_reasoning(record.reasoning, record.answer or "")
    return response


def write_row(record: Record, shape: WrittenShape) -> dict[str, Any] | str:
    """A trace as a row of a shape, or why it is none; `parse_row` makes the same prompt and response of it.

    An unfinished response is none: a row cannot say that its response was cut off.
    """
    if not record.messages:
        return "plain text without a prompt"
    if not record.response:
        return "no response"
    if record.finish_reason == "length":
        return "an unfinished response"
    return _WRITERS[shape](record, [(one["role"], one["content"]) for one in record.messages])


def _as_question_answer(record: Record, turns: Turns) -> dict[str, Any] | str:
    if [role for role, _ in turns] != ["user"]:
        return "a conversation, of which a question is no more than a part"
    gold = {} if record.reference is None else {"reference": record.reference, "task": record.task}
    return {"question": turns[0][1], "answer": whole_response(record), **gold}


def _as_messages(record: Record, turns: Turns) -> dict[str, Any]:
    spoken = [*turns, ("assistant", whole_response(record))]
    return {"messages": [{"role": role, "content": text} for role, text in spoken]}


def _as_openthoughts(record: Record, turns: Turns) -> dict[str, Any]:
    system = [text for role, text in turns[:1] if role == "system"]
    thought, solution = split_reasoning(whole_response(record))
    marks = OPEN_THOUGHTS
    marked = f"{marks.answer_open}\n\n{solution}\n\n{marks.answer_close}"
    if thought is not None:
        marked = f"{marks.open}\n\n{thought}\n\n{marks.close}\n\n{marked}"
    spoken = [*turns[len(system) :], ("assistant", marked)]
    return {
        "system": system[0] if system else _OPEN_THOUGHTS_SYSTEM,
        "conversations": [{"from": role, "value": text} for role, text in spoken],
    }


_WRITERS: dict[WrittenShape, Callable[[Record, Turns], dict[str, Any] | str]] = {
    "question_answer": _as_question_answer,
    "openthoughts": _as_openthoughts,
    "messages": _as_messages,
}
WRITTEN_SHAPES = tuple(_WRITERS)


def nested_columns(row: Row) -> dict[str, Any]:
    """What lies in the mappings that a row holds, by dotted names: `meta.domain`."""
    return {
        f"{name}.{key}": value
        for name, column in row.items()
        if isinstance(column, Mapping)
        for key, value in column.items()
    }


def scalar_columns(row: Row) -> dict[str, Any]:
    """The short scalar values of a row (subject, category, level), which are worth keeping with a record."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 100)
    }
