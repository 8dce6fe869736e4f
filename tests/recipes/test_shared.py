"""What one store made another fetches: nothing is made twice, and all is the same to the byte."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.core import shared as sharing
from potstill.core.errors import StoreError
from potstill.core.events import read_events
from potstill.core.store import Artifact

from ..s3 import HAS_S3, NEEDS_S3, make_bucket, s3_environment, s3_server
from .conftest import Command, Outcome, small_recipe, write_recipe

STEPS = ("traces", "pruned", "student", "exam")


def _with_an_adapter(model_folder: Path) -> dict[str, Any]:
    """A recipe whose student is an adapter on what another step made."""
    recipe = small_recipe(model_folder)
    steps: dict[str, Any] = recipe["steps"]
    del steps["logits"]
    steps["traces"]["data"]["size"] = 12
    steps["student"] = {
        "do": "train",
        "student": "pruned",
        "data": "traces",
        "batch": 4,
        "lr": 1e-3,
        "lora": {"rank": 2},
        "keep_epochs": "all",
    }
    steps["exam"] |= {"models": {"base": "pruned", "student": "student"}, "max_new_tokens": 4}
    return recipe


def _files(run: Path) -> dict[str, dict[str, bytes]]:
    """The bytes of all that every step of a run made, manifests too; a model's card is the run's own."""
    found = {}
    for step in STEPS:
        folder = (run / step).resolve()
        names = [*Artifact.open(folder).manifest.files, "manifest.json"]
        found[step] = {name: (folder / name).read_bytes() for name in names}
    return found


def _told(run: Path, event: str) -> list[str]:
    return [one["step"] for one in read_events(run / "events.jsonl") if one["event"] == event]


def _table(outcome: Outcome) -> str:
    return outcome.out.partition("report:")[0]


@pytest.fixture
def team(tmp_path: Path) -> Path:
    """A folder that two machines mount."""
    folder = tmp_path / "team"
    folder.mkdir()
    return folder


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path, team: Path) -> Path:
    """The recipe's file, which says where its artifacts are shared."""
    return write_recipe(
        tmp_path / "recipe.yaml", {**_with_an_adapter(tiny_model_folder), "shared": str(team)}
    )


RunOn = Callable[..., Outcome]


@pytest.fixture
def run_on(potstill: Command, recipe: Path, tmp_path: Path) -> RunOn:
    """`run_on("a", ...)`: the recipe on the store and into the run folder of one machine."""

    def run(machine: str, *arguments: str) -> Outcome:
        places = ("--store", tmp_path / machine / "store", "--output", tmp_path / machine / "run")
        told = potstill("run", recipe, *arguments, *places)
        assert told.code == 0, told.err
        return told

    return run


@pytest.mark.slow
def test_a_second_machine_makes_nothing_and_has_the_same(
    run_on: RunOn, potstill: Command, recipe: Path, tmp_path: Path
) -> None:
    made = run_on("a")
    assert made.err.count(": done in") == len(STEPS)
    assert _told(tmp_path / "a" / "run", "step_shared") == list(STEPS)
    expected = _files(tmp_path / "a" / "run")
    (tmp_path / "a").rename(tmp_path / "gone")  # what names a path of the first machine leads nowhere now

    plan = json.loads(
        potstill("plan", recipe, "--store", tmp_path / "b" / "store", "--json").out.splitlines()[-1]
    )
    assert [step["status"] for step in plan["steps"]] == ["shared"] * len(STEPS)
    assert plan["problems"] == []
    assert not (tmp_path / "b" / "store" / "artifacts").exists(), "a plan fetches nothing"

    fetched = run_on("b")
    assert ": done in" not in fetched.err
    assert _told(tmp_path / "b" / "run", "step_fetched") == list(STEPS)
    assert _files(tmp_path / "b" / "run") == expected
    assert _table(fetched) == _table(made)

    # A step that nobody has made, of models that were fetched: an adapter and the base that it names.
    further = run_on("b", "exam.max_new_tokens=5", "--only", "exam")
    assert further.err.count(": done in") == 1
    assert _table(run_on("c", "exam.max_new_tokens=5")) == _table(further)
    assert "fetching" not in run_on("b").err, "what is here is not fetched"


@pytest.mark.slow
def test_the_models_of_single_epochs_find_their_base_as_well(run_on: RunOn, tmp_path: Path) -> None:
    run_on("a")
    (tmp_path / "a").rename(tmp_path / "gone")
    told = run_on("b", "exam.models.student=student:epoch1")
    assert told.err.count(": done in") == 1


@pytest.mark.slow
def test_what_could_not_be_shared_is_said_kept_and_put_up_by_the_same_command(
    run_on: RunOn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failures = sharing._SharedFolder._put_file, ["model.safetensors"]

    def fail(self: Any, source: Path, target: str, advance: Any) -> None:
        if source.name in failures:
            raise OSError("the disk there is full")
        put(self, source, target, advance)

    monkeypatch.setattr(sharing._SharedFolder, "_put_file", fail)
    told = run_on("a")
    assert "pruned: made, and not shared:" in told.err
    assert "the disk there is full" in told.err
    assert "the same command puts up what is missing" in told.err
    assert _told(tmp_path / "a" / "run", "step_not_shared") == ["pruned"]
    failures.clear()
    assert ": done in" not in run_on("a").err
    assert _told(tmp_path / "a" / "run", "step_shared")[-len(STEPS) :] == list(STEPS)
    assert ": done in" not in run_on("b").err


@pytest.mark.slow
def test_a_damaged_file_there_ends_the_run_and_a_step_made_by_force_takes_its_place(
    run_on: RunOn, potstill: Command, recipe: Path, team: Path, tmp_path: Path
) -> None:
    run_on("a")
    (damaged,) = team.glob("sealed/init-*/*/model.safetensors")
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    told = potstill("run", recipe, "--store", tmp_path / "b" / "store", "--output", tmp_path / "b" / "run")
    assert told.code == 1
    assert "step pruned" in told.err
    assert "model.safetensors is damaged there" in told.err
    assert _told(tmp_path / "b" / "run", "step_failed") == ["pruned"]
    run_on("a", "--force", "pruned")
    assert damaged.read_bytes() == data
    assert ": done in" not in run_on("b").err


@pytest.mark.slow
def test_what_is_damaged_here_is_fetched_again(run_on: RunOn, tmp_path: Path) -> None:
    run_on("a")
    expected = _files(tmp_path / "a" / "run")
    (tmp_path / "a" / "run" / "pruned" / "model.safetensors").unlink()
    told = run_on("a")
    assert "what was made is damaged (model.safetensors is missing); it is fetched" in told.err
    assert ": done in" not in told.err
    assert _files(tmp_path / "a" / "run") == expected


def test_a_place_that_is_not_there_or_holds_a_key_is_refused_before_anything_is_made(
    potstill: Command, recipe: Path, tmp_path: Path
) -> None:
    for place, message in {
        str(tmp_path / "elsewhere"): "is no folder here",
        "s3://AKIA:canary-0815@bucket/x": "command line: shared: holds a user name, a key or a `?`",
    }.items():
        told = potstill("run", recipe, f"shared={place}", "--store", tmp_path / "store")
        assert told.code == 1
        assert message in told.err
        assert "Traceback" not in told.err
        assert not (tmp_path / "store" / "artifacts").exists()
        written = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
        assert all(b"canary" not in text for text in [*written, told.err.encode(), told.out.encode()])
    plan = potstill("plan", recipe, f"shared={tmp_path}/elsewhere", "--store", tmp_path / "store")
    assert plan.code == 1
    assert "problem: " in plan.out
    assert "is no folder here" in plan.out


def test_steps_commands_share_as_well(potstill: Command, tiny_model_folder: Path, team: Path) -> None:
    command = (
        "generate",
        f"model={tiny_model_folder}",
        "data={task: chain_sum, size: 2}",
        "max_new_tokens=2",
    )
    for store, said in (("a", ": done in"), ("b", "is shared in")):
        told = potstill(*command, f"shared={team}", "--store", store)
        assert told.code == 0, told.err
        assert said in told.err


def test_a_plan_tells_what_only_a_fetched_part_can_tell(
    potstill: Command, recipe: Path, team: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    shared = {**_with_an_adapter(tiny_model_folder), "shared": str(team)}
    shared["steps"]["pruned"]["data"] = {"step": "traces", "where": {"task": "chain_sum"}}
    del shared["steps"]["student"], shared["steps"]["exam"]
    shared["steps"]["traces"]["data"]["labels"] = {"task": "task"}
    path = write_recipe(tmp_path / "parts.yaml", shared)
    told = potstill("run", path, "--only", "traces", "--store", tmp_path / "a")
    assert told.code == 0, told.err
    plan = json.loads(potstill("plan", path, "--store", tmp_path / "b", "--json").out.splitlines()[-1])
    assert plan["problems"] == []
    assert [step["status"] for step in plan["steps"]] == ["shared", "to make"]
    assert "step pruned: whether it is made is known once traces is fetched" in plan["notes"]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_S3, reason=NEEDS_S3)
def test_a_second_machine_makes_nothing_where_the_first_shared_by_s3(recipe: Path, tmp_path: Path) -> None:
    def run(machine: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [
            sys.executable,
            "-c",
            "from potstill.cli import main; main()",
            "run",
            str(recipe),
            *arguments,
        ]
        places = ["--store", str(tmp_path / machine / "store"), "--output", str(tmp_path / machine / "run")]
        return subprocess.run(
            [*command, *places], capture_output=True, text=True, env=environment, check=False
        )

    with s3_server(tmp_path) as address:
        environment = {**os.environ, **s3_environment(address)}
        missing = run("a", "shared=s3://team/distil")
        assert missing.returncode == 1
        assert "there is no bucket 'team'" in missing.stderr
        make_bucket(address, "team")
        made = run("a", "shared=s3://team/distil")
        assert made.returncode == 0, made.stderr
        assert made.stderr.count(": done in") == len(STEPS)
        assert "not shared" not in made.stderr
        expected = _files(tmp_path / "a" / "run")
        (tmp_path / "a").rename(tmp_path / "gone")
        fetched = run("b", "shared=s3://team/distil")
        assert fetched.returncode == 0, fetched.stderr
        assert ": done in" not in fetched.stderr
        assert _told(tmp_path / "b" / "run", "step_fetched") == list(STEPS)
        assert _files(tmp_path / "b" / "run") == expected
        assert fetched.stdout.partition("report:")[0] == made.stdout.partition("report:")[0]
        left = [
            path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "moto.log"
        ]
        assert not [text for text in left if b"canary" in text], "no key is written anywhere"


def test_a_step_that_cannot_be_looked_up_ends_the_run_with_what_was_made(
    run_on: RunOn, potstill: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, kind: str, fingerprint: str, on_damage: Any = None) -> None:
        raise StoreError("cannot be asked for what is made", where=self.place)

    monkeypatch.setattr(sharing.SharedArtifacts, "find", fail)
    told = potstill("run", recipe, "--store", tmp_path / "a" / "store", "--output", tmp_path / "a" / "run")
    assert told.code == 1
    assert "step traces" in told.err
    assert "cannot be asked for what is made" in told.err
