"""The closed set of step kinds: each kind's settings and the function that carries it out."""

import importlib
from collections.abc import Callable
from typing import Any

from potstill.core.settings import Settings
from potstill.core.step import StepContext, StepResult

__all__ = ["STEP_KINDS", "settings_class", "step_function"]

STEP_KINDS: dict[str, tuple[str, str]] = {
    "generate": ("potstill.generate", "GenerateSettings"),
    "select": ("potstill.select", "SelectSettings"),
    "cache": ("potstill.cache", "CacheSettings"),
    "init": ("potstill.student", "InitSettings"),
    "train": ("potstill.train", "TrainSettings"),
    "merge": ("potstill.merge", "MergeSettings"),
    "retrieve": ("potstill.retrieval", "RetrieveSettings"),
    "evaluate": ("potstill.evaluate", "EvaluateSettings"),
}


def settings_class(kind: str) -> type[Settings]:
    """The settings of a step kind."""
    module, name = STEP_KINDS[kind]
    found: type[Settings] = getattr(importlib.import_module(module), name)
    return found


def step_function(kind: str) -> Callable[[Any, StepContext], StepResult]:
    """The function that carries out a step kind."""
    function: Callable[[Any, StepContext], StepResult] = importlib.import_module(STEP_KINDS[kind][0]).run
    return function
