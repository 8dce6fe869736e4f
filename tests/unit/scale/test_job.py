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
from potstill.scale.job import Failure, Job, JobSettings, Outcome, work_folder
from potstill.scale.settings import Ray
from potstill.select import SelectSettings

STEPS = [
    pytest.param(node.settings, id=f"{recipe}-{name}")
    for recipe in shipped_recipes()
    for name, node in load_recipe(recipe).graph.nodes.items()
    if isinstance(node.settings, JobSettings)
]


@pytest.mark.parametrize("settings", STEPS)
def test_every_shipped_step_reaches_its_processes_unchanged(
    settings: JobSettings, step_context: Any, traces: Any
) -> None:
    model = TransformersModel(path="some/model", quantize="nf4")
    artifact = traces(4)
    named = [one for _, one in references(settings)]
    context = step_context(
        settings.kind,
        models={str(one): model for one in named if isinstance(one, ModelRef)},
        data={one.target: [artifact] for one in named if isinstance(one, DataRef)},
    )
    on_ray = Ray(engine="ray", replicas=3, address="head:6379", gpus_per_replica=0.5)
    job = Job.read(Job.of(settings, context, "fsdp2", ray=on_ray).write())
    assert (job.settings, job.strategy, job.ray) == (settings, "fsdp2", on_ray)
    assert (job.label, job.elsewhere) == (None, None)
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


@pytest.mark.parametrize(
    ("step", "devices"), [("cpu", ["cpu", "cpu"]), (None, [None, "cuda"])], ids=["by the step", "by models"]
)
def test_a_steps_device_counts_before_its_models(
    step_context: Any, traces: Any, step: str | None, devices: list[str | None]
) -> None:
    models = {
        "big": TransformersModel(path="some/big", device="cuda"),
        "small": TransformersModel(path="some/small"),
    }
    asked = {"do": "select", "data": "t", "teacher": "big", "student": "small", "keep": {"top": 0.5}}
    settings = SelectSettings.model_validate({**asked, "device": step})
    context = step_context("select", models=models, data={"t": [traces(2)]})
    assert Job.read(Job.of(settings, context).write()).devices == devices


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
    assert str(first.error()) == str(TrainingError("the loss is nan", where="step 3", mend="lower lr"))
    assert (first.rank, first.what, first.where, first.mend) == (1, "the loss is nan", "step 3", "lower lr")
    assert second.what == "RuntimeError: connection closed by peer"
    assert Failure.take_all(tmp_path) == []
