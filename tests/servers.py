"""A real HTTP server on loopback that answers chat completions as a script says, faults included."""

import json
import random
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.models import LoadedModel

Body = dict[str, Any]
_DRIP_S = 0.02


@dataclass(frozen=True)
class Reply:
    """What the server sends: a JSON body or raw text.

    `cut` breaks the connection off in the middle of it, `drip_s` stretches it byte by byte over that time.
    `sent` is called once all of it has left.
    """

    status: int = 200
    body: Body | str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    drip_s: float = 0.0
    sent: Callable[[], None] | None = None


def completion(text: str | None = "fine", *, finish_reason: str | None = "stop", **message: Any) -> Body:
    """A chat completion as OpenAI's API gives it."""
    return {
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }


def error(message: str) -> Body:
    """An error body as OpenAI's API gives it."""
    return {"error": {"message": message, "type": "error"}}


def with_logprobs(body: Body) -> Body:
    """A completion with the log-probability of its one token."""
    text = body["choices"][0]["message"]["content"]
    body["choices"][0]["logprobs"] = {"content": [{"token": text, "logprob": -0.5}]}
    return body


def prompt_logprobs(model: "LoadedModel", body: Body) -> Body:
    """What vLLM answers: entry i holds the k likeliest ids in the place of token i, and token i itself."""
    import torch

    ids = body["prompt"]
    with torch.no_grad():
        logits_TV = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    log_probs_TV = logits_TV[:, : model.vocabulary_size].log_softmax(-1)
    entries: list[Any] = [None]
    for log_probs_V, id_ in zip(log_probs_TV, ids[1:], strict=False):
        chosen = {*log_probs_V.topk(body["prompt_logprobs"]).indices.tolist(), id_}
        entries.append({str(one): {"logprob": log_probs_V[one].item(), "rank": 1} for one in chosen})
    return {"choices": [{"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": entries}]}


def vllm(answer: Callable[[Body], Reply], max_model_len: int | None = 4096) -> Callable[[Body], Reply]:
    """A vLLM server of a model "tiny": its list of models, and its answers to prompts of token ids."""
    models = {"object": "list", "data": [{"id": "other"}, {"id": "tiny", "max_model_len": max_model_len}]}
    return lambda body: answer(body) if "prompt" in body else Reply(body=models)


def rows_scored(server: "ScriptedServer") -> list[Body]:
    """The requests to score a row: those that are not about the text which is scored before the first one."""
    scored = [body for body in server.requests if "prompt" in body]
    known = scored[0]["prompt"] if scored else []
    return [body for body in scored if body["prompt"][: len(known) // 2] != known[: len(known) // 2]]


class Faults:
    """Answers to questions, of which a share goes wrong in every way that servers do.

    What happens to a question's next try is drawn from (seed, question, number of the try). `delivered`
    counts the whole answers that left for each question, `met` the faults.
    """

    def __init__(self, share: float, *, seed: int = 0, drip_s: float = 5.0, say: str = "") -> None:
        self.share, self.seed, self.say = share, seed, say
        self.tries, self.delivered, self.met = Counter[str](), Counter[str](), Counter[str]()
        self.lock = threading.Lock()
        html = Reply(body="<html>Bad gateway</html>", headers={"Content-Type": "text/html"})
        self.faults = {
            "429 with Retry-After": Reply(429, error(f"slow down {say}"), {"Retry-After": "0.05"}),
            "429": Reply(429, error("slow down")),
            "500": Reply(500, error(f"out of order {say}")),
            "503": Reply(503, "<html>Unavailable</html>"),
            "cut": Reply(body=with_logprobs(completion("half a sentence")), cut=True),
            "drip": Reply(body=with_logprobs(completion("slowly " * 99)), drip_s=drip_s),
            "malformed JSON": Reply(body='{"choices": [{"message": '),
            "empty choices": Reply(body={**completion(), "choices": []}),
            "no logprobs": Reply(body=completion()),
            "wrong content type": html,
        }

    def __call__(self, body: Body) -> Reply:
        """The next reply to a question."""
        question = body["messages"][-1]["content"]
        with self.lock:
            self.tries[question] += 1
            drawn = random.Random(f"{self.seed} {question} {self.tries[question]}")
            if drawn.random() < self.share:
                fault = drawn.choice(sorted(self.faults))
                self.met[fault] += 1
                return self.faults[fault]
        return Reply(body=with_logprobs(completion(f"echo {question}")), sent=lambda: self._count(question))

    def _count(self, question: str) -> None:
        with self.lock:
            self.delivered[question] += 1


class ScriptedServer(ThreadingHTTPServer):
    """Plays `script` in the order of arrival, then `always`; keeps what it was asked.

    A reply may be a function of the request's body. Everything in `hold` blocks until it is set. `clients`
    holds the address of each connection.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: deque[Reply | Callable[[Body], Reply]] = deque()
        self.always: Callable[[Body], Reply] = lambda body: Reply(
            body=completion(f"echo {body['messages'][-1]['content']}")
        )
        self.requests: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.clients: set[Any] = set()
        self.under_way = self.most_under_way = 0
        self.hold: threading.Event | None = None
        self.lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of the tests."""

    def reply(self, body: Body, headers: dict[str, str]) -> Reply:
        with self.lock:
            self.requests.append(body)
            self.headers.append(headers)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            found = self.script.popleft() if self.script else self.always
        if self.hold is not None:
            self.hold.wait(30)
        with self.lock:
            self.under_way -= 1
        return found(body) if callable(found) else found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_POST(self) -> None:
        self.server.clients.add(self.client_address)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(self.server.reply(body, dict(self.headers)))

    def do_GET(self) -> None:
        self._send(self.server.reply({"messages": [{"content": self.path}]}, dict(self.headers)))

    def _send(self, reply: Reply) -> None:
        data = (json.dumps(reply.body) if isinstance(reply.body, dict) else reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if reply.cut:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if reply.drip_s:
            self._drip(data, reply.drip_s)
        else:
            self.wfile.write(data)
        if reply.sent is not None:
            reply.sent()

    def _drip(self, data: bytes, seconds: float) -> None:
        pieces = min(len(data), max(1, int(seconds / _DRIP_S)))
        for number in range(pieces):
            self.wfile.write(data[number * len(data) // pieces : (number + 1) * len(data) // pieces])
            time.sleep(seconds / pieces)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@contextmanager
def running_server() -> Iterator[ScriptedServer]:
    """A scripted server for as long as the block lasts."""
    server = ScriptedServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        if server.hold is not None:
            server.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()
