"""What the documentation tells a reader to type works, its links lead somewhere, its tables are current."""

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from potstill.cli import app
from potstill.core.errors import RecipeError
from potstill.recipe import load_recipe, sweep_variants

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for name, text in FENCE.findall(page.read_text(encoding="utf-8")):
            if name == language:
                found.append((str(page.relative_to(ROOT)), text))
    return found


def check_run(arguments: list[str]) -> None:
    """Load what `potstill run` would run: its one recipe, or every recipe of its sweep."""
    command = typer.main.get_group(app).commands["run"]
    given = command.make_context("run", list(arguments)).params
    if given["sweep"]:
        sweep_variants(given["recipe"], given["sweep"], given["overrides"] or ())
    else:
        load_recipe(given["recipe"], given["overrides"] or ())


COMMANDS = [(page, line) for page, text in blocks("sh") for line in text.strip().splitlines()]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_run(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make targets exist; potstill's commands parse, and those that cost nothing are carried out."""
    words = shlex.split(line)
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    assert Path(words[0]).name == "potstill", f"{page}: what is {words[0]}?"
    command, arguments = words[1], words[2:]
    if command == "run":
        check_run(arguments)
        return
    if command in ("chat", "rate", "report", "plan"):
        arguments = ["--help"]
    monkeypatch.chdir(tmp_path)
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 0, result.output


def test_a_command_with_a_sweep_is_checked_as_one() -> None:
    check_run(["logit-kd", "--sweep", "student.alpha=0.0,0.5", "--output", "runs/x"])
    check_run(["logit-kd", "--sweep", "two-stages,one-stage", "seed=3"])
    with pytest.raises(RecipeError, match="no variant 'three-stages'"):
        check_run(["logit-kd", "--sweep", "two-stages,three-stages"])
    with pytest.raises(RecipeError, match="command line: steps"):
        check_run(["logit-kd", "--sweep", "student.batch=1,many"])


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_recipes_in_the_documentation_load(page: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_recipe(str(path)).graph.order


@pytest.mark.slow
def test_the_python_in_the_readme_runs_on_a_run_of_the_recipe_it_names(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.core.store import Store
    from potstill.pipeline.run import run_recipe
    from potstill.pipeline.runner import RunOptions

    model = {"path": str(tiny_model_folder)}
    server = {**model, "engine": "transformers", "model": None}
    overrides = {"models": {"teacher-server": server, "teacher": model}}
    small = {"traces": {"max_new_tokens": 8, "data": {"task": "chain_sum", "size": 16}}}
    steps = {**small, "pruned": {"layers": 1}, "logits": {"top_k": 8}, "student": None, "exam": None}
    recipe = {"extends": "quickstart", **overrides, "steps": steps}
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    loaded = load_recipe("small.yaml")
    run_recipe(loaded, Path("runs/quickstart"), Store(tmp_path / "store"), "quiet", RunOptions())
    [script] = [text for page, text in blocks("python") if page == "README.md"]
    exec(compile(script, "README.md", "exec"), {})
    assert Path("my-student/model.safetensors").is_file()


def test_the_python_in_the_how_to_makes_a_cache_of_another_scripts_file(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import h5py
    import numpy as np
    import torch

    from potstill.cache import import_artifact
    from potstill.logits.logit_cache import LogitCache
    from potstill.losses.types import Sparse
    from potstill.models import TransformersModel, load_tokenizer, tokenizer_hash

    chance, k = np.random.default_rng(0), 5
    real = np.arange(9) < np.array([9, 4, 6])[:, None]
    ids, kept = (
        chance.integers(3, 300, real.shape),
        chance.permuted(np.tile(np.arange(300), (3, 9, 1)), axis=2),
    )
    logits = chance.normal(10, 2, (*real.shape, k)).astype(np.float16)
    monkeypatch.chdir(tmp_path)
    with h5py.File("old.h5", "w") as old:
        old["input_ids"], old["attention_mask"] = ids, real.astype(int)
        old["top_k_indices"], old["top_k_logits"] = kept[:, :, :k], logits
    [script] = [text for page, text in blocks("python") if page.endswith("logit-distillation.md")]
    exec(compile(script.replace("Qwen/Qwen3-4B", str(tiny_model_folder)), "how-to", "exec"), {})
    cache = LogitCache.open(import_artifact(Path("new.h5"), tmp_path / "logits").folder)
    assert cache.tokenizer == tokenizer_hash(load_tokenizer(TransformersModel(path=str(tiny_model_folder))))
    for number, length in enumerate((9, 4, 6)):
        assert list(cache.row(number).token_ids) == ids[number, :length].tolist()
        assert list(cache.row(number).mask) == [0] + [1] * (length - 1)
        for temperature in (1.0, 2.0):
            signal = cache.signal(number, temperature)
            assert isinstance(signal, Sparse)
            given_NK = torch.from_numpy(logits[number, : length - 1]).float()
            order_NK = given_NK.sort(dim=-1, descending=True, stable=True).indices
            expected_NK = (given_NK / temperature).log_softmax(-1).gather(-1, order_NK)
            torch.testing.assert_close(signal.log_probs_NK, expected_NK, rtol=0.01, atol=0.01)
            ids_NK = torch.from_numpy(kept[number, : length - 1, :k])
            assert torch.equal(signal.ids_NK, ids_NK.gather(-1, order_NK))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def _script_of_docs(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_reference_is_current() -> None:
    module = _script_of_docs("recipe_reference")
    assert module.TARGET.read_text(encoding="utf-8") == module.reference(), (
        "run python docs/recipe_reference.py"
    )


def test_the_table_of_sizes_is_current() -> None:
    module = _script_of_docs("scaling_table")
    assert module.TARGET.read_text(encoding="utf-8") == module.page(), "run python docs/scaling_table.py"
