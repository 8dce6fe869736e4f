"""Multiple choice: the letter that a text, in English or Russian, settles on."""

import re
import string

from potstill.core.records import Record
from potstill.data.answers import last_boxed
from potstill.data.multiple_choice import LOOK_ALIKES, latin_letter

__all__ = ["chosen_letter", "is_right_choice"]

# Cyrillic letters that look like Latin ones are also words: in "В Москве" there is no letter B.
_ALIKE = rf"[{LOOK_ALIKES}](?!\s+[а-яёА-ЯЁ])"
_LETTER = rf"[(\[<«\"]?\*{{0,2}}([A-Z]|{_ALIKE})\b\*{{0,2}}"
_WORD = r"(?:[Aa]nswer|ANSWER|[Cc]hoice|[Oo]ption|[Оо]твет|ОТВЕТ|[Вв]ариант)"
# Spaces are never given back: a text of many would be gone through again from each of them.
_ANNOUNCEMENT = rf"\b{_WORD}\*{{0,2}}(?:\s++is\s*+:?|\s*+:|\s++[—–-](?=\s)|\s++это\b)\*{{0,2}}\s*+"
_ANNOUNCED = re.compile(rf"{_ANNOUNCEMENT}(?:(?:[Oo]ption|[Вв]ариант)\s++)?{_LETTER}")
_ANNOUNCED_TEXT = re.compile(rf"{_ANNOUNCEMENT}(\S[^\n]*)")
_LEADING = re.compile(rf"\*{{0,2}}(?:\(([A-Z{LOOK_ALIKES}])\)|([A-Z{LOOK_ALIKES}])\*{{0,2}}[).:])")
_LONE = re.compile(
    rf"[^\w]*(?:(?:[Aa]nswer|[Оо]твет|[Вв]ариант)\W+)?([A-Za-z{LOOK_ALIKES}{LOOK_ALIKES.lower()}])[^\w]*"
)
_PARENTHESISED = re.compile(rf"\(([A-Z{LOOK_ALIKES}])\)")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}")


def is_right_choice(record: Record, answer: str) -> bool:
    """Whether the text settles on the record's reference letter; `meta["choices"]` are the options' texts."""
    return (
        chosen_letter(answer, [str(choice) for choice in record.meta.get("choices", ())]) == record.reference
    )


def chosen_letter(text: str, choices: list[str]) -> str | None:
    r"""The letter that a text settles on, or None.

    In this order: the last `\boxed{B}`, the option whose whole text the last announcement names, the last
    `answer is B`, `Answer: (B)` or `Ответ: B`, a leading `B.` or `(B)`, the letter alone, the last `(B)`, the
    only option whose text is the last line, or stands in it. Cyrillic letters count as the Latin ones that
    they look like.
    """
    letters = string.ascii_uppercase[: len(choices)] if choices else string.ascii_uppercase
    text = text.strip()
    boxed = last_boxed(text)
    found = [_LONE.fullmatch(_TEXT_COMMAND.sub(r"\1", boxed))] if boxed else []
    if not any(found) and (named := _announced_text(text, choices)) is not None:
        return named
    found += [*_ANNOUNCED.finditer(text)][-1:]
    found += [_LEADING.match(text), _LONE.fullmatch(text), *[*_PARENTHESISED.finditer(text)][-1:]]
    for match in found:
        if match is None:
            continue
        letter = latin_letter(next(filter(None, match.groups())))
        if letter in letters:
            return letter
    return _letter_of_text(text, choices)


def _announced_text(text: str, choices: list[str]) -> str | None:
    """The letter of the option that the last announcement gives in full: `Answer: A dog`, not `Answer: A`."""
    announced = [*_ANNOUNCED_TEXT.finditer(text)][-1:]
    named = [] if not announced else _named(announced[0][1], choices)
    lone = bool(announced) and _LONE.fullmatch(announced[0][1])
    return string.ascii_uppercase[named[0]] if len(named) == 1 and not lone else None


def _named(line: str, choices: list[str]) -> list[int]:
    """The options whose text a line is, whatever marks stand around it."""
    bare = line.casefold().strip(" .*\"'`«»")
    return [place for place, choice in enumerate(choices) if choice.strip().casefold().rstrip(".") == bare]


def _letter_of_text(text: str, choices: list[str]) -> str | None:
    last_line = text.splitlines()[-1] if text else ""
    named = _named(last_line, choices)
    if not named:
        # Word boundaries, so that "1" is not found in "10".
        named = [
            place
            for place, choice in enumerate(choices)
            if choice.strip()
            and re.search(rf"(?<!\w){re.escape(choice.strip().casefold())}(?!\w)", last_line.casefold())
        ]
    return string.ascii_uppercase[named[0]] if len(named) == 1 else None
