"""Train steps of which none needs another run at once: as in turn, whatever becomes of one of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from potstill.core.events import read_events
from potstill.core.store import Artifact
from potstill.pipeline.run_folder import load_run

from ..rows import write_rows
from .conftest import Command, write_recipe

TWO_AT_ONCE = ("scale.engine=torchrun", "scale.nproc_per_node=1", "scale.parallel_steps=2")
TIMEOUT_S = 600.0


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two students of one base, one more of each, and one that is a first one under another name."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = [
        {"prompt": f"What is {n} + {n % 4}?", "response": f"The answer is {n + n % 4}."} for n in range(20)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    usual = {"do": "train", "data": {"path": "rows.jsonl"}, "batch": 4, "max_steps": 6}
    steps: dict[str, dict[str, Any]] = {
        "fast": {**usual, "student": "base", "lr": 1e-3},
        "twin": {**usual, "student": "base", "lr": 1e-3},
        "slow": {**usual, "student": "base", "lr": 1e-4},
        "faster": {**usual, "student": "fast", "lr": 1e-3},
    }
    models = {"base": {"path": str(tiny_model_folder), "device": "cpu"}}
    return write_recipe(tmp_path / "recipe.yaml", {"name": "r", "seed": 3, "models": models, "steps": steps})


def artifact(tmp_path: Path, step: str, run: str = "r") -> Artifact:
    return Artifact.open((tmp_path / "runs" / run / step).resolve())


@pytest.mark.slow
def test_steps_at_once_are_made_as_one_after_the_other_and_their_time_is_told(
    potstill: Command, recipe: Path, tmp_path: Path
) -> None:
    told = potstill("run", recipe, *TWO_AT_ONCE)
    assert told.code == 0, told.err
    folder = tmp_path / "runs" / "r"
    run = load_run(folder)
    by_name = {step.name: step for step in run.steps}
    assert run.side_by_side([by_name["fast"], by_name["slow"]]) is not None
    begun = [one["step"] for one in run.events if one["event"] == "step_started"]
    assert begun[:2] == ["fast", "slow"], "the twin of one under way waits, and is found made"
    assert set(begun) == {"fast", "slow", "faster"}
    assert artifact(tmp_path, "twin").folder == artifact(tmp_path, "fast").folder
    assert "side by side" in (folder / "report.html").read_text(encoding="utf-8")
    log = (folder / "run.log").read_text(encoding="utf-8")
    for name in ("fast", "slow"):
        assert f"  {name}:   20 rows" in log, "each line says of which step it is"
    in_turn = potstill("run", recipe, "--store", tmp_path / "other", "--output", tmp_path / "runs" / "turn")
    assert in_turn.code == 0, in_turn.err
    for name in ("fast", "slow", "faster"):
        one, other = artifact(tmp_path, name), artifact(tmp_path, name, "turn")
        assert one.folder != other.folder
        weights, expected = (load_file(each.folder / "model.safetensors") for each in (one, other))
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_where_one_fails_those_beside_it_are_made_to_their_end_and_nothing_else_is_begun(
    potstill: Command, recipe: Path, tmp_path: Path
) -> None:
    longer = *TWO_AT_ONCE, "fast.max_steps=100", "twin.max_steps=100"
    told = potstill("run", recipe, *longer, "fast.lr=1e30")
    assert told.code == 1
    assert "step fast" in told.err
    assert "nothing else is begun; going on to their end: twin" in told.err
    assert artifact(tmp_path, "twin").manifest.counts["steps"] == 100
    events = read_events(tmp_path / "runs" / "r" / "events.jsonl")
    assert [one["step"] for one in events if one["event"] == "step_started"] == ["fast", "twin"]
    again = potstill("run", recipe, *longer, "--only", "fast", "--only", "twin")
    assert again.code == 0, again.err
    assert again.err.count("train already made") == 2, "the twin is what the step is now"


@pytest.mark.slow
def test_told_to_stop_all_of_them_do_behind_a_checkpoint(
    potstill: Command, recipe: Path, tmp_path: Path
) -> None:
    long = ("fast.max_steps=400", "slow.max_steps=400", "fast.checkpoint_minutes=0.0")
    arguments = [*TWO_AT_ONCE, *long, "--only", "fast", "--only", "slow"]
    command = [sys.executable, "-c", "from potstill.cli import main; main()", "run", str(recipe), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + TIMEOUT_S
    events = tmp_path / "runs" / "r" / "events.jsonl"

    def training() -> set[str]:
        return {one["step"] for one in read_events(events) if one["event"] == "train_log"}

    while training() != {"fast", "slow"}:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 143, err
    ended = [one["step"] for one in read_events(events) if one["event"] == "step_interrupted"]
    assert set(ended) == {"fast", "slow"}
    checkpoints = [*tmp_path.glob("store/artifacts/train-*/scratch/checkpoint-*/complete.json")]
    assert len(checkpoints) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scale.parallel_steps=0"], "greater than or equal to 1, not 0"),
        (["fast.device=cuda:1"], "device: cuda:1 is one GPU, and each of 2 processes takes its own"),
        (
            ["scale.strategy=fsdp2", "models.base.quantize=nf4"],
            "a student in nf4 cannot be divided",
        ),
        (["scale.strategy=fsdp"], "'ddp' or 'fsdp2', not 'fsdp'"),
    ],
)
def test_what_cannot_be_had_is_told_by_plan_and_run_before_anything_is_made(
    potstill: Command, recipe: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    for command in ("plan", "run"):
        told = potstill(command, recipe, *TWO_AT_ONCE, *arguments)
        assert told.code == 1
        assert message in told.out + told.err
        assert "Traceback" not in told.err
    assert not (tmp_path / "store" / "artifacts").exists()
