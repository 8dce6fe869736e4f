"""Finished runs, to be exported."""

from pathlib import Path
from typing import Any

import yaml

from potstill.core.store import Store
from potstill.pipeline.run import run_recipe
from potstill.pipeline.runner import RunOptions
from potstill.recipe import load_recipe


def run_in(folder: Path, recipe: dict[str, Any]) -> Path:
    """Run a recipe, with recipe, store and run in a folder; gives the run's own."""
    path, made = folder / "recipe.yaml", folder / "runs" / recipe["name"]
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run_recipe(load_recipe(str(path)), made, Store(folder / "store"), "quiet", RunOptions())
    return made
