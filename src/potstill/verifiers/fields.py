"""Extracted fields: the JSON object in an answer, compared with the reference field by field."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.answers import parse_number
from potstill.verifiers.judgement import Judgement
from potstill.verifiers.settings import FieldRule, FieldsVerifier, Tolerance

__all__ = ["found_object", "judge_fields"]

_FENCE = re.compile(r"```[ \t]*+(?:json)?[ \t]*+\n(.*?)```", re.DOTALL | re.IGNORECASE)
# Bounds what a text of nothing but opened braces costs.
_LONGEST_TEXT, _TRIED_OBJECTS = 100_000, 1000
_EXACT = 1e-9
_ABSENT = object()


def judge_fields(record: Record, answer: str, verifier: FieldsVerifier) -> Judgement:
    """Compare an answer's object with the record's reference, which is one as well.

    Verdicts: `correct` (all fields), `has_object`, and `field <name>` for the fields that are named; score:
    `fields`, the share that is right. A field that neither has is right; null is a value. Raises DataError
    for a reference that is no object.
    """
    reference = _reference(record)
    rules: Mapping[str, FieldRule] = (
        dict.fromkeys(reference, "exact") if verifier.fields == "all" else verifier.fields
    )
    given = found_object(answer)
    right = {
        name: given is not None and _is_right(_value(reference, name), _value(given, name), rule)
        for name, rule in rules.items()
    }
    verdicts = {"correct": given is not None and all(right.values()), "has_object": given is not None}
    if verifier.fields != "all":
        verdicts |= {f"field {name}": one for name, one in right.items()}
    wrong = ", ".join(name for name, one in right.items() if not one)
    note = "no JSON object in the answer" if given is None else f"wrong: {wrong}" if wrong else None
    return Judgement(verdicts, {"fields": sum(right.values()) / len(right) if right else 1.0}, note)


def _reference(record: Record) -> dict[str, Any]:
    try:
        reference = json.loads(record.reference or "")
    except (ValueError, RecursionError):
        reference = None
    if not isinstance(reference, dict):
        raise DataError(
            "the reference is no JSON object to compare fields with",
            where=f"record {record.id}",
            expected='a row with a reference such as {"total": 12.5, "tags": ["a", "b"]}',
        )
    return reference


def found_object(text: str) -> dict[str, Any] | None:
    """The last JSON object of a text: one in a fence where there is any, else one anywhere."""
    text = text[-_LONGEST_TEXT:]
    for part in [*(match[1] for match in _FENCE.finditer(text))][::-1]:
        for found in [*_objects(part)][::-1]:
            return found
    objects = [*_objects(text)]
    return objects[-1] if objects else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a text, those inside another left out."""
    decoder, at = json.JSONDecoder(), 0
    for _ in range(_TRIED_OBJECTS):
        at = text.find("{", at)
        if at < 0:
            return
        try:
            found, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
        else:
            yield found


def _value(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a field, which `a.b` finds inside another unless a field is called so."""
    if name in fields:
        return fields[name]
    outer, dot, inner = name.partition(".")
    inside = fields.get(outer, _ABSENT)
    return _value(inside, inner) if dot and isinstance(inside, dict) else _ABSENT


def _is_right(reference: Any, given: Any, rule: FieldRule) -> bool:
    try:
        return _equal(reference, given, rule)
    except RecursionError:  # lists in lists by the hundred
        return False


def _equal(reference: Any, given: Any, rule: FieldRule) -> bool:
    if reference is _ABSENT or given is _ABSENT:
        return reference is given
    if isinstance(rule, Tolerance):
        gold, number = _number(reference), _number(given)
        if gold is None or number is None:
            return False
        return abs(gold - number) <= max(rule.absolute, rule.relative * abs(gold)) + _EXACT * abs(gold)
    if rule == "set":
        if not isinstance(reference, list) or not isinstance(given, list):
            return False
        return {_canonical(one) for one in reference} == {_canonical(one) for one in given}
    return _canonical(reference) == _canonical(given)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    exact = parse_number(value) if isinstance(value, str) else value
    if not isinstance(exact, int | float | Fraction):
        return None
    try:
        number = float(exact)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _canonical(value: Any) -> str:
    """Text that equal values have in common: 2 and 2.0 are equal, order of keys and outer space aside."""

    def plain(one: Any) -> Any:
        if isinstance(one, dict):
            return {key: plain(inner) for key, inner in one.items()}
        if isinstance(one, list):
            return [plain(inner) for inner in one]
        if isinstance(one, float) and one.is_integer():
            return int(one)
        return one.strip() if isinstance(one, str) else one

    return json.dumps(plain(value), sort_keys=True, ensure_ascii=False)
