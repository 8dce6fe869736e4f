"""Final answers inside text: numbers as people write them, and LaTeX's boxed answers."""

import re
from fractions import Fraction

__all__ = ["NUMBER_PATTERN", "last_boxed", "parse_number"]

# At most 40 digits, with thousands separators or without; bounded, so that no text is slow to search.
NUMBER_PATTERN = r"[-+−]?(?:\d{1,3}(?:,\d{3}){1,12}(?!\d)|\d{1,40})(?:\.\d{1,40})?|[-+−]?\.\d{1,40}"
_PLAIN = re.compile(rf"({NUMBER_PATTERN})(?:\s?/\s?(\d{{1,40}})|[eE]([-+]?\d{{1,2}}))?")
_LATEX_FRACTION = re.compile(r"([-+−]?)\\[dt]?frac\{(-?\d{1,40})\}\{(\d{1,40})\}")
_ORNAMENTS = re.compile(r"\\[,;!$%]|\\text\{[^{}]*\}|\\(?:left|right)|[$€£%\s]|\\\(|\\\)|\\\[|\\\]|\*\*")

# Unclosed boxes one after the other would be searched again and again.
_TRIED_BOXES, _LONGEST_BOX = 4, 2000


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number and no more: `1,234.5`, `-3/4`, `$18`, `\frac{1}{2}`.

    Currency and percent signs are left out, not reckoned with. None for anything else.
    """
    bare = _ORNAMENTS.sub("", text.strip()).rstrip(".").replace("−", "-")
    if latex := _LATEX_FRACTION.fullmatch(bare):
        sign, above, below = latex.groups()
        return None if int(below) == 0 else Fraction(int(above), int(below)) * (-1 if sign == "-" else 1)
    plain = _PLAIN.fullmatch(bare)
    if plain is None:
        return None
    number, below, exponent = plain.groups()
    value = Fraction(number.replace(",", ""))
    if below is not None:
        return None if int(below) == 0 else value / int(below)
    return value * Fraction(10) ** int(exponent or 0)


def last_boxed(text: str) -> str | None:
    r"""What the last closed `\boxed{...}` holds, with its inner braces balanced, or None."""
    end = len(text)
    for _ in range(_TRIED_BOXES):
        start = text.rfind("\\boxed{", 0, end)
        if start < 0:
            break
        depth, first = 1, start + len("\\boxed{")
        for at in range(first, min(len(text), first + _LONGEST_BOX)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[first:at].strip()
        end = start
    return None
