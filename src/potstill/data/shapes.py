"""Shapes of rows: which columns a data set has, and what prompt, response and gold answer they hold. Pure."""

import re
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from potstill.core.errors import DataError
from potstill.data.answers import last_boxed, parse_number
from potstill.data.chat import THINK_CLOSE, THINK_OPEN, tag_reasoning

__all__ = ["BadRow", "Example", "Shape", "describe_shapes", "parse_row", "recognise", "scalar_columns"]

Shape = Literal[
    "auto",
    "messages",
    "conversations",
    "openthoughts",
    "multiple_choice",
    "alpaca",
    "question_answer",
    "prompt_response",
    "text",
]


class BadRow(Exception):
    """A row that cannot be used; the others can."""


@dataclass(slots=True)
class Example:
    """A row understood. `question` is what makes the prompt's identity; plain text has no messages."""

    question: Any
    messages: list[dict[str, str]] = field(default_factory=list)
    response: str | None = None
    reference: str | None = None
    task: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


Row = Mapping[str, Any]
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")


def _text(row: Row, *columns: str) -> str:
    """The text of the first of the columns that the row has."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
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
    if worked is None:
        return Example(question, _user(question))
    reference, task = _gold(_optional_text(row, "answer") or worked)
    if reference is None:
        reference, task = _gold(worked)
    return Example(question, _user(question), _CALCULATOR_MARK.sub("", worked), reference, task)


def _prompt_response(row: Row) -> Example:
    prompt = _text(row, "prompt" if "prompt" in row else "input")
    response = _optional_text(row, "response", "completion", "output")
    return Example(
        prompt, _user(prompt), response, _optional_text(row, "reference"), _optional_text(row, "task")
    )


def _alpaca(row: Row) -> Example:
    extra = _optional_text(row, "input")
    prompt = _text(row, "instruction") + (f"\n\n{extra}" if extra else "")
    return Example(prompt, _user(prompt), _text(row, "output"))


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
        messages.append({"role": role, "content": _content(turn[content_key])})
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
    # OpenThoughts' system prompt asks for the very tags that are replaced in its responses.
    keep = isinstance(system, str) and "<|begin_of_thought|>" not in system
    turns = row.get("conversations")
    keys = (
        ("role", "content") if isinstance(turns, list) and turns and "role" in turns[0] else ("from", "value")
    )
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


def _choice_index(answer: Any, choices: list[str], labels: list[str]) -> int:
    letters = string.ascii_uppercase[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        key = answer.strip()
        for known in (labels, [*letters], [choice.strip() for choice in choices]):
            if known.count(key) == 1:
                return known.index(key)
    raise DataError(
        f"answer {answer!r} names none of the {len(choices)} choices",
        expected=f"an index from 0 to {len(choices) - 1}, a letter A to {letters[-1]}, or a choice's text",
        mend="correct the row; if the indexes count from 1, subtract one from all of them",
    )


def _multiple_choice(row: Row) -> Example:
    question, given = _text(row, "question"), row.get("choices", row.get("options"))
    labels: list[str] = []
    if isinstance(given, Mapping):
        labels, given = [str(label) for label in given.get("label", [])], given.get("text")
    if not isinstance(given, list) or not 2 <= len(given) <= len(string.ascii_uppercase):
        raise BadRow("choices are not a list of 2 to 26 texts")
    choices = [str(choice) for choice in given]
    letters = string.ascii_uppercase[: len(choices)]
    letter = letters[_choice_index(row.get("answer", row.get("answerKey")), choices, labels)]
    options = "\n".join(f"{one}. {choice}" for one, choice in zip(letters, choices, strict=True))
    prompt = f"{question}\n\n{options}\n\nGive the letter of the right choice in the form: Answer: <letter>"
    return Example(
        [question, choices], _user(prompt), f"Answer: {letter}", letter, "choice", {"choices": choices}
    )


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
        "question, choices or options, answer or answerKey (index from 0, letter or text)",
        _has("question", "choices|options", "answer|answerKey"),
        _multiple_choice,
    ),
    "alpaca": _ShapeSpec("instruction, output, perhaps input", _has("instruction", "output"), _alpaca),
    "question_answer": _ShapeSpec(
        "question or problem, perhaps answer or solution", _has("question|problem"), _question_answer
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
    example = _SHAPES[shape].parse(row)
    if example.response is not None:
        example.response = tag_reasoning(example.response)
    return example


def scalar_columns(row: Row) -> dict[str, Any]:
    """The short scalar values of a row (subject, category, level), which are worth keeping with a record."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 100)
    }
