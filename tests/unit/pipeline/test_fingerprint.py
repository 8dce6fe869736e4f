"""What a step means when its inputs are other steps' artifacts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from potstill.cache import CacheSettings
from potstill.core.errors import DataError, RecipeError
from potstill.core.records import RECORDS_FILE, Record, write_records
from potstill.core.settings import ModelRef, ModelsRef
from potstill.core.store import Artifact, Store
from potstill.generate import GenerateSettings
from potstill.merge import MergeSettings
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


@pytest.fixture
def epochs(tmp_path: Path) -> dict[str, Artifact]:
    """A trained model without and with its epochs."""
    artifacts = {}
    for name, views in (("without", []), ("with", ["epoch1", "epoch2"])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        for view in views:
            (folder / view).mkdir()
            (folder / view / "model.safetensors").write_bytes(view.encode())
        extra = {"views": views} if views else {}
        artifacts[name] = Store(tmp_path).seal(
            folder, kind="train", fingerprint=name, settings={}, seed=1, seconds=0.0, extra=extra
        )
    return artifacts


def exam(graph: Graph, model: str, made: Artifact) -> Inputs:
    merge = MergeSettings.model_validate({"do": "merge", "model": model})
    student = graph.nodes["student"]
    kept = student.settings.model_copy(update={"keep_epochs": "all", "epochs": 9.0})
    steps = {**graph.nodes, "student": replace(student, settings=kept)}
    node = Node("exam", "exam", "merge", merge)
    return Inputs(Graph({**steps, "exam": node}, graph.models), node, {"student": made})


def test_epochs_that_are_kept_besides_leave_what_a_model_means_as_it_is(
    graph: Graph, epochs: dict[str, Artifact]
) -> None:
    plain, kept = (exam(graph, "student", epochs[name]).fingerprint(1) for name in ("without", "with"))
    assert plain == kept
    assert epochs["without"].manifest.content != epochs["with"].manifest.content


def test_an_epoch_is_a_model_of_its_own(graph: Graph, epochs: dict[str, Artifact]) -> None:
    found = {}
    for view in ("epoch1", "epoch2"):
        inputs = exam(graph, f"student:{view}", epochs["with"])
        model = inputs.model(ModelRef(f"student:{view}"))
        assert isinstance(model, TransformersModel)
        assert Path(model.path) == epochs["with"].folder / view
        found[view] = inputs.fingerprint(1)
    assert len({*found.values(), exam(graph, "student", epochs["with"]).fingerprint(1)}) == 3


def test_an_epoch_that_training_did_not_come_to_is_told(graph: Graph, epochs: dict[str, Artifact]) -> None:
    with pytest.raises(RecipeError, match="student kept no such epoch") as caught:
        exam(graph, "student:epoch7", epochs["with"]).fingerprint(1)
    assert caught.value.expected == "epoch1, epoch2"


def test_several_models_are_meant_by_the_content_of_each_and_in_their_order(
    graph: Graph, tmp_path: Path
) -> None:
    train = graph.nodes["student"].settings
    experts = [Node(f"expert[{one}]", "expert", "train", train, {"k": one}) for one in "ab"]
    merge = MergeSettings.model_validate({"do": "merge", "models": "expert"})
    joined = Node("joined", "joined", "merge", merge)
    several = Graph({one.name: one for one in (*graph.nodes.values(), *experts, joined)}, graph.models)

    def adapter(name: str, weights: bytes) -> Artifact:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(weights)
        fields: dict[str, Any] = {"settings": {}, "seed": 1, "seconds": 0.0, "model_identity": name}
        return Store(tmp_path).seal(tmp_path / name, kind="train", fingerprint=name, **fields)

    one, two, other = adapter("one", b"1"), adapter("two", b"2"), adapter("other", b"3")

    def inputs(first: Artifact, second: Artifact) -> Inputs:
        return Inputs(several, joined, {"expert[a]": first, "expert[b]": second})

    models = inputs(one, two).models(ModelsRef("expert"))
    assert [*models] == ["expert[a]", "expert[b]"]
    assert [getattr(model, "path", None) for model in models.values()] == [str(one.folder), str(two.folder)]
    fingerprints = [inputs(*given).fingerprint(1) for given in ((one, two), (two, one), (one, other))]
    assert len({*fingerprints}) == 3
    assert inputs(one, two).described() == {
        "expert": {"expert[a]": one.manifest.fingerprint, "expert[b]": two.manifest.fingerprint}
    }


def test_cached_logits_mean_their_chat_template_too(graph: Graph, tmp_path: Path) -> None:
    data = {"do": "train", "student": "big", "data": "logits"}
    cache = CacheSettings.model_validate({"do": "cache", "model": "big", "data": "a/b", "top_k": 2})
    node = Node("student", "student", "train", TrainSettings.model_validate(data))
    nodes = {"logits": Node("logits", "logits", "cache", cache), "student": node}
    found = []
    for name in ("chatml", "chatml-again", "plain"):
        extra = {"rendering": {"hash": name.removesuffix("-again")}}
        logits = made(tmp_path / name, extra)
        found.append(Inputs(Graph(nodes, graph.models), node, {"logits": logits}).fingerprint(1))
    assert found[0] == found[1] != found[2]


class TestParts:
    @staticmethod
    def fingerprint(folder: Path, traces: list[Record], category: str, view: str = "") -> str:
        """Of a train step on one category of the traces of a generate step."""
        folder.mkdir()
        write_records(folder / RECORDS_FILE, traces)
        fields: dict[str, Any] = {"settings": {}, "seed": 1, "seconds": 0.0}
        artifact = Store(folder.parent).seal(folder, kind="generate", fingerprint=folder.name, **fields)
        part = {"step": f"traces{view}", "where": {"category": category}}
        train = TrainSettings.model_validate({"do": "train", "student": "big", "data": part, "lora": {}})
        generate = GenerateSettings.model_validate({"model": "big", "data": {"task": "gcd", "size": 1}})
        nodes = [Node("traces", "traces", "generate", generate), Node("student", "student", "train", train)]
        graph = Graph(
            {one.name: one for one in nodes}, {"big": TransformersModel(path="a/b", identity="big")}
        )
        assert graph.needs["student"] == ["traces"]
        return Inputs(graph, graph.nodes["student"], {"traces": artifact}).fingerprint(1)

    @staticmethod
    def trace(number: int, category: str) -> Record:
        return Record(f"p{number}", [], response=f"answer {number}", meta={"category": category})

    def test_rows_of_another_domain_leave_what_learns_from_this_one_as_it_is(self, tmp_path: Path) -> None:
        four = [self.trace(0, "math"), self.trace(1, "words"), self.trace(2, "math")]
        five = [*four, self.trace(3, "logic")]
        one = self.fingerprint(tmp_path / "four", four, "math")
        assert self.fingerprint(tmp_path / "five", five, "math") == one
        assert self.fingerprint(tmp_path / "other", five, "logic") != one
        assert self.fingerprint(tmp_path / "more", [*five, self.trace(4, "math")], "math") != one

    def test_a_part_without_rows_is_told_before_anything_is_trained(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no row has category = 'maths'"):
            self.fingerprint(tmp_path / "four", [self.trace(0, "math")], "maths")
