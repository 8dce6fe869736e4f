"""What a training's processes are given and give back is what one process has, through JSON."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import TrainingError
from potstill.core.events import Reporter
from potstill.core.settings import DataRef, ModelRef, references
from potstill.core.step import StepResult
from potstill.models import TransformersModel
from potstill.recipe import load_recipe, shipped_recipes
from potstill.scale.job import Failure, Job, Outcome, work_folder
from potstill.train import TrainSettings

TRAIN_STEPS = [
    pytest.param(node.settings, id=f"{recipe}-{name}")
    for recipe in shipped_recipes()
    for name, node in load_recipe(recipe).graph.nodes.items()
    if isinstance(node.settings, TrainSettings)
]


@pytest.mark.parametrize("settings", TRAIN_STEPS)
def test_every_shipped_train_step_reaches_its_processes_unchanged(
    settings: TrainSettings, step_context: Any, traces: Any
) -> None:
    model = TransformersModel(path="some/model", quantize="nf4")
    artifact = traces(4)
    named = [one for _, one in references(settings)]
    context = step_context(
        "train",
        models={str(one): model for one in named if isinstance(one, ModelRef)},
        data={one.target: [artifact] for one in named if isinstance(one, DataRef)},
    )
    job = Job.read(Job.of(settings, context, elsewhere=None).write())
    assert job.settings == settings
    again = job.context(Reporter("quiet"), threading.Event())
    assert (again.name, again.kind, again.folder, again.seed) == (
        context.name,
        context.kind,
        context.folder,
        context.seed,
    )
    assert again.derive_seed("order") == context.derive_seed("order")
    for one in named:
        if isinstance(one, ModelRef):
            assert again.model(one) == model
        if isinstance(one, DataRef) and not one.is_path:
            [(found, view)] = again.artifacts(one)
            assert (found.manifest, view) == (artifact.manifest, one.view)


def test_a_result_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    work_folder(tmp_path).mkdir(parents=True)
    assert Outcome.read(tmp_path) is None
    history = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": math.inf}]
    result = StepResult(counts={"rows": 3}, metrics={"history": history}, extra={"base": None}, tokens=7)
    Outcome(result=result, seconds=1.5, peaks={"peak_memory_bytes": 9}).write(tmp_path)
    found = Outcome.read(tmp_path)
    assert found is not None
    assert (found.result, found.seconds, found.peaks) == (result, 1.5, {"peak_memory_bytes": 9})


def test_what_was_foreseen_is_told_before_what_followed_from_it(tmp_path: Path) -> None:
    work_folder(tmp_path).mkdir(parents=True)
    Failure.of(RuntimeError("connection closed by peer"), rank=0).write(tmp_path)
    Failure.of(TrainingError("the loss is nan", where="step 3", mend="lower lr"), rank=1).write(tmp_path)
    first, second = Failure.take_all(tmp_path)
    assert (first.rank, first.what, first.where, first.mend) == (1, "the loss is nan", "step 3", "lower lr")
    assert second.what == "RuntimeError: connection closed by peer"
    assert Failure.take_all(tmp_path) == []
