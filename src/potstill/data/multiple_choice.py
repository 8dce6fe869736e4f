"""Multiple choice: options in the layouts of MMLU, MERA's ruMMLU and flat tables, asked in two languages."""

import json
import re
import string
from collections.abc import Collection, Mapping
from typing import Any

from potstill.core.errors import DataError

__all__ = [
    "LOOK_ALIKES",
    "answer_announcement",
    "answer_column",
    "choice_columns",
    "choice_index",
    "choice_listing",
    "has_choices",
    "is_russian",
    "latin_letter",
    "question_column",
]

_CYRILLIC = re.compile("[А-Яа-яЁё]")
# Cyrillic capitals that look like Latin ones: keyboards, and models, mix them up.
LOOK_ALIKES = "АВСЕНКМОРТХ"
_TO_LATIN = str.maketrans(LOOK_ALIKES, "ABCEHKMOPTX")
_QUESTIONS = ("question", "inputs.text", "text")
_ANSWERS = ("answer", "answerKey", "correct_answer", "correct", "outputs")
# What is learnt, or compared with, where no column says which option is right.
_RESPONSES = {"solution", "response", "completion", "output", "reference"}
# A column an option: MERA's, those of flat tables, and MMLU's as CSV.
_OPTION_COLUMNS = tuple(
    tuple(f"{prefix}{letter}" for letter in letters)
    for prefix, letters in (
        ("inputs.option_", string.ascii_lowercase),
        ("option_", string.ascii_lowercase),
        ("", string.ascii_uppercase),
    )
)


def is_russian(text: str) -> bool:
    """Whether there is Cyrillic in a text."""
    return _CYRILLIC.search(text) is not None


def latin_letter(letter: str) -> str:
    """A letter as the Latin capital that it is or looks like."""
    return letter.upper().translate(_TO_LATIN)


def question_column(columns: Collection[str]) -> str | None:
    """The column that holds the question."""
    return next((one for one in _QUESTIONS if one in columns), None)


def has_choices(columns: Collection[str]) -> bool:
    """Whether a row of these columns is multiple choice: a question and options, perhaps an answer.

    Without an answer it is none where `text`, which may be anything, would be its question, or where there is
    a response or a reference, which is the answer in full.
    """
    question = question_column(columns)
    options = {"choices", "options"} & set(columns) or _option_columns(columns)
    is_answered = any(one in columns for one in _ANSWERS)
    return bool(
        question and options and (is_answered or (question != "text" and not _RESPONSES & set(columns)))
    )


def answer_column(row: Mapping[str, Any]) -> str | None:
    """The column of a row that says which option is right."""

    def says(column: str) -> bool:
        return column in row and not (column == "correct" and isinstance(row[column], bool))  # of an answer

    return next(filter(says, _ANSWERS), None)


def _option_columns(columns: Collection[str]) -> list[str]:
    """The columns that hold an option each, from the first on; none where there are fewer than two."""
    for names in _OPTION_COLUMNS:
        count = next((place for place, name in enumerate(names) if name not in columns), len(names))
        if count > 1:
            return [*names[:count]]
    return []


def choice_columns(row: Mapping[str, Any]) -> tuple[list[str], list[str], Any]:
    """A row's options, the data set's own labels of them, and what it says of the right one.

    There are no options where the row holds no list of 2 to 26. An option without text ends them.
    """
    given = row.get("choices", row.get("options"))
    labels: list[str] = []
    if given is None:
        texts = [row[name] for name in _option_columns(row)]
        given = texts[: next((at for at, text in enumerate(texts) if text in (None, "")), len(texts))]
    elif isinstance(given, str):  # of a table without types
        try:
            given = json.loads(given)
        except ValueError:
            given = None
    if isinstance(given, Mapping):
        labels, given = [str(label) for label in given.get("label") or []], given.get("text")
    if not isinstance(given, list) or not 2 <= len(given) <= len(string.ascii_uppercase):
        return [], [], None
    column = answer_column(row)
    answer = None if column is None else row[column]
    if answer is not None and all(isinstance(value, str) for value in row.values()):
        answer = _untyped_index(answer, [str(choice) for choice in given])
    return [str(choice) for choice in given], labels, answer


def _untyped_index(answer: str, choices: list[str]) -> Any:
    """The index that a text from a table without types stands for, or the text itself."""
    key = answer.strip()
    if not key.isdecimal() or int(key) >= len(choices):
        return answer
    texts = [choice.strip() for choice in choices]
    if key in texts and texts.index(key) != int(key):
        raise DataError(
            f"answer {key!r} is the index of one choice and the text of another",
            expected="a letter, where choices are numbers and columns have no types",
            mend="write answers as letters",
        )
    return int(key)


def choice_index(answer: Any, choices: list[str], labels: list[str]) -> int:
    """Which choice an answer names: by index from 0, label, letter or text. DataError where none."""
    letters = string.ascii_uppercase[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        key = answer.strip()
        alike = key.translate(_TO_LATIN) if len(key) == 1 else key
        for known, wanted in (
            (labels, key),
            ([*letters], alike),
            ([choice.strip() for choice in choices], key),
        ):
            if known.count(wanted) == 1:
                return known.index(wanted)
    raise DataError(
        f"answer {answer!r} names none of the {len(choices)} choices",
        expected=f"an index from 0 to {len(choices) - 1}, a letter A to {letters[-1]}, or a choice's text",
        mend="correct the row; if the indexes count from 1, subtract one from all of them",
    )


def choice_listing(choices: list[str], *, russian: bool = False) -> str:
    """What follows the question of a multiple-choice prompt: the options, and how to answer."""
    options = "\n".join(
        f"{one}. {choice}" for one, choice in zip(string.ascii_uppercase, choices, strict=False)
    )
    asked = (
        "Назовите букву верного варианта в виде: Ответ: <буква>"
        if russian
        else "Give the letter of the right choice in the form: Answer: <letter>"
    )
    return f"\n\n{options}\n\n{asked}"


def answer_announcement(*, russian: bool = False) -> str:
    """What stands before the letter in the form that the prompt asks for."""
    return "Ответ: " if russian else "Answer: "
