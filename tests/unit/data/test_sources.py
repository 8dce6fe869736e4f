"""Sources, references and mixtures become records; what is wrong with them is said in time and place."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from potstill.core.errors import DataError, Interrupted
from potstill.core.events import Reporter, read_events
from potstill.core.hashing import hash_file
from potstill.core.records import RECORDS_FILE, Record, prompt_identity, write_records
from potstill.core.settings import DataRef, meaning
from potstill.core.step import StepContext
from potstill.core.store import Artifact, Store
from potstill.data.sources import (
    Data,
    FileSource,
    HubSource,
    TaskSource,
    count_rows,
    prompts,
    read,
    source_of_path,
)

DATA = TypeAdapter(Data)
Write = Callable[[str, str], Path]


@dataclass
class Reading:
    """Reads data settings given as plain values, as a recipe would give them."""

    folder: Path
    seed: int = 7
    artifacts: dict[str, list[tuple[Artifact, str | None]]] = field(default_factory=dict)
    output: io.StringIO = field(default_factory=io.StringIO)

    def __post_init__(self) -> None:
        self.reporter = Reporter("plain", self.folder / "events.jsonl", self.output)

    def __call__(self, data: Any, *, kind: str = "generate") -> list[Record]:
        settings = DATA.validate_python(data, context={"folders": [self.folder]})
        return list(read(settings, self.context(kind)))

    def context(self, kind: str = "generate") -> StepContext:
        return StepContext(
            name="step",
            kind=kind,
            folder=self.folder,
            seed=self.seed,
            cache_folder=self.folder,
            reporter=self.reporter,
            resolve_models=lambda reference: pytest.fail(
                f"no model is needed, yet {reference} was asked for"
            ),
            resolve_data=self._artifacts,
        )

    def _artifacts(self, reference: DataRef) -> list[tuple[Artifact, str | None]]:
        return [(artifact, reference.view) for artifact, _ in self.artifacts[reference.target]]

    def seal(self, name: str, records: Iterable[Record]) -> Artifact:
        store = Store(self.folder / "sealed")
        folder = store.prepare("generate", name)
        write_records(folder / RECORDS_FILE, records)
        artifact = store.seal(folder, kind="generate", fingerprint=name, settings={}, seed=0, seconds=0.0)
        self.artifacts.setdefault(name, []).append((artifact, None))
        return artifact

    @property
    def said(self) -> str:
        return self.output.getvalue()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder / "events.jsonl") if event["event"] == kind]


@pytest.fixture
def reading(tmp_path: Path) -> Iterator[Reading]:
    one = Reading(tmp_path)
    yield one
    one.reporter.close()


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def numbered(count: int) -> str:
    return lines(*({"prompt": f"question {number}", "level": number % 3} for number in range(count)))


def asked(records: list[Record]) -> list[str]:
    return [record.messages[-1]["content"] for record in records]


class TestSettings:
    def test_a_mapping_is_a_source_by_its_key(self, write: Write) -> None:
        path = str(write("a.jsonl", "{}"))
        assert isinstance(DATA.validate_python({"path": path}), FileSource)
        assert isinstance(DATA.validate_python({"dataset": "openai/gsm8k", "config": "main"}), HubSource)
        assert isinstance(DATA.validate_python({"task": "chain_sum", "size": 3}), TaskSource)
        assert isinstance(DATA.validate_python("traces:prompts"), DataRef)
        assert [type(one) for one in DATA.validate_python(["traces", {"task": "gcd", "size": 1}])] == [
            DataRef,
            TaskSource,
        ]

    @pytest.mark.parametrize("value", [{}, {"pat": "x"}, {"path": "x", "task": "y"}, 3, None, [3]])
    def test_anything_else_is_refused_with_what_is_expected(self, value: Any) -> None:
        with pytest.raises(ValidationError, match="exactly one of path, dataset, task and step"):
            DATA.validate_python(value)

    def test_an_unknown_key_is_told_of_the_source_meant(self) -> None:
        with pytest.raises(ValidationError) as caught:
            DATA.validate_python({"task": "chain_sum", "size": 1, "siz": 2})
        assert [error["loc"] for error in caught.value.errors()] == [("TaskSource", "siz")]

    def test_an_empty_list_and_a_lone_weight_are_refused(self) -> None:
        with pytest.raises(ValidationError, match="at least 1 item"):
            DATA.validate_python([])
        with pytest.raises(ValidationError, match="only in a list"):
            DATA.validate_python({"task": "chain_sum", "size": 1, "weight": 2.0})

    def test_a_moved_file_means_the_same_and_a_changed_one_does_not(self, write: Write) -> None:
        one, moved = write("a.jsonl", "{}"), write("b.jsonl", "{}")
        changed = write("c.jsonl", "{ }")
        fingerprints = [meaning(FileSource(path=str(path))) for path in (one, moved, changed)]  # type: ignore[arg-type]
        assert fingerprints[0] == fingerprints[1] != fingerprints[2]
        assert fingerprints[0]["content"]["file"] == hash_file(one)

    def test_a_changed_template_file_means_something_else(self, write: Write) -> None:
        data, template = write("a.jsonl", "{}"), write("t.txt", "Say {prompt}")
        settings = DATA.validate_python({"path": str(data), "template": str(template)})
        before = meaning(settings)
        write("t.txt", "Sing {prompt}")
        assert meaning(settings) != before

    def test_a_missing_file_is_known_before_anything_runs(self) -> None:
        with pytest.raises(DataError, match="no such data file"):
            meaning(DATA.validate_python({"path": "nowhere.jsonl"}))

    def test_a_wrong_task_is_known_before_anything_runs(self) -> None:
        with pytest.raises(DataError, match="did you mean chain_sum"):
            meaning(DATA.validate_python({"task": "chain_sun", "size": 3}))

    def test_the_template_beside_the_recipe_is_found(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", lines({"lyrics": "la la"}))
        write("analysis.txt", "Analyse: {lyrics}")
        assert asked(reading({"path": "a.jsonl", "template": "analysis.txt"})) == ["Analyse: la la"]

    def test_a_path_of_no_data_file_is_refused(self) -> None:
        assert source_of_path("x/a.csv").label == "a.csv"
        with pytest.raises(DataError, match="neither an artifact's folder nor a data file"):
            source_of_path("x/a.gguf")

    def test_settings_import_nothing_heavy(self) -> None:
        heavy = "torch transformers pyarrow datasets reasoning_gym httpx2 math_verify"
        code = f"import sys, potstill.data.sources; print([m for m in {heavy.split()} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestFiles:
    def test_rows_become_records(self, reading: Reading, write: Write) -> None:
        write(
            "a.jsonl", lines({"question": "Why?", "answer": "<think>\nten\n</think>\n\n#### 11", "level": 3})
        )
        [record] = reading({"path": "a.jsonl"})
        assert record.messages == [{"role": "user", "content": "Why?"}]
        assert (record.reasoning, record.answer, record.reference) == ("ten", "#### 11", "11")
        assert record.response == "<think>\nten\n</think>\n\n#### 11"
        assert record.finish_reason is None
        assert record.meta == {"level": 3}

    @pytest.mark.parametrize(
        ("row", "kept"),
        [
            (
                {"question": "Which?", "choices": ["Math & CS", "Other"], "answer": 1, "category": "Other"},
                "Other",
            ),
            ({"question": "Which?", "A": "bones", "B": "cells", "answer": "A", "category": "bones"}, "bones"),
            (
                {"question": "Which science is of cells?", "answer": "biology", "category": "biology"},
                "biology",
            ),
            ({"question": "2 + 2?", "answer": "#### 4", "category": "4"}, "4"),
            ({"question": "2 + 2?", "answer": "It is 4.", "reference": "4", "category": "4"}, "4"),
            ({"prompt": "geography", "response": "What is far off.", "category": "geography"}, "geography"),
        ],
    )
    def test_a_label_stays_where_its_word_is_spoken_in_the_row(
        self, reading: Reading, write: Write, row: dict[str, Any], kept: str
    ) -> None:
        write("a.jsonl", lines(row))
        [record] = reading({"path": "a.jsonl", "where": {"category": kept}})
        assert record.meta["category"] == kept

    def test_what_a_record_was_made_of_is_not_kept_twice(self, reading: Reading, write: Write) -> None:
        row = {"question": "Which?", "option_a": "red", "option_b": "blue", "answer": "B", "level": 3}
        write("a.jsonl", lines(row))
        [record] = reading({"path": "a.jsonl"})
        assert record.meta == {"question": "Which?", "choices": ["red", "blue"], "level": 3}

    def test_limit_where_and_system(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", numbered(12))
        records = reading({"path": "a.jsonl", "limit": 3, "where": {"level": 1}, "system": "Be brief."})
        assert asked(records) == ["question 1", "question 4", "question 7"]
        assert records[0].messages[0] == {"role": "system", "content": "Be brief."}
        assert len(reading({"path": "a.jsonl", "where": {"level": [0, 2]}})) == 8

    def test_values_of_a_csv_compare_as_text(self, reading: Reading, write: Write) -> None:
        write("a.csv", "prompt,level\na,1\nb,2\n")
        assert asked(reading({"path": "a.csv", "where": {"level": 2}})) == ["b"]

    def test_a_condition_that_nothing_meets_shows_the_columns(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", numbered(2))
        with pytest.raises(DataError, match="no row has levl = 1") as caught:
            reading({"path": "a.jsonl", "where": {"levl": 1}})
        assert "prompt, level" in str(caught.value)

    def test_system_replaces_the_one_in_the_row(self, reading: Reading, write: Write) -> None:
        turns = [{"role": "system", "content": "old"}, {"role": "user", "content": "Hi"}]
        write("a.jsonl", lines({"messages": turns}))
        [record] = reading({"path": "a.jsonl", "system": "new"})
        assert [message["content"] for message in record.messages] == ["new", "Hi"]

    def test_the_prompt_is_known_by_its_question_whatever_stands_around_it(
        self, reading: Reading, write: Write
    ) -> None:
        write("a.jsonl", lines({"question": "Why?"}))
        plain, dressed = (
            reading({"path": "a.jsonl", **more})[0]
            for more in ({}, {"system": "s", "template": "Q: {question}"})
        )
        assert plain.prompt_id == dressed.prompt_id == prompt_identity("Why?")
        assert plain.messages != dressed.messages
        assert plain.id != dressed.id

    def test_a_template_keeps_the_response_and_knows_the_prompt_by_name(
        self, reading: Reading, write: Write
    ) -> None:
        write("a.jsonl", lines({"question": "Which?", "choices": ["x", "y"], "answer": 1}))
        [record] = reading({"path": "a.jsonl", "template": "Think first.\n\n{prompt}"})
        assert record.messages[-1]["content"].startswith("Think first.\n\nWhich?\n\nA. x\nB. y")
        assert record.response == "Answer: B"

    def test_a_template_makes_prompts_of_unknown_columns_and_of_text(
        self, reading: Reading, write: Write
    ) -> None:
        write("a.jsonl", lines({"lyrics": "la", "title": "T"}, {"lyrics": "li", "title": "T"}))
        records = reading({"path": "a.jsonl", "template": "Analyse: {lyrics}"})
        assert asked(records) == ["Analyse: la", "Analyse: li"]
        assert records[0].prompt_id != records[1].prompt_id
        write("a.txt", "One.\n\nTwo.")
        records = reading({"path": "a.txt", "template": "Go on: {text}"})
        assert asked(records) == ["Go on: One.", "Go on: Two."]
        assert [record.response for record in records] == [None, None]

    def test_a_column_that_the_template_lacks_is_an_error_at_its_row(
        self, reading: Reading, write: Write
    ) -> None:
        write("a.jsonl", lines({"lyrics": "la"}))
        with pytest.raises(DataError, match=r"a\.jsonl, line 1: the template asks for the column 'lyric'"):
            reading({"path": "a.jsonl", "template": "{lyric}"})

    def test_plain_text_is_all_response(self, reading: Reading, write: Write) -> None:
        write("wiki.txt", " = Title = \n\n One paragraph .\n")
        records = reading({"path": "wiki.txt"})
        assert [(record.messages, record.response) for record in records] == [
            ([], "= Title ="),
            ([], "One paragraph ."),
        ]
        with pytest.raises(DataError, match="`system` has no place in plain text"):
            reading({"path": "wiki.txt", "system": "Be brief."})

    def test_unknown_columns_show_what_there_is_and_what_could_be(
        self, reading: Reading, write: Write
    ) -> None:
        write("a.jsonl", lines({"lyrics": "la"}))
        with pytest.raises(DataError, match="the columns lyrics are not those of a known shape") as caught:
            reading({"path": "a.jsonl"})
        assert "question_answer: question or problem" in str(caught.value)
        with pytest.raises(DataError, match="the shape 'alpaca'"):
            reading({"path": "a.jsonl", "shape": "alpaca"})

    def test_shuffling_takes_from_all_rows_and_depends_on_the_seed(
        self, reading: Reading, write: Write
    ) -> None:
        write("a.jsonl", numbered(200))
        some = {"path": "a.jsonl", "shuffle": True, "limit": 10}
        first = asked(reading(some))
        assert first == asked(reading(some))
        assert len(set(first)) == 10
        assert any(int(question.split()[1]) > 100 for question in first)
        assert sorted(asked(reading({"path": "a.jsonl", "shuffle": True}))) == sorted(
            asked(reading({"path": "a.jsonl"}))
        )
        reading.seed = 8
        assert asked(reading(some)) != first

    def test_a_stop_is_heeded_between_rows(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", numbered(3))
        context = reading.context()
        records = read(DATA.validate_python({"path": str(reading.folder / "a.jsonl")}), context)
        next(records)
        context.stop.set()
        with pytest.raises(Interrupted):
            next(records)


class TestMalformedRows:
    def test_they_are_told_by_line_counted_and_left_out(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", lines({"prompt": "a"}) + "{broken\n" + lines({"prompt": None}, {"prompt": "b"}))
        assert asked(reading({"path": "a.jsonl"})) == ["a", "b"]
        assert "a.jsonl, line 2: not valid JSON" in reading.said
        assert "a.jsonl, line 3: no text in prompt; left out" in reading.said
        assert "a.jsonl: 2 rows, 2 malformed rows left out" in reading.said
        assert [event["left_out"] for event in reading.events("source")] == [2]

    def test_many_of_them_are_only_counted(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", lines({"prompt": "a"}) + "{broken\n" * 50)
        reading({"path": "a.jsonl"})
        assert reading.said.count("not valid JSON") == 3
        assert "50 malformed rows" in reading.said

    def test_strict_stops_at_the_first(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", lines({"prompt": "a"}) + "{broken\n")
        with pytest.raises(DataError, match=r"a\.jsonl, line 2: not valid JSON"):
            reading({"path": "a.jsonl", "strict": True})

    def test_a_wrong_answer_index_stops_at_its_row(self, reading: Reading, write: Write) -> None:
        row = {"question": "Which?", "choices": ["x", "y"], "answer": 1}
        write("a.jsonl", lines(row, {**row, "answer": 2}))
        with pytest.raises(DataError, match=r"a\.jsonl, line 2: answer 2 names none of the 2 choices"):
            reading({"path": "a.jsonl"})

    def test_a_source_without_a_usable_row_says_what_is_wrong_with_the_first(
        self, reading: Reading, write: Write
    ) -> None:
        write("a.jsonl", "{broken\n")
        with pytest.raises(DataError, match=r"none of its rows can be used; the first is a\.jsonl, line 1"):
            reading({"path": "a.jsonl"})

    @pytest.mark.parametrize(
        ("name", "text"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "prompt\n"), ("a.txt", " \n")]
    )
    def test_an_empty_data_set_is_an_error(
        self, reading: Reading, write: Write, name: str, text: str
    ) -> None:
        write(name, text)
        with pytest.raises(DataError, match=f"{name}: there are no rows"):
            reading({"path": name})


class TestHeldOut:
    def test_a_prompt_falls_on_one_side_in_every_source_and_step(
        self, reading: Reading, write: Write
    ) -> None:
        rows = [{"prompt": f"question {number % 50}", "response": str(number)} for number in range(200)]
        write("a.jsonl", lines(*rows))
        write("b.jsonl", lines(*({"question": f"question {number}"} for number in range(50))))
        sides: dict[str, set[bool]] = {}
        for name in ("a.jsonl", "b.jsonl"):
            for kind in ("generate", "evaluate"):
                for record in reading({"path": name, "held_out": 0.3, "system": name}, kind=kind):
                    sides.setdefault(record.prompt_id, set()).add(record.held_out)
        assert len(sides) == 50
        assert all(len(side) == 1 for side in sides.values())

    def test_the_share_is_about_what_is_asked_and_none_is_none(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", numbered(1000))
        held = sum(record.held_out for record in reading({"path": "a.jsonl", "held_out": 0.2}))
        assert 150 < held < 250
        assert f"1,000 rows, {held} of them held out" in reading.said
        assert not any(record.held_out for record in reading({"path": "a.jsonl"}))

    def test_another_seed_holds_out_others(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", numbered(100))
        some = {"path": "a.jsonl", "held_out": 0.3}
        one = [record.held_out for record in reading(some)]
        reading.seed = 8
        assert one != [record.held_out for record in reading(some)]


class TestReferences:
    def traces(self) -> list[Record]:
        return [
            Record(
                f"p{number // 2}",
                [{"role": "user", "content": str(number // 2)}],
                response=f"r{number}",
                sample=number % 2,
                held_out=number // 2 == 2,
                reference="x",
                task="math",
                verdicts={"correct": True},
                meta={"level": 1},
            )
            for number in range(6)
        ]

    def test_records_of_a_step_come_as_they_are(self, reading: Reading) -> None:
        reading.seal("traces", self.traces())
        assert reading("traces") == self.traces()

    def test_the_prompts_view_has_each_prompt_once_without_what_was_answered(self, reading: Reading) -> None:
        reading.seal("traces", self.traces())
        found = reading("traces:prompts")
        assert [record.prompt_id for record in found] == ["p0", "p1", "p2"]
        assert found == list(prompts(self.traces()))
        first = found[0]
        assert (first.response, first.verdicts, first.sample) == (None, {}, 0)
        assert (first.reference, first.task, first.meta) == ("x", "math", {"level": 1})
        assert [record.held_out for record in found] == [False, False, True]

    def test_the_held_out_view_has_only_those_rows(self, reading: Reading) -> None:
        reading.seal("traces", self.traces())
        assert {record.prompt_id for record in reading("traces:held_out")} == {"p2"}

    def test_a_held_out_view_of_nothing_says_how_to_hold_out(self, reading: Reading) -> None:
        reading.seal("traces", self.traces()[:2])
        with pytest.raises(DataError, match="no row is held out") as caught:
            reading("traces:held_out")
        assert "held_out: 0.1" in str(caught.value)

    def test_several_artifacts_of_one_reference_are_joined(self, reading: Reading) -> None:
        reading.seal("traces", self.traces()[:2])
        reading.artifacts["all"] = [
            *reading.artifacts["traces"],
            (reading.seal("more", self.traces()[4:]), None),
        ]
        assert len(reading("all")) == 4
        assert [record.prompt_id for record in reading("all:prompts")] == ["p0", "p2"]

    def test_a_path_is_a_data_file_or_an_artifacts_folder(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", numbered(2))
        assert len(reading(str(reading.folder / "a.jsonl"))) == 2
        artifact = reading.seal("traces", self.traces())
        reading.artifacts[str(artifact.folder)] = [(artifact, None)]
        assert len(reading(str(artifact.folder))) == 6

    def test_an_artifact_without_records_is_refused(self, reading: Reading) -> None:
        artifact = reading.seal("traces", self.traces())
        (artifact.folder / "records.parquet").unlink()
        with pytest.raises(DataError, match="'generate' holds no records"):
            reading("traces")


class TestMixtures:
    def test_without_weights_all_rows_come_in_order_and_prompts_once(
        self, reading: Reading, write: Write
    ) -> None:
        write("a.jsonl", numbered(4))
        write("b.jsonl", lines({"question": "question 1"}, {"question": "new"}, {"question": "new"}))
        records = reading([{"path": "a.jsonl"}, {"path": "b.jsonl"}])
        assert asked(records) == [*(f"question {number}" for number in range(4)), "new"]
        assert "mixture of 5 rows: a.jsonl 4, b.jsonl 1 (2 repeated)" in reading.said
        assert [event["rows"] for event in reading.events("mixture")] == [[4, 1]]

    def test_weights_hold_at_every_point_and_to_the_end(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", lines(*({"prompt": f"a{number}"} for number in range(30))))
        write("b.jsonl", lines(*({"prompt": f"b{number}"} for number in range(12))))
        mixture = [{"path": "a.jsonl", "weight": 1.0}, {"path": "b.jsonl", "weight": 3.0}]
        records = asked(reading(mixture))
        assert records == asked(reading(mixture))
        assert [question[0] for question in records[:8]].count("a") == 2
        assert (sum(one[0] == "a" for one in records), sum(one[0] == "b" for one in records)) == (4, 12)

    def test_limits_hold_for_each_member(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", numbered(9))
        write("b.jsonl", lines(*({"prompt": f"b{number}"} for number in range(9))))
        records = asked(reading([{"path": "a.jsonl", "limit": 2}, {"path": "b.jsonl", "limit": 3}]))
        assert records == ["question 0", "question 1", "b0", "b1", "b2"]

    def test_several_answers_to_a_prompt_are_not_repetitions(self, reading: Reading) -> None:
        calm, lively = (
            [
                Record("p", [{"role": "user", "content": "Hi"}], response=text, sample=number)
                for number in range(2)
            ]
            for text in ("calm", "lively")
        )
        reading.seal("calm", calm)
        reading.seal("lively", lively)
        assert [record.response for record in reading(["calm", "lively"])] == [
            "calm",
            "calm",
            "lively",
            "lively",
        ]
        assert len(reading(["calm", "calm"])) == 2


class TestTasks:
    def test_problems_are_records_with_their_gold_answer(self, reading: Reading) -> None:
        records = reading({"task": "chain_sum", "size": 5, "parameters": {"min_terms": 3, "max_terms": 3}})
        assert len(records) == 5
        for record in records:
            assert record.task == "reasoning_gym:chain_sum"
            assert record.messages[0]["content"].endswith(record.meta["expression"] + " =")
            assert record.response is None
            assert record.reference is not None
            assert json.loads(json.dumps(record.meta)) == record.meta

    def test_seeds_next_to_each_other_share_no_problems(self, reading: Reading) -> None:
        some = {"task": "chain_sum", "size": 100, "parameters": {"min_terms": 6, "min_digits": 4}}
        one, other = ({record.prompt_id for record in reading({**some, "seed": seed})} for seed in (1, 2))
        assert not one & other
        assert one == {record.prompt_id for record in reading({**some, "seed": 1})}

    def test_steps_of_different_kinds_get_different_problems(self, reading: Reading) -> None:
        some = {"task": "chain_sum", "size": 50, "parameters": {"min_terms": 6, "min_digits": 4}}
        train, test = (
            {record.prompt_id for record in reading(some, kind=kind)} for kind in ("generate", "evaluate")
        )
        assert not train & test

    def test_a_wrong_parameter_is_met_with_the_nearest(self, reading: Reading) -> None:
        with pytest.raises(DataError, match="no parameter 'min_term'") as caught:
            reading({"task": "chain_sum", "size": 1, "parameters": {"min_term": 3}})
        assert "did you mean min_terms" in str(caught.value)

    def test_a_value_that_the_task_refuses_is_shown(self, reading: Reading) -> None:
        with pytest.raises(DataError, match=r"min_terms=30\): max_terms must be >= min_terms"):
            reading({"task": "chain_sum", "size": 1, "parameters": {"min_terms": 30}})

    def test_templates_and_conditions_know_the_problems_figures(self, reading: Reading) -> None:
        data = {
            "task": "chain_sum",
            "size": 30,
            "template": "Work out {expression}.",
            "where": {"num_terms": 4},
        }
        records = reading(data)
        assert 0 < len(records) < 30
        assert all(
            record.messages[0]["content"] == f"Work out {record.meta['expression']}." for record in records
        )


class TestHub:
    """A folder of files is loaded as a hub's data set would be, without a network."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "train.jsonl").write_text(numbered(20), encoding="utf-8")
        return folder

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows_come_streamed_or_not(self, reading: Reading, folder: Path, streaming: bool) -> None:
        records = reading({"dataset": str(folder), "limit": 3, "streaming": streaming})
        assert asked(records) == ["question 0", "question 1", "question 2"]
        shuffled = asked(reading({"dataset": str(folder), "streaming": streaming, "shuffle": True}))
        assert sorted(shuffled) == sorted(f"question {number}" for number in range(20)) != shuffled

    def test_what_cannot_be_loaded_is_named(self, reading: Reading, folder: Path) -> None:
        with pytest.raises(DataError, match="the data set cannot be loaded"):
            reading({"dataset": str(folder), "split": "nowhere"})


class TestCounting:
    def test_the_count_is_that_of_a_reading(self, reading: Reading, write: Write) -> None:
        write("a.jsonl", numbered(10))
        path = str(reading.folder / "a.jsonl")
        for data in (
            path,
            {"path": path, "where": {"level": 1}, "limit": 2},
            {"task": "chain_sum", "size": 9, "limit": 7},
            {"task": "chain_sum", "size": 9, "where": {"num_terms": [2, 3, 4, 5, 6]}},
            [{"path": path, "weight": 2.0}, {"task": "chain_sum", "size": 3, "weight": 2.0, "seed": 1}],
        ):
            assert count_rows(DATA.validate_python(data), reading.seed) == len(reading(data)), data

    def test_an_artifacts_folder_is_counted_by_its_footer(self, reading: Reading) -> None:
        artifact = reading.seal("traces", [Record(f"p{number}", []) for number in range(5)])
        assert count_rows(DataRef(artifact.folder), 0) == 5

    @pytest.mark.parametrize(
        "data", ["step", ["step", {"task": "gcd", "size": 1}], {"dataset": "openai/gsm8k"}]
    )
    def test_what_only_a_run_can_tell_is_unknown(self, data: Any) -> None:
        assert count_rows(DATA.validate_python(data), 0) is None

    def test_what_is_wrong_is_raised(self, write: Write) -> None:
        path = write("a.jsonl", lines({"lyrics": "la"}))
        with pytest.raises(DataError, match="not those of a known shape"):
            count_rows(DATA.validate_python({"path": str(path)}), 0)


class TestRealData:
    def test_gsm8k(self, reading: Reading, shared_data: Path) -> None:
        records = reading({"path": str(shared_data / "gsm8k" / "train.jsonl"), "held_out": 0.1})
        assert len(records) == 7473
        assert all(record.task == "math" and record.reference for record in records)
        assert not any("<<" in str(record.response) for record in records)
        assert 650 < sum(record.held_out for record in records) < 850

    def test_mmlu(self, reading: Reading, shared_data: Path) -> None:
        records = reading({"path": str(shared_data / "mmlu" / "dev.jsonl"), "where": {"subject": "anatomy"}})
        assert len(records) == 5
        assert all(record.reference in "ABCD" and record.meta["category"] for record in records)


def test_a_data_set_on_the_hub_has_at_most_its_limit_and_is_not_fetched_to_be_counted() -> None:
    assert count_rows(HubSource(dataset="some/set", limit=150), seed=1) == 150
    assert count_rows(HubSource(dataset="some/set"), seed=1) is None


def test_rows_of_input_and_output_are_prompts_and_responses(tmp_path: Path, step_context: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input": "1 + 1 =", "output": "2", "domain": "math"}), encoding="utf-8")
    [record] = read(source_of_path(str(path)), step_context("read"))
    assert (record.messages[-1]["content"], record.response, record.meta["domain"]) == (
        "1 + 1 =",
        "2",
        "math",
    )
