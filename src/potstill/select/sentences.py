"""Sentences of prose, reasoning, equations and code as spans of bytes, and which tokens lie in them."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import regex

from potstill.core.errors import DataError

__all__ = ["sentences", "tokens_of_spans"]

# Tags that set reasoning and answer apart: an opening one belongs to what follows, a closing one to what
# precedes.
_TAG = regex.compile(
    r"(?P<open><(?:think|thinking|reasoning|answer|solution)>|<\|begin_of_(?:thought|solution)\|>)"
    r"|</(?:think|thinking|reasoning|answer|solution)>|<\|end_of_(?:thought|solution)\|>"
)
_DISPLAY_MATH = regex.compile(
    r"\$\$(?:[^$\n]|\n(?![^\S\n]*\n))*+\$\$|\\\[(?:[^\\\n]|\\(?![\[\]])|\n(?![^\S\n]*\n))*+\\\]"
)
_FENCE = regex.compile(r"[^\S\n]*(?:```|~~~)")
_CONTENT = regex.compile(r"[\p{L}\p{N}]")

# The classes of Unicode's sentence segmentation (UAX 29): STerm ends a sentence, ATerm (full stops) may.
_STOP = regex.compile(
    r"(?P<stop>[\p{Sentence_Break=STerm}\p{Sentence_Break=ATerm}…]+)"
    r"(?:\\[)\]]|[[\p{Sentence_Break=Close}*_`$]--[\p{Ps}\p{Pi}]]|\p{Pi}(?=\s|$)|[^\S\n]»)*+",
    regex.VERSION1,
)
_ENDS_WITHOUT_SPACE = regex.compile(r"[[\p{Sentence_Break=STerm}]--[!?]]", regex.VERSION1)
_FOLLOWING = regex.compile(r"""\s*+(?:[\p{Ps}\p{Pi}"'*_`$]|\\[(\[])*+(?P<head>.)""", regex.DOTALL)
_LITERAL = regex.compile(r"[`$]|\\[(\[]")
_EQUATION = regex.compile(r"\p{Ll}[\p{L}\p{N}_']?\s?[=<>≤≥≈≠]")
_GOES_ON = regex.compile(r"[\p{Ll}\p{Pe}\p{Pf},;:=+*/^<>≤≥≈≠|&%–—→⇒，、；：\-]")
_ENUMERATOR = regex.compile(
    r"[\s\p{P}#>*]*(?:(?:step|case|part|question|problem|exercise|шаг|случай|schritt|étape|paso)\s+)?"
    r"(?:\d{1,3}(?:\.\d{1,3})*|\p{L}|[ivxlc]{1,5})",
    regex.IGNORECASE,
)
_INITIALS = regex.compile(r"(?:\p{L}\p{M}*\.)*\p{L}\p{M}*|Ph\.D")
_CAPITALISED = regex.compile(r"\p{Lu}[\p{L}\p{M}.'’-]*")
_LONGEST_WORD, _LONGEST_ENUMERATOR = 24, 40

# Words whose full stop is part of them, by language; those of the second expression only before a number.
_ABBREVIATION = regex.compile(
    r"""
    dr|mr|mrs|ms|mx|prof|st|mt|messrs|gen|col|capt|lt|sgt|rev|hon|sr|jr|gov|sen|rep|pres|dept|assoc|inc|ltd
    |e\.?g|i\.?e|vs|cf|viz|al|approx|resp|incl|ca
    |hr|fr|bzw|z\.b|d\.h|u\.a|ggf|inkl|str|vgl|sog|evtl|bspw
    |mme|mlle|p\.ex|env|sra|srta|dra|ud|uds|p\.ej|ee\.uu|exmo|exma|sig|dott|avv
    |т\.е|т\.к|т\.н|т\.о|напр|им|ул|просп|гр|акад|проф|доц|тов|обл|пос
    """,
    regex.VERBOSE | regex.IGNORECASE,
)
_NUMBERED = regex.compile(
    r"""
    no|nos|nr|num|fig|figs|eq|eqs|sec|secs|ch|chap|vol|p|pp|pt|art|thm|lem|def|ex|exs|tab|app|ver|ed|sect|par
    |abb|kap|bd|рис|табл|гл|разд|п|пп|стр|ст|№
    """,
    regex.VERBOSE | regex.IGNORECASE,
)
_NAME_FOLLOWS = regex.compile(r"\p{Lu}\.\s?\p{Lu}")

_Kind = Literal["content", "opening", "closing", "blank"]


def sentences(text: str) -> list[tuple[int, int]]:
    r"""The sentences of a text as (start, end) in bytes of its UTF-8, which cover it in order; none is empty.

    The end of a line always ends a sentence, so that list items, equations and lines of code are sentences
    of their own; a display equation (`$$…$$`, `\[…\]`) is one whatever its lines. Within a line a sentence
    ends at `.`, `!`, `?` before white space and at the stops of other scripts (Unicode's sentence
    segmentation, UAX 29), but not behind abbreviations, initials and enumerators, and not where the line
    goes on in lower case. Spaces belong to the sentence they lead, as in most tokenizers; line breaks to the
    one they end. What has neither letter nor digit (rules, fences) and think tags join a neighbour. Lone
    surrogates count as three bytes. Time is linear in the text.
    """
    starts: list[int] = []
    joins_next = False
    for start, _, kind in _pieces(text):
        if not starts:
            starts.append(start)
            joins_next = kind != "content"
        elif kind in ("content", "opening"):
            if not joins_next:
                starts.append(start)
            joins_next = kind == "opening"
        elif kind == "closing":
            joins_next = False
    ends = _byte_offsets(text, [*starts[1:], len(text)])
    return [*pairwise([0, *ends])] if text else []


def tokens_of_spans(
    spans: Sequence[tuple[int, int]], token_bytes: Sequence[int], *, before: int = 0, after: int = 0
) -> list[int]:
    """For each token the index of the one span that holds most of its bytes; of equal shares the earlier.

    `spans` are those of `sentences`, `token_bytes` the length of each token in bytes. `before` and `after`
    say by how many bytes the tokens begin before the text and end behind it (a SentencePiece's leading
    space, an end-of-turn token); negative, how many bytes of the text have no token. Tokens outside belong
    to the first or last span, tokens of no bytes to the span that ends there. DataError when the lengths do
    not add up: a shift would put every later token into the wrong sentence.
    """
    size = spans[-1][1] if spans else 0
    assert all(one[1] == two[0] for one, two in pairwise([(0, 0), *spans])), "spans cover the text"
    if any(length < 0 for length in token_bytes):
        raise DataError("a token has a negative length", expected="the number of its bytes")
    if (total := sum(token_bytes)) != before + size + after:
        raise DataError(
            f"the tokens have {total:,} bytes, but the text has {size:,}",
            expected=f"{before + size + after:,} bytes ({before:+,} before the text, {after:+,} behind it)",
            mend="give the tokens of this text, or say with `before` and `after` what stands outside of it",
        )
    if token_bytes and not spans:
        raise DataError(
            f"{len(token_bytes):,} tokens belong to an empty text", expected="a text with sentences"
        )
    chosen: list[int] = []
    end, first = -before, 0
    for length in token_bytes:
        start, end = end, end + length
        while first < len(spans) - 1 and spans[first][1] <= start and (length or spans[first][1] < start):
            first += 1
        best, most = first, min(end, spans[first][1]) - max(start, spans[first][0])
        for number in range(first + 1, len(spans)):
            if spans[number][0] >= end:
                break
            if (share := min(end, spans[number][1]) - spans[number][0]) > most:
                best, most = number, share
        chosen.append(best)
    return chosen


def _byte_offsets(text: str, offsets: Sequence[int]) -> list[int]:
    """Ascending offsets in characters as offsets in bytes."""
    if text.isascii():
        return [*offsets]
    found, size = [], 0
    for start, end in pairwise([0, *offsets]):
        size += len(text[start:end].encode("utf-8", "surrogatepass"))
        found.append(size)
    return found


def _pieces(text: str) -> Iterator[tuple[int, int, _Kind]]:
    """The text between all places where a sentence may begin: (start, end, kind), in characters."""
    tag_cuts = {tag.start() if tag["open"] else tag.end() for tag in _TAG.finditer(text)}
    cuts, opening_fences = _line_cuts(text, tag_cuts)
    kept = sorted(cuts | tag_cuts)
    for equation in _DISPLAY_MATH.finditer(text):
        inside = slice(bisect_right(kept, equation.start()), bisect_left(kept, equation.end()))
        if tag_cuts.isdisjoint(kept[inside]):
            del kept[inside]
    places = sorted({0, *kept, len(text)})
    for start, end in pairwise(places):
        yield start, end, _kind(text[start:end], start in opening_fences)


def _kind(piece: str, opens_code: bool) -> _Kind:
    if opens_code:
        return "opening"
    if piece.isspace():
        return "blank"
    if _CONTENT.search(_TAG.sub("", piece)):
        return "content"
    tags = [*_TAG.finditer(piece)]
    return "opening" if tags and tags[-1]["open"] else "closing"


def _line_cuts(text: str, tag_cuts: set[int]) -> tuple[set[int], set[int]]:
    """Where lines and the sentences within them end, and which lines open a block of code."""
    cuts: set[int] = set()
    opening_fences: set[int] = set()
    in_code = False
    start = 0
    for line in text.splitlines(keepends=True):
        end = start + len(line)
        if tag_cuts and not tag_cuts.isdisjoint(range(start, end + 1)):
            in_code = False
        if _FENCE.match(line):
            in_code = not in_code
            if in_code:
                opening_fences.add(start)
        elif not in_code:
            cuts.update(_stops(text, start, end))
        cuts.add(end)
        start = end
    return cuts, opening_fences


def _stops(text: str, start: int, end: int) -> Iterator[int]:
    """Where sentences end within one line, its own end apart."""
    for stop in _STOP.finditer(text, start, end):
        following = _FOLLOWING.match(text, stop.end(), end)
        if following is None:
            return
        spaced = text[stop.end()].isspace()
        at_once = _ENDS_WITHOUT_SPACE.search(stop["stop"]) is not None
        if not spaced and not at_once:
            continue
        if _GOES_ON.match(following["head"]) and not (spaced and _begins_anew(text, following, end)):
            continue
        if not at_once and not _full_stop_ends(text, start, stop, following):
            continue
        yield stop.end()
        start = stop.end()


def _begins_anew(text: str, following: "regex.Match[str]", end: int) -> bool:
    """Whether what goes on in lower case is a formula, code or an equation, which may begin a sentence."""
    head = following.start("head")
    return bool(_LITERAL.search(text, following.start(), head) or _EQUATION.match(text, head, end))


def _full_stop_ends(text: str, start: int, stop: "regex.Match[str]", following: "regex.Match[str]") -> bool:
    """Whether stops that may belong to a word end the sentence that began at `start`."""
    marks, head = stop["stop"], following["head"]
    if "!" in marks or "?" in marks:
        return True
    if len(marks) > 1 or marks == "…":
        return head.isalpha() and not head.islower()
    first = at = stop.start()
    while first > max(start, at - _LONGEST_WORD) and (text[first - 1].isalnum() or text[first - 1] == "."):
        first -= 1
    word = text[first:at]
    if (
        (at - start <= _LONGEST_ENUMERATOR and _ENUMERATOR.fullmatch(text, start, at))
        or _ABBREVIATION.fullmatch(word)
        or (head.isnumeric() and _NUMBERED.fullmatch(word))
    ):
        return False
    if _INITIALS.fullmatch(word):
        # "U.S." may end a sentence or not; "p.m." before a capital does. A lone capital is a variable
        # or an option rather than an initial, unless more of a name stands around it.
        return not word[0].isupper() or (len(word) == 1 and not _is_initial(text, start, first, following))
    return True


def _is_initial(text: str, start: int, at: int, following: "regex.Match[str]") -> bool:
    """Whether a lone capital is part of a name, as in `John F. Kennedy` or `by J. K. Rowling`."""
    words = text[max(start, at - _LONGEST_WORD) : at].split()
    behind_a_name = bool(words) and _CAPITALISED.fullmatch(words[-1]) and following["head"].isupper()
    return bool(behind_a_name) or _NAME_FOLLOWS.match(following.string, following.start("head")) is not None
