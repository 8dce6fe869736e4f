"""Settings of a select step that make no sense are refused with the reason."""

from typing import Any

import pytest
from pydantic import ValidationError

from potstill.core.settings import meaning
from potstill.select import SelectSettings

PLAIN = {"do": "select", "data": "traces", "student": "base", "keep": {"top": 0.6}}


def _settings(**changes: Any) -> SelectSettings:
    return SelectSettings.model_validate({**PLAIN, **changes})


def test_the_seeds_form_is_enough() -> None:
    settings = _settings(rule="divergence", level="response")
    assert settings.models == {"student": "base"}
    assert _settings(level="sentence", keep={"per_prompt": 1}, distilled="after", teacher="big").models == {
        "student": "base",
        "teacher": "big",
        "distilled": "after",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": {}}, "states nothing; expected exactly one of top, threshold and per_prompt"),
        ({"keep": {"top": None}}, "states nothing; expected exactly one"),
        ({"keep": {"top": 0.5, "per_prompt": 1}}, "states per_prompt and top; expected exactly one"),
        ({"keep": {"top": 1.5}}, "less than or equal to 1"),
        ({"keep": {"top": 0}}, "greater than 0"),
        ({"keep": {"threshold": float("nan")}}, "finite number"),
        ({"keep": {"per_prompt": 0}}, "greater than or equal to 1"),
        ({"keep": None}, "rule divergence needs keep"),
        ({"student": None}, "rule divergence needs student"),
        ({"rule": "none"}, "student belongs to rule divergence, and rule is none"),
        ({"rule": "none", "student": None, "keep": None, "control": "random"}, "control belongs to rule"),
        ({"distilled": "after"}, "distilled belongs to level sentence"),
        ({"measure": "ratio"}, "measure belongs to level sentence"),
        ({"beta": 0.2}, "beta belongs to level sentence"),
        ({"control": "shortest"}, "'random' or 'length'"),
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _settings(**changes)


def test_how_it_is_executed_is_no_part_of_what_it_means() -> None:
    assert meaning(_settings(max_tokens=100, device="cpu")) == meaning(_settings())
    assert meaning(_settings(control="random")) != meaning(_settings())
