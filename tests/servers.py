"""A real HTTP server on loopback that answers chat completions as a script says, faults included."""

import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What the server sends: a JSON body or raw text; `cut` breaks the connection off in the middle of it."""

    status: int = 200
    body: Body | str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


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


class ScriptedServer(ThreadingHTTPServer):
    """Plays `script` in the order of arrival, then `always`; keeps what it was asked.

    A reply may be a function of the request's body. Everything in `hold` blocks until it is set.
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
        self.wfile.write(data)

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
