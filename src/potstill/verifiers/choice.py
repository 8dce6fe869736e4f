"""Multiple choice: the letter that a text settles on."""

import re
import string

from potstill.core.records import Record
from potstill.data.answers import last_boxed

__all__ = ["chosen_letter", "is_right_choice"]

_LETTER = r"[(\[<]?\*{0,2}([A-Z])\b\*{0,2}"
_ANNOUNCED = re.compile(
    rf"\b(?:[Aa]nswer|ANSWER|[Cc]hoice|[Oo]ption)\*{{0,2}}(?:\s+is\s*:?|\s*:)\*{{0,2}}\s*(?:[Oo]ption\s+)?{_LETTER}"
)
_LEADING = re.compile(r"\*{0,2}(?:\(([A-Z])\)|([A-Z])\*{0,2}[).:])")
_LONE = re.compile(r"[^\w]*(?:[Aa]nswer\W+)?([A-Za-z])[^\w]*")
_PARENTHESISED = re.compile(r"\(([A-Z])\)")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}")


def is_right_choice(record: Record, answer: str) -> bool:
    """Whether the text settles on the record's reference letter; `meta["choices"]` are the options' texts."""
    return (
        chosen_letter(answer, [str(choice) for choice in record.meta.get("choices", ())]) == record.reference
    )


def chosen_letter(text: str, choices: list[str]) -> str | None:
    r"""The letter that a text settles on, or None.

    In this order: the last `\boxed{B}`, the last `answer is B` or `Answer: (B)`, a leading `B.` or `(B)`, the
    letter alone, the last `(B)`, the only option whose text is the last line, or stands in it.
    """
    letters = string.ascii_uppercase[: len(choices)] if choices else string.ascii_uppercase
    text = text.strip()
    boxed = last_boxed(text)
    found = [_LONE.fullmatch(_TEXT_COMMAND.sub(r"\1", boxed))] if boxed else []
    found += [*_ANNOUNCED.finditer(text)][-1:]
    found += [_LEADING.match(text), _LONE.fullmatch(text), *[*_PARENTHESISED.finditer(text)][-1:]]
    for match in found:
        if match is None:
            continue
        letter = str(next(filter(None, match.groups()))).upper()
        if letter in letters:
            return letter
    return _letter_of_text(text, choices)


def _letter_of_text(text: str, choices: list[str]) -> str | None:
    last_line = text.splitlines()[-1].casefold() if text else ""
    bare = last_line.strip(" .*\"'`")
    named = [place for place, choice in enumerate(choices) if choice.strip().casefold().rstrip(".") == bare]
    if not named:
        # Word boundaries, so that "1" is not found in "10".
        named = [
            place
            for place, choice in enumerate(choices)
            if choice.strip()
            and re.search(rf"(?<!\w){re.escape(choice.strip().casefold())}(?!\w)", last_line)
        ]
    return string.ascii_uppercase[named[0]] if len(named) == 1 else None
