"""Commands do what their help says, for people and for machines."""

import json
from pathlib import Path
from typing import Any

from potstill.data.sources import read_file

from ..rows import write_rows
from ..servers import Body, Reply, completion, error, running_server
from .conftest import Command, write_recipe

Recipe = dict[str, Any]


def without_exam(recipe: Recipe) -> Recipe:
    steps = {name: step for name, step in recipe["steps"].items() if name != "exam"}
    return {**recipe, "steps": steps}


def test_a_plan_tells_what_will_be_made_and_makes_nothing(
    potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", small)
    outcome = potstill("plan", recipe, "--store", tmp_path / "store", "--json")
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    steps = {step["name"]: step for step in plan["steps"]}
    assert plan["runs"] is True
    assert [step["status"] for step in plan["steps"]] == ["to make"] * 5
    assert steps["traces"]["rows"] == 24
    assert steps["traces"]["tokens"] == 24 * 12
    assert steps["student"]["tokens"] == 2 * 24 * 12
    assert steps["student"]["memory_gb"] > 0
    assert not (tmp_path / "store" / "artifacts").exists()


def test_a_plan_knows_what_a_run_has_made_and_what_a_change_makes_again(
    potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", without_exam(small))
    assert potstill("run", recipe, "--store", tmp_path / "store").code == 0

    def statuses(*overrides: str) -> list[str]:
        outcome = potstill("plan", recipe, *overrides, "--store", tmp_path / "store", "--json")
        return [step["status"] for step in json.loads(outcome.out)["steps"]]

    assert statuses() == ["made"] * 4
    assert statuses("student.lr=0.5") == ["made", "made", "made", "to make"]
    assert statuses("student.max_tokens=64") == ["made"] * 4


def test_a_plan_takes_a_teachers_speed_from_that_teachers_own_work(
    potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    small["models"]["solver"] = {"engine": "solver", "function": "potstill.teachers.solvers:chain_sum"}
    small["models"]["other"] = {**small["models"]["teacher"], "identity": "another"}
    small["steps"] = {"traces": small["steps"]["traces"]}
    recipe = write_recipe(tmp_path / "recipe.yaml", small)
    assert potstill("run", recipe, "--store", tmp_path / "store").code == 0

    def planned(model: str) -> tuple[int | None, bool, bool]:
        overrides = [f"traces.model={model}", "traces.max_new_tokens=24"]
        outcome = potstill("plan", recipe, *overrides, "--store", tmp_path / "store", "--json")
        plan = json.loads(outcome.out)
        [step] = plan["steps"]
        is_guess = any("traces: its time is a guess" in note for note in plan["notes"])
        return step["tokens"], step["seconds"] is not None, is_guess

    assert planned("teacher") == (24 * 24, True, False)
    assert planned("other") == (24 * 24, True, True)
    assert planned("solver") == (None, False, False)


def test_a_plan_that_cannot_run_says_why_and_exits_1(
    potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    api = {
        "engine": "openai",
        "base_url": "http://127.0.0.1:9/v1",
        "model": "m",
        "api_key_env": "NO_SUCH_KEY",
    }
    small["models"]["api"] = api
    small["steps"]["traces"]["model"] = "api"
    small["steps"]["exam"]["tasks"]["sums"]["task"] = "chain_sums"
    outcome = potstill("plan", write_recipe(tmp_path / "recipe.yaml", small), "--store", tmp_path / "store")
    assert outcome.code == 1
    assert "NO_SUCH_KEY" in outcome.out
    assert "chain_sums" in outcome.out
    assert "cannot run" in outcome.out


def test_a_plan_asks_an_api_for_no_answer(potstill: Command, small: Recipe, tmp_path: Path) -> None:
    with running_server() as server:
        small["models"]["api"] = {"engine": "openai", "base_url": server.base_url, "model": "m"}
        small["steps"] = {"traces": {**small["steps"]["traces"], "model": "api"}}
        outcome = potstill(
            "plan", write_recipe(tmp_path / "recipe.yaml", small), "--store", tmp_path / "store"
        )
        assert outcome.code == 0, outcome.out
        assert all(list(request) == ["messages"] for request in server.requests), "only the list of models"


def test_force_makes_a_step_again_and_only_makes_one(
    potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    recipe, store = write_recipe(tmp_path / "recipe.yaml", without_exam(small)), tmp_path / "store"
    early = potstill("run", recipe, "--store", store, "--only", "logits")
    assert early.code == 1
    assert "'logits' needs 'traces'" in early.err
    assert potstill("run", recipe, "--store", store, "--only", "traces").code == 0
    assert potstill("run", recipe, "--store", store, "--only", "logits").code == 0
    assert not list((store / "artifacts").glob("train-*"))
    forced = potstill("run", recipe, "--store", store, "--only", "logits", "--force", "logits")
    assert "traces: generate already made" in forced.err
    assert "logits: done in" in forced.err


def test_force_asks_only_for_the_answers_that_few_enough_failed_to_give(
    potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    questions = [f"question {number}" for number in range(12)]
    refused = questions[3:5]
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": question} for question in questions])
    small["steps"] = {
        "traces": {"do": "generate", "model": "api", "data": {"path": prompts}, "max_failed_share": 0.2},
        "kept": {"do": "select", "data": "traces", "rule": "none"},
        "aside": {"do": "generate", "model": "api", "data": {"task": "chain_sum", "size": 3}},
    }
    recipe, store = tmp_path / "recipe.yaml", tmp_path / "store"

    def refuse_two(body: Body) -> Reply:
        is_refused = body["messages"][-1]["content"] in refused
        return Reply(400, error("not this one")) if is_refused else Reply(body=completion())

    def run(*arguments: str) -> str:
        outcome = potstill("run", recipe, "--store", store, *arguments)
        assert outcome.code == 0, outcome.err
        return outcome.err

    with running_server() as server:
        server.always = refuse_two
        small["models"]["api"] = {"engine": "openai", "base_url": server.base_url, "model": "m"}
        write_recipe(recipe, small)
        assert "2 failed" in run()
        server.always = lambda body: Reply(body=completion())
        server.requests.clear()
        again = run()
        assert "traces: generate already made" in again
        assert "2 failed: --force traces tries those again and makes anew what uses them" in again
        assert again.count("tries those again") == 1, "of the step alone that has failures"
        assert not server.requests
        forced = run("--force", "traces")
        asked = [body["messages"][-1]["content"] for body in server.requests]
    assert sorted(asked) == sorted(refused)
    assert [name for name in small["steps"] if f"{name}: done in" in forced] == ["traces", "kept"]
    assert "12 records" in forced
    assert "tries those again" not in run()


def test_only_several_steps_are_made_and_what_they_need_is_named(
    potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    recipe, store = write_recipe(tmp_path / "recipe.yaml", without_exam(small)), tmp_path / "store"
    lacking = potstill("run", recipe, "--store", store, "--only", "student", "--only", "traces")
    assert lacking.code == 1
    assert "'student' needs 'logits'" in lacking.err
    assert "--only logits" in lacking.err
    several = ("--only", "student", "--only", "pruned", "--only", "logits")
    outcome = potstill("run", recipe, "--store", store, *several)
    assert outcome.code == 0, outcome.err
    assert "traces: generate already made" in outcome.err
    assert "student: done in" in outcome.err
    unknown = potstill("run", recipe, "--store", store, "--only", "studnet")
    assert "did you mean 'student'" in unknown.err


def test_what_the_recipe_names_is_handed_out_and_the_log_tells_how_it_ended(
    potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    small["outputs"] = {"final_model": "student", "results.json": "exam:metrics", "pipeline.log": "run:log"}
    sums = small["steps"]["exam"]["tasks"]["sums"]
    recipe, store, folder = tmp_path / "recipe.yaml", tmp_path / "store", tmp_path / "runs" / "small"
    sums["parameters"] = {"min_terms": 9, "max_terms": 3}
    assert potstill("run", write_recipe(recipe, small), "--store", store).code == 1
    sums.pop("parameters")
    outcome = potstill("run", write_recipe(recipe, small), "--store", store)
    assert outcome.code == 0, outcome.err
    assert "beside:  final_model, results.json, pipeline.log" in outcome.out
    assert {"model.safetensors", "README.md"} <= {path.name for path in (folder / "final_model").iterdir()}
    assert "models" in json.loads((folder / "results.json").read_text(encoding="utf-8"))
    log = (folder / "pipeline.log").read_text(encoding="utf-8")
    assert "student: done in" in log
    assert "min_terms" in log, "what stopped an earlier run"


def test_traces_are_exported_as_rows_that_are_read_again(
    potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    small["models"]["solver"] = {"engine": "solver", "function": "potstill.teachers.solvers:chain_sum"}
    small["steps"] = {"traces": {**small["steps"]["traces"], "model": "solver"}}
    assert potstill("run", write_recipe(tmp_path / "recipe.yaml", small), "--store", tmp_path / "s").code == 0
    asked = ("export", "runs/small/traces", "--to", "jsonl", "--output", "rows.jsonl")
    outcome = potstill(*asked)
    assert outcome.code == 0, outcome.err
    assert "rows.jsonl: 24 rows" in outcome.out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one.response for one in read_file(tmp_path / "rows.jsonl")] == [row["answer"] for row in rows]
    assert list(rows[0]) == ["question", "answer", "reference", "task"]
    assert "is there already" in potstill(*asked).err
    tagged = potstill(*asked[:-1], "tagged.jsonl", "--shape", "openthoughts", "--json")
    assert json.loads(tagged.out) == {"output": "tagged.jsonl", "rows": 24, "left_out": {}}
    assert (
        "not a finished artifact"
        in potstill("export", "runs/small", "--to", "jsonl", "--output", "x.jsonl").err
    )


def test_a_sweep_runs_once_a_value_and_compares(potstill: Command, small: Recipe, tmp_path: Path) -> None:
    recipe, store = write_recipe(tmp_path / "recipe.yaml", small), tmp_path / "store"
    outcome = potstill(
        "run", recipe, "--store", store, "--sweep", "student.lr=1e-3,1e-2", "--output", "swept"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("traces: done in") == 1
    assert outcome.err.count("student: done in") == 2
    assert "lr=0.001" in outcome.out
    assert "lr=0.01" in outcome.out
    assert (tmp_path / "swept" / "report.html").is_file()
    assert (tmp_path / "swept" / "lr=0.01" / "student").is_dir()
    again = potstill("report", "swept/lr=0.001", "swept/lr=0.01", "--output", "both.html")
    assert again.code == 0, again.err
    assert "<script" not in (tmp_path / "both.html").read_text(encoding="utf-8")


def test_runs_of_two_different_recipes_are_reported_together(
    potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    assert potstill("run", write_recipe(tmp_path / "small.yaml", small), "--store", store).code == 0
    steps = small["steps"]
    apart = {"pupil": {**steps["student"], "data": "traces", "max_steps": 1}}
    exam = {**steps["exam"], "models": {"base": "pruned", "pupil": "pupil"}}
    kept = {name: steps[name] for name in ("traces", "pruned")}
    other = {**small, "name": "other", "steps": {**kept, **apart, "exam": exam}}
    assert potstill("run", write_recipe(tmp_path / "other.yaml", other), "--store", store).code == 0
    outcome = potstill("report", "runs/small", "runs/other", "--output", "both.html")
    assert outcome.code == 0, outcome.err
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert ">small<" in text
    assert ">other<" in text
    assert "KL to the teacher" in text
    # Cached logits and plain traces: two losses.
    assert "minimised different losses" in text


def test_machines_read_json_and_quiet_says_nothing(potstill: Command, small: Recipe, tmp_path: Path) -> None:
    small["steps"] = {"traces": small["steps"]["traces"]}
    recipe, store = write_recipe(tmp_path / "recipe.yaml", small), tmp_path / "store"
    spoken = potstill("run", recipe, "--store", store, "--json")
    lines = [json.loads(line) for line in spoken.out.splitlines()]
    assert [line.get("event") for line in lines][:2] == ["run_started", "step_started"]
    assert lines[-1]["report"] == "runs/small/report.html"
    quiet = potstill("run", recipe, "--store", store, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_a_step_command_is_a_recipe_of_one_step(
    potstill: Command, tiny_model_folder: Path, tmp_path: Path
) -> None:
    rows = [json.dumps({"prompt": f"{n} + 1 =", "response": f"{n + 1}"}) for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    arguments = [f"student={tiny_model_folder}", "data=./rows.jsonl", "batch=4", "lora.rank=2"]
    outcome = potstill("train", *arguments, "--store", tmp_path / "store")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "runs" / "train" / "train" / "adapter_config.json").is_file()
    again = potstill("run", "runs/train/recipe.yaml", "--store", tmp_path / "store")
    assert "train: train already made" in again.err


def test_shipped_recipes_are_listed_shown_and_copied(potstill: Command, tmp_path: Path) -> None:
    assert "quickstart" in potstill("recipes", "list").out
    shown = potstill("recipes", "show", "quickstart").out
    assert potstill("recipes", "copy", "quickstart", "mine.yaml").code == 0
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == shown
    assert "name another target" in potstill("recipes", "copy", "quickstart", "mine.yaml").err
    assert "did you mean 'quickstart'" in potstill("recipes", "show", "quikstart").err


def test_the_machine_the_models_and_the_schema_are_told(potstill: Command) -> None:
    assert {"name", "ok", "finding", "hint"} == json.loads(potstill("doctor", "--json").out)[0].keys()
    models = json.loads(potstill("models", "list", "--json").out)
    assert models == [{**models[0], "name": "smollm2-135m-instruct", "fetched": False}]
    assert json.loads(potstill("schema").out)["title"] == "potstill recipe"


def test_a_sweep_of_variants_and_seeds_is_compared_arm_by_arm(
    potstill: Command, small: Recipe, tmp_path: Path
) -> None:
    small["variants"] = {"slow": {}, "fast": {"steps": {"student": {"lr": 1e-2}}}}
    recipe, store = write_recipe(tmp_path / "recipe.yaml", small), tmp_path / "store"
    outcome = potstill(
        *("run", recipe, "--store", store, "--output", "swept"),
        *("--sweep", "slow,fast", "--sweep", "seed=1,2"),
    )
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("traces: done in") == 2, "once a seed"
    assert outcome.err.count("student: done in") == 4
    arms = outcome.out[outcome.out.index("minus slow") :].splitlines()[2:4]
    assert [line.split()[:2] for line in arms] == [["slow", "2"], ["fast", "2"]]
    assert arms[1].count("(") == 2
    assert arms[1].count(",") == 1, "a difference a seed"
    assert "arm by arm" in (tmp_path / "swept" / "report.html").read_text(encoding="utf-8")


def test_a_runs_training_is_exported(potstill: Command, tiny_model_folder: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"{n} + 1 =", "response": f"{n + 1}"}) for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    arguments = [f"student={tiny_model_folder}", "data=./rows.jsonl", "batch=4", "lora.rank=2"]
    assert potstill("train", *arguments, "--store", tmp_path / "store").code == 0
    outcome = potstill("export", "--to", "llamafactory", "runs/train", "--output", "lf")
    assert outcome.code == 0, outcome.err
    assert f"{Path('lf') / 'train.jsonl'}: 8 rows" in outcome.out
    assert "llamafactory-cli train train.yaml" in outcome.out
    assert {path.name for path in Path("lf").iterdir()} == {"dataset_info.json", "train.jsonl", "train.yaml"}
    again = potstill("export", "--to", "llamafactory", "runs/train", "--output", "lf")
    assert again.code == 1
    assert "is there already" in again.err
    other = potstill("export", "--to", "axolotl", "runs/train", "--output", "ax")
    assert other.code == 2
