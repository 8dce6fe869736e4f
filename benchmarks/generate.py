"""How much of a server's best rate `generate` reaches, and what it costs in CPU and memory.

    python benchmarks/generate.py [--json] [--requests 20000] [--peers FOLDER]
    python benchmarks/generate.py --logprobs 1 --tokens 1050 --latency 1.6 --requests 2000

A server of a known ceiling, in a process of its own on loopback: `slots` requests at a time take a fixed
latency each, the others wait. Beside the generate step, which ends with everything stored and sealed, stands
a plain asyncio loop over the OpenAI SDK, whose texts are lost when it dies; it is left out where `openai` is
not installed (`pip install --target FOLDER openai` keeps it apart). A share of the ceiling is what the server
saw from its first request to its last answer.

`found` is the step that is allowed many more in flight than the server has slots, and finds their number.

With `--logprobs K` the answers hold `--tokens` tokens with the K likeliest in the place of each, as vLLM
writes them; `without` is the same step that does not ask for them: what they cost the client. The ceiling is
to be one that a client can reach: an answer of 1,050 tokens takes it some milliseconds.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from findings import argument_parser, show, surroundings

MB = 1e6
MANY = 512  # in flight, for `found`
WARM_AFTER = 1000  # requests, from where memory is not to grow
SAMPLE_S = 0.25
STARTUP_S, SLOWEST = 60.0, 2.0  # a client is given up at half of the ceiling: its machine is not calm


class Server(asyncio.Protocol):
    """HTTP/1.1 with as little work as possible, so that the machine is left to the client."""

    waiting: ClassVar[deque[Any]] = deque()
    slots, latency_s, busy = 64, 0.4, 0
    first = last = 0.0
    answered = 0
    plain = with_logprobs = b""

    def connection_made(self, transport: Any) -> None:
        """A client has come."""
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        """Queue a whole request; a GET is told what was seen so far."""
        self.received += data
        head, end, rest = self.received.partition(b"\r\n\r\n")
        if not end:
            return
        if head.startswith(b"GET"):
            seen = {"answered": Server.answered, "seconds": Server.last - Server.first}
            self.send(json.dumps(seen).encode())
        elif len(rest) >= int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0]):
            Server.first = Server.first or time.perf_counter()
            self.received, self.asks_logprobs = b"", b'"logprobs":true' in rest
            Server.waiting.append(self)
            self.serve()

    def serve(self) -> None:
        """Begin what there are slots for."""
        while Server.waiting and Server.busy < Server.slots:
            Server.busy += 1
            asyncio.get_running_loop().call_later(Server.latency_s, Server.waiting.popleft().finish)

    def finish(self) -> None:
        """Answer, and free the slot."""
        Server.busy -= 1
        Server.answered += 1
        self.send(Server.with_logprobs if self.asks_logprobs else Server.plain)
        Server.last = time.perf_counter()
        self.serve()

    def send(self, body: bytes) -> None:
        """One response."""
        self.received = b""
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)


def answer(tokens: int, logprobs: int) -> bytes:
    """A completion of so many tokens, `logprobs` of the likeliest in the place of each."""
    words = [" The", " answer", " is", " 42", ".", "\n", " so", " that", " it", " holds"]
    texts = [words[place % len(words)] for place in range(tokens)]

    def entry(text: str, rank: int) -> dict[str, Any]:
        return {"token": text, "logprob": -0.12345678901234567 - rank, "bytes": [*text.encode()]}

    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": "".join(texts)},
    }
    if logprobs:
        content = []
        for place, text in enumerate(texts):
            likeliest = [entry(words[(place + rank) % len(words)], rank) for rank in range(logprobs)]
            content.append({**entry(text, 0), "top_logprobs": likeliest})
        choice["logprobs"] = {"content": content}
    usage = {"prompt_tokens": 60, "completion_tokens": tokens}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


async def serve(options: argparse.Namespace) -> None:
    Server.slots, Server.latency_s = options.slots, options.latency
    Server.plain = answer(options.tokens, 0)
    Server.with_logprobs = answer(options.tokens, options.logprobs)
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def running_server(options: argparse.Namespace) -> Iterator[str]:
    """Its base URL."""
    command = [
        sys.executable,
        __file__,
        "--serve",
        f"--slots={options.slots}",
        f"--latency={options.latency}",
        f"--logprobs={options.logprobs}",
        f"--tokens={options.tokens}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.kill()
        process.wait()


class Meter:
    """CPU and wall seconds of this process from its start, and memory beyond that of `WARM_AFTER` answers."""

    def __init__(self) -> None:
        import psutil

        self.process, self.answers, self.warm_mb, self.most_mb = psutil.Process(), 0, 0.0, 0.0
        self.started, self.cpu = time.perf_counter(), time.process_time()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()

    def sample(self) -> None:
        """Watch the memory."""
        while not self.ended.wait(SAMPLE_S):
            if self.answers >= WARM_AFTER:
                now_mb = self.process.memory_info().rss / MB
                self.warm_mb = self.warm_mb or now_mb
                self.most_mb = max(self.most_mb, now_mb)

    def figures(self) -> dict[str, float]:
        """Everything up to now."""
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.started
        self.ended.set()
        self.thread.join()
        return {
            "wall_s": wall,
            "cpu_s_per_1000": 1000 * cpu / self.answers,
            "rss_growth_mb": self.most_mb - self.warm_mb,
        }


def questions(requests: int) -> Iterator[str]:
    for number in range(requests):
        yield f"A train leaves at {number % 24} o'clock with {number} passengers. " * 3


def potstill(url: str, requests: int, in_flight: int, logprobs: int) -> dict[str, float]:
    """The generate step, from reading the prompts to the sealed artifact."""
    from potstill.core.events import Reporter
    from potstill.core.store import Store
    from potstill.pipeline.runner import RunOptions, run_graph
    from potstill.recipe import load_recipe

    meter, found = Meter(), {}  # what an import costs is no matter of how many requests there are

    class Metering(Reporter):
        @contextmanager
        def progress(self, *args: Any, **fields: Any) -> Iterator[Any]:
            yield self

        def advance(self, count: float = 1, **figures: object) -> None:
            meter.answers += 1

        def event(self, name: str, /, **fields: Any) -> None:
            if name == "answers":
                found["limit"] = fields["concurrency"]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text(
            "".join(f"{json.dumps({'prompt': one})}\n" for one in questions(requests)), encoding="utf-8"
        )
        model = {"engine": "openai", "base_url": url, "model": "m", "concurrency": in_flight}
        step = {"do": "generate", "model": "m", "data": {"path": str(path)}, "logprobs": logprobs or None}
        recipe_path = Path(folder) / "recipe.yaml"
        recipe_path.write_text(
            json.dumps({"name": "b", "models": {"m": model}, "steps": {"s": step}}), encoding="utf-8"
        )
        recipe = load_recipe(str(recipe_path))
        run_graph(recipe.graph, 0, Store(Path(folder) / "store"), Metering("quiet"), RunOptions())
        return {**meter.figures(), **found}


def openai_sdk(url: str, requests: int, in_flight: int, logprobs: int) -> dict[str, float]:
    """What one would write by hand: as many coroutines as requests, and a semaphore."""
    import openai

    async def main() -> dict[str, float]:
        client, places, meter = (
            openai.AsyncOpenAI(base_url=url, api_key="none"),
            asyncio.Semaphore(in_flight),
            Meter(),
        )

        extra: dict[str, Any] = {"logprobs": True, "top_logprobs": logprobs} if logprobs else {}

        async def ask(question: str) -> str:
            async with places:
                answer = await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": question}], max_tokens=1024, **extra
                )
            meter.answers += 1
            return str(answer.choices[0].message.content)

        texts = await asyncio.gather(*(ask(question) for question in questions(requests)))
        assert len(texts) == requests
        return meter.figures()

    return asyncio.run(main())


CLIENTS = {"potstill": potstill, "openai_sdk": openai_sdk}


def measure(
    client: str, requests: int, in_flight: int, options: argparse.Namespace, *, logprobs: int | None = None
) -> dict[str, float]:
    """One client in a process of its own against a server of its own."""
    import httpx2

    ceiling, asked = options.slots / options.latency, options.logprobs if logprobs is None else logprobs
    path = os.pathsep.join(filter(None, [str(options.peers or ""), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path} if client == "openai_sdk" else None
    patience_s = STARTUP_S + SLOWEST * requests / ceiling
    print(
        f"{client}, {requests:,} requests, {in_flight} in flight: {requests / ceiling:.0f} s at least, "
        f"given up after {patience_s:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    with running_server(options) as url:
        command = [sys.executable, __file__, f"--client={client}", f"--url={url}", f"--requests={requests}"]
        try:
            done = subprocess.run(
                [*command, f"--in-flight={in_flight}", f"--logprobs={asked}"],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=environment,
                timeout=patience_s,
            )
        except subprocess.TimeoutExpired:
            sys.exit(f"{client} was given up; a calm machine, or a larger --latency, would let it end")
        found: dict[str, float] = json.loads(done.stdout)
        seen = httpx2.get(f"{url}/seen", trust_env=False).json()
    assert seen["answered"] == requests
    return {
        "share_of_ceiling": requests / seen["seconds"] / ceiling,
        "whole_share_of_ceiling": requests / found.pop("wall_s") / ceiling,
        **found,
    }


def openai_version(peers: Path | None) -> str | None:
    """The SDK's version, where it is installed."""
    found = metadata.distributions(name="openai", path=[str(peers)] if peers else sys.path)
    return next((one.version for one in found), None)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.4, help="seconds; the ceiling is slots / latency")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--logprobs", type=int, default=0, help="likeliest tokens a place of an answer")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer")
    parser.add_argument("--peers", type=Path, help="a folder that `openai` is installed in")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", choices=list(CLIENTS), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options))
        return
    if options.client:
        client = CLIENTS[options.client]
        print(json.dumps(client(options.url, options.requests, options.in_flight, options.logprobs)))
        return
    found: dict[str, Any] = {
        "benchmark": "generate",
        **surroundings(),
        "requests": options.requests,
        "slots": options.slots,
        "latency_s": options.latency,
        "ceiling_per_s": options.slots / options.latency,
        "in_flight": options.in_flight,
        "tokens": options.tokens,
        "logprobs": options.logprobs,
        "answer_kb": len(answer(options.tokens, options.logprobs)) / 1000,
        **measure("potstill", options.requests, options.in_flight, options),
    }
    if options.logprobs:
        found["without"] = measure("potstill", options.requests, options.in_flight, options, logprobs=0)
    else:
        found["found"] = measure("potstill", options.requests // 2, MANY, options)
    if version := openai_version(options.peers):
        found["openai_sdk"] = {
            "version": version,
            **measure("openai_sdk", options.requests, options.in_flight, options),
        }
    show(found, as_json=options.json)


if __name__ == "__main__":
    main()
