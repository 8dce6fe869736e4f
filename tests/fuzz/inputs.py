"""Inputs as an adversary or a bad disk makes them: nearly what is expected, as bytes and as JSON."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

__all__ = ["JSON", "mutated_bytes", "mutated_json", "texts"]

_TELLING = [
    "",
    "../../etc/passwd",
    "/etc/passwd",
    "\x00",
    "\ud800",
    "NaN",
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "=HYPERLINK(1)",
    "%s%n",
    "9" * 5000,
    "[" * 200,
    "\u2028\r\n\x85",
    "<|im_end|>",
    "<think>",
    "</think>",
]
texts = st.sampled_from(_TELLING) | st.text(max_size=40)
_numbers = st.sampled_from(
    [0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 1e308, -0.0, float("nan"), float("inf")]
)
_scalars = st.none() | st.booleans() | _numbers | st.floats() | st.integers() | texts
JSON: st.SearchStrategy[Any] = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated_bytes(draw: st.DrawFn, *seeds: bytes) -> bytes:
    """One of the seeds with some bytes changed, cut out, doubled or put in, or cut off somewhere."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "put", "cut", "double", "end"])):
            case "flip" if place < len(data):
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "put":
                data[place:place] = draw(st.binary(min_size=1, max_size=8) | texts.map(_encoded))
            case "cut":
                del data[place : place + draw(st.integers(1, 16))]
            case "double":
                data[place:place] = data[place : place + draw(st.integers(1, 64))]
            case "end":
                del data[place:]
    return bytes(data)


@st.composite
def mutated_json(draw: st.DrawFn, seed: Any) -> Any:
    """The seed with some of what it holds, at whatever depth, replaced, taken out, or given another name."""
    found = copy.deepcopy(seed)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(found))
        if not places:
            return draw(JSON)
        inside, key = draw(st.sampled_from(places))
        if draw(st.booleans()):
            inside[key] = draw(JSON)
        elif isinstance(inside, dict) and draw(st.booleans()):
            inside[draw(texts)] = inside.pop(key)
        else:
            del inside[key]
    return found


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, one in items:
        yield value, key
        yield from _places(one)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def json_bytes(value: Any) -> bytes:
    """JSON as a sloppy writer gives it: NaN and halves of surrogate pairs included."""
    return _encoded(json.dumps(value, ensure_ascii=False))
