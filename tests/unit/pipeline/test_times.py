"""How long steps may take: by what like ones took before, else by what this machine multiplies."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.core.store import Store
from potstill.models import parameter_count
from potstill.models.source import TransformersModel
from potstill.pipeline.plan import Plan, PlannedStep, make_plan
from potstill.recipe import load_recipe

SPEED = 1e9  # floating-point operations a second


@pytest.fixture
def recipe(shared_model_folder: Path) -> dict[str, Any]:
    """Traces with a tenth held out, a selection, a smaller student, an evaluation of two models."""
    return {
        "name": "timed",
        "models": {"teacher": {"path": str(shared_model_folder), "device": "cpu"}},
        "steps": {
            "traces": {
                "do": "generate",
                "model": "teacher",
                "data": {"task": "chain_sum", "size": 80, "held_out": 0.1},
                "held_out": 0.1,
                "max_new_tokens": 10,
                "logprobs": 1,
            },
            "picked": {"do": "select", "data": "traces", "student": "teacher", "keep": {"top": 0.6}},
            "small": {"do": "init", "model": "teacher", "data": "traces", "layers": 1, "samples": 16},
            "exam": {
                "do": "evaluate",
                "models": {"teacher": "teacher", "student": "small"},
                "baseline": "teacher",
                "teacher": "teacher",
                "data": "traces:held_out",
                "tasks": {"sums": {"task": "chain_sum", "size": 5}},
                "max_new_tokens": 20,
            },
        },
    }


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.train.throughput.peak_flops_per_s", lambda device, dtype: SPEED)
    monkeypatch.setattr("potstill.scale.local.read_bytes_per_s", lambda device, dtype: SPEED)


def planned(recipe: dict[str, Any], folder: Path) -> tuple[Plan, dict[str, PlannedStep]]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    plan = make_plan(load_recipe(str(folder / "recipe.yaml"), []), Store(folder / "store"))
    return plan, {step.name: step for step in plan.steps}


def earlier(folder: Path, kind: str, seconds: float, **manifest: Any) -> Path:
    """The folder of an artifact of other settings that a store holds."""
    store, fingerprint = Store(folder / "store"), kind.ljust(24, "0")
    made = store.prepare(kind, fingerprint)
    (made / "some.file").write_text("x", encoding="utf-8")
    given = {"settings": {}, "seed": 1, **manifest}
    store.seal(made, kind=kind, fingerprint=fingerprint, seconds=seconds, **given)
    return made


def test_where_nothing_was_made_a_time_follows_from_the_tokens_and_the_model_and_is_called_a_guess(
    tmp_path: Path, recipe: dict[str, Any], shared_model_folder: Path
) -> None:
    plan, steps = planned(recipe, tmp_path)
    assert plan.problems == []
    parameters = parameter_count(TransformersModel(path=str(shared_model_folder))) or 0
    picked = steps["picked"]
    alone_s = 2 * parameters * (picked.tokens or 0) / (0.5 * SPEED)  # attention comes on top
    assert alone_s < (picked.seconds or 0) < 2 * alone_s
    assert (steps["small"].seconds or 0) > 0
    exam = steps["exam"].seconds or 0
    # Two models write 5 x 20 tokens, and read some besides.
    written_s = 2 * 2 * parameters * 100 / (0.5 * SPEED)
    assert exam > written_s
    recipe["steps"]["exam"]["max_new_tokens"] = 40
    longer = planned(recipe, tmp_path)[1]["exam"].seconds or 0
    assert written_s < longer - exam < 3 * written_s
    for name in ("picked", "small", "exam"):
        assert sum(note.startswith(f"step {name}: its time is a guess") for note in plan.notes) == 1


def test_an_evaluation_reads_the_held_out_share_of_its_traces(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["steps"]["exam"] |= {"tasks": {}, "samples_shown": 0}
    tenth = planned(recipe, tmp_path)[1]["exam"].seconds or 0
    recipe["steps"]["traces"]["held_out"] = 0.2
    fifth = planned(recipe, tmp_path)[1]["exam"].seconds or 0
    assert fifth == pytest.approx(2 * tenth, rel=0.01)


def test_what_like_steps_did_a_second_goes_before_a_guess(
    tmp_path: Path, recipe: dict[str, Any], shared_model_folder: Path
) -> None:
    parameters = parameter_count(TransformersModel(path=str(shared_model_folder))) or 0
    sizes = {"parameters": {"teacher": parameters}}
    earlier(tmp_path, "select", 10.0, tokens=500, **sizes)
    earlier(
        tmp_path,
        "init",
        4.0,
        counts={"calibration_rows": 8},
        metrics={"parameters_before": parameters},
        settings={"method": "prune", "depth_by": "block_importance"},
    )
    figures = {"seconds_per_response": 0.5, "mean_response_tokens": {"value": 10.0}}
    measured = {"models": {"m": {"tasks": {"t": figures}}}}
    earlier(tmp_path, "evaluate", 99.0, metrics=measured, settings={"models": {"m": "teacher"}}, **sizes)
    plan, steps = planned(recipe, tmp_path)
    assert steps["picked"].seconds == pytest.approx((steps["picked"].tokens or 0) / 50)
    assert steps["small"].seconds == pytest.approx(2 * 4.0)  # twice the rows
    exam = steps["exam"].seconds or 0
    recipe["steps"]["exam"]["max_new_tokens"] = 40
    longer = planned(recipe, tmp_path)[1]["exam"].seconds or 0
    smaller = (steps["small"].parameters or 0) / parameters
    assert longer - exam == pytest.approx(100 / 20 * (1 + smaller))  # 20 tokens/s, of the student more
    assert not [one for one in plan.notes if "is a guess" in one and not one.startswith("step traces")]
    known = f"its time is by what a model of {parameters:,} parameters last did of this"
    assert [note for note in plan.notes if note == f"step picked: {known}"]


@pytest.mark.parametrize(
    ("size", "seconds"), [(1.0, 20.0), (0.3, 60.0), (4.0, 5.0), (0.2, None), (5.0, None)]
)
def test_a_speed_goes_by_the_models_size_and_is_not_that_of_a_model_of_quite_another(
    tmp_path: Path, recipe: dict[str, Any], shared_model_folder: Path, size: float, seconds: float | None
) -> None:
    parameters = parameter_count(TransformersModel(path=str(shared_model_folder))) or 0
    recipe["steps"] = {
        "traces": recipe["steps"]["traces"],
        "logits": {"do": "cache", "model": "teacher", "data": "traces"},
        "student": {"do": "train", "student": "teacher", "data": "traces"},
    }
    guessed = planned(recipe, tmp_path)[1]
    for kind, role in (("cache", "model"), ("train", "student")):
        sizes = {"m": round(size * parameters)}
        earlier(tmp_path, kind, 10.0, tokens=400, settings={role: "m"}, parameters=sizes)
    plan, steps = planned(recipe, tmp_path)
    for name in ("logits", "student"):
        assert steps[name].tokens == 800
        assert steps[name].seconds == pytest.approx(seconds or guessed[name].seconds, rel=0.2)
        noted = [note for note in plan.notes if note.startswith(f"step {name}: its time")]
        assert ["is a guess" in note for note in noted] == [seconds is None]


def test_what_another_machine_made_or_whose_student_is_unknown_says_nothing_of_speed(
    tmp_path: Path, recipe: dict[str, Any], shared_model_folder: Path
) -> None:
    parameters = parameter_count(TransformersModel(path=str(shared_model_folder))) or 0
    recipe["steps"] = {
        "traces": recipe["steps"]["traces"],
        "student": {"do": "train", "student": "teacher", "data": "traces"},
    }
    guessed = planned(recipe, tmp_path)[1]["student"].seconds
    sizes = {"teacher": parameters}
    for student in ("gone", "teacher"):
        made = earlier(tmp_path, "train", 9e5, tokens=400, settings={"student": student}, parameters=sizes)
        if student == "teacher":
            assert (planned(recipe, tmp_path)[1]["student"].seconds or 0) > 9e5
            mark = made.parent.parent / "fetched" / made.name
            mark.parent.mkdir()
            mark.touch()
        assert planned(recipe, tmp_path)[1]["student"].seconds == pytest.approx(guessed, rel=0.2)


def test_a_cache_of_what_traces_hold_says_nothing_of_a_models_speed(
    tmp_path: Path, recipe: dict[str, Any], shared_model_folder: Path
) -> None:
    parameters = parameter_count(TransformersModel(path=str(shared_model_folder))) or 0
    guessed = planned(recipe, tmp_path)[1]["exam"].seconds
    copied = {"from_traces": True, "model": "teacher"}
    earlier(tmp_path, "cache", 0.1, tokens=5000, settings=copied, parameters={"teacher": parameters})
    assert planned(recipe, tmp_path)[1]["exam"].seconds == guessed


def test_a_shared_core_takes_a_pass_over_the_traces_for_as_many_layers_as_fit_into_memory(
    tmp_path: Path,
    recipe: dict[str, Any],
    build_tiny_model: Any,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_tiny_model("qwen3_moe", num_hidden_layers=6).save_pretrained(tmp_path / "mixture")
    tiny_tokenizer.save_pretrained(tmp_path / "mixture")
    recipe["models"]["teacher"]["path"] = str(tmp_path / "mixture")
    del recipe["steps"]["exam"]
    recipe["steps"]["small"] = {"do": "init", "model": "teacher", "data": "traces", "samples": 16}

    def seconds(**fields: Any) -> float:
        recipe["steps"]["small"] |= {"method": "share_experts", "rank": 2, **fields}
        found = planned(recipe, tmp_path)[1]["small"].seconds
        assert found is not None
        return found

    in_one_pass = seconds()  # routing, moments, model and student
    layer_bytes = 8 * (32**2 + 24**2) * 4
    monkeypatch.setattr("potstill.student.moe_sharing._MOMENT_BYTES", 2 * layer_bytes)
    in_three_passes = seconds()
    assert in_three_passes == pytest.approx(in_one_pass * 6 / 4)
    assert seconds(core_by="fisher") == pytest.approx(in_one_pass * 9 / 4)


def test_a_selection_that_found_all_scores_in_the_store_says_nothing_of_speed(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    guessed = planned(recipe, tmp_path)[1]["picked"].seconds
    earlier(tmp_path, "select", 0.1, tokens=0, parameters={"teacher": 1000})
    assert planned(recipe, tmp_path)[1]["picked"].seconds == guessed


def test_artifacts_of_an_earlier_version_say_what_they_can(tmp_path: Path, recipe: dict[str, Any]) -> None:
    guessed = planned(recipe, tmp_path)[1]
    earlier(tmp_path, "init", 4.0, metrics={"parameters_before": 1000})
    earlier(tmp_path, "evaluate", 4.0)
    earlier(tmp_path, "cache", 4.0, tokens=1000, settings={"model": "teacher"})
    earlier(tmp_path, "train", 4.0, tokens=1000, settings={"student": "small"})
    assert planned(recipe, tmp_path)[1] == guessed


def test_an_evaluation_with_nothing_to_go_by_has_no_time(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["steps"]["exam"] |= {"tasks": {}, "data": "traces:held_out", "samples_shown": 0}
    recipe["models"]["teacher"] = {"path": "some/model"}  # no size in its name
    assert planned(recipe, tmp_path)[1]["exam"].seconds is None
