from typing import Any

import pytest
from pydantic import ValidationError

from potstill.core.settings import meaning, references
from potstill.evaluate import EvaluateSettings
from potstill.evaluate.settings import Decoding


def _settings(**fields: Any) -> EvaluateSettings:
    given: dict[str, Any] = {"do": "evaluate", "models": {"student": "student"}, "data": "traces:held_out"}
    return EvaluateSettings.model_validate({**given, **fields})


def test_models_in_a_list_go_by_their_own_names() -> None:
    settings = _settings(models=["base", "stage1"])
    assert settings.roles == {"base": "base", "stage1": "stage1"}


@pytest.mark.parametrize(
    ("models", "teacher", "baseline"),
    [
        ({"student": "s", "base": "b"}, None, "base"),
        ({"before": "b", "after": "s"}, None, "before"),
        ({"teacher": "big", "before": "b", "after": "s"}, "big", "before"),
        (["big", "stage1", "stage2"], "big", "stage1"),
        (["big"], "big", "big"),
    ],
)
def test_the_baseline_is_base_else_the_first_that_is_not_the_teacher(
    models: Any, teacher: str | None, baseline: str
) -> None:
    settings = _settings(models=models, teacher=teacher)
    assert settings.baseline == baseline
    assert meaning(settings)["baseline"] == baseline


def test_how_fast_it_runs_is_no_part_of_the_meaning() -> None:
    assert meaning(_settings(batch=3, max_tokens=77, device="cpu")) == meaning(_settings())
    assert meaning(_settings(max_new_tokens=3)) != meaning(_settings())


def test_every_model_and_row_it_reads_is_a_reference() -> None:
    settings = _settings(
        models={"base": "b", "student": "s"}, teacher="t", tasks={"exam": "prompts:held_out"}
    )
    assert {str(reference) for _, reference in references(settings)} == {
        "b",
        "s",
        "t",
        "traces:held_out",
        "prompts:held_out",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": None}, "nothing to evaluate on"),
        ({"baseline": "nobody"}, "baseline 'nobody' is not among the models: student"),
        ({"models": ["a", "a"]}, "models names one twice"),
        ({"models": {}}, "at least 1"),
        ({"temperature": -1.0}, "greater than or equal to 0"),
        ({"shots": 3}, "Extra inputs are not permitted"),
        ({"samples": 4, "tasks": {"t": "p:held_out"}}, "the 4 samples of t would all be alike"),
        ({"tasks": {"t": {"data": "p:prompts", "samples": 2}}}, "the 2 samples of t would all be alike"),
        ({"pass_at": [4], "tasks": {"t": "p:held_out"}}, "pass@4 needs as many samples a prompt, not 1"),
        (
            {"tasks": {"t": {"data": "p:prompts", "choose_by": "letter", "samples": 2}}},
            "samples is for answers",
        ),
        ({"tasks": {"t": {"data": "p:prompts", "choose_by": "luck"}}}, "'generation', 'letter' or 'text'"),
        ({"tasks": {"t": "p:a"}, "forgetting": {"t": "p:b"}}, "'t' stands under tasks and under forgetting"),
        ({"top_p": 0.0}, "greater than 0"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _settings(**fields)


def test_a_task_takes_from_the_step_what_it_leaves_out() -> None:
    tasks = {"bare": "p:prompts", "own": {"data": "p:prompts", "samples": 8, "max_new_tokens": 99}}
    settings = _settings(tasks=tasks, temperature=0.7, top_p=0.9, samples=2)
    bare, own = (settings.decoding(settings.all_tasks[name]) for name in ("bare", "own"))
    assert bare == Decoding(samples=2, temperature=0.7, top_p=0.9, max_new_tokens=512)
    assert own == Decoding(samples=8, temperature=0.7, top_p=0.9, max_new_tokens=99)
    assert settings.decoding(settings.all_tasks["bare"], reasons=True).max_new_tokens == 4096
    assert settings.decoding() == Decoding(samples=1, temperature=0.7, top_p=0.9, max_new_tokens=512)


def test_the_data_of_a_task_with_settings_is_a_reference_too() -> None:
    settings = _settings(
        tasks={"exam": {"data": "prompts:held_out", "limit": 3}}, forgetting={"old": "before:held_out"}
    )
    found = {str(reference) for _, reference in references(settings)}
    assert {"prompts:held_out", "before:held_out"} <= found


def test_settings_of_a_task_are_part_of_the_meaning() -> None:
    one = _settings(tasks={"exam": {"data": "p:prompts"}})
    other = _settings(tasks={"exam": {"data": "p:prompts", "choose_by": "text"}})
    assert meaning(one) != meaning(other)
    assert meaning(_settings(max_cost=3.0)) == meaning(_settings())
