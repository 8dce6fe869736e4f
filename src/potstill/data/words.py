"""Words of any language, as filters count them and retrieval finds them."""

import regex

__all__ = ["marked_words", "words"]

# Scripts without spaces give a word a character; runs longer than any word come in pieces, so that what
# repeats inside of them is seen.
_SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_WORD = rf"{_SPACELESS}\p{{M}}*+|[\p{{L}}\p{{M}}\p{{N}}]{{1,16}}"
_OPERATOR = r"[\p{Sm}*/^%]|(?<!\p{L})-|-(?!\p{L})"
_WORDS = regex.compile(rf"{_WORD}|{_OPERATOR}")
_MARKED_WORDS = regex.compile(rf"{_WORD}|\S")


def words(text: str) -> list[str]:
    """Words, numbers and arithmetic signs of a text in order, without case; other marks are left out."""
    found: list[str] = _WORDS.findall(text.casefold())
    return found


def marked_words(text: str) -> list[str]:
    """Words and every other mark of a text in order; case counts."""
    found: list[str] = _MARKED_WORDS.findall(text)
    return found
