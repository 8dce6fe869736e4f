"""What the documentation tells a reader to type works, its links lead somewhere, its tables are current."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from potstill.recipe import load_recipe

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
        options = [one for one in arguments[1:] if "=" in one and not one.startswith("--")]
        load_recipe(arguments[0], options)
        return
    if command in ("chat", "report", "plan"):
        arguments = ["--help"]
    monkeypatch.chdir(tmp_path)
    from typer.testing import CliRunner

    from potstill.cli import app

    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_recipes_in_the_documentation_load(page: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_recipe(str(path)).graph.order


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_recipe_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "docs" / "recipe_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.reference(), (
        "run python docs/recipe_reference.py"
    )
