"""potstill in processes of its own, forked from one that has imported everything, and what they left behind.

A recipe of every kind of step that quickstart and its like are made of, on tiny models and deterministic.
"""

import itertools
import json
import multiprocessing
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from potstill.core.events import Reporter, read_events
from potstill.core.store import Artifact

from .conftest import small_recipe, write_recipe

__all__ = [
    "KINDS",
    "TIMEOUT_S",
    "Potstill",
    "contents",
    "whole_recipe",
]

KINDS = {
    "traces": "generate",
    "pruned": "init",
    "picked": "select",
    "logits": "cache",
    "student": "train",
    "plain": "merge",
    "exam": "evaluate",
}
TIMEOUT_S = 600.0
_POLL_S = 0.002
_PRELOADED = (
    "potstill.cli",
    "potstill.recipe",
    "potstill.pipeline.run",
    "potstill.report.page",
    "potstill.report.charts",
    "potstill.teachers.transformers",
    "potstill.train.step",
    "potstill.evaluate.step",
    "potstill.select.step",
    "potstill.student.step",
    "potstill.merge.step",
    "potstill.cache",
    "peft",
    "accelerate",
    "transformers.models.llama.modeling_llama",
)


def whole_recipe(path: Path, model_folder: Path) -> Path:
    """Write the recipe, of small batches: a fault finds work that is done and work that is not."""
    recipe = small_recipe(model_folder)
    steps = recipe["steps"]
    steps["traces"] |= {
        "data": {"task": "chain_sum", "size": 12, "held_out": 0.25},
        "temperature": 1.0,
        "logprobs": 1,
        "samples": 2,
        "max_new_tokens": 8,
        "concurrency": 1,
    }
    steps["student"] |= {"checkpoint_minutes": 0.0, "epochs": 3, "lora": {"rank": 2}}
    steps["exam"] |= {"samples_shown": 1, "max_new_tokens": 4}
    steps["exam"]["models"] = {"base": "pruned", "student": "plain", "teacher": "teacher"}
    recipe["steps"] = {
        "traces": steps["traces"],
        "pruned": steps["pruned"],
        "picked": {"do": "select", "data": "traces", "student": "pruned", "keep": {"top": 0.5}},
        "logits": steps["logits"] | {"data": "picked", "batch_tokens": 64},
        "student": steps["student"],
        "plain": {"do": "merge", "model": "student"},
        "exam": steps["exam"],
    }
    return write_recipe(path, recipe)


def contents(run_folder: Path) -> dict[str, dict[str, str]]:
    """The hashes of the files that every step of a run made, but for PEFT's, which notes a path."""
    made = {step: Artifact.open((run_folder / step).resolve()).manifest for step in KINDS}
    return {
        step: {name: one.sha256 for name, one in manifest.files.items() if name != "adapter_config.json"}
        for step, manifest in made.items()
    }


_LOOKS_BEFORE_A_SHIFT = 10


class Potstill:
    """A running `potstill`, whose clock jumps by `clock_shift_s` when it is looked at the tenth time.

    From when it begins the step `starved_at` it gets no more memory than so many bytes.
    """

    def __init__(
        self, *arguments: object, clock_shift_s: float = 0.0, starved_at: tuple[str, int] | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*_PRELOADED])
        # A pipe, since limits on files are among the faults.
        reading, writing = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_main, args=([*map(str, arguments)], writing, clock_shift_s, starved_at)
        )
        self._process.start()
        writing.close()
        assert self._process.pid is not None
        self.pid, self._printed = self._process.pid, bytearray()
        self._listener = threading.Thread(target=self._listen, args=(reading,), daemon=True)
        self._listener.start()

    def _listen(self, reading: Any) -> None:
        with reading:
            while part := os.read(reading.fileno(), 1 << 16):
                self._printed += part

    @property
    def printed(self) -> str:
        """What it has printed; all of it, once it was waited for."""
        return self._printed.decode("utf-8", "replace")

    def send(self, signal_number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, signal_number)

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Look as often as can be until a condition holds; it has to before the process ends."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self._process.is_alive(), f"it ended before {what}:\n{self.printed}"
            assert time.monotonic() < deadline, what
            time.sleep(_POLL_S)

    def wait(self) -> int:
        """The exit status, once it has ended."""
        self._process.join(TIMEOUT_S)
        assert self._process.exitcode is not None, f"it has not ended:\n{self.printed}"
        self._listener.join(TIMEOUT_S)
        return self._process.exitcode


def started(run_folder: Path, step: str) -> int:
    """How often a run folder tells that a step was begun."""
    events = read_events(run_folder / "events.jsonl")
    return sum(one["event"] == "step_started" and one.get("step") == step for one in events)


def _main(
    arguments: list[str], writing: Any, clock_shift_s: float, starved_at: tuple[str, int] | None
) -> None:
    with writing:
        for descriptor in (1, 2):
            os.dup2(writing.fileno(), descriptor)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    import torch

    torch.set_num_threads(1)
    if clock_shift_s:
        real, looks = time.time, itertools.count(1)
        time.time = lambda: real() + clock_shift_s * (next(looks) >= _LOOKS_BEFORE_A_SHIFT)
    if starved_at is not None:
        _starve_at(*starved_at)
    sys.argv = ["potstill", *arguments]
    from potstill.cli import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _starve_at(step: str, spare_bytes: int) -> None:
    tell = Reporter.event

    def event(reporter: Reporter, name: str, /, **fields: Any) -> None:
        tell(reporter, name, **fields)
        if name == "step_started" and fields["step"] == step:
            limit = psutil.Process().memory_info().vms + spare_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    Reporter.event = event  # type: ignore[method-assign]


def read_manifest(run_folder: Path, step: str) -> dict[str, Any]:
    """A step's manifest as its file has it."""
    found: dict[str, Any] = json.loads((run_folder / step / "manifest.json").read_text(encoding="utf-8"))
    return found
