"""Which language a text is written in."""

import copy
import difflib
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import regex

from potstill.core.errors import RecipeError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

__all__ = ["LanguageDetector", "check_languages"]

# What is not prose says nothing of the language: code, formulas, addresses, tags.
_NOT_PROSE = regex.compile(
    r"```(?:(?!```)[\s\S])*+(?:```)?|`[^`\n]*`"
    r"|\$\$[^$]*\$\$|\$(?=\S)[^$\n]*(?<=\S)\$(?!\d)"
    r"|\\\[(?:(?!\\[\[\]])[\s\S])*+\\\]|\\\((?:(?!\\[()]).)*+\\\)|\\\p{L}+"
    r"|https?://\S+|</?\p{L}[^<>\n]{0,80}>|[\d_]+"
)
_LETTER = regex.compile(r"\p{L}")
_FEWEST_LETTERS = 40
_WINDOW_CHARACTERS = 1000
_LEAST_CONFIDENCE = 0.6
_NO_LANGUAGE = "zxx"


class LanguageDetector:
    """Tells whether texts are in one of the wanted languages, by py3langid's naive Bayes model.

    The detector chooses among `wanted` and `others`; without others among all that it knows. The fewer there
    are the surer it is of a short text, but a language that is not among them is taken for one that is.
    RecipeError for a code that it does not know.
    """

    def __init__(self, wanted: Sequence[str], others: Sequence[str] = ()) -> None:
        check_languages([*wanted, *others])
        self._wanted = frozenset(wanted)
        self._identifier = copy.copy(_identifier())
        if others:
            self._identifier.set_languages([*wanted, *others])

    def foreign(self, text: str) -> tuple[str, float] | None:
        """The language that a text, or a part of it, is in without being wanted, and how sure that is (0-1).

        None where all is in a wanted language, and where it cannot be told: in formulas and code, of fewer
        than 40 letters, with a confidence below 0.6. Of a long text the beginning, middle and end are read,
        1,000 characters each.
        """
        for window in _windows(_NOT_PROSE.sub(" ", text)):
            language, confidence = self._identifier.classify(window)
            if language not in self._wanted | {_NO_LANGUAGE} and confidence >= _LEAST_CONFIDENCE:
                return language, confidence
        return None


def check_languages(codes: Sequence[str]) -> None:
    """Raise RecipeError for the first code that the detector does not know."""
    known = {*_identifier().labels} - {_NO_LANGUAGE}
    for code in codes:
        if code not in known:
            near = difflib.get_close_matches(code[:2], known, n=1, cutoff=0.9)
            raise RecipeError(
                f"the language detector does not know {code!r}",
                expected=f"ISO 639-1 codes: {', '.join(sorted(known))}",
                mend=f"perhaps {near[0]!r} is meant" if near else None,
            )


@functools.cache
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _windows(prose: str) -> Iterator[str]:
    size = _WINDOW_CHARACTERS
    starts = range(0, len(prose), size)
    if len(starts) > 3:
        starts = range(0, len(prose) - size + 1, (len(prose) - size) // 2)
    for start in starts:
        window = prose[start : start + size]
        if len(_LETTER.findall(window)) >= _FEWEST_LETTERS:
            yield window
