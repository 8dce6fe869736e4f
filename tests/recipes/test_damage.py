"""What a disk or a copy has changed is found before it is used, named, and made again."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from potstill.core.store import MANIFEST_FILE, Artifact
from potstill.pipeline import runner
from potstill.pipeline.kinds import step_function

from .conftest import Command, write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Traces of a solver, and a selection of them: no model is loaded."""
    steps: dict[str, Any] = {
        "traces": {"do": "generate", "model": "solver", "data": {"task": "chain_sum", "size": 12}},
        "picked": {"do": "select", "data": "traces", "rule": "none", "filters": {"max_characters": 5000}},
    }
    solver = {"engine": "solver", "function": "potstill.teachers.solvers:chain_sum"}
    return write_recipe(
        tmp_path / "recipe.yaml", {"name": "damage", "models": {"solver": solver}, "steps": steps}
    )


@pytest.fixture
def made(potstill: Command, recipe: Path, tmp_path: Path) -> dict[str, Artifact]:
    """What a run of it makes."""
    done = potstill("run", recipe)
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "damage"
    return {step: Artifact.open((folder / step).resolve()) for step in ("traces", "picked")}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def unmake(artifact: Artifact) -> None:
    """Let a step be made again, so that it reads its input."""
    (artifact.folder / MANIFEST_FILE).unlink()


def check_undisturbed(done: Any, made: dict[str, Artifact]) -> None:
    assert done.code == 0, done.err
    for artifact in made.values():
        again = Artifact.open(artifact.folder)
        assert again.manifest.content == artifact.manifest.content
        again.check_content()


def test_a_flipped_bit_in_what_a_step_reads_is_named_before_it_is_used(
    potstill: Command, recipe: Path, made: dict[str, Artifact]
) -> None:
    records = made["traces"].folder / "records.parquet"
    flip(records, records.stat().st_size // 2)
    unmake(made["picked"])
    failed = potstill("run", recipe)
    assert failed.code == 1
    assert f"{records}: is damaged" in failed.err
    assert "delete it" in failed.err
    assert "Traceback" not in failed.err
    records.unlink()
    done = potstill("run", recipe)
    check_undisturbed(done, made)
    assert "records.parquet is missing); it is made again" in done.err
    assert "12 of them answered already" in done.err, "no answer is asked for twice"


def test_a_file_cut_short_is_made_again_and_said_so(
    potstill: Command, recipe: Path, made: dict[str, Artifact]
) -> None:
    records = made["traces"].folder / "records.parquet"
    records.write_bytes(records.read_bytes()[:-9])
    done = potstill("run", recipe)
    check_undisturbed(done, made)
    assert "what was made is damaged (records.parquet has" in done.err
    assert "picked: select already made" in done.err


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_damaged_manifest_is_made_again_and_said_so(
    share: float, potstill: Command, recipe: Path, made: dict[str, Artifact]
) -> None:
    manifest = made["traces"].folder / MANIFEST_FILE
    data = manifest.read_bytes()
    place = next(
        at
        for at in range(int(share * len(data)), len(data))
        if chr(data[at]).isalnum() and chr(data[at]) != "0"
    )
    flip(manifest, place)
    done = potstill("run", recipe)
    check_undisturbed(done, made)
    assert "what was made is damaged (manifest.json: unreadable manifest" in done.err


def test_an_answer_that_was_damaged_in_the_store_is_taken_out_and_asked_for_again(
    potstill: Command, recipe: Path, made: dict[str, Artifact], tmp_path: Path
) -> None:
    [path] = (tmp_path / "store" / "requests").glob("*.sqlite")
    with sqlite3.connect(path) as database:
        [(key, answer)] = database.execute("SELECT key, answer FROM answers LIMIT 1").fetchall()
        database.execute("UPDATE answers SET answer = ? WHERE key = ?", (answer.replace("is", "iz"), key))
    database.close()
    failed = potstill("run", recipe, "--force", "traces")
    assert failed.code == 1
    assert "1 answers were damaged on the disk, and have been taken out" in failed.err
    done = potstill("run", recipe)
    check_undisturbed(done, made)
    assert "11 of them answered already" in done.err


def test_a_store_of_answers_that_is_no_database_any_more_is_named(
    potstill: Command, recipe: Path, made: dict[str, Artifact], tmp_path: Path
) -> None:
    [path] = (tmp_path / "store" / "requests").glob("*.sqlite")
    path.write_bytes(b"\0" * 64 + path.read_bytes()[64:])
    failed = potstill("run", recipe, "--force", "traces")
    assert failed.code == 1
    assert f"{path}: the store of answers is damaged" in failed.err
    assert "move the file away" in failed.err
    path.unlink()
    check_undisturbed(potstill("run", recipe), made)


def test_memory_that_runs_out_in_a_step_is_said_so_and_costs_nothing_made(
    potstill: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    with monkeypatch.context() as patched:
        patched.setattr(
            runner, "step_function", lambda kind: full if kind == "select" else step_function(kind)
        )
        failed = potstill("run", recipe)
    assert failed.code == 1
    assert "error: step picked: ran out of memory" in failed.err
    assert "fault in potstill" not in failed.err
    done = potstill("run", recipe)
    assert done.code == 0, done.err
    assert "traces: generate already made" in done.err
