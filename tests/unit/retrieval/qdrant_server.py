"""Qdrant's REST interface on loopback, as far as collections are filled and searched, over its own engine."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Request:
    """What a client asked, and with which key."""

    method: str
    path: str
    body: dict[str, Any]
    api_key: str | None


def _engine() -> Any:
    from qdrant_client import QdrantClient  # which tests go without where it is not installed

    return QdrantClient(":memory:")


@dataclass
class QdrantStandIn:
    """Collections that outlast their clients; from the request `broken_from` on, it answers 500.

    `before_request` is what happens before the request of a number is answered, or read as one of its own.
    """

    engine: Any = field(default_factory=_engine)
    requests: list[Request] = field(default_factory=list)
    broken_from: int | None = None
    before_request: tuple[int, Callable[[], None]] | None = None
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def filled(self) -> list[list[int]]:
        """The ids of the points of each request that brought some."""
        return [one.body["batch"]["ids"] for one in self.requests if one.path.endswith("/points?wait=true")]

    def answer(self, asked: Request) -> Any:
        """The `result` of a request; KeyError for one that this interface has not."""
        from qdrant_client import models

        _, _, name, *rest = asked.path.partition("?")[0].split("/")
        match asked.method, rest:
            case "GET", ["exists"]:
                return {"exists": self.engine.collection_exists(name)}
            case "PUT", []:
                vectors = models.VectorParams.model_validate(asked.body["vectors"])
                return self.engine.create_collection(name, vectors_config=vectors)
            case "DELETE", []:
                return self.engine.delete_collection(name)
            case "PUT", ["points"]:
                points = models.Batch.model_validate(asked.body["batch"])
                return self.engine.upsert(name, points).model_dump()
            case "POST", ["points", "count"]:
                return self.engine.count(name, exact=asked.body["exact"]).model_dump()
            case "POST", ["points", "query"]:
                nearest, limit = asked.body["query"]["nearest"], asked.body["limit"]
                return self.engine.query_points(name, query=nearest, limit=limit).model_dump()
        raise KeyError(asked.path)


@contextmanager
def running_qdrant() -> Iterator[QdrantStandIn]:
    """Qdrant's interface on a port of its own."""
    stand_in = QdrantStandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            asked = Request(self.command, self.path, body, self.headers.get("api-key"))
            if (meanwhile := stand_in.before_request) and len(stand_in.requests) == meanwhile[0]:
                meanwhile[1]()
            broken = stand_in.broken_from is not None and len(stand_in.requests) >= stand_in.broken_from
            stand_in.requests.append(asked)
            if not broken:
                try:
                    told: dict[str, Any] = {"result": stand_in.answer(asked)}
                except ValueError as error:  # as of a collection that exists
                    broken, told = True, {"status": {"error": str(error)}}
            else:
                told = {"status": {"error": "out of room"}}
            data = json.dumps({"status": "ok", "time": 0.0, **told}).encode()
            self.send_response(500 if broken else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *_: Any) -> None:
            """Tests print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        stand_in.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()
