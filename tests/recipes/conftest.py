"""The command line as a user meets it, and a small recipe of every step on tiny models."""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill import cli


@dataclass(frozen=True)
class Outcome:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def potstill(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Command]:
    """`potstill("run", "recipe.yaml", ...)` in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["potstill", *map(str, arguments)])
        cli._STOP.clear()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def check_refused_before_anything_is_made(told: Outcome, message: str, store: Path) -> None:
    """A run was refused with one error that says so, and the store has no artifact."""
    assert told.code == 1
    assert message in told.err
    assert "Traceback" not in told.err
    assert not (store / "artifacts").exists()


def small_recipe(model_folder: Path) -> dict[str, Any]:
    """Every step kind, deterministic, on a tiny model: greedy traces, cache, half-depth student, exam."""
    return {
        "name": "small",
        "seed": 3,
        "models": {"teacher": {"path": str(model_folder)}},
        "steps": {
            "traces": {
                "do": "generate",
                "model": "teacher",
                "data": {"task": "chain_sum", "size": 24, "held_out": 0.25},
                "temperature": 0.0,
                "max_new_tokens": 12,
            },
            "logits": {"do": "cache", "model": "teacher", "data": "traces", "top_k": 8},
            "pruned": {"do": "init", "model": "teacher", "data": "traces", "layers": 1, "samples": 8},
            "student": {
                "do": "train",
                "student": "pruned",
                "data": "logits",
                "epochs": 2,
                "batch": 4,
                "lr": 1e-3,
            },
            "exam": {
                "do": "evaluate",
                "models": {"base": "pruned", "student": "student", "teacher": "teacher"},
                "teacher": "teacher",
                "data": "traces:held_out",
                "tasks": {"sums": {"task": "chain_sum", "size": 4}},
                "max_new_tokens": 8,
            },
        },
    }


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe as YAML."""
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def small(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    """The small recipe, ready to be changed."""
    return small_recipe(tiny_model_folder)
