"""Parts of a step's rows: which they are, and what they mean to a fingerprint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from potstill.core.alternatives import Alternatives
from potstill.core.errors import DataError
from potstill.core.records import RECORDS_FILE, Record, write_records
from potstill.core.store import Artifact
from potstill.data.parts import continued, part_content
from potstill.data.sources import Data, StepPart, count_rows, read

DATA = TypeAdapter(Data)
Seal = Callable[..., Artifact]


def trace(number: int, category: str | None, **fields: Any) -> Record:
    meta = {} if category is None else {"category": category}
    messages = [{"role": "user", "content": f"question {number}"}]
    return Record(f"p{number}", messages, response=f"answer {number}", meta=meta, **fields)


TRACES = [trace(0, "math"), trace(1, "words"), trace(2, "math", held_out=True), trace(3, None)]


@pytest.fixture
def sealed(tmp_path: Path, seal: Any) -> Seal:
    def make(records: list[Record], name: str = "traces", kind: str = "generate") -> Artifact:
        folder = tmp_path / name
        folder.mkdir()
        if kind == "generate":
            write_records(folder / RECORDS_FILE, records)
        return seal(folder, kind)

    return make


@pytest.fixture
def reading(step_context: Any, sealed: Seal) -> Callable[[Any], list[str]]:
    context = step_context("train", data={"traces": [sealed(TRACES)]})

    def make(data: Any) -> list[str]:
        return [record.prompt_id for record in read(DATA.validate_python(data), context)]

    return make


class TestContinued:
    @pytest.mark.parametrize("begun", [{"prefix_characters": 3}, {"prefix_tokens": 1}])
    def test_one_beginning_that_another_model_wrote_is_enough(self, begun: dict[str, int]) -> None:
        records = [*TRACES, trace(4, None, **begun)]
        assert [*continued(records)] == records

    def test_without_any_it_is_an_error_behind_the_last_record(self) -> None:
        found = continued(TRACES)
        assert [next(found) for _ in TRACES] == TRACES
        with pytest.raises(DataError, match=r"mask_prefix leaves nothing out(.|\n)*continue:"):
            next(found)


class TestRows:
    @pytest.mark.parametrize(
        ("part", "prompts"),
        [
            ({"step": "traces", "where": {"category": "math"}}, ["p0", "p2"]),
            ({"step": "traces", "where": {"category": ["math", "words"]}}, ["p0", "p1", "p2"]),
            ({"step": "traces:held_out", "where": {"category": "math"}}, ["p2"]),
            ({"step": "traces", "where": {"category": "math"}, "limit": 1}, ["p0"]),
            ({"step": "traces"}, ["p0", "p1", "p2", "p3"]),
            ([{"step": "traces", "where": {"category": "words"}}, "traces"], ["p1", "p0", "p2", "p3"]),
        ],
    )
    def test_a_part_are_the_rows_whose_columns_hold_what_is_asked_for(
        self, reading: Any, part: Any, prompts: list[str]
    ) -> None:
        assert reading(part) == prompts

    def test_parts_are_mixed_by_weight(self, reading: Any) -> None:
        parts = [
            {"step": "traces", "where": {"category": name}, "weight": weight}
            for name, weight in (("math", 2.0), ("words", 1.0))
        ]
        assert reading(parts) == ["p0", "p2", "p1"]
        with pytest.raises(ValidationError, match="only in a list"):
            DATA.validate_python(parts[0])

    def test_the_prompts_of_a_part_have_no_responses(self, step_context: Any, sealed: Seal) -> None:
        context = step_context("generate", data={"traces": [sealed(TRACES)]})
        part = DATA.validate_python({"step": "traces:prompts", "where": {"category": "math"}})
        assert [record.response for record in read(part, context)] == [None, None]

    def test_a_value_that_no_row_has_is_told_with_those_that_there_are(self, reading: Any) -> None:
        with pytest.raises(DataError, match="no row has category = 'maths'") as caught:
            reading({"step": "traces", "where": {"category": "maths"}})
        assert "category: math, words" in str(caught.value)
        with pytest.raises(DataError, match="a row with the column 'topic'"):
            reading({"step": "traces", "where": {"topic": "math"}})

    def test_cached_logits_have_no_parts(self, step_context: Any, sealed: Seal) -> None:
        context = step_context("train", data={"logits": [sealed([], "logits", "cache")]})
        with pytest.raises(DataError, match="kind 'cache' holds no records"):
            list(read(StepPart.model_validate({"step": "logits"}), context))

    def test_how_many_they_are_only_a_run_can_tell(self) -> None:
        assert count_rows(DATA.validate_python({"step": "traces", "where": {"category": "math"}}), 0) is None


class TestContent:
    @staticmethod
    def of(artifact: Artifact, **part: Any) -> str:
        return part_content(StepPart.model_validate({"step": "traces", **part}), [(artifact, None)])

    def test_other_rows_change_nothing(self, sealed: Seal) -> None:
        more = sealed([trace(9, "logic"), *TRACES, trace(8, "logic")], "more")
        where = {"category": "math"}
        assert self.of(sealed(TRACES), where=where) == self.of(more, where=where)
        assert self.of(sealed(TRACES, "again")) != self.of(more)

    def test_whatever_a_row_of_its_own_holds_does(self, sealed: Seal) -> None:
        contents = {
            self.of(sealed(rows, f"traces-{number}"), where={"category": "math"})
            for number, rows in enumerate(
                (
                    TRACES,
                    [trace(0, "math"), trace(2, "math")],  # not held out
                    [trace(2, "math", held_out=True), trace(0, "math")],  # another order
                    [*TRACES, trace(7, "math")],
                    [trace(0, "math", verdicts={"correct": True}), *TRACES[1:]],
                    [trace(0, "math", alternatives=Alternatives.of([[(7, -1.0)]], as_ids=True)), *TRACES[1:]],
                    [
                        trace(0, "math", alternatives=Alternatives.of([[(b"7", -1.0)]], as_ids=False)),
                        *TRACES[1:],
                    ],
                )
            )
        }
        assert len(contents) == 7

    def test_a_view_and_a_limit_are_other_rows(self, sealed: Seal) -> None:
        artifact, where = sealed(TRACES), {"category": "math"}
        contents = {
            self.of(artifact, where=where),
            self.of(artifact, where=where, limit=1),
            self.of(artifact, step="traces:held_out", where=where),
            self.of(artifact, step="traces:prompts", where=where),
        }
        assert len(contents) == 4
