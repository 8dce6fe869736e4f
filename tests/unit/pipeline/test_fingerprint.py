"""What a step means when its inputs are other steps' artifacts."""

from pathlib import Path
from typing import Any

import pytest

from potstill.core.settings import ModelRef
from potstill.core.store import Artifact, Store
from potstill.models import TransformersModel
from potstill.pipeline.fingerprint import Inputs
from potstill.pipeline.graph import Graph, Node
from potstill.student import InitSettings
from potstill.train import TrainSettings


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}', encoding="utf-8")
    data = {"path": str(tmp_path / "rows.jsonl")}
    init = InitSettings.model_validate({"do": "init", "model": "big", "layers": 1, "data": data})
    train = TrainSettings.model_validate({"do": "train", "student": "pruned", "data": data, "lora": {}})
    nodes = [Node("pruned", "pruned", "init", init), Node("student", "student", "train", train)]
    return Graph({node.name: node for node in nodes}, {"big": TransformersModel(path="a/b", identity="big")})


def made(folder: Path, extra: dict[str, Any]) -> Artifact:
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    fields = {"settings": {}, "seed": 1, "seconds": 0.0, "model_identity": "weights", "extra": extra}
    return Store(folder.parent).seal(folder, kind="init", fingerprint=folder.name, **fields)


def test_a_student_in_four_bits_is_loaded_so_and_means_something_else(graph: Graph, tmp_path: Path) -> None:
    found = {}
    for name, extra in (("plain", {}), ("packed", {"quantize": "nf4"})):
        inputs = Inputs(graph, graph.nodes["student"], {"pruned": made(tmp_path / name, extra)})
        model = inputs.model(ModelRef("pruned"))
        assert isinstance(model, TransformersModel)
        found[name] = (model.quantize, inputs.fingerprint(1))
    assert found["plain"][0] is None
    assert found["packed"][0] == "nf4"
    assert found["plain"][1] != found["packed"][1]
