"""A run killed with SIGKILL inside any step ends, run again, as an uninterrupted one does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.core.events import read_events
from potstill.core.store import MANIFEST_FILE, Artifact

from .conftest import small_recipe, write_recipe

pytestmark = pytest.mark.slow
STEPS = ("traces", "logits", "pruned", "student", "exam")
KINDS = {"traces": "generate", "logits": "cache", "pruned": "init", "student": "train", "exam": "evaluate"}
TIMEOUT_S = 240.0


def _recipe(tmp_path: Path, model_folder: Path) -> Path:
    recipe: dict[str, Any] = small_recipe(model_folder)
    steps = recipe["steps"]
    # Small batches, so that a kill finds work that is done and work that is not.
    steps["traces"].update(data={"task": "chain_sum", "size": 48, "held_out": 0.25}, concurrency=1)
    steps["logits"].update(batch_tokens=64)
    steps["student"].update(checkpoint_minutes=0.0, epochs=6)
    return write_recipe(tmp_path / "recipe.yaml", recipe)


def _start(recipe: Path, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "from potstill.cli import main; main()", "run", str(recipe)]
    options = ["--store", str(folder / "store"), "--output", str(folder / "run")]
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def _finish(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    return out + err


def _contents(folder: Path) -> dict[str, str]:
    return {step: Artifact.open((folder / "run" / step).resolve()).manifest.content for step in STEPS}


def _event(folder: Path, name: str, step: str) -> bool:
    return any(
        one["event"] == name and one.get("step") == step
        for one in read_events(folder / "run" / "events.jsonl")
    )


def _some(folder: Path, pattern: str) -> bool:
    return any((folder / "store").glob(pattern))


# What shows that a step is under way, with something done that a second run can take up.
UNDER_WAY: dict[str, Callable[[Path], bool]] = {
    "traces": lambda folder: _some(folder, "requests/*"),
    "logits": lambda folder: _event(folder, "step_started", "logits"),
    "pruned": lambda folder: _event(folder, "step_started", "pruned"),
    "student": lambda folder: _some(folder, "artifacts/train-*/scratch/checkpoint-*/complete.json"),
    "exam": lambda folder: _some(folder, "artifacts/evaluate-*/scratch/*.json"),
}
TAKEN_UP = {"student": "goes on after step"}


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, shared_model_folder: Path
) -> tuple[Path, dict[str, str]]:
    """The recipe's file, and the content of every artifact of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = _recipe(folder, shared_model_folder)
    _finish(_start(recipe, folder / "whole"))
    return recipe, _contents(folder / "whole")


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_run_ends_as_an_uninterrupted_one(
    step: str, uninterrupted: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    recipe, expected = uninterrupted
    process = _start(recipe, tmp_path / "killed")
    deadline = time.monotonic() + TIMEOUT_S
    while not UNDER_WAY[step](tmp_path / "killed"):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate()
    unfinished = list((tmp_path / "killed" / "store" / "artifacts").glob(f"{KINDS[step]}-*"))
    assert len(unfinished) == 1
    assert not (unfinished[0] / MANIFEST_FILE).exists(), "the step was finished before the kill"
    output = _finish(_start(recipe, tmp_path / "killed"))
    assert _contents(tmp_path / "killed") == expected
    assert TAKEN_UP.get(step, "") in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_told_to_stop_says_how_to_go_on_and_goes_on(
    number: int, code: int, uninterrupted: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    recipe, expected = uninterrupted
    process = _start(recipe, tmp_path / "stopped")
    deadline = time.monotonic() + TIMEOUT_S
    while not UNDER_WAY["student"](tmp_path / "stopped"):
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code
    assert "give the same command again" in err
    assert "Traceback" not in err
    assert _event(tmp_path / "stopped", "step_interrupted", "student")
    assert TAKEN_UP["student"] in _finish(_start(recipe, tmp_path / "stopped"))
    assert _contents(tmp_path / "stopped") == expected


def test_two_runs_of_one_recipe_make_each_artifact_once(
    uninterrupted: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    recipe, expected = uninterrupted
    folder = tmp_path / "shared"
    processes = [_start(recipe, folder), _start(recipe, folder)]
    outputs = [_finish(process) for process in processes]
    assert _contents(folder) == expected
    assert sum(output.count(": done in") for output in outputs) == len(STEPS)
    assert any("is making this now; waiting" in output for output in outputs)
