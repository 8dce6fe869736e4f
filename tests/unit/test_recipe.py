"""Recipes: extended, overridden, swept and expanded, and every mistake told with its place."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.core.errors import RecipeError
from potstill.recipe import json_schema, load_recipe, one_step_recipe, shipped_recipes, sweep_variants

BASE: dict[str, Any] = {
    "name": "base",
    "seed": 1,
    "models": {"teacher": {"path": "some/model"}},
    "steps": {
        "traces": {"do": "generate", "model": "teacher", "data": {"task": "chain_sum", "size": 4}},
        "student": {"do": "train", "student": "teacher", "data": "traces", "lora": {"rank": 4}},
    },
}


def write(path: Path, recipe: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return str(path)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return write(tmp_path / "base.yaml", BASE)


def settings(recipe: Any, step: str) -> Any:
    return recipe.graph.nodes[step].settings


def test_an_extending_recipe_is_laid_on_its_base_and_null_removes(base: str, tmp_path: Path) -> None:
    over = {"extends": "base.yaml", "name": "over", "steps": {"student": {"epochs": 3, "lora": None}}}
    recipe = load_recipe(write(tmp_path / "over.yaml", over))
    student = settings(recipe, "student")
    assert (recipe.name, recipe.seed, student.epochs, student.lora) == ("over", 1, 3, None)


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    with pytest.raises(RecipeError, match=r"circle: b\.yaml -> a\.yaml -> b\.yaml"):
        load_recipe(write(tmp_path / "b.yaml", {"extends": "a.yaml"}))


def test_overrides_are_typed_and_reach_nested_keys(base: str) -> None:
    recipe = load_recipe(
        base, ["seed=9", "student.lr=1e-3", "steps.student.lora.rank=8", "models.teacher.identity=x"]
    )
    student = settings(recipe, "student")
    assert (recipe.seed, student.lr, student.lora.rank) == (9, 1e-3, 8)
    assert recipe.graph.models["teacher"].identity == "x"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("studnet.lr=1", "did you mean 'student'"),
        ("student.lr", "no override"),
        ("student.lr=fast", "command line: steps.student.lr"),
        ("student.lora.ranc=4", "did you mean 'rank'"),
        ("seed=x", "no whole number"),
    ],
)
def test_a_wrong_override_is_told_as_from_the_command_line(base: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(base, [override])


def test_the_resolved_recipe_makes_the_same_graph(base: str, tmp_path: Path) -> None:
    recipe = load_recipe(base, ["student.epochs=2"])
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    same = load_recipe(str(again)).graph
    assert same.models == recipe.graph.models
    assert {one.name: one.settings for one in same.nodes.values()} == {
        one.name: one.settings for one in recipe.graph.nodes.values()
    }


def test_each_makes_one_step_a_value_and_fills_in_placeholders(tmp_path: Path) -> None:
    recipe = {**BASE, "steps": {**BASE["steps"]}}
    recipe["steps"]["traces"] = {
        "do": "generate",
        "model": "teacher",
        "data": {"task": "{task}", "size": 4},
        "each": {"task": ["chain_sum", "products"]},
    }
    loaded = load_recipe(write(tmp_path / "each.yaml", recipe))
    assert settings(loaded, "traces[products]").data.task == "products"
    assert loaded.graph.needs["student"] == ["traces[chain_sum]", "traces[products]"]


def test_a_sweep_over_values_and_over_named_variants(tmp_path: Path) -> None:
    path = write(
        tmp_path / "sweep.yaml",
        {
            **BASE,
            "variants": {
                "plain": {"steps": {"student": {"lora": None}}},
                "wide": {"steps": {"student": {"batch": 32}}},
            },
        },
    )
    recipes = sweep_variants(path, ["student.lr=1e-4,3e-4", "plain,wide"], ["seed=5"])
    assert list(recipes) == ["lr=0.0001,plain", "lr=0.0001,wide", "lr=0.0003,plain", "lr=0.0003,wide"]
    last = settings(recipes["lr=0.0003,wide"], "student")
    assert (last.lr, last.batch, last.lora.rank, recipes["lr=0.0003,wide"].seed) == (3e-4, 32, 4, 5)
    assert settings(recipes["lr=0.0001,plain"], "student").lora is None


def test_an_unknown_variant_is_refused(base: str) -> None:
    with pytest.raises(RecipeError, match="no variant 'wide'"):
        load_recipe(base, variant="wide")


def test_a_step_command_is_a_recipe_of_one_step() -> None:
    recipe = one_step_recipe("train", ["student=some/model", "data=./x.jsonl", "lora.rank=2", "seed=4"])
    assert (recipe.seed, list(recipe.graph.nodes), settings(recipe, "train").lora.rank) == (4, ["train"], 2)


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_shipped_recipes_load_and_say_what_they_do(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_the_schema_knows_every_key_of_the_shipped_recipes() -> None:
    schema = json_schema()
    kinds = {
        one["properties"]["do"]["const"]: one
        for one in schema["properties"]["steps"]["additionalProperties"]["oneOf"]
    }
    for path in shipped_recipes().values():
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert raw.keys() <= schema["properties"].keys()
        for step in raw["steps"].values():
            assert step.keys() <= kinds[step["do"]]["properties"].keys()
