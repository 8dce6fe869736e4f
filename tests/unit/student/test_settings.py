"""Sizes, targets and methods that contradict each other are refused, with what was expected."""

from typing import Any

import pytest
from pydantic import ValidationError

from potstill.student import InitSettings


def settings(**fields: Any) -> InitSettings:
    return InitSettings.model_validate({"do": "init", "model": "base", "data": "traces", **fields})


@pytest.mark.parametrize(
    ("given", "count"), [("60M", 60_000_000), ("1.5b", 1_500_000_000), ("800K", 800_000), (1234, 1234)]
)
def test_a_count_of_parameters_is_read_as_people_write_it(given: Any, count: int) -> None:
    assert settings(target_params=given).target_params == count


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": 4},
        {"hidden_size": 8, "attention_heads": 2},
        {"depth_by": [0, 2, 5], "intermediate_size": 8},
        {"target_ratio": 0.5, "depth_by": "drop_one", "depth_choice": "greedy", "candidates": 3},
        {"method": "fresh", "hidden_size": 8, "weights": "random"},
        {"method": "copy", "layers": 2},
    ],
    ids=str,
)
def test_what_fits_together_is_taken(fields: dict[str, Any]) -> None:
    assert settings(**fields).samples == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs what to keep, one of: layers, hidden_size"),
        ({"layers": 2, "target_params": "1M"}, "target_params and layers; expected one target"),
        ({"target_params": "1M", "target_ratio": 0.5}, "target_params and target_ratio"),
        ({"target_params": "60 apples"}, "integer"),
        ({"target_ratio": 1.0}, "less than 1"),
        ({"layers": 2, "candidates": 3}, "candidates belongs to target_params and target_ratio"),
        ({"depth_by": [0, 2], "layers": 2}, "lists the blocks to keep, and layers would choose others"),
        ({"depth_by": [0, 2], "depth_choice": "greedy"}, "and depth_choice would choose others"),
        ({"depth_by": [0, 2], "target_ratio": 0.5}, "and target_ratio would choose others"),
        ({"depth_by": [2, 0]}, "in ascending order"),
        ({"depth_by": []}, "each once and in ascending order"),
        ({"hidden_size": 8, "depth_by": "drop_one"}, "neither layers nor a target says how many"),
        ({"method": "copy"}, "copy needs layers"),
        ({"method": "copy", "layers": 2, "hidden_size": 8}, "hidden_size belongs to method prune or fresh"),
        ({"method": "fresh"}, "needs one size at least"),
        ({"method": "fresh", "target_params": "1M"}, "target_params belongs to method prune"),
        ({"layers": 2, "weights": "random"}, "weights belongs to method fresh, and method is prune"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**fields)
