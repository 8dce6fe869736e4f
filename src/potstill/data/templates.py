"""Templates of prompts: text with {column} for a row's values; doubled braces stand for themselves."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.core.errors import DataError

__all__ = ["columns_of", "fill", "is_inline", "template_text"]

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_][\w .-]*)\}")


def is_inline(template: str) -> bool:
    """Whether a setting is the template itself and not the path of its file."""
    return "{" in template or "\n" in template


def template_text(template: str) -> str:
    """The text of a template given inline or by its file's path. DataError when it names no column."""
    text = template
    if not is_inline(template):
        try:
            text = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the template cannot be read ({error})",
                where=template,
                expected="a text file, or the text itself with a {column} in it",
            ) from error
    if not columns_of(text):
        raise DataError(
            "the template has no {column}, so that every prompt would be the same",
            where=None if is_inline(template) else template,
            expected="the name of at least one column in braces",
        )
    return text


def columns_of(text: str) -> list[str]:
    """The columns that a template's text asks for."""
    return sorted({match[1] for match in _PLACEHOLDER.finditer(text) if match[1]})


def fill(text: str, row: Mapping[str, Any]) -> str:
    """A template's text with a row's values. DataError when the row lacks a column."""

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        if match[1] not in row:
            raise DataError(
                f"the template asks for the column {match[1]!r}, which the row lacks",
                expected=f"one of {', '.join(row) or 'no columns at all'}",
                mend="correct the name, or double the braces to have them in the text",
            )
        return str(row[match[1]])

    return _PLACEHOLDER.sub(value, text)
