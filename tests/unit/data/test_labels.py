"""Labels of rows: stated, looked up, predicted; kept with records and there to choose rows by."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.core.settings import meaning
from potstill.data.sources import Data, read

DATA = TypeAdapter(Data)
Write = Callable[[str, str], Path]
Read = Callable[[Any], list[Record]]

ROWS = [
    {"question": "What is 2 + 2?", "answer": "4", "subject": "arithmetic"},
    {"question": "Where is the Nile?", "answer": "In Africa", "subject": "geography"},
    {"question": "What is 3 * 5?", "answer": "15", "subject": "arithmetic"},
]
MAP = "subject,category\narithmetic,Math & CS\ngeography,Other\n"


@pytest.fixture
def context(step_context: Any) -> Any:
    return step_context("generate")


@pytest.fixture
def reading(context: Any, tmp_path: Path) -> Read:
    def make(data: Any) -> list[Record]:
        return list(read(DATA.validate_python(data, context={"folders": [tmp_path]}), context))

    return make


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def rows(write: Write) -> str:
    write("map.csv", MAP)
    return str(write("rows.jsonl", lines(ROWS)))


def test_a_stated_label_is_every_rows(reading: Read, rows: str) -> None:
    records = reading({"path": rows, "labels": {"category": "mixed"}})
    assert [record.meta["category"] for record in records] == ["mixed"] * 3


def test_problems_of_a_task_carry_labels_beside_what_their_scorer_reads(reading: Read) -> None:
    plain = reading({"task": "chain_sum", "size": 2})
    labelled = reading({"task": "chain_sum", "size": 2, "labels": {"category": "sums"}})
    assert [one.meta for one in labelled] == [{**one.meta, "category": "sums"} for one in plain]
    taken = next(iter(plain[0].meta))
    with pytest.raises(DataError, match=f"a figure of its own that is called {taken!r}"):
        reading({"task": "chain_sum", "size": 2, "labels": {taken: "x"}})


def test_a_label_is_looked_up_and_rows_are_chosen_by_it(reading: Read, rows: str) -> None:
    labels = {"category": {"column": "subject", "file": "map.csv"}}
    records = reading({"path": rows, "labels": labels, "where": {"category": "Math & CS"}})
    assert [record.meta["subject"] for record in records] == ["arithmetic"] * 2
    assert {record.meta["category"] for record in records} == {"Math & CS"}


def test_a_value_without_a_label_is_a_malformed_row(reading: Read, write: Write, rows: str) -> None:
    write("map.csv", "subject,category\narithmetic,Math & CS\n")
    labels = {"category": {"column": "subject", "file": "map.csv"}}
    assert len(reading({"path": rows, "labels": labels})) == 2
    with pytest.raises(DataError, match=r"line 2.*subject is 'geography', which map.csv gives no category"):
        reading({"path": rows, "labels": labels, "strict": True})


def test_columns_inside_a_column_are_named_with_a_dot(reading: Read, write: Write) -> None:
    write("map.csv", MAP)
    rows = [{"question": row["question"], "meta": {"domain": row["subject"]}} for row in ROWS]
    path = str(write("nested.jsonl", lines(rows)))
    labels = {"category": {"column": "meta.domain", "file": "map.csv"}}
    records = reading({"path": path, "labels": labels, "where": {"meta.domain": "geography"}})
    assert [record.meta["category"] for record in records] == ["Other"]
    asked = reading({"path": path, "template": "{meta.domain}: {question}", "limit": 1})
    assert asked[0].messages[-1]["content"] == "arithmetic: What is 2 + 2?"


def test_the_labels_of_a_map_are_meant_and_not_its_path(write: Write, rows: str, tmp_path: Path) -> None:
    def of(name: str, text: str) -> Any:
        write(name, text)
        labels = {"category": {"column": "subject", "file": name}}
        return meaning(
            DATA.validate_python({"path": rows, "labels": labels}, context={"folders": [tmp_path]})
        )

    assert of("one.csv", MAP) == of("moved.csv", MAP)
    assert of("one.csv", MAP) != of("other.csv", MAP.replace("Other", "Else"))


class TestPredicted:
    LIKE = (
        *({"question": f"What is {n} + {n * 7 % 5} * {n + 2}?", "category": "sums"} for n in range(30)),
        *({"question": f"Where is town number {n} of Africa?", "category": "places"} for n in range(30)),
    )

    @pytest.fixture
    def like(self, write: Write) -> dict[str, Any]:
        return {"path": str(write("like.jsonl", lines([*self.LIKE])))}

    def test_rows_without_a_label_get_one_by_their_prompt_with_its_confidence(
        self, reading: Read, context: Any, rows: str, like: dict[str, Any]
    ) -> None:
        records = reading({"path": rows, "labels": {"category": {"like": like}}})
        assert [record.meta["category"] for record in records] == ["sums", "places", "sums"]
        assert all(0.5 < record.meta["category_confidence"] <= 1 for record in records)
        told = "\n".join(context.reporter.said)
        assert "right for 100% of 12 labelled rows that were left out, at a mean confidence of" in told
        assert "category predicted: places 1 (confidence 0." in told

    def test_rows_are_chosen_by_what_was_predicted(
        self, reading: Read, rows: str, like: dict[str, Any]
    ) -> None:
        labels = {"category": {"like": like}}
        records = reading({"path": rows, "labels": labels, "where": {"category": "places"}})
        assert [record.meta["subject"] for record in records] == ["geography"]

    def test_a_label_that_a_row_has_is_kept(self, reading: Read, write: Write, like: dict[str, Any]) -> None:
        rows = [{**ROWS[0], "category": "history"}, {**ROWS[2], "category": ""}]
        path = str(write("some.jsonl", lines(rows)))
        records = reading({"path": path, "labels": {"category": {"like": like}}})
        assert [record.meta["category"] for record in records] == ["history", "sums"]
        assert "category_confidence" not in records[0].meta

    def test_what_is_too_unsure_has_no_label(
        self, reading: Read, context: Any, write: Write, like: dict[str, Any]
    ) -> None:
        path = str(write("odd.jsonl", lines([{"question": "xyzzy"}])))
        [record] = reading({"path": path, "labels": {"category": {"like": like, "min_confidence": 0.95}}})
        assert "category" not in record.meta
        assert "too unsure 1" in "\n".join(context.reporter.said)

    def test_rows_that_lack_the_label_cannot_be_learnt_from(self, reading: Read, rows: str) -> None:
        with pytest.raises(DataError, match="no row has a category that could be learnt"):
            reading({"path": rows, "labels": {"category": {"like": {"path": rows}}}})


@pytest.mark.slow
def test_mmlus_categories_are_predicted_from_its_questions(
    reading: Read, write: Write, shared_data: Path
) -> None:
    mmlu = shared_data / "mmlu"
    with (mmlu / "dev.jsonl").open(encoding="utf-8") as file:
        known = [json.loads(line) for line in file]
    path = str(write("dev.jsonl", lines([{**row, "category": ""} for row in known])))
    like = {"path": str(mmlu / "train.jsonl"), "limit": 1000, "shuffle": True}
    records = reading({"path": path, "labels": {"category": {"like": like}}})
    right = sum(one.meta["category"] == row["category"] for one, row in zip(records, known, strict=True))
    assert right > 0.6 * len(records)
