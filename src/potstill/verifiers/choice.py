"""Multiple choice: the letter that a text, in English or Russian, settles on."""

import re
import string

from potstill.core.records import Record
from potstill.data.answers import last_boxed
from potstill.data.multiple_choice import LOOK_ALIKES, latin_letter

__all__ = ["chosen_letter", "is_right_choice"]

# Б is the second by its place in the alphabet and by its sound; of other letters one contradicts the other.
_CYRILLIC = f"{LOOK_ALIKES}Б"
# Cyrillic letters that look like Latin ones are also words: in "В Москве" there is no letter B.
_ALIKE = rf"[{_CYRILLIC}](?!\s+[а-яёА-ЯЁ])"
_LETTER = rf"[(\[<«\"]?\*{{0,2}}([A-Z]|{_ALIKE})\b\*{{0,2}}"
_WORD = (
    r"(?:[Aa]nswer|ANSWER|[Cc]hoice|[Oo]ption|(?:[Rr]ight|[Cc]orrect)\s++letter"
    r"|[Оо]твет|ОТВЕТ|[Вв]ариант|(?:[Пп]равильная|[Вв]ерная)\s++буква)"
)
# Spaces are never given back: a text of many would be gone through again from each of them.
_ANNOUNCEMENT = rf"\b{_WORD}\*{{0,2}}(?:\s++is\s*+:?|\s*+:|\s++[—–-](?=\s)|\s++это\b)\*{{0,2}}\s*+"
_ANNOUNCED = re.compile(rf"{_ANNOUNCEMENT}(?:(?:[Oo]ption|[Вв]ариант)\s++)?{_LETTER}")
_ANNOUNCED_TEXT = re.compile(rf"{_ANNOUNCEMENT}(\S[^\n]*)")
_LEADING = re.compile(rf"\*{{0,2}}(?:\(([A-Z{_CYRILLIC}])\)|([A-Z{_CYRILLIC}])\*{{0,2}}[).:])")
_LONE = re.compile(
    rf"[^\w]*(?:(?:[Aa]nswer|[Оо]твет|[Вв]ариант)\W+)?([A-Za-z{_CYRILLIC}{_CYRILLIC.lower()}])[^\w]*"
)
_PARENTHESISED = re.compile(rf"\(([A-Z{_CYRILLIC}])\)")
_TAGGED = re.compile(r"<answer>([^<]*)</answer>")
# "C is right" is of the letter, "C is the right ventricle" is not, and "C is right only if" settles nothing.
_CLOSE = r"[)\]>»\"*]*+"
_END = rf"(?={_CLOSE}[^\S\n]*+(?:[.,;:!\n]|$|(?:because|since|as|потому|поскольку|так\s++как)\b))"
_NOUN = r"(?:answer|choice|option|one|ответ|вариант)\b(?!\s*+\?)"
_IS_RIGHT = (
    rf"(?:is\s++(?:(?:right|correct){_END}|the\s++(?:right|correct|best)\s++{_NOUN})"
    rf"|(?:[—–-]\s++)?(?:(?:верен|правилен|верный|правильный){_END}"
    rf"|(?:это\s++)?(?:верный|правильный)\s++{_NOUN}))"
)
_NOT_SUPPOSED = r"(?<!\b[Ii]f )(?<!whether )(?<!that )(?<!not )(?<!сли )(?<!ли )(?<!что )(?<!не )(?<!Не )"
_PLAIN_LETTER = rf"[(\[<«\"]?\*{{0,2}}([A-Z{_CYRILLIC}])\b{_CLOSE}"
_STATED = re.compile(
    rf"{_NOT_SUPPOSED}\b(?:[Oo]ption|[Cc]hoice|[Вв]ариант)\s++{_PLAIN_LETTER}\s++{_IS_RIGHT}"
    rf"|(?:^|(?<=[.!?;:,\n] )|(?<=\n)|(?<=\bSo )|(?<=\bThus )){_LETTER}{_CLOSE}\s++{_IS_RIGHT}"
    rf"|{_NOT_SUPPOSED}\b(?:[Вв]ерен|[Пп]равилен|(?:[Вв]ерным|[Пп]равильным)\s++является)"
    rf"\s++(?:ответ|вариант)\s++{_LETTER}{_END}"
    rf"|\b(?:[Оо]твет|[Вв]ариант)\s++(?:находится\s++|стоит\s++)?под\s++буквой\s++{_LETTER}{_END}"
    rf"|{_NOT_SUPPOSED}\b[Вв]ыбираю\s++(?:ответ\s++|вариант\s++)?{_LETTER}{_END}"
    rf"|\bI(?:\s++would|\s++will|'d|'ll)?\s++(?:choose|pick|select|go\s++with)"
    rf"\s++(?:option\s++|answer\s++)?{_LETTER}{_END}"
    rf"|\b(?:So|Thus|Hence|Therefore|Итак|Значит|Следовательно)[,:]?\s++{_LETTER}{_CLOSE}[\s.!*]*+\Z"
)
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}")


def is_right_choice(record: Record, answer: str) -> bool:
    """Whether the text settles on the record's reference letter; `meta["choices"]` are the options' texts."""
    return (
        chosen_letter(answer, [str(choice) for choice in record.meta.get("choices", ())]) == record.reference
    )


def chosen_letter(text: str, choices: list[str]) -> str | None:
    r"""The letter that a text settles on, or None.

    In this order: the last `\boxed{B}`, the last `<answer>B</answer>`, the option whose whole text the last
    announcement names, the last `answer is B`, `Answer: (B)` or `Ответ: B`, the last sentence that settles it
    in other words (`B is right`, `I choose B`, `верен вариант B`), a leading `B.` or `(B)`, the letter alone,
    the last `(B)`, the only option whose text is the last line, or stands in it. Cyrillic letters count as
    the Latin ones that they look like, and Б as B.
    """
    letters = string.ascii_uppercase[: len(choices)] if choices else string.ascii_uppercase
    text = text.strip()
    boxed = last_boxed(text)
    found = [_LONE.fullmatch(_TEXT_COMMAND.sub(r"\1", boxed))] if boxed else []
    if not any(found) and (tagged := _TAGGED.findall(text)):
        inside = tagged[-1].strip()
        found = [_LONE.fullmatch(inside) or _LEADING.match(inside)]
        if not any(found) and len(places := _named(inside, choices)) == 1:
            return string.ascii_uppercase[places[0]]
    if not any(found) and (named := _announced_text(text, choices)) is not None:
        return named
    found += [*[*_ANNOUNCED.finditer(text)][-1:], *[*_STATED.finditer(text)][-1:]]
    found += [_LEADING.match(text), _LONE.fullmatch(text), *[*_PARENTHESISED.finditer(text)][-1:]]
    for match in found:
        if match is None:
            continue
        letter = latin_letter(next(filter(None, match.groups()))).replace("Б", "B")
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
