"""Faults at every step: a clear error, nothing lost, and in the end what an undisturbed run makes."""

import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from potstill.core.events import read_events

from .processes import KINDS, Potstill, contents, started, whole_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its faults"),
]
# FAULTS_STEPS=all: at every step, and a pause lasts a minute; else at the two that keep most to go on with.
EVERY_STEP = os.environ.get("FAULTS_STEPS") == "all"
STEPS = [*KINDS] if EVERY_STEP else [name for name, kind in KINDS.items() if kind in ("cache", "train")]
PAUSE_S, LONG_PAUSE_S = 1.0, 60.0 if EVERY_STEP else 1.0
YEAR_S = 365 * 86400.0
DISK_BYTES = 64 << 20
SPARE_BYTES = (0, 4 << 20, 16 << 20)
NO_MEMORY = ("ran out of memory", "does not fit into memory")
# SQLite maps a file, and takes the refusal for the disk's; Arrow has no room for a thread's stack.
NO_MEMORY_ELSEWISE = ("disk I/O error", "Failed to launch worker thread")
Contents = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Place:
    """Where a run keeps what it makes."""

    store: Path
    run: Path

    @classmethod
    def below(cls, folder: Path) -> "Place":
        return cls(folder / "store", folder / "run")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shared_model_folder: Path) -> Path:
    return whole_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", shared_model_folder)


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Contents:
    """The content of what a run makes that nothing happened to."""
    place = Place.below(recipe.parent)
    run = start(recipe, place)
    assert run.wait() == 0, run.printed
    return contents(place.run)


def start(recipe: Path, place: Place, **faults: Any) -> Potstill:
    options = ["--store", place.store, "--output", place.run]
    return Potstill("run", recipe, *options, **faults)


def start_until(step: str, recipe: Path, place: Place, *, clock_shift_s: float = 0.0) -> Potstill:
    """Start a run, and return when it begins a step."""
    before = started(place.run, step)
    run = start(recipe, place, clock_shift_s=clock_shift_s)
    run.wait_until(lambda: started(place.run, step) > before, f"it came to {step}")
    return run


def check_failed(run: Potstill, *said: str) -> None:
    """One error for a person, and no success."""
    assert run.wait() == 1, run.printed
    assert "Traceback" not in run.printed
    assert "fault in potstill" not in run.printed, run.printed[-1500:]
    assert [line[:7] for line in run.printed.splitlines()].count("error: ") == 1
    assert any(one in run.printed for one in said), run.printed


def check_ends_undisturbed(
    recipe: Path, place: Place, undisturbed: Contents, *, clock_shift_s: float = 0.0
) -> None:
    run = start(recipe, place, clock_shift_s=clock_shift_s)
    assert run.wait() == 0, run.printed
    assert contents(place.run) == undisturbed
    assert (place.run / "report.html").is_file()


@contextmanager
def mounted(folder: Path) -> Iterator[Callable[..., None]]:
    """A small disk of its own in a folder; what is given mounts it anew with other options."""
    folder.mkdir(parents=True)
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("a disk can be mounted by root alone")
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a disk")
    try:
        yield lambda option: subprocess.run([mount, "-o", f"remount,{option}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room that a disk has left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_every_step(
    number: signal.Signals, recipe: Path, undisturbed: Contents, tmp_path: Path
) -> None:
    place = Place.below(tmp_path)
    for step in STEPS:
        run = start_until(step, recipe, place)
        run.send(number)
        code = run.wait()
        if code == 0:  # a small step can end before it asks whether it is to stop; then the run has
            assert step == [*KINDS][-1]
            continue
        assert code == (-number if number == signal.SIGKILL else 128 + number)
        assert "Traceback" not in run.printed
        if number != signal.SIGKILL:
            assert "give the same command again" in run.printed
    check_ends_undisturbed(recipe, place, undisturbed)


def test_a_pause_at_every_step_changes_nothing(recipe: Path, undisturbed: Contents, tmp_path: Path) -> None:
    place = Place.below(tmp_path)
    run = start(recipe, place)
    for step in STEPS:
        run.wait_until(lambda step=step: started(place.run, step), f"it came to {step}")
        run.send(signal.SIGSTOP)
        time.sleep(LONG_PAUSE_S if step == "student" else PAUSE_S)
        run.send(signal.SIGCONT)
    assert run.wait() == 0, run.printed
    assert contents(place.run) == undisturbed


@pytest.mark.parametrize("where", ["store", "store and run folder"])
def test_a_disk_that_fills_at_every_step(
    where: str, recipe: Path, undisturbed: Contents, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with mounted(disk):
        place = Place(disk / "store", (disk if "run" in where else tmp_path) / "run")
        for step in STEPS:
            run = start_until(step, recipe, place)
            filler = fill(disk)
            check_failed(run, "No space left on device", "disk is full", "make room and run again")
            filler.unlink()
        check_ends_undisturbed(recipe, place, undisturbed)


def test_a_limit_on_the_size_of_files_at_every_step(
    recipe: Path, undisturbed: Contents, tmp_path: Path
) -> None:
    place = Place.below(tmp_path)
    for step in STEPS:
        run = start_until(step, recipe, place)
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (0, 0))
        check_failed(run, "File too large", "disk I/O error", "disk is full")
    check_ends_undisturbed(recipe, place, undisturbed)


def test_a_disk_that_has_become_read_only_after_every_step(
    recipe: Path, undisturbed: Contents, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with mounted(disk) as remount:
        place = Place.below(disk)
        for step in STEPS:
            run = start_until(step, recipe, place)
            run.send(signal.SIGKILL)
            run.wait()
            remount("ro")
            check_failed(start(recipe, place), "Read-only file system")
            kept = Place(place.store, tmp_path / "elsewhere")
            check_failed(start(recipe, kept), "Read-only file system", "readonly database")
            remount("rw")
        check_ends_undisturbed(recipe, place, undisturbed)


def test_memory_that_runs_out_at_every_step(recipe: Path, undisturbed: Contents, tmp_path: Path) -> None:
    place = Place.below(tmp_path)
    told = set()
    for step in STEPS:
        for spare_bytes in SPARE_BYTES:
            run = start(recipe, place, starved_at=(step, spare_bytes))
            code = run.wait()
            # A library that cannot go on without memory ends the process itself, the loader with 127.
            assert code in (1, 127, -signal.SIGABRT, -signal.SIGSEGV), run.printed
            if code == 1:
                check_failed(run, *NO_MEMORY, *NO_MEMORY_ELSEWISE)
                (name,) = re.findall(r"^error: step (\w+): ", run.printed, re.MULTILINE)
                told |= {name} if any(one in run.printed for one in NO_MEMORY) else set()
            if f"{step}: done" in run.printed:  # a small one may need no more than there is
                break
    assert told >= {"logits", "student"}
    check_ends_undisturbed(recipe, place, undisturbed)


def test_a_clock_that_is_set_back_between_and_within_runs(
    recipe: Path, undisturbed: Contents, tmp_path: Path
) -> None:
    place = Place.below(tmp_path)
    for number, step in enumerate(STEPS):
        run = start_until(step, recipe, place, clock_shift_s=-number * YEAR_S)
        run.send(signal.SIGKILL)
        run.wait()
        for path in place.store.rglob("*"):  # as if made long after now
            os.utime(path, (time.time() + YEAR_S, time.time() + YEAR_S), follow_symlinks=False)
    check_ends_undisturbed(recipe, place, undisturbed, clock_shift_s=-10 * YEAR_S)
    told = [one["time"] for one in read_events(place.run / "events.jsonl")]
    falls = [before - after for before, after in itertools.pairwise(told)]
    assert sum(fall > 5 * YEAR_S for fall in falls) == 1, "the clock went back within the last run"
    page = (place.run / "report.html").read_text(encoding="utf-8")
    assert "-31" not in page, "no time that passed is negative"
