"""Every mistake gets one clear message and a non-zero exit, no traceback, and loses nothing."""

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..servers import Reply, error, running_server
from .conftest import Command, write_recipe

Recipe = dict[str, Any]
Mistake = Callable[[Recipe, Path], None]


def _set(*path: str, value: Any) -> Mistake:
    def make(recipe: Recipe, folder: Path) -> None:
        target = recipe
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return make


def _file(name: str, text: str, **source: Any) -> Mistake:
    def make(recipe: Recipe, folder: Path) -> None:
        (folder / name).write_text(text, encoding="utf-8")
        recipe["steps"]["traces"]["data"] = {"path": name, **source}

    return make


def _without_tokenizer(recipe: Recipe, folder: Path) -> None:
    for path in Path(recipe["models"]["teacher"]["path"]).glob("*token*"):
        path.unlink()


def _broken_gguf(recipe: Recipe, folder: Path) -> None:
    (folder / "model.gguf").write_bytes(b"not a model")
    recipe["models"]["teacher"] = {"engine": "llama_cpp", "model": "./model.gguf"}


def _run(potstill: Command, recipe: Recipe, folder: Path) -> Any:
    store = recipe.pop("store", folder / "store")
    return potstill("run", write_recipe(folder / "recipe.yaml", recipe), "--store", store)


MISTAKES: dict[str, tuple[Mistake, list[str]]] = {
    "unknown key": (
        _set("steps", "student", "learning_rate", value=1),
        ["recipe.yaml:", "steps.student.learning_rate", "unknown key"],
    ),
    "misspelt key": (_set("steps", "logits", "topk", value=4), ["recipe.yaml:", "did you mean 'top_k'"]),
    "misspelt top key": (_set("model", value={}), ["unknown key model", "did you mean 'models'"]),
    "wrong type": (
        _set("steps", "student", "epochs", value="many"),
        ["steps.student.epochs", "valid number", "'many'"],
    ),
    "number out of range": (
        _set("steps", "student", "lr", value=-1.0),
        ["steps.student.lr", "greater than 0"],
    ),
    "unknown kind of step": (
        _set("steps", "student", "do", value="trian"),
        ["unknown kind 'trian'", "did you mean 'train'"],
    ),
    "unknown step": (_set("steps", "student", "data", value="logit"), ["'logit'", "did you mean 'logits'"]),
    "unknown model": (
        _set("steps", "traces", "model", value="techer"),
        ["'techer'", "did you mean 'teacher'"],
    ),
    "unknown view": (
        _set("steps", "exam", "data", value="traces:heldout"),
        ["'heldout'", "did you mean 'held_out'"],
    ),
    "circle": (_set("steps", "pruned", "model", value="student"), ["circle", "pruned -> "]),
    "one name for model and step": (
        _set("models", "pruned", value={"path": "x/y"}),
        ["names both a model and a step"],
    ),
    "missing data file": (_set("steps", "traces", "data", value={"path": "gone.jsonl"}), ["gone.jsonl"]),
    "missing model folder": (_set("models", "teacher", "path", value="./gone"), ["./gone"]),
    "empty data": (_file("empty.jsonl", ""), ["empty.jsonl", "no rows"]),
    "unknown shape": (_file("odd.jsonl", '{"colour": "red"}\n'), ["colour", "question"]),
    "malformed line, strict": (
        _file("rows.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": \n', strict=True),
        ["rows.jsonl", "2"],
    ),
    "wrong answer index": (
        _file(
            "mc.jsonl", json.dumps({"question": "q", "choices": ["x", "y"], "answer": 7}) + "\n", strict=True
        ),
        ["mc.jsonl", "7"],
    ),
    "unknown task": (
        _set("steps", "traces", "data", value={"task": "chain_sums", "size": 4}),
        ["chain_sums", "chain_sum"],
    ),
    "prompt past the context": (_file("long.jsonl", json.dumps({"prompt": "word " * 3000}) + "\n"), ["512"]),
    "model folder without tokenizer": (_without_tokenizer, ["tokenizer"]),
    "a GGUF that is none": (_broken_gguf, ["model.gguf", "GGUF"]),
    "a logits step wants a local model": (
        _set(
            "models", "teacher", value={"engine": "solver", "function": "potstill.teachers.solvers:chain_sum"}
        ),
        ["gives no logits", "engine: transformers"],
    ),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_gets_one_clear_message(
    mistake: str, potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    make, fragments = MISTAKES[mistake]
    make(small, tmp_path)
    outcome = _run(potstill, small, tmp_path)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert outcome.err.count("error: ") == 1
    for fragment in fragments:
        assert fragment in outcome.err


def test_a_name_given_twice_in_the_file_is_refused(potstill: Command, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("steps:\n  a: {do: cache}\n  a: {do: init}\n", encoding="utf-8")
    outcome = potstill("run", path)
    assert outcome.code == 1
    assert "recipe.yaml:3: steps.a is given twice (first on line 2)" in outcome.err


def test_a_recipe_that_is_not_there_is_refused_with_the_nearest_name(potstill: Command) -> None:
    outcome = potstill("run", "quikstart")
    assert outcome.code == 1
    assert "did you mean 'quickstart'" in outcome.err


def test_a_malformed_line_is_left_out_and_counted(potstill: Command, small: Recipe, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"say {n}"}) for n in range(6)]
    _file("rows.jsonl", "\n".join([*lines[:2], '{"prompt": ', *lines[2:]]))(small, tmp_path)
    small["steps"] = {"traces": small["steps"]["traces"]}
    outcome = _run(potstill, small, tmp_path)
    assert outcome.code == 0
    assert "rows.jsonl, line 3" in outcome.err
    assert "6 rows" in outcome.err
    assert "1 malformed" in outcome.err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full and /sys are Linux's")
def test_a_full_disk_and_a_read_only_folder_are_said_so(
    potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    run_folder = tmp_path / "runs" / "small"
    run_folder.mkdir(parents=True)
    (run_folder / "events.jsonl").symlink_to("/dev/full")
    recipe = write_recipe(tmp_path / "recipe.yaml", small)
    full = potstill("run", recipe, "--store", tmp_path / "store")
    assert full.code == 1
    assert "No space left on device" in full.err
    assert "Traceback" not in full.err
    read_only = potstill("run", recipe, "--output", tmp_path / "other", "--store", "/sys/potstill")
    assert read_only.code == 1
    assert "/sys/potstill" in read_only.err
    assert "Traceback" not in read_only.err


def test_what_was_made_before_a_mistake_is_kept(potstill: Command, small: Recipe, tmp_path: Path) -> None:
    small["steps"]["student"]["max_length"] = 2
    assert _run(potstill, small, tmp_path).code == 1
    small["steps"]["student"].pop("max_length")
    outcome = _run(potstill, small, tmp_path)
    assert outcome.code == 0, outcome.err
    assert "traces: generate already made" in outcome.err
    assert "logits: cache already made" in outcome.err


def test_strict_stops_at_a_malformed_line(potstill: Command, small: Recipe, tmp_path: Path) -> None:
    _file("rows.jsonl", '{"prompt": "a"}\n{"prompt": \n')(small, tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", small)
    outcome = potstill("run", recipe, "--store", tmp_path / "store", "--strict")
    assert outcome.code == 1
    assert "rows.jsonl, line 2" in outcome.err


def test_logits_of_another_vocabulary_are_refused(
    potstill: Command, small: Recipe, tmp_path: Path, tiny_model_folder: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    # Two words change places: the sizes still agree, what the ids mean does not.
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    small["models"]["other"] = {"path": str(other)}
    small["steps"]["student"]["student"] = "other"
    outcome = _run(potstill, small, tmp_path)
    assert outcome.code == 1
    assert "tokenizer" in outcome.err
    assert "Traceback" not in outcome.err


def _with_server(small: Recipe, base_url: str) -> Recipe:
    model = {
        "engine": "openai",
        "base_url": base_url,
        "model": "m",
        "api_key_env": "CANARY_KEY",
        "max_retries": 0,
    }
    return {**small, "models": {"teacher": model}, "steps": {"traces": small["steps"]["traces"]}}


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refuses the key"), (404, "no such model"), (500, "HTTP 500")]
)
def test_a_server_that_refuses_is_named_with_the_reason_and_never_the_key(
    status: int,
    message: str,
    potstill: Command,
    small: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CANARY_KEY", "sk-canary-1234567890")
    with running_server() as server:
        server.always = lambda body: Reply(status=status, body=error("no"))
        outcome = _run(potstill, _with_server(small, server.base_url), tmp_path)
    assert outcome.code == 1
    assert message in outcome.err
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 3
    assert all(b"sk-canary" not in text for text in [*written, outcome.err.encode(), outcome.out.encode()])


def test_a_server_that_is_not_there_is_said_so(
    potstill: Command, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY_KEY", "sk-canary-1234567890")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outcome = _run(potstill, _with_server(small, f"http://127.0.0.1:{port}/v1"), tmp_path)
    assert outcome.code == 1
    assert f"127.0.0.1:{port}" in outcome.err
    assert "cannot be reached" in outcome.err


def test_a_key_that_is_not_set_is_named(potstill: Command, small: Recipe, tmp_path: Path) -> None:
    outcome = _run(potstill, _with_server(small, "http://127.0.0.1:9/v1"), tmp_path)
    assert outcome.code == 1
    assert "CANARY_KEY" in outcome.err
