"""Recipes: extended, overridden, swept and expanded, and every mistake told with its place."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.core.errors import RecipeError
from potstill.core.settings import meaning
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


def test_an_override_of_null_removes_a_key(base: str) -> None:
    recipe = load_recipe(base, ["student.lora=null"])
    assert recipe.graph.nodes["student"].settings.lora is None  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="lorra"):
        load_recipe(base, ["student.lorra=null"])


def test_a_placeholder_that_stands_alone_becomes_the_value_itself(tmp_path: Path) -> None:
    recipe = {
        "name": "two",
        "models": {"teacher": {"path": "some/model"}},
        "steps": {
            "traces": {
                "do": "generate",
                "model": "teacher",
                "data": {"task": "chain_sum", "size": 4, "labels": {"heat": "at {t}"}},
                "temperature": "{t}",
                "each": {"t": [0.3, 1]},
            }
        },
    }
    nodes = load_recipe(write(tmp_path / "two.yaml", recipe)).graph.nodes
    found = {name: (node.settings.temperature, node.settings.data.labels) for name, node in nodes.items()}  # type: ignore[attr-defined]
    assert found == {"traces[0.3]": (0.3, {"heat": "at 0.3"}), "traces[1]": (1.0, {"heat": "at 1"})}


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


def test_how_many_processes_train_is_said_apart_from_the_steps(base: str, tmp_path: Path) -> None:
    over = write(
        tmp_path / "over.yaml", {"extends": "base.yaml", "scale": {"engine": "torchrun", "nproc_per_node": 2}}
    )
    recipe = load_recipe(over, ["scale.nproc_per_node=4"])
    assert recipe.scale is not None
    assert (recipe.scale.nproc_per_node, recipe.scale.nnodes) == (4, 1)
    assert recipe.resolved["scale"] == {"engine": "torchrun", "nproc_per_node": 4}
    kept = load_recipe(base).graph.nodes
    assert [one.settings for one in recipe.graph.nodes.values()] == [one.settings for one in kept.values()]
    assert load_recipe(over, ["scale=null"]).scale is None
    assert meaning(recipe.scale) == {}, "it never enters a fingerprint"
    one_step = one_step_recipe(
        "train", ["student=./a", "data=./b", "scale.engine=torchrun", "scale.nproc_per_node=2"]
    )
    assert one_step.scale is not None
    with pytest.raises(RecipeError, match=r"base\.yaml:1: scale: 2 is not a mapping"):
        load_recipe(write(tmp_path / "base.yaml", {"scale": 2, **BASE}))


def test_where_artifacts_are_shared_is_said_apart_from_the_steps(base: str, tmp_path: Path) -> None:
    over = write(tmp_path / "over.yaml", {"extends": "base.yaml", "shared": "s3://bucket/distil"})
    recipe = load_recipe(over)
    assert recipe.shared == recipe.resolved["shared"] == "s3://bucket/distil"
    assert load_recipe(over, ["shared=/mnt/team"]).shared == "/mnt/team"
    assert load_recipe(over, ["shared=null"]).shared is None
    assert load_recipe(base).shared is None
    assert one_step_recipe("train", ["student=./a", "data=./b", "shared=/mnt/team"]).shared == "/mnt/team"
    with pytest.raises(RecipeError, match=r"command line: shared: holds a user name") as caught:
        load_recipe(over, ["shared=s3://key:canary@bucket"])
    assert "canary" not in str(caught.value)


# --- stages


def staged(tmp_path: Path, *stages: dict[str, Any], **step: Any) -> str:
    student = {**BASE["steps"]["student"], "epochs": 2, "lr": 1e-3, "stages": list(stages), **step}
    exam = {"do": "evaluate", "models": ["student"], "data": "traces:held_out"}
    steps = {**BASE["steps"], "student": student, "exam": exam}
    return write(tmp_path / "staged.yaml", {**BASE, "steps": steps})


HEAD = {"name": "head", "epochs": 1, "groups": [{"match": "layers", "lr_multiplier": 0}]}


def test_stages_become_a_chain_whose_last_step_keeps_the_name(tmp_path: Path) -> None:
    recipe = load_recipe(staged(tmp_path, HEAD, {"name": "top", "lr": 5e-4}, {"name": "all"}))
    graph = recipe.graph
    assert graph.order == ["traces", "student-head", "student-top", "student", "exam"]
    assert graph.needs["student-top"] == ["student-head", "traces"]
    assert graph.needs["student"] == ["student-top", "traces"]
    assert graph.needs["exam"] == ["student", "traces"]
    head, top, last = (settings(recipe, name) for name in ("student-head", "student-top", "student"))
    assert (head.student, head.epochs, head.lr, head.groups[0].lr_multiplier) == ("teacher", 1, 1e-3, 0)
    assert (top.epochs, top.lr, top.groups) == (2, 5e-4, [])
    assert (last.epochs, last.lr) == (2, 1e-3)
    assert [one.lora is not None for one in (head, top, last)] == [True, False, False]


def test_a_stage_may_have_its_own_data_and_take_a_setting_away(tmp_path: Path) -> None:
    recipe = load_recipe(
        staged(tmp_path, {**HEAD, "data": "some/rows.jsonl"}, {"name": "all", "max_steps": None}, max_steps=9)
    )
    head, last = settings(recipe, "student-head"), settings(recipe, "student")
    assert (head.data, head.max_steps) == ("some/rows.jsonl", 9)
    assert (last.data, last.max_steps) == ("traces", None)


def test_the_resolved_recipe_of_stages_is_the_chain(tmp_path: Path) -> None:
    recipe = load_recipe(staged(tmp_path, HEAD, {"name": "all"}))
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    same = load_recipe(str(again)).graph
    assert {one.name: one.settings for one in same.nodes.values()} == {
        one.name: one.settings for one in recipe.graph.nodes.values()
    }


def test_stages_of_each_value_follow_one_another(tmp_path: Path) -> None:
    path = staged(tmp_path, HEAD, {"name": "all"}, each={"seeded": ["a", "b"]})
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    del recipe["steps"]["exam"]
    graph = load_recipe(write(Path(path), recipe)).graph
    assert graph.needs["student[b]"] == ["student-head[b]", "traces"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"epochs": 1}], r"stages\.0 has no name"),
        ([HEAD, HEAD], r"stages\.1 has no name of its own"),
        ([HEAD, {"name": "all", "student": "teacher"}], r"staged\.yaml:\d+: a stage cannot set student"),
        ([HEAD, {"name": "all", "lora": {"rank": 2}}], "a later stage cannot set lora"),
        ([HEAD, {"name": "all", "epoch": 2}], r"unknown key steps\.student\.epoch\n.*did you mean 'epochs'"),
        ([{**HEAD, "lr": "fast"}, {"name": "all"}], r"steps\.student-head\.lr"),
        ([], "stages is empty"),
    ],
)
def test_a_wrong_stage_is_told_with_its_place(tmp_path: Path, stages: list[Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(staged(tmp_path, *stages))


LAST = {"name": "all", "epochs": 1, "lr": 1e-4}


@pytest.mark.parametrize("stage", ["all", "1"])
def test_an_override_reaches_a_stage_by_name_and_by_number(tmp_path: Path, stage: str) -> None:
    recipe = load_recipe(
        staged(tmp_path, HEAD, LAST),
        [f"student.stages.{stage}.lr=1e-5", "student.stages.head.groups.0.lr_multiplier=0.5"],
    )
    head, last = settings(recipe, "student-head"), settings(recipe, "student")
    assert (head.lr, head.groups[0].lr_multiplier, last.lr, last.epochs) == (1e-3, 0.5, 1e-5, 1)


def test_an_override_reaches_an_item_of_any_list(tmp_path: Path) -> None:
    path = staged(
        tmp_path,
        {"name": "all"},
        groups=[{"match": "layers", "lr_multiplier": 0}, {"match": "embed", "lr_multiplier": 0}],
    )
    groups = settings(load_recipe(path, ["student.groups.1.lr_multiplier=0.1"]), "student").groups
    assert [one.lr_multiplier for one in groups] == [0, 0.1]


def test_a_key_of_the_hub_beside_a_path_is_told_what_it_belongs_to_and_each_known_key_once() -> None:
    with pytest.raises(RecipeError) as told:
        one_step_recipe("cache", ["model=some/model", "data.path=wikitext", "data.config=wikitext-2-raw-v1"])
    assert "command line: unknown key steps.cache.data.config" in str(told.value)
    assert "config belongs to a data set of the hub: name that by `dataset`, not `path`" in str(told.value)
    with pytest.raises(RecipeError) as told:
        one_step_recipe("cache", ["model=some/model", "data.path=./x.jsonl", "data.qqq=1"])
    known = str(told.value).partition("known: ")[2].split(", ")
    assert sorted(set(known)) == known, "each once"
    assert {"path", "limit", "held_out"} <= set(known)


def test_an_override_of_what_no_stage_sets_reaches_every_stage(tmp_path: Path) -> None:
    recipe = load_recipe(staged(tmp_path, HEAD, LAST), ["student.batch=3"])
    assert [settings(recipe, name).batch for name in ("student-head", "student")] == [3, 3]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "student.epochs=4",
            r"reach any stage[^\n]*\n.*student\.stages\.head\.epochs=, student\.stages\.all\.epochs=",
        ),
        ("student.lr=1e-5", r"command line: student\.lr would not reach every stage: lr is set in 'all'\n"),
        (
            "student.groups.0.lr_multiplier=1",
            r"groups\.0\.lr_multiplier is set in 'head'\n.*student\.stages\.head\.groups\.0\.lr_multiplier=",
        ),
        (
            "steps.student.lr=1e-5",
            r"mend: .* steps\.student\.stages\.head\.lr=, steps\.student\.stages\.all\.lr=",
        ),
    ],
)
def test_an_override_that_some_stage_hides_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(staged(tmp_path, HEAD, LAST), [override])


def test_a_hidden_setting_of_an_adapter_is_overridden_in_the_first_stage_alone(tmp_path: Path) -> None:
    path = staged(tmp_path, {**HEAD, "lora": {"rank": 2}}, LAST)
    with pytest.raises(RecipeError, match=r"counts: student\.stages\.head\.lora\.rank=$"):
        load_recipe(path, ["student.lora.rank=8"])


def test_a_hidden_setting_in_a_step_command_is_named_as_it_is_typed() -> None:
    arguments = ["student=some/model", "data=./x.jsonl", "stages=[{name: a.b, lr: 1}, {name: c}]", "lr=2"]
    with pytest.raises(RecipeError, match=r"counts: stages\.0\.lr=, stages\.c\.lr="):
        one_step_recipe("train", arguments)


def test_what_merges_with_a_stages_mapping_is_not_hidden(tmp_path: Path) -> None:
    path = staged(tmp_path, {**HEAD, "trainer": {"adam_epsilon": 1e-7}}, LAST)
    recipe = load_recipe(path, ["student.trainer.torch_empty_cache_steps=3"])
    assert settings(recipe, "student-head").trainer == {"adam_epsilon": 1e-7, "torch_empty_cache_steps": 3}


def test_a_sweep_of_a_stages_setting_is_labelled_with_the_stage(tmp_path: Path) -> None:
    path = staged(tmp_path, HEAD, LAST)
    recipes = sweep_variants(path, ["student.stages.head.lr=1e-3,1e-5", "student.stages.all.lr=1e-4"], [])
    assert list(recipes) == ["head.lr=0.001,all.lr=0.0001", "head.lr=1e-05,all.lr=0.0001"]
    assert [settings(one, "student-head").lr for one in recipes.values()] == [1e-3, 1e-5]


@pytest.mark.parametrize("sweep", ["student.groups=[]", "student.lr=1e-3,1e-5"])
def test_a_sweep_that_the_stages_hide_is_refused(sweep: str) -> None:
    with pytest.raises(RecipeError, match=r"student\.stages\.blocks\.\w+=, student\.stages\.all\.\w+="):
        sweep_variants("logit-kd", [sweep], [])


def test_stages_set_to_null_are_absent(tmp_path: Path) -> None:
    graph = load_recipe(staged(tmp_path, HEAD, LAST), ["student.stages=null", "student.lr=1e-5"]).graph
    assert graph.order == ["traces", "student", "exam"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.stagess=1", "did you mean 'stages'"),
        ("student.eech=1", "did you mean 'each'"),
        ("traces.eech=1", "did you mean 'each'"),
        ("student.stages.al.lr=1", "has no item 'al'\n.*below 2, or its name\n.*did you mean 'all'"),
        ("student.stages.2.lr=1", "has no item '2'"),
        ("student.stages.all.lr.x=1", "'lr' holds a value"),
    ],
)
def test_a_wrong_key_of_stages_is_told_with_the_near_one(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(staged(tmp_path, HEAD, LAST), [override])


def test_a_stage_that_would_take_a_steps_name_is_refused(tmp_path: Path) -> None:
    path = staged(tmp_path, {"name": "x"}, {"name": "all"})
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    recipe["steps"]["student-x"] = recipe["steps"]["traces"]
    with pytest.raises(RecipeError, match="makes a step 'student-x', and there is one already"):
        load_recipe(write(Path(path), recipe))


def test_the_schema_knows_stages_and_what_they_may_set() -> None:
    steps = json_schema()["properties"]["steps"]["additionalProperties"]["oneOf"]
    kinds = {one["properties"]["do"]["const"]: one["properties"] for one in steps}
    stage = kinds["train"]["stages"]["items"]["properties"]
    assert {"name", "groups", "lr", "epochs", "data"} <= stage.keys()
    assert not {"do", "student", "stages", "each"} & stage.keys()
    assert "stages" not in kinds["generate"]


def test_a_plan_counts_every_stage_and_knows_an_adapter_that_is_trained_on(tmp_path: Path) -> None:
    from potstill.core.store import Store
    from potstill.pipeline.plan import make_plan

    path = staged(tmp_path, HEAD, {"name": "all", "epochs": 3})
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    recipe["models"] = {}
    recipe["steps"]["traces"]["model"] = recipe["steps"]["student"]["student"] = "smollm2-135m-instruct"
    plan = make_plan(load_recipe(write(Path(path), recipe)), Store(tmp_path / "store"))
    steps = {step.name: step for step in plan.steps}
    head, last = steps["student-head"], steps["student"]
    assert head.tokens is not None
    assert last.tokens == 3 * head.tokens
    assert last.memory_gb == head.memory_gb


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


def test_a_sweep_over_lists_and_mappings_keeps_all_of_each(base: str) -> None:
    recipes = sweep_variants(
        base, ["student.groups=[],[{match: 'layers', lr_multiplier: 0.5}]", "student.betas=[0.8, 0.9]"], []
    )
    plain, grouped = (settings(one, "student") for one in recipes.values())
    assert (plain.groups, list(plain.betas)) == ([], [0.8, 0.9])
    assert [(one.match, one.lr_multiplier) for one in grouped.groups] == [("layers", 0.5)]


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
        nodes = load_recipe(str(path)).graph.nodes.values()
        kind_of = {node.base: node.kind for node in nodes}  # an extending recipe leaves `do` to its base
        for name, step in raw["steps"].items():
            assert step.keys() <= kinds[kind_of[name]]["properties"].keys()


def test_a_fault_inside_a_choice_of_forms_is_placed_as_the_recipe_has_it(tmp_path: Path) -> None:
    """Pitfall: pydantic puts the names of its classes and types between the keys."""
    task = {"data": {"path": "sums.jsonl"}, "verifier": {"fields": {"total": "fuzzy"}}}
    exam = {"do": "evaluate", "models": ["org/model"], "tasks": {"sums": task}}
    path = write(tmp_path / "r.yaml", {"name": "r", "steps": {"exam": exam}})
    with pytest.raises(
        RecipeError, match=r"steps\.exam\.tasks\.sums\.verifier\.fields\.total: .*'fuzzy'"
    ) as caught:
        load_recipe(path)
    assert "TaskSettings" not in str(caught.value)
    assert "[" not in str(caught.value)


@pytest.mark.parametrize("value", ["algebra/geometry", "..\\up", "a\nb", "x" * 200])
def test_a_value_of_each_that_is_no_part_of_a_files_name_is_refused(tmp_path: Path, value: str) -> None:
    step = {"do": "generate", "model": "m", "data": {"task": "{t}", "size": 4}, "each": {"t": [value]}}
    path = tmp_path / "recipe.yaml"
    recipe = {"models": {"m": {"path": "some/model"}}, "steps": {"traces": step}}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(RecipeError, match="cannot be part of a step's name"):
        load_recipe(str(path))
