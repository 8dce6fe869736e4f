"""Train steps run by torchrun: as one process would, whatever ends them, and no process is left behind."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from potstill.core.events import Reporter, read_events
from potstill.core.store import Artifact
from potstill.scale.job import Job, Outcome
from potstill.train import run as train

from ..rows import write_rows
from .conftest import Command, check_refused_before_anything_is_made, write_recipe

TWO = ("scale.engine=torchrun", "scale.nproc_per_node=2")
TIMEOUT_S = 600.0
STEPS = 60


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """One step, which makes a checkpoint after each optimiser step."""
    rows = [
        {"prompt": f"What is {n} + {n % 4}?", "response": f"The answer is {n + n % 4}."} for n in range(40)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    student = {
        "do": "train",
        "student": "base",
        "data": {"path": "rows.jsonl", "held_out": 0.2},
        "batch": 4,
        "lr": 2e-4,
        "max_steps": STEPS,
        "checkpoint_minutes": 0.0,
        "keep_epochs": 1,
    }
    models = {"base": {"path": str(tiny_model_folder), "device": "cpu"}}
    return write_recipe(
        tmp_path / "recipe.yaml", {"name": "r", "seed": 3, "models": models, "steps": {"student": student}}
    )


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def start(recipe: Path, folder: Path, strategy: str) -> "subprocess.Popen[str]":
    """A run in two processes, of another process's own."""
    command = [sys.executable, "-c", "from potstill.cli import main; main()", "run", str(recipe), *TWO]
    command.append(f"scale.strategy={strategy}")
    options = ["--store", str(folder / "store"), "--output", str(folder / "run")]
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


def ranks(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The processes that train, by rank."""
    found = [
        one
        for one in psutil.Process(process.pid).children(recursive=True)
        if "potstill.scale.worker" in one.cmdline() and "torch.distributed.run" not in one.cmdline()
    ]
    return sorted(found, key=lambda one: int(one.environ()["RANK"]))


def newest_checkpoint(folder: Path) -> int:
    whole = (folder / "store").glob("artifacts/train-*/scratch/checkpoint-*/complete.json")
    return max((int(one.parent.name.rpartition("-")[2]) for one in whole), default=0)


def run_on(recipe: Path, folder: Path, strategy: str) -> "subprocess.Popen[str]":
    """A run under way that has made a checkpoint of its own."""
    before, deadline = newest_checkpoint(folder), time.monotonic() + TIMEOUT_S
    process = start(recipe, folder, strategy)
    while newest_checkpoint(folder) <= before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def listening(process: psutil.Process) -> list[Any]:
    return [one for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_end(processes: list[psutil.Process]) -> bool:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and not all(map(is_gone, processes)):
        psutil.wait_procs(processes, timeout=0.1)
    return all(map(is_gone, processes))


def history(folder: Path) -> list[dict[str, float]]:
    manifest = Artifact.open((folder / "run" / "student").resolve()).manifest
    points: list[dict[str, float]] = manifest.metrics["history"]
    return points


def assert_alike(found: Path, expected: Path, before: Path) -> None:
    """Figures and weights are the same to the rounding of bfloat16 products, where a processor has these."""
    points = history(expected)
    assert len(history(found)) == len(points)
    for point, wanted in zip(history(found), points, strict=True):
        assert point == pytest.approx(wanted, rel=2e-2)
    mine, theirs = (load_file(one / "run" / "student" / "model.safetensors") for one in (found, expected))
    start_of_both = load_file(before / "model.safetensors")
    apart = sum(float((mine[name] - theirs[name]).square().sum()) for name in theirs)
    moved = sum(float((theirs[name] - start_of_both[name]).square().sum()) for name in theirs)
    assert moved > 0
    assert apart < 0.05**2 * moved


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_and_every_end_before_it_is_made_good(
    potstill: Command, recipe: Path, tmp_path: Path, tiny_model_folder: Path, strategy: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()

    def in_this_process(folder: Path, *overrides: str) -> Any:
        return potstill("run", recipe, *overrides, "--store", folder / "store", "--output", folder / "run")

    assert in_this_process(one).code == 0

    # A rank dies: the step ends, with its log.
    process = run_on(recipe, two, strategy)
    first, second = ranks(process)
    agent = psutil.Process(process.pid).children()
    second.kill()
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "step student" in err
    assert "process 1 of the training was ended by SIGKILL" in err
    assert "Traceback" not in err
    assert "exitcode  : -9" in (two / "run" / "run.log").read_text(encoding="utf-8")
    assert all_end([first, second, *agent])

    # The run itself is killed: nothing goes on without it.
    process = run_on(recipe, two, strategy)
    left = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks(process)) == 2
    assert {one.laddr.ip for each in left for one in listening(each)} == {"127.0.0.1"}
    process.kill()
    process.communicate(timeout=TIMEOUT_S)
    assert all_end(left)

    # It is told to stop: it does, behind a checkpoint.
    process = run_on(recipe, two, strategy)
    left = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 143
    assert "give the same command again" in err
    assert "goes on after step" in err
    assert all_end(left)
    assert [one["event"] for one in read_events(two / "run" / "events.jsonl")][-1] == "run_interrupted"

    # One process goes on from there.
    outcome = in_this_process(two)
    assert outcome.code == 0
    assert "goes on after step" in outcome.err
    assert_alike(two, one, tiny_model_folder)

    # Two processes to its end tell what one does, and make what one takes for its own; and the other way.
    whole = tmp_path / "whole"
    whole.mkdir()
    _, err = start(recipe, whole, strategy).communicate(timeout=TIMEOUT_S)
    assert_alike(whole, one, tiny_model_folder)
    assert f"step {STEPS}: held-out loss" in err
    assert "training: " in (whole / "run" / "run.log").read_text(encoding="utf-8")
    told = [event for event in read_events(whole / "run" / "events.jsonl") if event["event"] == "train_log"]
    assert len([event for event in told if "tokens" in event]) == STEPS
    artifact = Artifact.open((whole / "run" / "student").resolve())
    assert (
        artifact.manifest.fingerprint
        == Artifact.open((one / "run" / "student").resolve()).manifest.fingerprint
    )
    assert (
        artifact.manifest.files.keys()
        == Artifact.open((one / "run" / "student").resolve()).manifest.files.keys()
    )
    assert "already made" in in_this_process(whole).err
    assert "already made" in in_this_process(one, *TWO).err


@pytest.mark.slow
def test_a_process_whose_memory_runs_out_ends_the_step_which_says_so_and_goes_on_from_its_checkpoint(
    potstill: Command, recipe: Path, tmp_path: Path
) -> None:
    for spare_bytes in (0, 1 << 20, 4 << 20, 16 << 20):
        process = run_on(recipe, tmp_path, "ddp")
        left = psutil.Process(process.pid).children(recursive=True)
        second = ranks(process)[1]
        limit = second.memory_info().vms + spare_bytes
        resource.prlimit(second.pid, resource.RLIMIT_AS, (limit, limit))
        _, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 1
        assert "error: step student: " in err
        assert "Traceback" not in err
        assert all_end(left)
        # A library that cannot go on without memory ends the process itself.
        if "process 1 of the training was ended by SIG" not in err:
            break
    assert "error: step student: ran out of memory" in err
    assert "quantize: nf4" in err
    again = potstill("run", recipe, "--store", tmp_path / "store", "--output", tmp_path / "run")
    assert again.code == 0
    assert "goes on after step" in again.err


def test_a_line_is_printed_for_a_scheduler_and_what_it_made_is_sealed_by_the_next_run(
    potstill: Command, recipe: Path, tmp_path: Path
) -> None:
    nodes = ("scale.engine=torchrun", "scale.nnodes=2", "scale.nproc_per_node=8")
    told = potstill("run", recipe, *nodes, "--launcher-command")
    assert told.code == 0
    [line] = told.out.splitlines()
    assert "store_type=file" not in line
    assert "-m torch.distributed.run --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d" in line
    [path] = tmp_path.glob("store/artifacts/train-*/scratch/processes/job.json")
    assert line.endswith(str(path))
    unset = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]}
    )
    assert "MASTER_ADDR: set it to the name of the first machine" in unset.stderr
    # What the first process of that line does.
    job = Job.read(path)
    result = train(job.settings, job.context(Reporter("quiet"), threading.Event()))
    Outcome(result=result, seconds=1234.5, peaks={"peak_memory_bytes": 7}).write(job.folder)
    again = potstill("run", recipe, *nodes, "--launcher-command")
    assert (again.code, again.out) == (0, "")
    manifest = Artifact.open((tmp_path / "runs" / "r" / "student").resolve()).manifest
    assert (manifest.seconds, manifest.peak_memory_bytes) == (1234.5, 7)
    assert manifest.counts["steps"] == STEPS
    assert not (job.folder / "scratch").exists()


@pytest.mark.slow
def test_a_training_that_is_started_by_hand_took_as_long_as_all_attempts_at_it(
    potstill: Command, recipe: Path, tmp_path: Path
) -> None:
    by_hand = ("scale.engine=torchrun", "scale.nproc_per_node=1", "--launcher-command")
    line = potstill("run", recipe, *by_hand).out
    [job] = tmp_path.glob("store/artifacts/train-*/scratch/processes/job.json")
    seconds = job.parents[1] / "seconds"
    seconds.write_text("3600")
    subprocess.run(["bash", "-c", line], check=True)
    assert float(seconds.read_text()) > 3600
    assert potstill("run", recipe, *by_hand).code == 0
    assert Artifact.open((tmp_path / "runs" / "r" / "student").resolve()).manifest.seconds > 3600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["scale.engine=mpi", "scale.nproc_per_node=2"],
            "scale.engine: 'mpi' starts no processes",
        ),
        (["scale.nproc_per_node=2"], "scale.engine is missing"),
        (["scale.engine=torchrun"], "scale.nproc_per_node is missing"),
        ([*TWO, "scale.nproc_per_nod=2"], "did you mean 'nproc_per_node'"),
        (["scale.engine=torchrun", "scale.nproc_per_node=0"], "greater than or equal to 1, not 0"),
        (["scale=2"], "expected: scale: {engine: torchrun, nproc_per_node: 2}"),
        ([*TWO, "scale.nnodes=2"], "2 machines cannot be started from this one"),
        ([*TWO, "student.device=cuda:1"], "device: cuda:1 is one GPU, and each of 2 processes takes its own"),
        (["--launcher-command"], "the recipe says nothing of processes"),
        ([*TWO, "--launcher-command", "--json"], "leave --json out"),
    ],
)
def test_processes_that_cannot_be_had_are_told_before_anything_is_made(
    potstill: Command, recipe: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    check_refused_before_anything_is_made(potstill("run", recipe, *arguments), message, tmp_path / "store")


def test_more_processes_than_gpus_are_refused_by_run_and_plan(
    potstill: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert potstill("plan", recipe, *TWO).code == 0, "the student is on the CPU"
    there = (*TWO, "models.base.device=null")
    for command in ("plan", "run"):
        told = potstill(command, recipe, *there)
        assert told.code == 1
        assert "2 processes, and this machine has 1 GPU" in told.out + told.err


def test_a_recipe_that_torchrun_runs_itself_is_refused(
    potstill: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = potstill("run", recipe)
    assert told.code == 1
    assert "2 processes run this recipe" in told.err
    assert "scale.engine=torchrun scale.nproc_per_node=2" in told.err
