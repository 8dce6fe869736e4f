"""The train step as a recipe runs it, on one thread: on models this small more wait for one another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.core.settings import Settings
from potstill.core.step import StepContext, StepResult
from potstill.core.store import Artifact
from potstill.models import TransformersModel
from potstill.train import TrainSettings, run


@pytest.fixture(autouse=True)
def _one_thread(_quiet_libraries: None) -> None:
    pass


def settings(**fields: Any) -> TrainSettings:
    usual = {"do": "train", "student": "base", "data": "traces", "batch": 4, "lr": 5e-3, "device": "cpu"}
    return TrainSettings.model_validate({**usual, **fields})


@pytest.fixture
def base(tiny_model_folder: Path) -> TransformersModel:
    return TransformersModel(path=str(tiny_model_folder))


Training = Callable[..., tuple[StepResult, Path, StepContext]]


@pytest.fixture
def train(step_context: Any, base: TransformersModel, traces: Any) -> Training:
    """`train(folder, student=, data=, stop_at=, **settings)`; `stop_at` asks to stop in that step."""
    made: dict[str, Artifact] = {}

    def make(
        folder: str = "artifact",
        *,
        student: Settings | None = None,
        teacher: Settings | None = None,
        data: Artifact | None = None,
        stop_at: int | None = None,
        **fields: Any,
    ) -> tuple[StepResult, Path, StepContext]:
        if data is None and "traces" not in made:
            made["traces"] = traces()
        context = step_context(
            "train",
            folder=folder,
            models={"base": student or base, **({} if teacher is None else {"big": teacher})},
            data={"traces": [data or made["traces"]]},
        )

        def listen(event: dict[str, Any]) -> None:
            # A step's event comes after the decision about its checkpoint, so the one before asks for it.
            if stop_at is not None and event.get("optimiser_step") == stop_at - 1 and "loss" in event:
                context.stop.set()

        context.reporter.on_event = listen
        if teacher is not None:
            fields["teacher"] = "big"
        return run(settings(**fields), context), context.folder, context

    return make
