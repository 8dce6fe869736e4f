"""A server that fails in every way, and kills: nothing is lost and nothing bought twice."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from potstill.core.events import read_events
from potstill.core.records import RECORDS_FILE, read_records
from potstill.core.store import Artifact

from ..servers import Faults, ScriptedServer, running_server
from .conftest import write_recipe

pytestmark = pytest.mark.slow
KILLS, CONCURRENCY, MOST_RUNS = 10, 32, 12
REQUESTS = int(os.environ.get("FAULTS_REQUESTS", "600"))
TIMEOUT_S = 600.0
# An answer that leaves the server too late is rightly bought again: far more than a busy machine takes.
ANSWER_TIMEOUT_S = 15.0
KEY = "sk-canary-0815"
# Waits of a second between tries would make this take an hour.
MAIN = (
    "from functools import partial; import potstill.teachers as teachers;"
    "teachers.OpenAITeacher = partial(teachers.OpenAITeacher, backoff_s=0.02);"
    "from potstill.cli import main; main()"
)


@pytest.fixture
def faults() -> Faults:
    """A tenth of all tries goes wrong; what the server says of it gives the key away."""
    return Faults(0.1, seed=1, drip_s=1.5 * ANSWER_TIMEOUT_S, say=f"(your key: {KEY})")


@pytest.fixture
def server(faults: Faults) -> Iterator[ScriptedServer]:
    with running_server() as running:
        running.always = faults
        yield running


@pytest.fixture
def recipe(tmp_path: Path, server: ScriptedServer) -> Path:
    """Asks every question once, with log-probabilities."""
    rows = (json.dumps({"prompt": f"question {number}"}) for number in range(REQUESTS))
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    model = {
        "engine": "openai",
        "base_url": server.base_url,
        "model": "big",
        "api_key_env": "CANARY",
        "price": {"input": 1.0, "output": 2.0},
        "timeout_s": ANSWER_TIMEOUT_S,
        "concurrency": CONCURRENCY,
    }
    data = {"path": str(tmp_path / "prompts.jsonl")}
    step = {"do": "generate", "model": "big", "data": data, "logprobs": 1, "max_cost": 100.0}
    return write_recipe(
        tmp_path / "recipe.yaml", {"name": "faults", "models": {"big": model}, "steps": {"traces": step}}
    )


def start(recipe: Path) -> "subprocess.Popen[str]":
    folder = recipe.parent
    options = ["--store", str(folder / "store"), "--output", str(folder / "run")]
    with (folder / "output.txt").open("a", encoding="utf-8") as output:
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, "run", str(recipe), *options],
            stdout=output,
            stderr=output,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CANARY": KEY},
        )


def kept(folder: Path) -> Counter[str]:
    """How often each question's answer is in the request store."""
    [path] = (folder / "store" / "requests").glob("*.sqlite")
    database = sqlite3.connect(path)
    try:
        rows = database.execute("SELECT answer FROM answers").fetchall()
    finally:
        database.close()
    return Counter(json.loads(answer)["response"].removeprefix("echo ") for (answer,) in rows)


def run_to_the_end(recipe: Path) -> int:
    """Run until nothing has failed, and say how many runs failed rows took; each exits 1 and counts them."""
    for number in range(1, MOST_RUNS + 1):
        code = start(recipe).wait(timeout=TIMEOUT_S)
        answers = [
            one for one in read_events(recipe.parent / "run" / "events.jsonl") if one["event"] == "answers"
        ]
        assert code == (1 if answers[-1]["failed"] else 0)
        assert answers[-1]["left"] == 0
        if code == 0:
            return number
        [failures] = recipe.parent.glob("store/artifacts/*/failures.jsonl")
        assert len(failures.read_text(encoding="utf-8").splitlines()) == answers[-1]["failed"]
    raise AssertionError(f"rows still fail after {MOST_RUNS} runs")


def check_the_end(recipe: Path) -> None:
    """Every question has its answer, in order, and the key is in no file."""
    folder = recipe.parent
    artifact = Artifact.open((folder / "run" / "traces").resolve())
    responses = [record.response for record in read_records(artifact.folder / RECORDS_FILE)]
    assert responses == [f"echo question {number}" for number in range(REQUESTS)]
    counts = artifact.manifest.counts
    assert (counts["records"], counts["failed"]) == (REQUESTS, 0)
    assert kept(folder) == Counter(f"question {number}" for number in range(REQUESTS))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"events.jsonl", "report.html", "recipe.yaml", "output.txt"} <= {path.name for path in files}
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def test_nothing_is_lost_and_nothing_bought_twice(recipe: Path, faults: Faults) -> None:
    runs = run_to_the_end(recipe)
    check_the_end(recipe)
    assert set(faults.met) == set(faults.faults)
    assert faults.met.total() > 0.08 * REQUESTS
    assert faults.delivered == {f"question {number}": 1 for number in range(REQUESTS)}
    print(f"\n{runs} runs, {faults.tries.total():,} tries, faults: {dict(sorted(faults.met.items()))}")


def test_after_ten_kills_neither_but_for_what_was_under_way(
    recipe: Path, faults: Faults, server: ScriptedServer
) -> None:
    """An answer that had left the server and was not in the store yet is all that a kill can cost."""
    drawn = random.Random(2)
    lost: Counter[str] = Counter()
    losses = []
    for moment in sorted(drawn.sample(range(100, int(0.9 * REQUESTS)), KILLS)):
        process = start(recipe)
        while faults.delivered.total() < moment:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = -1
        while before != faults.delivered.total() or server.under_way:
            before = faults.delivered.total()
            time.sleep(0.1)
        now = faults.delivered - kept(recipe.parent)
        losses.append(now.total() - lost.total())
        lost = now
    assert all(loss <= CONCURRENCY for loss in losses)
    run_to_the_end(recipe)
    check_the_end(recipe)
    assert faults.delivered == Counter(f"question {number}" for number in range(REQUESTS)) + lost
    print(f"\nlost at each kill: {losses}")
