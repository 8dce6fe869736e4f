"""Whether a step can have its processes is told from the recipe, and only of steps that would have any."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.core.errors import RecipeError
from potstill.pipeline.graph import Graph
from potstill.pipeline.runner import check_scale
from potstill.recipe import load_recipe
from potstill.scale import Ray

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
