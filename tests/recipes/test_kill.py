"""A run that is killed or stopped inside its steps ends, run again, as an uninterrupted one does."""

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


def _events(folder: Path, name: str, step: str) -> set[str]:
    """Each such event so far."""
    events = read_events(folder / "run" / "events.jsonl")
    return {str(one) for one in events if one["event"] == name and one.get("step") == step}


def _files(folder: Path, pattern: str) -> set[str]:
    return {str(path) for path in (folder / "store").glob(pattern)}


# What a step under way leaves behind that another run can take up.
WORK: dict[str, Callable[[Path], set[str]]] = {
    "traces": lambda folder: _files(folder, "requests/*"),
    "logits": lambda folder: _events(folder, "step_started", "logits"),
    "pruned": lambda folder: _events(folder, "step_started", "pruned"),
    "student": lambda folder: _files(folder, "artifacts/train-*/scratch/checkpoint-*/complete.json"),
    "exam": lambda folder: _files(folder, "artifacts/evaluate-*/scratch/*.json"),
}
# One run of the recipe is stopped so often; what each of its processes finds was left by the one before.
STOPS = (
    ("traces", signal.SIGKILL),
    ("logits", signal.SIGKILL),
    ("pruned", signal.SIGKILL),
    ("student", signal.SIGINT),
    ("student", signal.SIGTERM),
    ("student", signal.SIGKILL),
    ("exam", signal.SIGKILL),
)
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
TAKEN_UP = {"student": "goes on after step"}


def _stop_inside(step: str, number: signal.Signals, recipe: Path, folder: Path) -> str:
    """Run until the step has done something new, stop it there, and say what the run printed."""
    before, told = WORK[step](folder), _events(folder, "step_interrupted", step)
    process = _start(recipe, folder)
    deadline = time.monotonic() + TIMEOUT_S
    while not WORK[step](folder) - before:
        assert process.poll() is None, f"the run ended before it could be stopped in {step}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == CODES[number]
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        assert "give the same command again" in err
        assert _events(folder, "step_interrupted", step) - told
    [unfinished] = (folder / "store" / "artifacts").glob(f"{KINDS[step]}-*")
    assert not (unfinished / MANIFEST_FILE).exists(), f"{step} was finished before the stop"
    return out + err


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, shared_model_folder: Path
) -> tuple[Path, list[str], dict[str, str]]:
    """The recipe's file, what two runs of it at once printed, and the content of what they made."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = _recipe(folder, shared_model_folder)
    processes = [_start(recipe, folder / "both") for _ in range(2)]
    return recipe, [_finish(process) for process in processes], _contents(folder / "both")


def test_two_runs_of_one_recipe_make_each_artifact_once(
    uninterrupted: tuple[Path, list[str], dict[str, str]],
) -> None:
    _, outputs, _ = uninterrupted
    assert sum(output.count(": done in") for output in outputs) == len(STEPS)
    assert any("is making this now; waiting" in output for output in outputs)


def test_a_run_stopped_inside_every_step_ends_as_one_that_was_not(
    uninterrupted: tuple[Path, list[str], dict[str, str]], tmp_path: Path
) -> None:
    recipe, _, expected = uninterrupted
    folder, left = tmp_path / "stopped", ""
    for step, number in STOPS:
        output = _stop_inside(step, number, recipe, folder)
        assert TAKEN_UP.get(left, "") in output
        left = step
    output = _finish(_start(recipe, folder))
    assert _contents(folder) == expected
    assert output.count(": done in") == 1, "what was sealed before is not made again"
