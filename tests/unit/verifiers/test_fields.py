"""Extracted fields: which object counts as the answer, and when two fields are equal."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.verifiers import Judgement, Verifier, judge
from potstill.verifiers.fields import found_object

VERIFIER: TypeAdapter[Any] = TypeAdapter(Verifier)
GOLD = {"name": "Ada", "total": 12.5, "tags": ["a", "b"], "place": {"city": "Ulm"}, "note": None}


def judged(answer: str, fields: Any = "all", reference: Any = GOLD) -> Judgement:
    record = Record("p", [{"role": "user", "content": "?"}], reference=json.dumps(reference))
    return judge(record, answer, VERIFIER.validate_python({"fields": fields}))


class TestTheObject:
    @pytest.mark.parametrize(
        "text",
        [
            '{"a": 1}',
            'Here it is:\n```json\n{"a": 1}\n```\nDone {not json}.',
            '```\n{"a": 1}\n```',
            'First {"a": 0}, no: {"a": 1}',
            'Mind the {brace. {"a": 1} and }',
            '```json\n{"a": 1}\n```\nOr as text: {"a": 2}',
            '```python\nx = {}\n```\n{"a": 1}',
            '[{"a": 1}]',
        ],
    )
    def test_is_the_last_that_can_be_read_a_fenced_one_before_others(self, text: str) -> None:
        assert found_object(text) == {"a": 1}

    def test_an_object_inside_another_is_no_answer(self) -> None:
        assert found_object('{"a": {"b": 1}}') == {"a": {"b": 1}}

    @pytest.mark.parametrize("text", ["", "12", "{", '{"a": ', "[1, 2]", '{"a": 1'])
    def test_there_may_be_none(self, text: str) -> None:
        assert found_object(text) is None

    @given(st.text(alphabet='{}[]",:a1\\ \n`', max_size=200))
    @settings(max_examples=200)
    def test_any_text_is_read_or_not(self, text: str) -> None:
        found = found_object(text)
        assert found is None or isinstance(found, dict)

    @pytest.mark.parametrize(
        "text", ["{" * 100_000, '{"a":' * 50_000, '{"a":[' * 30_000, f"```{' ' * 99_000}x"]
    )
    def test_no_text_takes_long_or_breaks_it(self, text: str) -> None:
        assert found_object(text) is None


class TestTheFields:
    def test_all_of_the_reference_are_compared_when_none_is_named(self) -> None:
        right = judged(json.dumps({**GOLD, "more": 1}))
        assert right.verdicts == {"well_formed": False, "correct": True, "has_object": True}
        assert (right.scores, right.note) == ({"fields": 1.0}, None)
        wrong = judged(json.dumps({**GOLD, "name": "Bob", "tags": ["b", "a"]}))
        assert not wrong.verdicts["correct"]
        assert wrong.scores == {"fields": pytest.approx(3 / 5)}
        assert wrong.note == "wrong: name, tags"

    def test_each_named_field_has_a_verdict(self) -> None:
        found = judged('{"name": "Ada", "total": 13}', {"name": "exact", "total": {"absolute": 0.4}})
        assert found.verdicts == {
            "well_formed": False,
            "correct": False,
            "has_object": True,
            "field name": True,
            "field total": False,
        }

    def test_an_answer_without_an_object_has_every_field_wrong(self) -> None:
        found = judged("Ada", {"name": "exact", "nowhere": "exact"})
        assert found.verdicts["has_object"] is found.verdicts["field nowhere"] is False
        assert (found.scores, found.note) == ({"fields": 0.0}, "no JSON object in the answer")

    @pytest.mark.parametrize(
        ("given_total", "rule", "right"),
        [
            (12.9, {"absolute": 0.4}, True),
            (12.91, {"absolute": 0.4}, False),
            (13.125, {"relative": 0.05}, True),
            (13.2, {"relative": 0.05}, False),
            (13.2, {"relative": 0.05, "absolute": 1}, True),
            ("12.50", {}, True),
            ("$12.50", {"absolute": 0}, True),
            ("twelve", {"absolute": 100}, False),
            (True, {"absolute": 100}, False),
            (None, {"absolute": 100}, False),
            (10**400, {"absolute": 100}, False),
            (12.5, "exact", True),
            ("12.5", "exact", False),
        ],
    )
    def test_numbers_may_differ_by_the_tolerance(self, given_total: Any, rule: Any, right: bool) -> None:
        found = judged(json.dumps({"total": given_total}), {"total": rule})
        assert found.verdicts["field total"] is right

    @pytest.mark.parametrize(
        ("tags", "right"),
        [(["b", "a"], True), (["b", "a", "a"], True), (["a"], False), ("a", False), ([], False)],
    )
    def test_a_set_has_no_order(self, tags: Any, right: bool) -> None:
        assert judged(json.dumps({"tags": tags}), {"tags": "set"}).verdicts["correct"] is right

    def test_exact_overlooks_outer_space_and_the_kind_of_a_whole_number_only(self) -> None:
        def same(reference: Any, answer: Any) -> bool:
            return judged(json.dumps({"a": answer}), {"a": "exact"}, {"a": reference}).verdicts["correct"]

        assert same(2, 2.0)
        assert same("Ada", " Ada\n")
        assert same({"x": 1, "y": [1, 2]}, {"y": [1, 2], "x": 1})
        assert not same("Ada", "ada")
        assert not same(1, True)
        assert not same(None, "")
        assert not same([1, 2], [2, 1])

    @pytest.mark.parametrize("rule", ["exact", "set"])
    def test_lists_that_are_nested_beyond_reason_are_wrong(self, rule: str) -> None:
        answer = '{"tags": ' + "[" * 700 + "]" * 700 + "}"
        assert judged(answer, {"tags": rule}).verdicts == {
            "well_formed": False,
            "correct": False,
            "has_object": True,
            "field tags": False,
        }

    def test_a_dotted_name_is_a_field_inside_another(self) -> None:
        found = judged('{"place": {"city": "Ulm"}}', {"place.city": "exact", "place.zip": "exact"})
        assert found.verdicts["field place.city"]
        assert found.verdicts["field place.zip"], "neither has it"
        assert not judged('{"place": "Ulm"}', {"place.city": "exact"}).verdicts["correct"]

    def test_a_field_that_one_lacks_is_wrong_and_null_is_a_value(self) -> None:
        assert judged('{"note": null}', {"note": "exact"}).verdicts["correct"]
        assert not judged("{}", {"note": "exact"}).verdicts["correct"]
        assert not judged('{"extra": 1}', {"extra": "exact"}).verdicts["correct"]

    @pytest.mark.parametrize("reference", [[1], "x", 3])
    def test_a_reference_that_is_no_object_is_an_error(self, reference: Any) -> None:
        with pytest.raises(DataError, match="no JSON object to compare"):
            judged("{}", "all", reference)
