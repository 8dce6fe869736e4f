import asyncio
import math
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from potstill.core.errors import EngineError
from potstill.core.settings import meaning
from potstill.data.chat import split_reasoning
from potstill.models import tokenizer_hash
from potstill.teachers import OpenAIModel, Request, RequestError, check_teacher, open_teacher
from potstill.teachers.openai import OpenAITeacher
from potstill.teachers.protocol import Usage
from potstill.teachers.server_errors import retry_after_s

from ...servers import Reply, ScriptedServer, completion, error, running_server

KEY = "sk-canary-4711"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running_server() as running:
        yield running


def settings_of(server: ScriptedServer, **fields: Any) -> OpenAIModel:
    return OpenAIModel(**{"engine": "openai", "base_url": server.base_url, "model": "big", **fields})


def ask(settings: OpenAIModel, *questions: str, **request: Any) -> list[Any]:
    """The answers, or the errors in their place."""

    async def run() -> list[Any]:
        teacher = OpenAITeacher(settings, backoff_s=0.001)
        try:
            return await asyncio.gather(
                *(
                    teacher.answer(Request([{"role": "user", "content": one}], **request))
                    for one in questions
                ),
                return_exceptions=True,
            )
        finally:
            await teacher.close()

    return asyncio.run(run())


def test_a_request_says_exactly_how_to_sample(server):
    [answer] = ask(
        settings_of(server, extra_body={"top_k": -1}),
        "hello",
        temperature=0.3,
        top_p=0.9,
        max_new_tokens=5,
        seed=2**31 + 9,
    )
    assert answer.response == "echo hello"
    assert (answer.finish_reason, answer.prompt_tokens, answer.response_tokens) == ("stop", 7, 3)
    assert server.requests == [
        {
            "top_k": -1,
            "model": "big",
            "messages": [{"role": "user", "content": "hello"}],
            "temperature": 0.3,
            "top_p": 0.9,
            "max_tokens": 5,
            "seed": 9,
        }
    ]


@pytest.mark.parametrize(
    "fault",
    [
        Reply(500, error("out of order")),
        Reply(503, "<html>Bad gateway</html>"),
        Reply(429, error("slow down"), {"Retry-After": "0"}),
        Reply(body=completion("half a sentence"), cut=True),
    ],
    ids=["500", "503", "429", "cut off"],
)
def test_what_may_pass_is_tried_again(server, fault):
    server.script.extend([fault, fault])
    [answer] = ask(settings_of(server), "hello")
    assert answer.response == "echo hello"
    assert len(server.requests) == 3


def test_retry_after_is_waited_for(server):
    server.script.append(Reply(429, error("slow down"), {"Retry-After": "0.3"}))
    started = time.monotonic()
    [answer] = ask(settings_of(server), "hello")
    assert answer.response == "echo hello"
    assert time.monotonic() - started >= 0.3


def test_tries_are_bounded(server):
    server.always = lambda body: Reply(500, error("out of order"))
    [failure] = ask(settings_of(server, max_retries=2), "hello")
    assert isinstance(failure, RequestError)
    assert (failure.status, failure.blames_row) == (500, False)
    assert "out of order" in str(failure)
    assert len(server.requests) == 3


def test_a_server_that_asks_for_an_hour_is_not_waited_for(server):
    server.always = lambda body: Reply(429, error("quota"), {"Retry-After": "3600"})
    [failure] = ask(settings_of(server), "hello")
    assert isinstance(failure, RequestError)
    assert "it asks to wait 3600 s" in str(failure)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, "refuses the key"),
        (403, "refuses the key"),
        (404, "no such model or address"),
        (402, "no credit"),
        (301, "no such model or address"),
    ],
)
def test_what_no_request_can_escape_is_not_tried_again(server, status, expected):
    server.always = lambda body: Reply(status, error("no"), {"Location": "http://127.0.0.1:9/"})
    [failure] = ask(settings_of(server), "hello")
    assert isinstance(failure, EngineError)
    assert not isinstance(failure, RequestError)
    assert expected in str(failure)
    assert "to mend" in str(failure)
    assert len(server.requests) == 1


def test_errors_name_the_address_that_was_asked(server):
    async def score() -> Any:
        teacher = OpenAITeacher(settings_of(server), backoff_s=0.001)
        try:
            return await asyncio.gather(teacher.prompt_logprobs([1, 2], 3), return_exceptions=True)
        finally:
            await teacher.close()

    server.always = lambda body: Reply(404, error("no"))
    [scored], [answered] = asyncio.run(score()), ask(settings_of(server), "hello")
    assert str(scored).startswith(f"{server.base_url}/completions: the server has no such model")
    assert str(answered).startswith(f"{server.base_url}/chat/completions: the server has no such model")
    server.always = lambda body: Reply(body={"choices": []})
    [scored], [answered] = asyncio.run(score()), ask(settings_of(server), "hello")
    assert "OpenAI's API answers at /v1/completions" in str(scored)
    assert "OpenAI's API answers at /v1/chat/completions" in str(answered)


def test_a_refused_prompt_fails_alone_and_at_once(server):
    server.script.append(Reply(400, error("this model's maximum context length is 4096 tokens")))
    [failure] = ask(settings_of(server), "hello")
    assert isinstance(failure, RequestError)
    assert (failure.status, failure.blames_row) == (400, True)
    assert "maximum context length" in failure.what
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (
            Reply(body="<html>Welcome</html>", headers={"Content-Type": "text/html"}),
            "not JSON: <html>Welcome",
        ),
        (Reply(body={"choices": []}), "no choices"),
        (Reply(body="[1, 2]"), "no choices"),
        (Reply(body=completion(None)), "no text"),
        (Reply(body=completion("", finish_reason="content_filter")), "'content_filter'"),
        (Reply(body=completion("x", finish_reason=None)), "neither 'stop' nor 'length'"),
    ],
)
def test_an_answer_that_is_no_response_is_said_so(server, reply, expected):
    server.always = lambda body: reply
    [failure] = ask(settings_of(server), "hello")
    assert isinstance(failure, RequestError)
    assert expected in str(failure)
    assert len(server.requests) == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_that_was_never_reached_ends_the_work():
    settings = OpenAIModel(engine="openai", base_url=f"http://127.0.0.1:{free_port()}/v1", model="big")
    [failure] = ask(settings, "hello")
    assert isinstance(failure, EngineError)
    assert not isinstance(failure, RequestError)
    assert "cannot be reached" in str(failure)
    assert settings.base_url in str(failure)


def test_a_server_that_dies_midway_fails_the_request_only():
    with running_server() as server:
        settings = settings_of(server, max_retries=2)

        async def run() -> Any:
            teacher = OpenAITeacher(settings, backoff_s=0.001)
            try:
                await teacher.answer(Request([{"role": "user", "content": "one"}]))
                await asyncio.to_thread(server.shutdown)
                server.server_close()
                server.always = lambda body: Reply(cut=True)
                return await asyncio.gather(
                    teacher.answer(Request([{"role": "user", "content": "two"}])), return_exceptions=True
                )
            finally:
                await teacher.close()

        [failure] = asyncio.run(run())
    assert isinstance(failure, RequestError)
    assert not failure.blames_row


def test_no_answer_in_time_is_tried_again(server):
    server.hold = threading.Event()
    [failure] = ask(settings_of(server, timeout_s=0.5, max_retries=1), "hello")
    assert isinstance(failure, RequestError)
    assert "no whole answer within 0.5 s" in str(failure)
    assert len(server.requests) == 2


def test_an_answer_that_drips_is_not_waited_for_beyond_its_time(server):
    server.script.append(Reply(body=completion("slow"), drip_s=20.0))
    started = time.monotonic()
    [answer] = ask(settings_of(server, timeout_s=0.4), "hello")
    assert answer.response == "echo hello"
    assert 0.4 <= time.monotonic() - started < 10


def test_an_answer_that_came_while_the_process_stood_still_is_not_asked_for_again(server):
    """Pitfall: a run is stopped by Ctrl-Z, its answers arrive, and each is past its time when it goes on."""
    sent = threading.Event()
    server.hold = threading.Event()
    server.script.append(Reply(body=completion("paid"), sent=sent.set))

    async def run() -> str:
        teacher = OpenAITeacher(settings_of(server, timeout_s=1.0), backoff_s=0.001)
        asked = asyncio.create_task(teacher.answer(Request([{"role": "user", "content": "hello"}])))
        while not server.requests:
            await asyncio.sleep(0)
        server.hold.set()
        assert sent.wait(30)
        time.sleep(1.5)  # nothing of the loop runs
        try:
            return (await asked).response
        finally:
            await teacher.close()

    assert asyncio.run(run()) == "paid"
    assert len(server.requests) == 1


def test_retry_after_keeps_the_whole_client_waiting(server):
    """Pitfall: the one request that was refused waits, and all others run into the same wall."""
    refused = threading.Event()
    server.script.append(Reply(429, error("slow down"), {"Retry-After": "0.5"}, sent=refused.set))
    arrivals: list[float] = []

    def answer(body: dict[str, Any]) -> Reply:
        arrivals.append(time.monotonic())
        assert refused.wait(30)
        return Reply(body=completion("fine"))

    server.always = answer
    started = time.monotonic()
    ask(settings_of(server, concurrency=2), *map(str, range(12)))
    # One is under way when the refusal is sent, and its answer may be read before the refusal is.
    assert len([one for one in arrivals if one - started < 0.5]) <= 2
    assert len(arrivals) == 12


def test_no_more_are_in_flight_than_the_cap(server):
    server.hold = full = threading.Event()

    def open_once_full() -> None:
        while server.under_way < 3 and not full.wait(0.001):
            pass
        full.set()

    opener = threading.Thread(target=open_once_full)
    opener.start()
    ask(settings_of(server, concurrency=3), *map(str, range(30)))
    opener.join()
    assert server.most_under_way == 3


def test_connections_are_as_many_as_requests_at_once_and_are_used_again(server):
    held: list[Any] = []

    async def ask_in_turn_then_together() -> None:
        teacher = OpenAITeacher(settings_of(server), backoff_s=0.001)
        request = Request([{"role": "user", "content": "hello"}])
        for _ in range(5):
            await teacher.answer(request)
        held.append(len(server.clients))
        for _ in range(3):
            await asyncio.gather(*(teacher.answer(request) for _ in range(4)))
        held.append(len(server.clients))
        await teacher.close()

    asyncio.run(ask_in_turn_then_together())
    assert held == [1, 4]


def test_a_server_that_fails_everything_is_given_up_after_the_patience_for_it(server):
    server.always = lambda body: Reply(500, error("out of order"))
    failures = ask(settings_of(server, patience_s=0.05, concurrency=4), *map(str, range(40)))
    ended = [one for one in failures if not isinstance(one, RequestError)]
    assert len(ended) > 20
    assert all("requests in a row failed" in str(one) and "out of order" in str(one) for one in ended)
    assert all("answers are kept" in str(one) for one in ended)
    assert len(server.requests) < 60


def test_what_is_no_json_may_pass_once_the_server_has_given_some(server):
    page = Reply(body="<html>Bad gateway</html>", headers={"Content-Type": "text/html"})
    server.script.extend([Reply(body=completion("first")), page, Reply(body='{"choices": [{"mess')])
    first, second = ask(settings_of(server, concurrency=1), "one", "two")
    assert (first.response, second.response) == ("first", "echo two")
    assert len(server.requests) == 4


def test_what_an_unusable_answer_was_billed_is_known(server):
    server.script.append(Reply(body=completion("", finish_reason="content_filter")))
    [failure] = ask(settings_of(server), "hello")
    assert failure.usage == Usage(7, 3)
    server.script.append(Reply(400, error("no")))
    [failure] = ask(settings_of(server), "hello")
    assert failure.usage == Usage()


def test_the_detail_of_a_server_made_of_fastapi_is_its_reason(server, tiny_model_folder):
    """Pitfall: `transformers serve` refuses a field that it does not know, and says so in `detail`."""
    server.always = lambda body: (
        Reply(422, {"detail": "Unexpected fields in the request: {'return_token_ids'}"})
        if "return_token_ids" in body
        else Reply(422, {"detail": "no such thing"})
    )
    [failure] = ask(settings_of(server, tokenizer=str(tiny_model_folder)), "one")
    assert failure.what == "HTTP 422: no such thing"
    assert len(server.requests) == 2


def test_ids_are_asked_for_where_they_are_of_use_and_taken(server, tiny_model_folder):
    ask(settings_of(server, tokenizer=str(tiny_model_folder)), "hello")
    ask(settings_of(server), "hello")
    ask(
        settings_of(server, tokenizer=str(tiny_model_folder), extra_body={"return_token_ids": False}), "hello"
    )
    assert [body.get("return_token_ids") for body in server.requests] == [True, None, False]


def test_a_server_that_knows_no_such_parameter_is_asked_without_it(server, tiny_model_folder):
    server.always = lambda body: (
        Reply(400, error("Unrecognized request argument supplied: return_token_ids"))
        if "return_token_ids" in body
        else Reply(body=completion("fine"))
    )
    answers = ask(settings_of(server, tokenizer=str(tiny_model_folder), concurrency=1), "one", "two")
    assert [answer.response for answer in answers] == ["fine", "fine"]
    assert len(server.requests) == 4  # both had been put into words before the first was refused


def test_a_server_that_knows_no_ids_of_alternatives_is_asked_without_any_ids(server, tiny_model_folder):
    refused = "Unrecognized request argument supplied: return_tokens_as_token_ids"
    server.always = lambda body: (
        Reply(400, error(refused))
        if "return_tokens_as_token_ids" in body
        else with_alternatives("x", [[{"token": "x", "logprob": -1.0}]])
    )
    [answer] = ask(settings_of(server, tokenizer=str(tiny_model_folder)), "hello", logprobs=2)
    assert list(answer.alternatives) == [[(b"x", -1.0)]]
    assert len(server.requests) == 2


def test_reasoning_of_its_own_field_comes_before_the_answer(server):
    server.script.append(Reply(body=completion("19", reasoning_content="12 + 7 = 19")))
    [answer] = ask(settings_of(server), "hello")
    assert answer.response == "<think>\n12 + 7 = 19\n</think>\n\n19"
    assert split_reasoning(answer.response) == ("12 + 7 = 19", "19")


def test_reasoning_that_was_cut_off_leaves_the_block_open(server):
    server.script.append(Reply(body=completion(None, finish_reason="length", reasoning_content="let me see")))
    [answer] = ask(settings_of(server), "hello")
    assert answer.response == "<think>\nlet me see"
    assert split_reasoning(answer.response) == ("let me see", "")


def with_logprobs(text: str, entries: list[dict[str, Any]], **choice: Any) -> Reply:
    body = completion(text)
    body["choices"][0] |= {"logprobs": {"content": entries}, **choice}
    body["usage"]["completion_tokens"] = len(entries)
    return Reply(body=body)


def test_logprobs_are_kept_without_that_of_the_end_of_turn(server):
    entries = [
        {"token": "1", "logprob": -0.5},
        {"token": "9", "logprob": -1},
        {"token": "<eos>", "logprob": -2.0},
    ]
    server.script.append(with_logprobs("19", entries))
    [answer] = ask(settings_of(server), "hello", logprobs=1)
    assert answer.logprobs == [-0.5, -1.0]
    assert answer.token_bytes == [1, 1]
    assert answer.response_token_ids is None
    assert (server.requests[0]["logprobs"], server.requests[0]["top_logprobs"]) == (True, 1)


def test_tokens_are_placed_in_the_text_by_their_bytes_where_the_server_gives_them(server):
    entries = [
        {"token": "a\ufffd", "bytes": [*"a🙂".encode()][:3], "logprob": -0.5},
        {"token": "\ufffd", "bytes": [*"🙂".encode()][2:], "logprob": -1},
    ]
    server.script.append(with_logprobs("a🙂", entries))
    [answer] = ask(settings_of(server), "hello", logprobs=1)
    assert answer.token_bytes == [1, 4]


def test_tokens_are_placed_in_reasoning_and_answer_as_they_were_joined(server):
    entries = [{"token": text, "logprob": -0.5} for text in ("<think>", "Two and", " two.", "</think>", "4")]
    reply = with_logprobs("4", entries)
    assert isinstance(reply.body, dict)
    reply.body["choices"][0]["message"]["reasoning_content"] = "Two and two."
    server.script.append(reply)
    [answer] = ask(settings_of(server), "hello", logprobs=1)
    assert answer.response == "<think>\nTwo and two.\n</think>\n\n4"
    assert answer.token_bytes == [0, 15, 5, 0, 12]


def test_reasoning_without_log_probabilities_is_one_token_that_nobody_knows(server):
    """Pitfall: the teacher's confidence is its answer's alone, the student's that of reasoning and answer."""
    entries = [{"token": text, "logprob": -0.5} for text in ("It is", " 4.", "<|im_end|>")]
    reply = with_logprobs("\n\nIt is 4.", entries)
    assert isinstance(reply.body, dict)
    reply.body["choices"][0]["message"]["reasoning_content"] = "Two and two."
    server.script.append(reply)
    [answer] = ask(settings_of(server), "hello", logprobs=1)
    assert answer.response == "<think>\nTwo and two.\n</think>\n\nIt is 4."
    assert answer.logprobs == [pytest.approx(math.nan, nan_ok=True), -0.5, -0.5]
    assert answer.token_bytes == [31, 5, 3]


def test_deepseek_gives_log_probabilities_of_the_reasoning_apart(server):
    entries = [{"token": text, "logprob": -0.5} for text in ("It is", " 4.")]
    reply = with_logprobs("It is 4.", entries)
    assert isinstance(reply.body, dict)
    [choice] = reply.body["choices"]
    choice["message"]["reasoning_content"] = "Two and two."
    choice["logprobs"]["reasoning_content"] = [
        {"token": "Two and", "logprob": -1},
        {"token": " two.", "logprob": -2},
    ]
    server.script.append(reply)
    [answer] = ask(settings_of(server), "hello", logprobs=1)
    assert answer.logprobs == [-1, -2, -0.5, -0.5]
    assert answer.token_bytes == [15, 5, 16, 3]


@pytest.mark.parametrize("form", ["vllm", "llama.cpp"])
def test_token_ids_are_kept_where_the_server_gives_them(server, form, tiny_model_folder, tiny_tokenizer):
    ids = tiny_tokenizer("12 + 7", add_special_tokens=False).input_ids
    entries = [{"token": "x", "logprob": -1.0} for _ in [*ids, 2]]
    extra: dict[str, Any] = {}
    if form == "vllm":
        extra["token_ids"] = [*ids, 2]
    else:
        entries = [{**entry, "id": id_} for entry, id_ in zip(entries, [*ids, 2], strict=True)]
    server.script.append(with_logprobs("12 + 7", entries, **extra))
    [answer] = ask(settings_of(server, tokenizer=str(tiny_model_folder)), "hello", logprobs=1)
    assert answer.response_token_ids == ids
    assert answer.logprobs == [-1.0] * len(ids)
    assert answer.tokenizer == tokenizer_hash(tiny_tokenizer)


def test_ids_are_dropped_where_the_server_left_some_out(server, tiny_model_folder):
    """llama.cpp's chat endpoint has no entry for a token that ends inside a character."""
    reply = with_logprobs("é", [{"token": "é", "id": 102, "logprob": -0.5}])
    assert isinstance(reply.body, dict)
    reply.body["usage"]["completion_tokens"] = 2
    server.script.append(reply)
    [answer] = ask(settings_of(server, tokenizer=str(tiny_model_folder)), "hello", logprobs=1)
    assert answer.response_token_ids is None
    assert answer.tokenizer is None
    assert answer.logprobs == [-0.5]


def test_logprobs_that_were_asked_for_and_did_not_come_are_a_failure(server):
    [failure] = ask(settings_of(server), "hello", logprobs=1)
    assert isinstance(failure, RequestError)
    assert "no log-probabilities" in str(failure)


def with_alternatives(text: str, likeliest: list[list[dict[str, Any]]], **choice: Any) -> Reply:
    entries = [{**place[0], "top_logprobs": place} for place in likeliest]
    return with_logprobs(text, entries, **choice)


def test_alternatives_are_asked_for_and_kept_by_their_bytes(server):
    """The end-of-turn's place has some as well, and a server without tokenizer has no ids of use."""
    likeliest: list[list[dict[str, Any]]] = [
        [
            {"token": "1", "bytes": [49], "logprob": -0.5, "id": 7},
            {"token": "\ufffd", "bytes": [0xF0], "logprob": -9999.0},
        ],
        [{"token": "9", "logprob": -1}, {"token": "é", "logprob": -2}],
        [{"token": "<eos>", "logprob": -2.0}, {"token": "!", "logprob": None}],
    ]
    server.script.append(with_alternatives("19", likeliest))
    [answer] = ask(settings_of(server), "hello", logprobs=2)
    assert (server.requests[0]["logprobs"], server.requests[0]["top_logprobs"]) == (True, 2)
    assert "return_tokens_as_token_ids" not in server.requests[0]
    assert answer.logprobs == [-0.5, -1.0]
    assert answer.alternatives.ids is None
    assert list(answer.alternatives) == [
        [(b"1", -0.5), (b"\xf0", -math.inf)],
        [(b"9", -1.0), ("é".encode(), -2.0)],
        [(b"<eos>", -2.0)],
    ]


@pytest.mark.parametrize("form", ["vllm", "llama.cpp"])
def test_alternatives_are_ids_where_the_server_gives_them(server, form, tiny_model_folder, tiny_tokenizer):
    """Pitfall 23: two ids of one text, an incomplete character say, are two alternatives."""
    ids = [*tiny_tokenizer("12", add_special_tokens=False).input_ids, 2]
    if form == "vllm":  # whose bytes of an alternative are then those of the words "token_id:9"
        likeliest = [
            [{"token": f"token_id:{id_}", "bytes": [*b"token_id"], "logprob": -1.0} for id_ in (one, 9)]
            for one in ids
        ]
        reply = with_alternatives("12", likeliest, token_ids=ids)
    else:
        likeliest = [[{"token": "\ufffd", "id": id_, "logprob": -1.0} for id_ in (one, 9)] for one in ids]
        reply = with_alternatives("12", likeliest)
    server.script.append(reply)
    [answer] = ask(settings_of(server, tokenizer=str(tiny_model_folder)), "hello", logprobs=2)
    assert server.requests[0]["return_tokens_as_token_ids"] is True
    assert answer.response_token_ids == ids[:-1]
    assert list(answer.alternatives) == [[(id_, -1.0), (9, -1.0)] for id_ in ids]


def test_ids_of_alternatives_that_no_tokenizer_has_are_no_ids(server, tiny_model_folder, tiny_tokenizer):
    ids = tiny_tokenizer("12", add_special_tokens=False).input_ids
    likeliest = [
        [{"token": "x", "id": id_, "logprob": -1.0}, {"token": "y", "id": 2**40, "logprob": -2.0}]
        for id_ in ids
    ]
    server.script.append(with_alternatives("12", likeliest, token_ids=ids))
    [answer] = ask(settings_of(server, tokenizer=str(tiny_model_folder)), "hello", logprobs=2)
    assert list(answer.alternatives) == [[(b"x", -1.0), (b"y", -2.0)] for _ in ids]


def test_reasoning_without_log_probabilities_has_no_alternatives(server):
    reply = with_alternatives("It is", [[{"token": "It is", "logprob": -0.5}]])
    assert isinstance(reply.body, dict)
    reply.body["choices"][0]["message"]["reasoning_content"] = "Two and two."
    server.script.append(reply)
    [answer] = ask(settings_of(server), "hello", logprobs=3)
    assert len(answer.logprobs) == 2
    assert list(answer.alternatives) == [[], [(b"It is", -0.5)]]


def test_alternatives_that_were_asked_for_and_did_not_come_are_a_failure(server):
    server.script.append(with_logprobs("x", [{"token": "x", "logprob": -1.0, "top_logprobs": None}]))
    [failure] = ask(settings_of(server), "hello", logprobs=2)
    assert "no alternatives to its tokens" in str(failure)


def test_one_log_probability_a_token_keeps_no_alternatives(server):
    server.script.append(with_alternatives("x", [[{"token": "x", "logprob": -1.0}]]))
    [answer] = ask(settings_of(server), "hello", logprobs=1)
    assert answer.alternatives is None


def test_a_server_that_allows_fewer_alternatives_says_how_to_be_served(server):
    server.script.append(
        Reply(400, error("Requested sample logprobs of 50, which is greater than max allowed: 20"))
    )
    [failure] = ask(settings_of(server), "hello", logprobs=50)
    assert "--max-logprobs of at least logprobs" in str(failure)


def test_the_key_goes_into_the_header_and_nowhere_else(server, monkeypatch):
    monkeypatch.setenv("CANARY", KEY)
    server.script.extend([Reply(401, error(f"Incorrect API key provided: {KEY}")), Reply(400, f"bad: {KEY}")])
    server.always = lambda body: Reply(body=f"your key is {KEY}")
    settings = settings_of(server, api_key_env="CANARY")
    for _ in range(3):
        [failure] = ask(settings, "hello")
        assert isinstance(failure, EngineError)
        assert "[the API key]" in str(failure)
        assert KEY not in f"{failure} {failure!r} {failure.__cause__!r} {failure.__context__!r}"
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    teacher = OpenAITeacher(settings)
    asyncio.run(teacher.close())
    assert KEY not in f"{settings!r} {settings.model_dump_json()} {meaning(settings)} {vars(teacher)}"


def test_a_key_that_is_not_set_is_named_before_anything_is_asked(server, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    settings = settings_of(server, api_key_env="NO_SUCH_KEY")
    with pytest.raises(EngineError, match="NO_SUCH_KEY is not set"):
        open_teacher(settings)
    assert "NO_SUCH_KEY" in (check_teacher(settings)[0] or "")
    assert server.requests == []


@pytest.mark.parametrize("key", [f"{KEY}\nsecond line", f"{KEY}é", f"{KEY}\x01"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(server, monkeypatch, key):
    monkeypatch.setenv("TORN_KEY", key)
    settings = settings_of(server, api_key_env="TORN_KEY")
    with pytest.raises(EngineError, match="TORN_KEY holds characters") as refused:
        open_teacher(settings)
    assert KEY not in str(refused.value)
    assert KEY not in (check_teacher(settings)[0] or KEY)
    assert server.requests == []


def test_half_a_character_is_one_that_no_file_refuses(server):
    half = with_logprobs(
        "half \ud83d", [{"token": "half", "logprob": -0.5}, {"token": " \ud83d", "logprob": -0.1}]
    )
    server.script.extend([half, Reply(400, body=error("\ud83d is no text"))])
    answer, refused = (ask(settings_of(server), "hello", logprobs=1)[0] for _ in range(2))
    assert answer.response == "half \N{REPLACEMENT CHARACTER}"
    assert (answer.logprobs, answer.token_bytes) == ([-0.5, -0.1], [4, 4])
    assert refused.what == "HTTP 400: \N{REPLACEMENT CHARACTER} is no text"


def test_the_fingerprint_knows_name_and_address_or_a_stated_identity_and_nothing_else():
    def fingerprint(**fields: Any) -> Any:
        return meaning(OpenAIModel(**{"engine": "openai", "base_url": "http://a/v1", "model": "m", **fields}))

    plain = fingerprint()
    assert plain == fingerprint(api_key_env="OTHER", timeout_s=1.0, concurrency=2, max_retries=0)
    assert plain == fingerprint(price={"input": 1.0, "output": 2.0}, patience_s=1.0)
    assert plain == fingerprint(base_url="http://a/v1/")
    assert plain != fingerprint(base_url="http://b/v1")
    assert plain != fingerprint(model="n")
    assert plain != fingerprint(extra_body={"top_k": 5})
    stated = fingerprint(identity="gpt-oss-120b")
    assert stated == fingerprint(identity="gpt-oss-120b", base_url="http://b:9/v1", model="alias")


@pytest.mark.parametrize(
    "fields",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "http://user:secret@host/v1"},
        {"base_url": "http://host/v1?api-key=secret"},
        {"base_url": "http://host/v1#secret"},
        {"extra_body": {"temperature": 0.1}},
        {"timeout_s": 0.0},
    ],
)
def test_settings_that_cannot_work_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        OpenAIModel(**{"engine": "openai", "base_url": "http://a/v1", "model": "m", **fields})


def test_the_check_before_a_run_tells_what_is_wrong(server):
    models = {"object": "list", "data": [{"id": "small"}]}
    server.always = lambda body: Reply(body=models)
    assert check_teacher(settings_of(server, model="small")) == (None, None)
    problem, note = check_teacher(settings_of(server, model="big"))
    assert problem is None
    assert "it lists small" in (note or "")
    server.always = lambda body: Reply(401, error("no"))
    assert "refuses the key" in (check_teacher(settings_of(server))[0] or "")
    server.always = lambda body: Reply(404, "not here")
    assert check_teacher(settings_of(server)) == (None, None)
    gone = OpenAIModel(engine="openai", base_url=f"http://127.0.0.1:{free_port()}/v1", model="big")
    assert "cannot be reached" in (check_teacher(gone)[0] or "")


def test_retry_after_is_read_in_both_its_forms():
    assert retry_after_s({"retry-after": "12"}) == 12.0
    later = retry_after_s(
        {"retry-after": format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)}
    )
    assert later == pytest.approx(90, abs=2)
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after_s({"retry-after": "soon"}) is None
    assert retry_after_s({}) is None


class TestContinuing:
    """A server is asked to go on from the beginning of a response, where its template allows that."""

    def test_the_beginning_is_an_unfinished_last_message(self, server):
        [answer] = ask(settings_of(server), "hello", prefix="First 12")
        [_, body] = server.requests  # the first asked whether a beginning is repeated
        assert body["messages"] == [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "First 12"},
        ]
        assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
        assert answer.response == "echo First 12", "what the server writes is the rest alone"

    def test_a_server_that_repeats_the_beginning_is_found_out_once_and_gives_the_rest_alone(self, server):
        """Pitfall: llama.cpp's server answers with the whole message, and the trace began twice."""
        server.always = lambda body: Reply(body=completion(body["messages"][-1]["content"] + " and seven"))
        answers = ask(settings_of(server), "one", "two", prefix="First 12")
        assert [answer.response for answer in answers] == [" and seven"] * 2
        assert len(server.requests) == 3
        assert server.requests[0]["max_tokens"] == 1

    def test_a_loop_that_says_the_beginning_again_is_no_repetition(self, server):
        server.always = lambda body: Reply(body=completion("wait wait "))
        [answer] = ask(settings_of(server), "one", prefix="wait ")
        assert answer.response == "wait wait "

    def test_other_requests_say_nothing_of_it(self, server):
        ask(settings_of(server), "hello")
        assert not {"continue_final_message", "add_generation_prompt"} & server.requests[0].keys()

    def test_the_rest_of_an_open_think_block_joins_its_beginning_to_the_letter(
        self, server, tiny_model_folder
    ):
        server.always = lambda body: Reply(
            body=completion("\n\n19", reasoning_content=" and seven are nineteen.")
        )
        settings = settings_of(server, tokenizer=str(tiny_model_folder))
        [answer] = ask(settings, "hello", prefix="<think>\ntwelve")
        assert answer.response == " and seven are nineteen.\n</think>\n\n19"
        whole = "<think>\ntwelve" + answer.response
        assert split_reasoning(whole) == ("twelve and seven are nineteen.", "19")

    def test_a_rest_that_is_cut_off_again_leaves_the_block_open(self, server, tiny_model_folder):
        server.always = lambda body: Reply(
            body=completion(None, reasoning_content=" and seven ", finish_reason="length")
        )
        settings = settings_of(server, tokenizer=str(tiny_model_folder))
        [answer] = ask(settings, "hello", prefix="<think>\ntwelve")
        assert (answer.response, answer.finish_reason) == (" and seven ", "length")

    @pytest.mark.parametrize("prefix", ["twelve", "<think>\ntwelve\n</think>\n\n19 is"])
    def test_a_server_that_begins_to_reason_anew_is_refused(self, server, tiny_model_folder, prefix):
        server.always = lambda body: Reply(body=completion("19", reasoning_content="Let me see."))
        [found] = ask(settings_of(server, tokenizer=str(tiny_model_folder)), "hello", prefix=prefix)
        assert isinstance(found, RequestError)
        assert "began to reason anew" in str(found)
        assert found.blames_row

    def test_a_think_block_is_not_handed_to_an_unknown_template(self, server):
        [found] = ask(settings_of(server), "hello", prefix="<think>\ntwelve")
        assert isinstance(found, RequestError)
        assert "chat template is unknown" in str(found)
        assert "state the model's `tokenizer`" in str(found)
        assert found.blames_row
        assert server.requests == []

    def test_a_template_that_would_change_the_beginning_is_refused(self, server, tiny_model_folder):
        template = tiny_model_folder / "chat_template.jinja"
        text = template.read_text(encoding="utf-8")
        template.write_text(
            text.replace("message['content']", "message['content'].split('<think>')[0]"), encoding="utf-8"
        )
        settings = settings_of(server, tokenizer=str(tiny_model_folder))
        kept, changed = (ask(settings, "hello", prefix=one)[0] for one in ("First", "So <think>\ntwelve"))
        assert not isinstance(kept, Exception)
        assert isinstance(changed, RequestError)
        assert "chat template changes the beginning" in str(changed)
