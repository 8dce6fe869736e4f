"""What a runner knows of its steps before it begins them, and how long it says that they took."""

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.core.errors import Interrupted, RecipeError
from potstill.core.events import Reporter
from potstill.core.store import Artifact, Store
from potstill.pipeline.graph import Graph
from potstill.pipeline.runner import RunOptions, check_scale, run_graph
from potstill.recipe import load_recipe
from potstill.scale import Ray
from potstill.teachers import OpenAIModel, VllmModel

COPIES = Ray(engine="ray", replicas=2)


@pytest.fixture(autouse=True)
def _ray_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.scale.settings.find_spec", lambda name: name)


@pytest.fixture
def graph(tmp_path: Path) -> Any:
    """The graph of a recipe whose teacher is on one GPU, with settings for its selection."""

    def made(**selection: str) -> Graph:
        steps = {
            "traces": {"do": "generate", "model": "teacher", "data": {"task": "chain_sum", "size": 4}},
            "picked": {
                "do": "select",
                "data": "traces",
                "student": str(tmp_path),
                "teacher": str(tmp_path),
                "keep": {"top": 0.5},
                **selection,
            },
            "student": {"do": "train", "student": "teacher", "data": "picked", "device": "cuda:1"},
        }
        models = {"teacher": {"path": str(tmp_path), "device": "cuda:1"}}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"name": "r", "models": models, "steps": steps}), encoding="utf-8")
        return load_recipe(str(path)).graph

    return made


def test_copies_of_a_model_on_one_gpu_are_refused(graph: Any) -> None:
    with pytest.raises(RecipeError, match="device: cuda:1 is one GPU, and each of 2 replicas takes its own"):
        check_scale(COPIES, graph(), "traces", elsewhere=False)


def test_a_step_that_asks_no_copies_needs_nothing_of_them(
    graph: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.scale.settings.find_spec", lambda name: None)
    check_scale(COPIES, graph(), "student", elsewhere=False)
    with pytest.raises(RecipeError, match="Ray is not installed"):
        check_scale(COPIES, graph(), "picked", elsewhere=False)


def test_a_steps_device_counts_before_its_models(graph: Any) -> None:
    check_scale(COPIES, graph(), "picked", elsewhere=False)
    check_scale(COPIES, graph(teacher="teacher", device="cpu"), "picked", elsewhere=False)
    for selection in ({"device": "cuda:1"}, {"teacher": "teacher"}):
        with pytest.raises(RecipeError, match="cuda:1 is one GPU"):
            check_scale(COPIES, graph(**selection), "picked", elsewhere=False)


@pytest.mark.parametrize("gpus", [2, 1, 0.5, None])
def test_several_gpus_a_copy_are_for_an_engine_that_uses_them(graph: Any, gpus: float | None) -> None:
    copies, made = Ray(engine="ray", replicas=2, gpus_per_replica=gpus), graph()
    if gpus == 2:
        told = "2 GPUs for each replica, of which a model of engine transformers uses one"
        with pytest.raises(RecipeError, match=told):
            check_scale(copies, made, "picked", elsewhere=False)
    else:
        check_scale(copies, made, "picked", elsewhere=False)
    for model in (
        VllmModel(engine="vllm", path="a/b"),
        OpenAIModel(engine="openai", base_url="http://127.0.0.1:1/v1", model="m"),
    ):
        made.models["teacher"] = model
        check_scale(copies, made, "traces", elsewhere=False)


class StopsWhatBegins(Reporter):
    """Hears that a step has begun, and asks the run to stop."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__("quiet")
        self.stop = stop

    def event(self, name: str, /, **fields: Any) -> None:
        if name == "step_started":
            self.stop.set()


@pytest.fixture
def interrupted(tmp_path: Path) -> Any:
    """A graph of one step whose first attempt was interrupted, the store, and the file of its seconds."""
    solver = {"engine": "solver", "function": "potstill.teachers.solvers:worked"}
    data = {"task": "chain_sum", "size": 4}
    steps = {"traces": {"do": "generate", "model": "solver", "data": data}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "models": {"solver": solver}, "steps": steps}))
    graph, store, stop = load_recipe(str(path)).graph, Store(tmp_path / "store"), threading.Event()
    with pytest.raises(Interrupted):
        run_graph(graph, 7, store, StopsWhatBegins(stop), RunOptions(stop=stop))
    [seconds] = store.root.glob("artifacts/generate-*/scratch/seconds")
    return graph, store, seconds


def _made(graph: Graph, store: Store, **options: Any) -> Artifact:
    return run_graph(graph, 7, store, Reporter("quiet"), RunOptions(**options))["traces"]


def test_a_step_took_as_long_as_all_attempts_at_it(interrupted: Any) -> None:
    graph, store, seconds = interrupted
    assert float(seconds.read_text()) > 0
    seconds.write_text("3600")
    made = _made(graph, store)
    assert 3600 < made.manifest.seconds < 7200
    assert not seconds.exists()


def test_a_step_that_is_made_anew_took_as_long_as_that(interrupted: Any) -> None:
    graph, store, seconds = interrupted
    seconds.write_text("3600")
    assert _made(graph, store, force=frozenset({"traces"})).manifest.seconds < 3600
