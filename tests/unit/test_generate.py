import json
import math
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import BudgetError, DataError, EngineError, Interrupted
from potstill.core.hashing import hash_file
from potstill.core.records import RECORDS_FILE, Record, read_records, write_records
from potstill.core.settings import Settings, meaning
from potstill.core.step import StepContext, StepResult
from potstill.data.chat import Renderer
from potstill.generate import GenerateSettings, PlannedAnswer, run
from potstill.models import TransformersModel, load_tokenizer
from potstill.teachers import OpenAIModel, OpenAITeacher, SolverModel
from potstill.teachers.failures import FAILURES_FILE

from ..rows import write_rows
from ..servers import Faults, Reply, ScriptedServer, completion, error, running_server

KEY = "sk-canary-4711"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running_server() as running:
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"question {number}"}) for number in range(30)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


class Kitchen:
    """Runs the step, each time in the artifact folder and over the store that are named."""

    def __init__(self, step_context: Any, model: Settings, prompts: Path) -> None:
        self.step_context, self.model, self.prompts = step_context, model, prompts
        self.context: StepContext

    def settings(self, **fields: Any) -> GenerateSettings:
        return GenerateSettings.model_validate(
            {"do": "generate", "model": "big", "data": {"path": str(self.prompts)}, **fields}
        )

    def run(self, *, folder: str = "artifact", seed: int = 1, stop: Any = None, **fields: Any) -> StepResult:
        self.context = self.step_context("generate", folder=folder, seed=seed, models={"big": self.model})
        if stop is not None:
            self.context.stop = stop
        return run(self.settings(**fields), self.context)

    def traces(self) -> list[Record]:
        return list(read_records(self.context.folder / RECORDS_FILE))

    def failures(self) -> list[dict[str, Any]]:
        text = (self.context.folder / FAILURES_FILE).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def kitchen(step_context: Any, server: ScriptedServer, prompts: Path) -> Kitchen:
    model = OpenAIModel(engine="openai", base_url=server.base_url, model="big", max_retries=0)
    return Kitchen(step_context, model, prompts)


def test_every_prompt_is_answered_once_and_in_order(kitchen, server):
    result = kitchen.run(samples=2, temperature=0.7, max_new_tokens=50)
    traces = kitchen.traces()
    assert [trace.messages[0]["content"] for trace in traces] == [f"question {n // 2}" for n in range(60)]
    assert [trace.sample for trace in traces] == [0, 1] * 30
    assert all(trace.response == f"echo {trace.messages[0]['content']}" for trace in traces)
    assert result.counts == {"prompts": 30, "records": 60, "held_out": 0, "failed": 0, "reused": 0}
    assert result.metrics == {
        "finish_reasons": {"stop": 60},
        "mean_response_tokens": 3.0,
        "reasoning_share": 0.0,
    }
    assert result.tokens == 180
    assert result.model_identity == traces[0].model == f"big at {server.base_url}"
    assert len(server.requests) == 60
    assert not (kitchen.context.folder / FAILURES_FILE).exists()


def test_each_sample_has_a_seed_of_its_own_that_is_written_down(kitchen, server):
    kitchen.run(samples=2)
    seeds = [trace.sampling["seed"] for trace in kitchen.traces()]
    assert len(set(seeds)) == 60
    assert sorted(body["seed"] for body in server.requests) == sorted(seed % 2**31 for seed in seeds)
    first = kitchen.traces()[3]
    assert first.sampling["seed"] == kitchen.context.derive_seed("sample", first.prompt_id, 1)
    assert first.sampling["temperature"] == 1.0


def test_reasoning_and_answer_are_kept_apart_and_together(kitchen, server):
    server.always = lambda body: Reply(body=completion("19", reasoning_content="12 + 7 = 19"))
    result = kitchen.run(limit=1)
    [trace] = kitchen.traces()
    assert (trace.reasoning, trace.answer) == ("12 + 7 = 19", "19")
    assert trace.response == "<think>\n12 + 7 = 19\n</think>\n\n19"
    assert result.metrics["reasoning_share"] == 1.0
    assert trace.verdicts == {}


def test_a_verifier_judges_each_response_and_traces_keep_its_verdicts(kitchen, server, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def right(answer, row):\n    assert 'thought' not in answer\n    return answer.endswith(' 1')\n",
        encoding="utf-8",
    )
    server.always = lambda body: Reply(
        body=completion(f"<think>thought</think>It is {body['messages'][0]['content']}")
    )
    verifier = {"function": f"{tmp_path}/mine.py:right"}
    result = kitchen.run(limit=4, verifier=verifier)
    assert [trace.verdicts["correct"] for trace in kitchen.traces()] == [False, True, False, False]
    assert result.metrics["verdicts"] == {"well_formed": 1.0, "correct": 0.25, "judged": 1.0}
    asked = len(server.requests)
    kitchen.run(folder="again", limit=4)
    assert len(server.requests) == asked, "with another verifier, or none, nothing is bought anew"
    assert kitchen.traces()[0].verdicts == {}


def test_a_row_that_the_verifier_cannot_judge_is_told_before_anything_is_asked(kitchen, server, tmp_path):
    rows = [{"prompt": "the total?", "reference": {"total": 1}}, {"prompt": "and this?", "reference": 7}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = {"path": str(path)}
    with pytest.raises(DataError, match="no JSON object to compare") as caught:
        kitchen.run(data=data, verifier={"fields": {"total": "exact"}})
    assert "data, prompt 2, record" in str(caught.value)
    assert not server.requests
    server.always = lambda body: Reply(body=completion('{"total": 1}'))
    kitchen.run(data=data, limit=1, folder="one", verifier={"fields": {"total": "exact"}})
    assert kitchen.traces()[0].verdicts["correct"]


def test_the_window_is_full_and_never_fuller(kitchen, server):
    server.hold = full = threading.Event()

    def open_once_full() -> None:
        while server.under_way < 7 and not full.wait(0.001):
            pass
        full.set()

    opener = threading.Thread(target=open_once_full)
    opener.start()
    kitchen.run(concurrency=7)
    opener.join()
    assert server.most_under_way == 7


def test_a_second_run_asks_nothing_and_makes_the_same_file(kitchen, server):
    kitchen.run()
    first = hash_file(kitchen.context.folder / RECORDS_FILE)
    result = kitchen.run(folder="again")
    assert len(server.requests) == 30
    assert result.counts["reused"] == 30
    assert hash_file(kitchen.context.folder / RECORDS_FILE) == first


def test_more_prompts_or_samples_ask_only_for_what_is_new(kitchen, server):
    kitchen.run(limit=10)
    kitchen.run(folder="more", limit=12)
    assert len(server.requests) == 12
    kitchen.run(folder="most", limit=12, samples=2)
    assert len(server.requests) == 24


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.5}, {"top_p": 0.5}, {"max_new_tokens": 7}, {"seed": 2}],
    ids=lambda change: next(iter(change)),
)
def test_an_answer_to_another_request_is_never_taken(kitchen, server, change):
    kitchen.run(limit=3)
    kitchen.run(folder="changed", limit=3, **change)
    assert len(server.requests) == 6


def test_an_answer_of_another_model_or_body_is_never_taken(kitchen, server):
    kitchen.run(limit=3)
    for update in ({"model": "other"}, {"extra_body": {"top_k": 5}}, {"identity": "stated"}):
        kitchen.model = kitchen.model.model_copy(update=update)
        kitchen.run(folder=f"after {next(iter(update))}", limit=3)
    assert len(server.requests) == 12
    kitchen.model = kitchen.model.model_copy(update={"concurrency": 2, "timeout_s": 9.0, "model": "alias"})
    kitchen.run(folder="moved", limit=3)
    assert len(server.requests) == 12


def test_at_temperature_zero_the_recipes_seed_changes_nothing(kitchen, server):
    kitchen.run(limit=3, temperature=0)
    kitchen.run(folder="other", limit=3, temperature=0, seed=2)
    assert len(server.requests) == 3
    assert "seed" not in kitchen.traces()[0].sampling


def test_a_stopped_run_keeps_what_arrived_and_ends_as_an_uninterrupted_one(
    kitchen, server, step_context, prompts
):
    stop = threading.Event()

    def stop_at_the_twelfth(body: dict[str, Any]) -> Reply:
        if len(server.requests) == 12:
            stop.set()
        return Reply(body=completion(f"echo {body['messages'][0]['content']}"))

    server.always = stop_at_the_twelfth
    with pytest.raises(Interrupted):
        kitchen.run(samples=2, concurrency=4, stop=stop)
    asked = len(server.requests)
    assert 12 <= asked <= 16
    assert not (kitchen.context.folder / RECORDS_FILE).exists()
    result = kitchen.run(samples=2, concurrency=4)
    # What was under way at the stop is asked again; nothing else is.
    assert 60 <= len(server.requests) <= 64
    assert result.counts["reused"] >= 8
    resumed = hash_file(kitchen.context.folder / RECORDS_FILE)
    other_store = Kitchen(step_context, kitchen.model, prompts)
    context = step_context("generate", folder="uninterrupted", models={"big": kitchen.model})
    context.cache_folder = prompts.parent / "other store"
    run(other_store.settings(samples=2, concurrency=9), context)
    assert hash_file(context.folder / RECORDS_FILE) == resumed


def stop_while_waiting(kitchen: Kitchen, server: ScriptedServer, at_once: int) -> None:
    """Stop a run with so many requests under way, which the server answers once the run is ending."""
    stop = threading.Event()
    server.hold = threading.Event()
    reporter_heard = threading.Event()

    def stop_then_let_go() -> None:
        while server.under_way < at_once and not reporter_heard.wait(0.001):
            pass
        stop.set()
        while not any("answers under way" in one for one in kitchen.context.reporter.said):
            reporter_heard.wait(0.001)
        server.hold.set()

    stopper = threading.Thread(target=stop_then_let_go)
    stopper.start()
    with pytest.raises(Interrupted):
        kitchen.run(concurrency=at_once, stop=stop)
    stopper.join()


def test_answers_under_way_at_a_stop_are_waited_for_and_kept(kitchen, server):
    stop_while_waiting(kitchen, server, 4)
    assert len(server.requests) == 4
    assert kitchen.run().counts["reused"] == 4
    assert len(server.requests) == 30


def test_a_stop_does_not_wait_for_a_server_that_hangs(kitchen, server, monkeypatch):
    monkeypatch.setattr("potstill.teachers.asking._GRACE_S", 0.05)
    stop = threading.Event()
    server.hold = threading.Event()
    server.always = lambda body: Reply(body=completion("late"))
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Interrupted):
        kitchen.run(stop=stop)


def fail_for(server: ScriptedServer, *numbers: int, status: int = 500) -> None:
    """Let the server refuse the questions of these numbers."""

    def reply(body: dict[str, Any]) -> Reply:
        question = body["messages"][0]["content"]
        if question in {f"question {number}" for number in numbers}:
            return Reply(status, error(f"cannot do {question}"))
        return Reply(body=completion(f"echo {question}"))

    server.always = reply


def test_failures_are_rows_of_their_own_and_retried_by_the_next_run(kitchen, server):
    fail_for(server, 3, 17)
    with pytest.raises(EngineError) as caught:
        kitchen.run()
    message = str(caught.value)
    assert "2 of 30 requests failed" in message
    assert "HTTP 500: cannot do question" in message
    assert "28 answers are kept" in message
    assert "max_failed_share" in message
    failures = kitchen.failures()
    assert sorted(row["reason"] for row in failures) == [
        "HTTP 500: cannot do question 17",
        "HTTP 500: cannot do question 3",
    ]
    assert {row["status"] for row in failures} == {500}
    server.always = lambda body: Reply(body=completion("at last"))
    asked = len(server.requests)
    result = kitchen.run()
    assert len(server.requests) == asked + 2
    assert result.counts == {"prompts": 30, "records": 30, "held_out": 0, "failed": 0, "reused": 28}
    assert {failure["prompt_id"] for failure in failures} == {
        trace.prompt_id for trace in kitchen.traces() if trace.response == "at last"
    }
    assert not (kitchen.context.folder / FAILURES_FILE).exists()


def test_a_stated_share_may_fail(kitchen, server):
    fail_for(server, 3, 17)
    result = kitchen.run(max_failed_share=0.07)
    assert result.counts == {"prompts": 30, "records": 28, "held_out": 0, "failed": 2, "reused": 0}
    assert len(kitchen.failures()) == 2
    with pytest.raises(EngineError, match="2 of 30 requests failed"):
        kitchen.run(folder="stricter", max_failed_share=0.05)


def test_without_any_answer_no_share_is_enough(kitchen, server):
    fail_for(server, *range(30), status=400)
    with pytest.raises(EngineError, match="2 of 2 requests failed"):
        kitchen.run(max_failed_share=1.0, limit=2)


def test_a_key_that_is_refused_stops_at_once(kitchen, server):
    server.always = lambda body: Reply(401, error("who are you"))
    with pytest.raises(EngineError, match="refuses the key"):
        kitchen.run(concurrency=2)
    assert len(server.requests) <= 3


def test_failures_that_do_not_end_break_the_circuit_and_lose_nothing(kitchen, server):
    kitchen.model = kitchen.model.model_copy(update={"patience_s": 0.0})
    fail_for(server, *range(5, 30), status=500)
    with pytest.raises(EngineError) as caught:
        kitchen.run(concurrency=2, max_failed_share=1.0)
    assert "requests in a row failed" in str(caught.value)
    assert "answers are kept" in str(caught.value)
    assert 25 <= len(server.requests) <= 27
    server.always = lambda body: Reply(body=completion("fine"))
    assert kitchen.run().counts["reused"] == 5


def test_prompts_that_the_server_always_breaks_down_on_do_not_use_up_the_patience_for_it(
    kitchen, server, monkeypatch
):
    monkeypatch.setattr("potstill.teachers.OpenAITeacher", partial(OpenAITeacher, backoff_s=0.001))
    kitchen.model = kitchen.model.model_copy(update={"max_retries": 9, "patience_s": 10.0})
    fail_for(server, *range(4), status=500)
    result = kitchen.run(concurrency=4, max_failed_share=0.2)
    assert (result.counts["records"], result.counts["failed"]) == (26, 4)
    reporter: Any = kitchen.context.reporter
    assert "20 requests in a row failed" in "".join(reporter.said), "the circuit was broken"


def test_prompts_that_are_refused_one_after_the_other_do_not_break_it(kitchen, server):
    fail_for(server, *range(2, 30), status=400)
    result = kitchen.run(concurrency=2, max_failed_share=0.95)
    assert (result.counts["records"], result.counts["failed"]) == (2, 28)


def test_prompts_that_are_all_refused_from_the_start_do(kitchen, server):
    fail_for(server, *range(30), status=400)
    with pytest.raises(EngineError, match="20 requests in a row failed"):
        kitchen.run(concurrency=1, max_failed_share=0.95)
    assert len(server.requests) == 20


PRICE = {"input": 1.0, "output": 10.0}
ANSWER_COST = (7 * 1.0 + 3 * 10.0) / 1e6  # of what the scripted server counts


def with_price(kitchen: Kitchen) -> None:
    kitchen.model = OpenAIModel.model_validate({**kitchen.model.model_dump(), "price": PRICE})


def test_a_budget_ends_the_step_where_it_is_used_up_and_a_larger_one_goes_on(kitchen, server):
    with_price(kitchen)
    with pytest.raises(BudgetError) as caught:
        kitchen.run(max_cost=12 * ANSWER_COST)
    message = str(caught.value)
    assert "model big: the budget is used up: $0.0004 bought, 18 requests are left" in message
    assert "raise it" in message
    assert "$0.0011" in message  # what all 30 cost
    assert "12 answers are kept" in message
    assert len(server.requests) == 12
    assert not (kitchen.context.folder / RECORDS_FILE).exists()
    with pytest.raises(BudgetError, match="18 requests are left"):
        kitchen.run(max_cost=12.5 * ANSWER_COST)  # what the first run bought counts
    assert len(server.requests) == 12
    result = kitchen.run(max_cost=30 * ANSWER_COST)
    assert len(server.requests) == 30
    assert result.counts["reused"] == 12
    bought = {"answers": 30, "prompt_tokens": 210, "response_tokens": 90, "cost_usd": 30 * ANSWER_COST}
    assert result.metrics["bought"] == pytest.approx(bought)


def test_tokens_are_bounded_without_a_price(kitchen, server):
    with pytest.raises(BudgetError, match=r"90 tokens bought, 21 requests are left(.|\n)*about 300 tokens"):
        kitchen.run(max_tokens=99)
    assert len(server.requests) == 9


def test_answers_that_are_of_no_use_are_paid_for_all_the_same(kitchen, server):
    with_price(kitchen)
    server.script.extend([Reply(body=completion("", finish_reason="content_filter"))] * 5)
    with pytest.raises(BudgetError):
        kitchen.run(max_cost=10 * ANSWER_COST, max_failed_share=1.0)
    assert len(server.requests) == 10
    assert len(kitchen.failures()) == 5


def test_a_budget_is_a_steps_own_and_what_others_bought_is_free(kitchen, server):
    with_price(kitchen)
    kitchen.run(limit=10)
    result = kitchen.run(folder="other", limit=12, max_cost=2 * ANSWER_COST)
    assert (result.counts["reused"], result.counts["records"]) == (10, 12)
    assert result.metrics["bought"]["answers"] == 2


def test_what_another_run_bought_meanwhile_is_taken_and_not_missed(kitchen, server):
    other = Kitchen(kitchen.step_context, kitchen.model, kitchen.prompts)

    def answer(body: dict[str, Any]) -> Reply:
        server.always = echo
        other.run(folder="other")  # in the server's thread, while the first answer is awaited
        return echo(body)

    echo, server.always = server.always, answer
    result = kitchen.run(concurrency=1)
    assert (result.counts["records"], result.counts["reused"]) == (30, 29)
    assert len(server.requests) == 31, "only the answer that both awaited is bought twice"


def test_what_came_of_no_use_while_a_run_was_ending_is_paid_for(kitchen, server):
    with_price(kitchen)
    server.script.append(Reply(body=completion("", finish_reason="content_filter")))
    stop_while_waiting(kitchen, server, 1)
    with pytest.raises(BudgetError, match="30 requests are left"):
        kitchen.run(max_cost=ANSWER_COST)
    assert len(server.requests) == 1


def test_a_budget_changes_nothing_of_what_is_made(kitchen, server):
    plain = meaning(kitchen.settings())
    assert meaning(kitchen.settings(max_cost=1.0, max_tokens=5, concurrency=3)) == plain


def test_a_bounded_cost_without_a_price_is_refused_before_anything_is_asked(kitchen, server):
    with pytest.raises(BudgetError, match=r"price(.|\n)*dollars a million tokens"):
        kitchen.run(max_cost=1.0)
    assert server.requests == []


def test_a_budget_is_refused_where_the_server_counts_nothing(kitchen, server):
    server.always = lambda body: Reply(body={**completion("fine"), "usage": None})
    with pytest.raises(BudgetError, match="does not say how many tokens"):
        kitchen.run(max_tokens=1000)
    assert len(server.requests) == 1
    assert kitchen.run().counts["reused"] == 1


def test_spent_and_projected_cost_are_shown_while_it_runs(kitchen, server):
    with_price(kitchen)
    kitchen.run(limit=10, max_cost=1.0, concurrency=1)
    reporter: Any = kitchen.context.reporter
    assert reporter.figures[4] == {
        "tokens": "50",
        "spent": "$0.0002/$1.00",
        "projected": "$0.0004",
        "at once": 1,
        "failed": 0,
    }


def test_servers_that_fail_in_every_way_lose_nothing_and_sell_nothing_twice(kitchen, server, monkeypatch):
    monkeypatch.setattr("potstill.teachers.OpenAITeacher", partial(OpenAITeacher, backoff_s=0.01))
    faults = Faults(0.4, seed=4, drip_s=1.5)
    server.always = faults
    rows = [json.dumps({"prompt": f"question {number}"}) for number in range(120)]
    kitchen.prompts.write_text("\n".join(rows), encoding="utf-8")
    kitchen.model = kitchen.model.model_copy(update={"max_retries": 6, "timeout_s": 1.0})
    counted: list[tuple[str, int]] = []
    result = None
    while result is None and len(counted) < 20:
        try:
            result = kitchen.run(logprobs=1, concurrency=16)
        except EngineError as error:
            counted.append((error.what, len(kitchen.failures())))
    assert result is not None
    assert counted
    assert all(what.startswith(f"{failures} of 120 requests failed") for what, failures in counted)
    assert faults.met.keys() == faults.faults.keys()
    assert result.counts["records"] == 120
    assert result.counts["failed"] == 0
    assert faults.delivered == {f"question {number}": 1 for number in range(120)}
    assert [trace.response for trace in kitchen.traces()] == [f"echo question {n}" for n in range(120)]


def test_the_key_is_in_no_file_event_or_message(kitchen, server, monkeypatch, tmp_path):
    monkeypatch.setenv("CANARY", KEY)
    kitchen.model = kitchen.model.model_copy(update={"api_key_env": "CANARY"})
    with_price(kitchen)
    server.script.append(Reply(400, error(f"wrong key {KEY}")))
    kitchen.run(max_failed_share=0.5)
    reporter: Any = kitchen.context.reporter
    said = json.dumps([reporter.events, reporter.figures]) + "".join(reporter.said)
    assert "[the API key]" in kitchen.failures()[0]["reason"]
    server.always = lambda body: Reply(401, error(f"wrong key {KEY}"))
    with pytest.raises(EngineError) as caught:
        kitchen.run(folder="again", seed=9)
    assert "[the API key]" in str(caught.value)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".sqlite" for path in files)
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in said + str(caught.value) + repr(caught.value)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_a_share_that_holds_no_prompt_out_is_said_before_anything_is_asked(kitchen, server):
    kitchen.run(held_out=0.0001)
    said = kitchen.context.reporter.said
    warned = next(number for number, line in enumerate(said) if "none of the 30 prompts is held out" in line)
    asked = next(number for number, line in enumerate(said) if "30 requests to big" in line)
    assert warned < asked
    kitchen.run(folder="other", held_out=0.4)
    assert not any("is held out" in line for line in kitchen.context.reporter.said)


def test_held_out_prompts_are_those_that_a_source_would_hold_out(kitchen, server):
    result = kitchen.run(held_out=0.4)
    by_step = [trace.held_out for trace in kitchen.traces()]
    kitchen.run(folder="source", data={"path": str(kitchen.prompts), "held_out": 0.4})
    assert by_step == [trace.held_out for trace in kitchen.traces()]
    assert result.counts["held_out"] == sum(by_step)
    assert 4 < sum(by_step) < 20


def test_rows_without_a_prompt_are_an_error(kitchen, tmp_path):
    (tmp_path / "book.txt").write_text("A paragraph.\n\nAnother.\n", encoding="utf-8")
    with pytest.raises(DataError, match="no row is a prompt"):
        kitchen.run(data={"path": str(tmp_path / "book.txt")})


def test_logprobs_are_averaged_and_their_temperature_is_written_down(kitchen, server):
    body = completion("19")
    body["choices"][0]["logprobs"] = {
        "content": [{"token": "1", "logprob": -1.0}, {"token": "19", "logprob": -2.0}]
    }
    server.always = lambda _: Reply(body=body)
    kitchen.model = kitchen.model.model_copy(update={"logprob_temperature": 1.0})
    result = kitchen.run(limit=2, logprobs=1)
    assert [trace.logprobs for trace in kitchen.traces()] == [[-1.0, -2.0]] * 2
    assert kitchen.traces()[0].sampling["logprob_temperature"] == 1.0
    assert (result.metrics["mean_logprob"], result.metrics["unknown_logprobs"]) == (-1.5, 0)


def with_alternatives(*likeliest: list[tuple[str, float]]) -> Reply:
    """An answer of tokens that are each the first of the likeliest in its place."""
    body = completion("".join(place[0][0] for place in likeliest))
    body["choices"][0]["logprobs"] = {
        "content": [
            {
                "token": place[0][0],
                "logprob": place[0][1],
                "top_logprobs": [{"token": token, "logprob": logprob} for token, logprob in place],
            }
            for place in likeliest
        ]
    }
    return Reply(body=body)


def test_alternatives_are_kept_with_the_traces_and_not_asked_for_again(kitchen, server):
    server.always = lambda _: with_alternatives([("1", -0.5), ("2", -1.0)], [("9", -0.25), ("8", -2.0)])
    kitchen.run(limit=3, logprobs=2)
    assert [one["top_logprobs"] for one in server.requests] == [2, 2, 2]
    first = kitchen.traces()
    for trace in first:
        assert trace.logprobs == [-0.5, -0.25]
        assert [*trace.alternatives] == [[(b"1", -0.5), (b"2", -1.0)], [(b"9", -0.25), (b"8", -2.0)]]
    result = kitchen.run(folder="again", limit=4, logprobs=2)
    assert (result.counts["reused"], len(server.requests)) == (3, 4)
    assert kitchen.traces()[:3] == first
    kitchen.run(folder="more", limit=3, logprobs=3)  # other answers, as they hold more
    assert len(server.requests) == 7


def test_more_logprobs_than_the_engine_gives_are_refused_before_anything_is_asked(kitchen):
    kitchen.model = SolverModel(engine="solver", function="potstill.teachers.solvers:chain_sum")
    with pytest.raises(EngineError, match="gives 0 log-probabilities a token, not 5"):
        kitchen.run(logprobs=5)


def test_no_more_requests_are_planned_at_once_than_are_in_flight(kitchen, server, monkeypatch):
    """Memory is constant: a list of the plan, of what is missing or of all tasks would hold every request."""
    alive = most = 0

    class Counted(PlannedAnswer):
        def __init__(self, *fields: Any) -> None:
            nonlocal alive, most
            super().__init__(*fields)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    monkeypatch.setattr("potstill.generate.PlannedAnswer", Counted)
    result = kitchen.run(samples=10, concurrency=4)
    assert result.counts["records"] == 300 == len(server.requests)
    assert 4 <= most <= 4 + 4


class TestLocalEngine:
    """The transformers engine on a tiny model: token ids all the way."""

    @pytest.fixture
    def kitchen(self, step_context: Any, tiny_model_folder: Path, prompts: Path) -> Kitchen:
        model = TransformersModel(path=str(tiny_model_folder), device="cpu", dtype="float32")
        return Kitchen(step_context, model, prompts)

    def test_a_trace_renders_from_its_own_ids(self, kitchen):
        result = kitchen.run(limit=5, temperature=0.8, max_new_tokens=12, logprobs=1)
        renderer = Renderer(load_tokenizer(kitchen.model))
        assert result.tokenizer == renderer.tokenizer_hash
        for trace in kitchen.traces():
            assert trace.tokenizer == renderer.tokenizer_hash
            assert trace.prompt_token_ids == renderer.prompt_ids(trace.messages)
            rendered = renderer.render(trace)
            response = trace.response_token_ids or []
            assert rendered.ids[: rendered.mask.index(1) + len(response)] == [
                *(trace.prompt_token_ids or []),
                *response,
            ]
            assert len(trace.logprobs or []) == len(trace.token_bytes or []) == len(response)
            assert sum(trace.token_bytes or []) == len((trace.response or "").encode())
            assert trace.sampling["logprob_temperature"] == 1.0
            assert trace.sampling["template"] == renderer.template_hash
        assert result.metrics["mean_logprob"] < 0

    def test_a_prompt_past_the_context_is_a_failed_row(self, kitchen, tmp_path):
        rows = [{"prompt": "short"}, {"prompt": "long " * 600}, {"prompt": "short too"}]
        path = write_rows(tmp_path / "mixed.jsonl", rows)
        settings = {"data": {"path": str(path)}, "temperature": 0.0, "max_new_tokens": 3}
        with pytest.raises(
            EngineError, match=r"1 of 3 requests failed: 1 x the prompt has .* the context holds 512"
        ):
            kitchen.run(**settings)
        result = kitchen.run(**settings, max_failed_share=0.4)
        assert (result.counts["records"], result.counts["reused"]) == (2, 2)

    def test_a_template_that_refuses_a_row_fails_that_row(self, kitchen, tmp_path):
        template = tmp_path / "strict.jinja"
        refusal = "{% if messages[-1]['content'] == 'c' %}{{ raise_exception('no such text') }}{% endif %}"
        template.write_text(refusal + "{{ messages[-1]['content'] }}", encoding="utf-8")
        kitchen.model = kitchen.model.model_copy(update={"chat_template": str(template)})
        rows = [
            [{"role": "user", "content": "a"}],
            [{"role": "user", "content": "c"}],
        ]
        path = tmp_path / "chats.jsonl"
        path.write_text("\n".join(json.dumps({"messages": row}) for row in rows), encoding="utf-8")
        result = kitchen.run(data={"path": str(path)}, max_new_tokens=3, max_failed_share=0.5)
        assert result.counts["records"] == 1
        assert "no such text" in kitchen.failures()[0]["reason"]

    def test_a_response_that_starts_inside_the_think_block_is_split(self, kitchen, tmp_path):
        template = tmp_path / "thinking.jinja"
        template.write_text("{{ messages[-1]['content'] }}\n<think>\n", encoding="utf-8")
        kitchen.model = kitchen.model.model_copy(update={"chat_template": str(template)})
        kitchen.run(limit=2, temperature=0.0, max_new_tokens=4)
        for trace in kitchen.traces():
            assert trace.finish_reason == "length"
            assert (trace.reasoning, trace.answer) == ((trace.response or "").strip(), "")


class TestSolver:
    """Solvers see the record."""

    @pytest.fixture
    def kitchen(self, step_context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kitchen:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "kitchen_solvers.py").write_text(
            "def echo(record):\n"
            "    if record.reference == '3':\n"
            "        raise ValueError('three is too much')\n"
            "    return f'<think>\\n{record.meta}\\n</think>\\n\\n{record.reference}'\n",
            encoding="utf-8",
        )
        path = tmp_path / "problems.jsonl"
        rows = [json.dumps({"question": f"how many {n}", "answer": f"so #### {n}"}) for n in range(5)]
        path.write_text("\n".join(rows), encoding="utf-8")
        return Kitchen(step_context, SolverModel(engine="solver", function="kitchen_solvers:echo"), path)

    def test_its_traces_have_reasoning_and_no_sampling(self, kitchen):
        result = kitchen.run(max_failed_share=0.2)
        assert [trace.answer for trace in kitchen.traces()] == ["0", "1", "2", "4"]
        assert all(trace.reasoning for trace in kitchen.traces())
        assert {json.dumps(trace.sampling) for trace in kitchen.traces()} == {"{}"}
        assert "mean_response_tokens" not in result.metrics
        assert "ValueError: three is too much" in kitchen.failures()[0]["reason"]

    def test_the_shipped_one_answers_reasoning_gyms_sums(self, kitchen):
        pytest.importorskip("reasoning_gym")
        kitchen.model = SolverModel(engine="solver", function="potstill.teachers.solvers:chain_sum")
        kitchen.run(data={"task": "chain_sum", "size": 20})
        assert all(trace.answer == trace.reference for trace in kitchen.traces())
        assert len({trace.reference for trace in kitchen.traces()}) > 10


class TestGroups:
    """Traces and right answers by the labels that the rows of a step have."""

    def data(self, folder, **of_label):
        """A labelled source a value, its questions and their right answers."""
        sources = []
        for value, rows in of_label.items():
            path = folder / f"{value}.jsonl"
            lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
            path.write_text("\n".join(lines), encoding="utf-8")
            sources.append({"path": str(path), "labels": {"category": value}})
        return sources

    def test_the_row_s_own_verifier_judges_the_traces_of_each_label(self, kitchen, server, tmp_path):
        server.always = lambda body: Reply(body=completion("The answer is 4"))
        data = self.data(
            tmp_path,
            sums=[("2 + 2", "#### 4"), ("2 + 3", "#### 5"), ("1 + 3", "#### 4")],
            odd=[("?", "#### 7")],
        )
        result = kitchen.run(data=data, samples=2)
        assert result.metrics["groups"] == {
            "category": {
                "odd": {"traces": 2, "judged": 2, "right": 0},
                "sums": {"traces": 6, "judged": 6, "right": 4},
            }
        }
        assert result.extra["labels"] == ["category"]
        assert kitchen.traces()[0].verdicts == {}, (
            "it is counted, and traces stay as they are without a verifier"
        )

    def test_the_step_s_verifier_stands_in_its_place(self, kitchen, server, tmp_path):
        (tmp_path / "mine.py").write_text(
            "def right(answer, row):\n    return 'no' in answer\n", encoding="utf-8"
        )
        server.always = lambda body: Reply(body=completion("no idea"))
        data = self.data(tmp_path, sums=[("2 + 2", "#### 4")])
        result = kitchen.run(data=data, verifier={"function": f"{tmp_path}/mine.py:right"})
        assert result.metrics["groups"] == {"category": {"sums": {"traces": 1, "judged": 1, "right": 1}}}

    def test_what_cannot_be_judged_is_counted_alone(self, kitchen, tmp_path):
        path = tmp_path / "open.jsonl"
        path.write_text('{"prompt": "tell me"}', encoding="utf-8")
        result = kitchen.run(data={"path": str(path), "labels": {"category": "open"}})
        assert result.metrics["groups"] == {"category": {"open": {"traces": 1, "judged": 0, "right": 0}}}

    def test_labels_go_on_through_the_steps_behind(self, kitchen, tmp_path, seal):
        folder = tmp_path / "told"
        folder.mkdir()
        asked = [{"role": "user", "content": "2 + 2"}]
        write_records(folder / RECORDS_FILE, [Record("p", asked, meta={"category": "sums", "level": "low"})])
        told = seal(folder, "select", StepResult(extra={"labels": ["category"]}))
        kitchen.step_context = partial(kitchen.step_context, data={"told": [told]})
        assert set(kitchen.run(data="told:prompts").metrics["groups"]) == {"category"}
        part = {"step": "told", "where": {"level": "low"}}
        assert set(kitchen.run(folder="part", data=part).metrics["groups"]) == {"level", "category"}

    def test_without_labels_nothing_is_judged_or_counted(self, kitchen):
        result = kitchen.run(limit=1)
        assert "groups" not in result.metrics
        assert result.extra["labels"] == []


def rollouts_of(path: Path, *responses: tuple[str, str], sample: int = 0, **fields: Any) -> None:
    """An artifact's records: a student's responses, each with how it ended."""
    records = [
        Record(
            f"p{number}",
            [{"role": "user", "content": f"question {number}"}],
            response=response,
            finish_reason=ended,
            sample=sample,
            model="student",
            held_out=number == 1,
            **fields,
        )
        for number, (response, ended) in enumerate(responses)
    ]
    path.mkdir()
    write_records(path / RECORDS_FILE, records)


LONG = "one two three four five six seven eight nine ten"


class TestContinuing:
    """Mixed policy: what a student began and did not finish, a teacher writes to its end."""

    @pytest.fixture
    def rollouts(self, tmp_path: Path, seal: Any) -> Any:
        folder = tmp_path / "rollouts"
        rollouts_of(folder, (LONG, "length"), (LONG + " eleven", "length"), ("done", "stop"))
        return seal(folder, "generate")

    def continue_(
        self, kitchen: Kitchen, rollouts: Any, *, folder: str = "artifact", **fields: Any
    ) -> StepResult:
        kitchen.context = kitchen.step_context(
            "generate", folder=folder, models={"big": kitchen.model}, data={"rollouts": [rollouts]}
        )
        settings = {"do": "generate", "model": "big", "data": "rollouts", "continue": {}, **fields}
        return run(GenerateSettings.model_validate(settings), kitchen.context)

    @pytest.fixture
    def kitchen(self, kitchen: Kitchen, server: ScriptedServer) -> Kitchen:
        kitchen.model = kitchen.model.model_copy(update={"continue_final_message": True})
        server.always = lambda body: Reply(body=completion(" and the rest"))
        return kitchen

    def test_a_trace_says_where_its_beginning_ends_and_who_wrote_it(self, kitchen, server, rollouts):
        result = self.continue_(kitchen, rollouts)
        traces = kitchen.traces()
        assert result.counts["records"] == 2, "the finished one is left alone"
        asked_of = {body["messages"][0]["content"]: body["messages"][-1] for body in server.requests}
        for trace in traces:
            asked = asked_of[trace.messages[0]["content"]]
            assert asked["role"] == "assistant"
            assert trace.response == asked["content"] + " and the rest"
            assert trace.prefix_characters == len(asked["content"])
            assert len(LONG) / 2 <= trace.prefix_characters <= len(LONG) + len(" eleven")
            assert trace.sampling["prefix_model"] == "student"
            assert trace.model == kitchen.model.known_as()
            assert (trace.finish_reason, trace.response_token_ids) == ("stop", None)
        assert [trace.held_out for trace in traces] == [False, True]

    def test_what_was_continued_once_is_not_bought_again(self, kitchen, server, rollouts):
        self.continue_(kitchen, rollouts)
        again = self.continue_(kitchen, rollouts, folder="again")
        assert again.counts["reused"] == 2
        asked = [body for body in server.requests if body["max_tokens"] > 1]  # the first was about beginnings
        assert len(asked) == 2
        assert len(server.requests) == 3
        self.continue_(kitchen, rollouts, folder="elsewhere", **{"continue": {"cut": [0.1, 0.3]}})
        assert len(server.requests) == 6

    def test_several_endings_and_several_rollouts_of_a_prompt_are_samples_of_their_own(
        self, kitchen, server, tmp_path, seal
    ):
        for sample in (0, 1):
            rollouts_of(tmp_path / f"part{sample}", (f"{LONG} {sample}", "length"), sample=sample)
        records = [
            one for sample in (0, 1) for one in read_records(tmp_path / f"part{sample}" / RECORDS_FILE)
        ]
        (tmp_path / "both").mkdir()
        write_records(tmp_path / "both" / RECORDS_FILE, records)
        self.continue_(kitchen, seal(tmp_path / "both", "generate"), samples=3)
        traces = kitchen.traces()
        assert sorted(trace.sample for trace in traces) == [0, 1, 2, 3, 4, 5]
        assert len({trace.sampling["seed"] for trace in traces}) == 6
        assert len({trace.id for trace in traces}) == 6

    def test_log_probabilities_begin_where_the_teacher_does(self, kitchen, server, rollouts):
        body = completion(" yes no")
        body["choices"][0]["logprobs"] = {
            "content": [{"token": " yes", "logprob": -1.0}, {"token": " no", "logprob": -2.0}]
        }
        server.always = lambda _: Reply(body=body)
        result = self.continue_(kitchen, rollouts, logprobs=1)
        assert all(trace.alternatives is None for trace in kitchen.traces())
        for trace in kitchen.traces():
            assert math.isnan(trace.logprobs[0])
            assert trace.logprobs[1:] == [-1.0, -2.0]
            assert trace.token_bytes == [trace.prefix_characters, 4, 3]
        assert result.metrics["mean_logprob"] == -1.5

    def test_nothing_is_known_of_the_places_that_another_model_filled(self, kitchen, server, rollouts):
        server.always = lambda _: with_alternatives([(" yes", -1.0), (" no", -2.0)])
        self.continue_(kitchen, rollouts, logprobs=2)
        for trace in kitchen.traces():
            assert [*trace.alternatives] == [[], [(b" yes", -1.0), (b" no", -2.0)]]
            assert len(trace.logprobs) == 2

    def test_a_server_that_is_not_known_to_go_on_is_asked_nothing(self, kitchen, server, rollouts):
        kitchen.model = kitchen.model.model_copy(update={"continue_final_message": False})
        with pytest.raises(EngineError, match="not known to continue a response"):
            self.continue_(kitchen, rollouts)
        assert server.requests == []

    def test_without_an_unfinished_response_there_is_nothing_to_do(self, kitchen, tmp_path, seal):
        rollouts_of(tmp_path / "finished", ("done", "stop"))
        with pytest.raises(DataError, match="no response is there to be continued"):
            self.continue_(kitchen, seal(tmp_path / "finished", "generate"))

    def test_an_unknown_key_is_named_with_the_nearest(self):
        from potstill.core.errors import RecipeError
        from potstill.recipe import one_step_recipe

        with pytest.raises(RecipeError, match="did you mean 'only'"):
            one_step_recipe("generate", ["model=./m", "data=./d", "continue.onyl=all"])

    class TestLocally:
        """By token ids, on a tiny model that is its own student."""

        @pytest.fixture
        def kitchen(self, step_context: Any, tiny_model_folder: Path, prompts: Path) -> Kitchen:
            model = TransformersModel(path=str(tiny_model_folder), device="cpu", dtype="float32")
            return Kitchen(step_context, model, prompts)

        def test_the_ids_are_the_students_and_then_the_teachers(self, kitchen, seal):
            kitchen.run(folder="rollouts", limit=6, temperature=0.9, max_new_tokens=16)
            rolled = kitchen.traces()
            rollouts = seal(kitchen.context.folder, "generate")
            test = TestContinuing()
            test.continue_(kitchen, rollouts, temperature=0.0, max_new_tokens=8, logprobs=1)
            renderer = Renderer(load_tokenizer(kitchen.model))
            traces = kitchen.traces()
            by_prompt = {trace.prompt_id: trace for trace in rolled}
            assert len(traces) > 3
            for trace in traces:
                began = by_prompt[trace.prompt_id].response_token_ids
                count = trace.prefix_tokens
                assert 1 <= count <= 16
                assert trace.response_token_ids[:count] == began[:count]
                assert trace.prompt_token_ids == renderer.prompt_ids(trace.messages)
                assert len(trace.logprobs) == len(trace.response_token_ids)
                assert all(map(math.isnan, trace.logprobs[:count]))
                assert not any(map(math.isnan, trace.logprobs[count:]))
                assert trace.response == renderer.tokenizer.decode(trace.response_token_ids)
                assert sum(trace.token_bytes) == len(trace.response.encode())
                masked = renderer.render(trace, mask_prefix=True)
                assert masked.mask.index(1) == len(trace.prompt_token_ids) + count

        def test_greedy_endings_are_those_of_the_whole(self, kitchen, seal):
            kitchen.run(folder="whole", limit=6, temperature=0.0, max_new_tokens=16)
            whole = kitchen.traces()
            short = {trace.prompt_id: trace for trace in whole if trace.finish_reason == "length"}
            rollouts = seal(kitchen.context.folder, "generate")
            TestContinuing().continue_(kitchen, rollouts, temperature=0.0, max_new_tokens=16)
            for trace in kitchen.traces():
                expected = short[trace.prompt_id].response_token_ids
                assert trace.response_token_ids[: len(expected)] == expected
