"""Steps whose models have copies on Ray: as without it, whatever befalls copies, machines and the cluster."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from potstill.core.events import read_events
from potstill.core.store import Artifact

from .conftest import Command, check_refused_before_anything_is_made, write_recipe

TIMEOUT_S = 1200.0
STEPS = ("traces", "picked", "logits")


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path, build_tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """The three steps that ask copies, with so many rows that what befalls the copies finds them at work."""
    student = tmp_path / "student"
    build_tiny_model("llama", seed=4).save_pretrained(student)
    tiny_tokenizer.save_pretrained(student)
    models = {
        name: {"path": str(folder), "device": "cpu", "dtype": "float32"}
        for name, folder in (("teacher", tiny_model_folder), ("student", student))
    }
    steps = {
        "traces": {
            "do": "generate",
            "model": "teacher",
            "data": {"task": "chain_sum", "size": 400},
            "temperature": 0.7,
            "max_new_tokens": 24,
        },
        "picked": {
            "do": "select",
            "data": "traces",
            "student": "student",
            "teacher": "teacher",
            "keep": {"top": 0.5},
        },
        "logits": {"do": "cache", "model": "teacher", "data": "traces", "top_k": 8, "batch_tokens": 512},
    }
    return write_recipe(tmp_path / "recipe.yaml", {"name": "r", "seed": 3, "models": models, "steps": steps})


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_without_ray_the_extra_that_brings_it_is_named(
    potstill: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.scale.settings.find_spec", lambda name: None)
    for command in ("run", "plan"):
        told = potstill(command, recipe, "scale.engine=ray", "scale.replicas=2")
        assert told.code == 1
        assert "2 replicas on Ray, and Ray is not installed" in told.out + told.err
        assert "potstill[ray]" in told.out + told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scale.engine=ray"], "scale.replicas is missing"),
        (["scale.engine=ray", "scale.replicas=0"], "greater than or equal to 1, not 0"),
        (["scale.engine=ray", "scale.replicas=2", "scale.adress=auto"], "did you mean 'address'"),
        (
            ["scale.engine=ray", "scale.replicas=2", "scale.address=ray://head:10001"],
            "expected local, auto, or the host:port of a Ray cluster's head",
        ),
        (
            ["scale.engine=ray", "scale.replicas=2", "scale.gpus_per_replica=1.5"],
            "a share of one GPU, or a whole number of them",
        ),
        (
            ["scale.engine=ray", "scale.replicas=2", "models.teacher.device=cuda:1"],
            "device: cuda:1 is one GPU, and each of 2 replicas takes its own",
        ),
        (["scale.engine=ray", "scale.replicas=2", "--launcher-command"], "nothing of processes that train"),
    ],
)
def test_copies_that_cannot_be_had_are_told_before_anything_is_made(
    potstill: Command, recipe: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    check_refused_before_anything_is_made(potstill("run", recipe, *arguments), message, tmp_path / "store")


class Cluster:
    """A cluster of three nodes in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]", address: str) -> None:
        self.process = process
        self.overrides = ("scale.engine=ray", f"scale.address={address}", "scale.cpus_per_replica=1")

    def suffer(self, what: str) -> bool:
        """Whether what was to befall it did."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return bool(json.loads(self.process.stdout.readline())["done"])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="Ray, which `make ray` installs, is not there")
    with tempfile.TemporaryDirectory(prefix="potstill-ray-", ignore_cleanup_errors=True) as folder:
        for name, value in {
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }.items():
            monkeypatch.setenv(name, value)
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "ray_cluster.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        family = [psutil.Process(process.pid)]
        try:
            while not (line := process.stdout.readline()).startswith("{"):
                assert process.poll() is None, "the cluster did not start"
            family += psutil.Process(process.pid).children(recursive=True)
            yield Cluster(process, json.loads(line)["address"])
        finally:
            process.communicate()
            for one in family:
                if one.is_running():
                    one.kill()


def start(recipe: Path, folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    """A run in a process of its own."""
    command = [sys.executable, "-c", "from potstill.cli import main; main()", "run", str(recipe), *overrides]
    options = ["--store", str(folder / "store"), "--output", str(folder / "run")]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def when_started(
    folder: Path, process: "subprocess.Popen[str]", act: Callable[[dict[str, Any]], None]
) -> None:
    """Let `act` see each event of a replica that started, while the run lasts."""
    seen = 0
    while process.poll() is None:
        events = read_events(folder / "run" / "events.jsonl")
        for event in events[seen:]:
            if event["event"] == "replica_started":
                act(event)
        seen = len(events)
        time.sleep(0.01)


def ended(
    process: "subprocess.Popen[str]", folder: Path, act: Callable[[dict[str, Any]], None]
) -> tuple[int, str]:
    """How a run ended while this befell its replicas, and what it said."""
    watching = threading.Thread(target=when_started, args=(folder, process, act))
    watching.start()
    _, err = process.communicate(timeout=TIMEOUT_S)
    watching.join()
    return process.returncode, err


def files(folder: Path) -> dict[str, Any]:
    found = {step: Artifact.open((folder / "run" / step).resolve()).manifest for step in STEPS}
    return {step: (manifest.fingerprint, manifest.files, manifest.counts) for step, manifest in found.items()}


@pytest.mark.slow
def test_whatever_befalls_copies_and_machines_the_artifacts_are_those_of_one_process(
    recipe: Path, tmp_path: Path, cluster: Cluster
) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    code, err = ended(start(recipe, one), one, lambda event: None)
    assert code == 0, err

    # In each step a replica is killed or stands still, and in the first a machine goes as well.
    befallen: dict[str, list[str]] = {step: [] for step in STEPS}

    def befall(event: dict[str, Any]) -> None:
        step, process = event["step"], event["process"]
        if not befallen[step]:
            befallen[step].append("stopped" if step == "logits" else "killed")
            os.kill(process, signal.SIGSTOP if step == "logits" else signal.SIGKILL)
        elif step == "traces" and "removed" not in befallen[step] and cluster.suffer(f"remove {process}"):
            befallen[step].append("removed")

    run = start(recipe, three, *cluster.overrides, "scale.replicas=3", "scale.timeout_s=30")
    code, err = ended(run, three, befall)
    assert code == 0, err
    assert befallen == {"traces": ["killed", "removed"], "picked": ["killed"], "logits": ["stopped"]}
    reasons: dict[str, list[str]] = {step: [] for step in STEPS}
    for event in read_events(three / "run" / "events.jsonl"):
        if event["event"] == "replica_ended":
            reasons[event["step"]].append(event["reason"])
    assert len(reasons["traces"]) >= 2
    assert reasons["picked"]
    assert "no answer within 30 s (scale.timeout_s)" in reasons["logits"]
    assert files(three) == files(one)


@pytest.mark.slow
def test_where_the_head_goes_the_run_ends_as_runs_end_and_one_process_goes_on(
    recipe: Path, tmp_path: Path, cluster: Cluster
) -> None:
    one, headless = tmp_path / "one", tmp_path / "headless"

    def behead(event: dict[str, Any]) -> None:
        cluster.suffer("head")

    only = ("--only", "traces")
    run = start(recipe, headless, *cluster.overrides, "scale.replicas=1", *only)
    code, err = ended(run, headless, behead)
    assert code == 1
    assert "step traces" in err
    assert "the Ray cluster's head has not answered for 20 s" in err
    assert "Traceback" not in err
    assert read_events(headless / "run" / "events.jsonl")[-1]["event"] == "run_failed"
    for folder in (headless, one):
        code, err = ended(start(recipe, folder, *only), folder, lambda event: None)
        assert code == 0, err
    found, expected = (
        Artifact.open((folder / "run" / "traces").resolve()).manifest for folder in (headless, one)
    )
    assert (found.fingerprint, found.files) == (expected.fingerprint, expected.files)


@pytest.mark.slow
def test_a_run_that_is_killed_or_told_to_stop_leaves_no_process_of_ray_behind(
    recipe: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray, which `make ray` installs, is not there")
    left: list[psutil.Process] = []

    def end_by(number: int) -> Callable[[dict[str, Any]], None]:
        def act(event: dict[str, Any]) -> None:
            left.extend(psutil.Process(run.pid).children(recursive=True))
            run.send_signal(number)

        return act

    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        folder = tmp_path / str(int(number))
        folder.mkdir()
        run = start(recipe, folder, "scale.engine=ray", "scale.replicas=1")
        assert ended(run, folder, end_by(number))[0] == code
        assert len(left) > 5, "Ray was not there"
        assert psutil.wait_procs(left, timeout=120)[1] == []
        left.clear()
