"""Traces that a vLLM server scores: what it says, how often it is asked, and what becomes of its refusals."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import EngineError, Interrupted
from potstill.core.records import Record
from potstill.data.chat import Renderer
from potstill.models import LoadedModel, load, load_tokenizer
from potstill.teachers import OpenAIModel

from ...servers import Body, Reply, ScriptedServer, error, prompt_logprobs, rows_scored, running_server, vllm
from .conftest import Bench, naive_probability


@pytest.fixture
def served(bench: Bench, records: list[Record]) -> LoadedModel:
    """The bench's teacher in float64; of each three traces two have no log-probabilities of it at 1."""
    for number, record in enumerate(records):
        if number % 3 == 1:
            record.logprobs = None
        elif number % 3 == 2:
            record.sampling = {"logprob_temperature": 0.3}
    bench.give(records)
    loaded = load(bench.models["teacher"])
    loaded.model.double()
    return loaded


@pytest.fixture
def server(bench: Bench, served: LoadedModel, tmp_path: Path) -> Iterator[ScriptedServer]:
    """A server of the teacher, which the bench knows as "big"."""
    with running_server() as running:
        bench.models["big"] = OpenAIModel(
            engine="openai",
            base_url=running.base_url,
            model="tiny",
            tokenizer=str(tmp_path / "teacher"),
            max_retries=2,
        )
        running.always = vllm(lambda body: Reply(body=prompt_logprobs(served, body)))
        yield running


def _to_score(records: list[Record], bench: Bench) -> list[list[int]]:
    """The token ids of the rows that have no log-probabilities at temperature 1, in order."""
    renderer = Renderer(load_tokenizer(bench.models["teacher"]))
    rows = [one for number, one in enumerate(records) if number % 3 and not one.held_out]
    return [[*renderer.prompt_ids(one.messages), *(one.response_token_ids or [])] for one in rows]


def test_what_is_missing_or_at_another_temperature_is_scored_by_the_server_at_1(
    bench: Bench, server: ScriptedServer, records: list[Record]
) -> None:
    kept = bench.run(teacher="big", keep={"top": 1.0})
    wanted = _to_score(records, bench)
    assert len(wanted) == 12
    assert sorted(one["prompt"] for one in rows_scored(server)) == sorted(wanted)
    assert all(one["model"] == "tiny" and one["prompt_logprobs"] == 1 for one in rows_scored(server))
    for record in kept:
        if not record.held_out:
            expected = naive_probability(bench, "teacher", record)
            assert record.scores["teacher_probability"] == pytest.approx(expected, rel=1e-5)
    assert "temperature" not in bench.said


def test_sentences_have_the_classes_that_the_same_model_gives_here(
    bench: Bench, server: ScriptedServer
) -> None:
    settings = {"level": "sentence", "keep": {"top": 1.0}, "beta": 0.001}
    local = bench.run("local", teacher="teacher", **settings)
    assert not rows_scored(server)
    found = bench.run("served", teacher="big", **settings)
    assert len(rows_scored(server)) == 12
    for one, other in zip(found, local, strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-4)
    assert any(one.scores.get("teacher_sentences") for one in found)


def test_a_served_student_scores_as_it_does_here(
    bench: Bench, server: ScriptedServer, tmp_path: Path
) -> None:
    student = load(bench.models["student"])
    student.model.double()
    server.always = vllm(lambda body: Reply(body=prompt_logprobs(student, body)))
    bench.models["small"] = OpenAIModel(
        engine="openai", base_url=server.base_url, model="tiny", tokenizer=str(tmp_path / "student")
    )
    local = bench.run("local", teacher="teacher", keep={"top": 1.0})
    found = bench.run("served", teacher="teacher", student="small", keep={"top": 1.0})
    assert len(rows_scored(server)) == 18
    for one, other in zip(found, local, strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-4)


def test_nothing_is_asked_twice_even_where_the_server_is_gone(bench: Bench, server: ScriptedServer) -> None:
    first = bench.run("first", teacher="big", keep={"top": 1.0})
    asked = len(server.requests)
    model = bench.models["big"]
    assert isinstance(model, OpenAIModel)
    gone = {"base_url": "http://127.0.0.1:9/v1", "identity": model.known_as()}
    bench.models["big"] = model.model_copy(update=gone)
    again = bench.run("again", teacher="big", keep={"per_prompt": 1})
    assert len(server.requests) == asked
    scores = {record.id: record.scores for record in first}
    assert all(record.scores == scores[record.id] for record in again)


def test_an_interrupted_step_asks_only_what_is_missing(
    bench: Bench, server: ScriptedServer, served: LoadedModel
) -> None:
    bench.models["big"] = bench.models["big"].model_copy(update={"concurrency": 1})

    def stopping(body: Body) -> Reply:
        if len(rows_scored(server)) == 5:
            bench.context.stop.set()
        return Reply(body=prompt_logprobs(served, body))

    server.always = vllm(stopping)
    with pytest.raises(Interrupted):
        bench.run("interrupted", teacher="big")
    assert 5 <= len(rows_scored(server)) < 12
    server.always = vllm(lambda body: Reply(body=prompt_logprobs(served, body)))
    bench.run("interrupted", teacher="big")
    times = Counter(tuple(one["prompt"]) for one in rows_scored(server))
    assert len(times) == 12
    # Of the one request under way when the run stopped nobody knows the answer.
    assert times.total() <= 13


def test_what_may_pass_is_tried_again(bench: Bench, server: ScriptedServer, served: LoadedModel) -> None:
    tries: Counter[tuple[int, ...]] = Counter()

    def busy_at_first(body: Body) -> Reply:
        tries[tuple(body["prompt"])] += 1
        if tries[tuple(body["prompt"])] == 1:
            return Reply(429, error("slow down"), {"Retry-After": "0.01"})
        return Reply(body=prompt_logprobs(served, body))

    server.always = vllm(busy_at_first)
    assert len(bench.run(teacher="big", keep={"top": 1.0})) == 24
    assert {tries[tuple(one["prompt"])] for one in rows_scored(server)} == {2}
    assert "dropped_by_score" not in bench.result.counts


def test_a_server_without_prompt_logprobs_is_refused(bench: Bench, server: ScriptedServer) -> None:
    server.always = vllm(lambda body: Reply(body={"choices": [{"text": "x"}]}))
    with pytest.raises(EngineError, match="the answer holds no log-probabilities of the prompt's") as caught:
        bench.run(teacher="big")
    assert "serve the model by vLLM, or let transformers run it here" in str(caught.value)
    assert len(rows_scored(server)) <= 12, "what no try can mend was tried again"


def test_a_row_that_the_server_refuses_is_a_row_of_its_own(
    bench: Bench, server: ScriptedServer, served: LoadedModel, records: list[Record]
) -> None:
    refused = _to_score(records, bench)[3]

    def answer(body: Body) -> Reply:
        if body["prompt"] == refused:
            return Reply(400, error("the prompt holds what may not be"))
        return Reply(body=prompt_logprobs(served, body))

    server.always = vllm(answer)
    with pytest.raises(
        EngineError, match=r"1 of 12 requests failed: 1 x HTTP 400: the prompt holds what may"
    ):
        bench.run(teacher="big", keep={"top": 1.0})
    [failure] = map(json.loads, (bench.context.folder / "failures-teacher.jsonl").read_text().splitlines())
    assert (failure["row"], failure["status"]) == ("row 6 (record r05)", 400)
    asked = len(rows_scored(server))
    kept = bench.run("again", teacher="big", keep={"top": 1.0}, max_failed_share=0.1)
    assert [one["prompt"] for one in rows_scored(server)[asked:]] == [refused], (
        "what was answered was bought again"
    )
    assert (len(kept), bench.result.counts["dropped_by_score"]) == (23, 1)
    text = (bench.context.folder / "dropped.jsonl").read_text(encoding="utf-8")
    assert f"tiny at {server.base_url} gave no answer: HTTP 400: the prompt holds what may not be" in text
    server.always = vllm(lambda body: Reply(body=prompt_logprobs(served, body)))
    assert len(bench.run("healed", teacher="big", keep={"top": 1.0})) == 24


def test_rows_that_were_refused_before_do_not_end_the_next_selection(
    bench: Bench,
    server: ScriptedServer,
    served: LoadedModel,
    records: list[Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("potstill.teachers.failures._FAILURES_IN_A_ROW", 3)
    bench.models["big"] = bench.models["big"].model_copy(update={"concurrency": 1})
    refused = _to_score(records, bench)[3:7]

    def answer(body: Body) -> Reply:
        if body["prompt"] in refused:
            return Reply(400, error("the prompt holds what may not be"))
        return Reply(body=prompt_logprobs(served, body))

    server.always = vllm(answer)
    for name in ("first", "again"):
        assert len(bench.run(name, teacher="big", keep={"top": 1.0}, max_failed_share=0.5)) == 20


def test_rows_past_the_servers_context_are_dropped_unasked(
    bench: Bench, server: ScriptedServer, served: LoadedModel, records: list[Record]
) -> None:
    lengths = sorted(len(one) for one in _to_score(records, bench))
    server.always = vllm(lambda body: Reply(body=prompt_logprobs(served, body)), max_model_len=lengths[8] + 1)
    fitting = sum(length <= lengths[8] for length in lengths)
    kept = bench.run(teacher="big", keep={"top": 1.0})
    assert len(rows_scored(server)) == fitting < 12
    assert bench.result.counts["dropped_by_score"] == 24 - len(kept) == 12 - fitting
    text = (bench.context.folder / "dropped.jsonl").read_text(encoding="utf-8")
    assert f"exceed the context of tiny at {server.base_url}" in text


def test_a_token_that_the_server_gives_no_probability_drops_its_row(
    bench: Bench, server: ScriptedServer, served: LoadedModel, records: list[Record]
) -> None:
    """Minus infinity is -9999 in vLLM's answers, which JSON can hold."""
    row = _to_score(records, bench)[0]

    def answer(body: Body) -> Reply:
        found = prompt_logprobs(served, body)
        if body["prompt"] == row:
            found["choices"][0]["prompt_logprobs"][-1][str(row[-1])]["logprob"] = -9999.0
        return Reply(body=found)

    server.always = vllm(answer)
    bench.run(teacher="big", keep={"top": 1.0})
    assert bench.result.counts["dropped_by_score"] == 1
    assert "gives some of its tokens no probability" in (bench.context.folder / "dropped.jsonl").read_text()


def test_an_answer_about_other_tokens_than_the_rows_is_refused(
    bench: Bench, server: ScriptedServer, served: LoadedModel
) -> None:
    def answer(body: Body) -> Reply:
        found: Any = prompt_logprobs(served, body)["choices"][0]["prompt_logprobs"]
        only_likeliest = [
            None if one is None else dict([max(one.items(), key=lambda pair: pair[1]["logprob"])])
            for one in found
        ]
        return Reply(body={"choices": [{"prompt_logprobs": only_likeliest}]})

    server.always = vllm(answer)
    with pytest.raises(EngineError, match=r"the answer says nothing of id \d+, which stands in the prompt"):
        bench.run(teacher="big")


def test_all_rows_with_log_probabilities_at_1_need_no_server(
    bench: Bench, server: ScriptedServer, records: list[Record]
) -> None:
    bench.give([record for number, record in enumerate(records) if number % 3 == 0])
    kept = bench.run(teacher="big", keep={"top": 1.0})
    assert not server.requests
    assert all(math.isfinite(one.scores["divergence"]) for one in kept if not one.held_out)
