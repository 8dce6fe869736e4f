"""`potstill cache`: a step's command like others, and what looks into a cache."""

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Command, write_recipe


@pytest.fixture
def run_folder(potstill: Command, small: dict[str, Any], tmp_path: Path) -> Path:
    """A run with traces and logits."""
    small["steps"] = {name: small["steps"][name] for name in ("traces", "logits")}
    recipe = write_recipe(tmp_path / "recipe.yaml", small)
    assert potstill("run", recipe, "--output", "run", "--quiet").code == 0
    return tmp_path / "run"


def test_settings_as_key_and_value_make_a_cache_with_or_without_the_word_make(
    potstill: Command, run_folder: Path, tiny_model_folder: Path
) -> None:
    settings = [f"model={tiny_model_folder}", f"data={run_folder / 'traces'}", "codec=sampled", "draws=20"]
    made = potstill("cache", *settings, "--output", "one")
    assert made.code == 0, made.err
    assert "[1/1] cache: done in" in made.err
    again = potstill("cache", "make", "--output", "two", *settings)
    assert "cache already made" in again.err
    found = potstill("cache", "inspect", "one/cache", "--json")
    assert json.loads(found.out)["codec"] == "sampled"
    trained = potstill("train", f"student={tiny_model_folder}", "data=./one/cache", "lr=1e-3", "alpha=1.0")
    assert trained.code == 0, trained.err


def test_inspect_tells_what_a_cache_holds(potstill: Command, run_folder: Path) -> None:
    outcome = potstill("cache", "inspect", run_folder / "logits", "--json")
    found = json.loads(outcome.out)
    assert (found["codec"], found["k"], found["temperatures"], found["rows"]) == ("topk", 8, [1.0], 24)
    assert 0 < found["kept_mass_p01"] <= found["kept_mass_p05"] <= found["kept_mass_p50"] <= 1
    assert found["mean_distinct_ids"] == 8
    assert found["supervised_tokens"] < found["tokens"]
    assert {"bytes_per_token", "mean_kept_mass", "tokenizer", "model"} <= found.keys()
    shown = potstill("cache", "inspect", run_folder / "logits").out
    assert "mean kept mass" in shown


def test_verify_names_a_damaged_shard_and_exits_1(potstill: Command, run_folder: Path) -> None:
    outcome = potstill("cache", "verify", run_folder / "logits")
    assert (outcome.code, outcome.out) == (0, "shards verified: 1\n")
    shard = next((run_folder / "logits").resolve().glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    outcome = potstill("cache", "verify", run_folder / "logits")
    assert outcome.code == 1
    assert f"{shard.name}: is damaged" in outcome.err


def test_a_folder_without_a_cache_is_refused(potstill: Command, run_folder: Path) -> None:
    outcome = potstill("cache", "inspect", run_folder / "traces")
    assert outcome.code == 1
    assert "holds no finished cache" in outcome.err


def test_an_exported_cache_is_imported_and_trained_on(
    potstill: Command, run_folder: Path, tiny_model_folder: Path
) -> None:
    exported = potstill("cache", "export", run_folder / "logits", "logits.h5")
    assert (exported.code, exported.out) == (0, "logits.h5\n"), exported.err
    imported = potstill("cache", "import", "logits.h5", "imported")
    assert imported.code == 0, imported.err
    before, after = (
        json.loads(potstill("cache", "inspect", folder, "--json").out)
        for folder in (run_folder / "logits", "imported")
    )
    same = ("codec", "k", "temperatures", "rows", "tokens", "supervised_tokens", "tokenizer", "model")
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    trained = potstill("train", f"student={tiny_model_folder}", "data=./imported", "lr=1e-3", "batch=4")
    assert trained.code == 0, trained.err
