"""What is known of a recipe's steps before any is made: rows, prompts, models, who made what they read."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from potstill.core.errors import PotstillError
from potstill.core.hashing import hash_json
from potstill.core.records import Record
from potstill.core.settings import DataRef, ModelRef, meaning, references
from potstill.core.store import MANIFEST_FILE, Artifact, Store
from potstill.data.parts import matches, read_part
from potstill.data.sources import StepPart, count_rows, first_prompts
from potstill.generate import GenerateSettings
from potstill.models import (
    TransformersModel,
    choose_device,
    find_source,
    frozen_weight_bytes,
    parameter_count,
)
from potstill.pipeline.fingerprint import Inputs, MissingInput
from potstill.pipeline.graph import Graph, Node

if TYPE_CHECKING:
    import torch

__all__ = [
    "GB",
    "PlannedStep",
    "Planner",
    "is_adapter",
    "kept_ids",
    "model_names",
    "parameters_of",
    "trains_adapter",
]

Figure = TypeVar("Figure")
GB = 1e9
_SIZE_IN_NAME = re.compile(r"-(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z0-9])")
_PROMPTS_LOOKED_AT = 200
# Of a quantised model about a tenth, the embedding, stays in 16 bits.
_EMBEDDING_BYTES = 0.2


@dataclass
class PlannedStep:
    """One step of a plan; figures are None where they cannot be known beforehand, upper bounds otherwise.

    `memory_gb` is that of `device`.
    """

    name: str
    kind: str
    status: str
    needs: list[str]
    settings: dict[str, Any]
    rows: int | None = None
    tokens: int | None = None
    cost_usd: float | None = None
    memory_gb: float | None = None
    device: str = "cpu"
    disk_gb: float | None = None
    seconds: float | None = None
    parameters: int | None = None


class Planner:
    """The steps planned so far, what is already made, and what stands in the way."""

    def __init__(self, graph: Graph, seed: int, store: Store) -> None:
        self.graph, self.seed, self.store = graph, seed, store
        self.made: dict[str, Artifact] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.steps: dict[str, PlannedStep] = {}
        self.speeds = _known_speeds(store)

    def problem(self, text: str) -> None:
        """Note what keeps the recipe from running, once."""
        if text not in self.problems:
            self.problems.append(text)

    def work(self, node: Node) -> str:
        """What a step's speed depends on: its kind and, where a teacher writes, which one."""
        if not isinstance(node.settings, GenerateSettings):
            return node.kind
        return _work(node.kind, meaning(self.graph.models.get(node.settings.model.target)))

    def rows_of(self, node: Node, data: Any) -> int | None:
        """How many rows a step's data has, as far as that is known without making anything."""
        if isinstance(data, StepPart):
            return self.rows_of_part(node, data)
        if isinstance(data, DataRef) and not data.is_path:
            rows = [self.steps[step.name].rows for step in self.graph.steps_named(data, node)]
            return None if any(one is None for one in rows) else sum(one or 0 for one in rows)
        try:
            return count_rows(data, self.seed)
        except PotstillError as error:
            self.problem(f"step {node.name}: {error}")
            return None

    def rows_of_part(self, node: Node, part: StepPart) -> int | None:
        """How many rows a part of a step has; by its prompts, or at most all rows, where it is to be made."""
        try:
            return sum(1 for _ in read_part(part, Inputs(self.graph, node, self.made).artifacts(part.step)))
        except MissingInput:
            pass
        except PotstillError as error:
            self.problem(f"step {node.name}: {error}")
            return None
        rows = self.rows_of(node, part.step)
        try:
            prompts = self.prompts_of(node, part.step, count=None)
        except PotstillError as error:
            self.problem(f"step {node.name}: {error}")
            return None
        if rows is None or not prompts:
            return rows
        return math.ceil(rows * sum(matches(part.where, one.meta) for one in prompts) / len(prompts))

    def makers(self, node: Node, data: Any) -> list[Node]:
        """The steps that a step's data lead to."""
        named = [ref for _, ref in references(data) if isinstance(ref, DataRef) and not ref.is_path]
        return [step for ref in named for step in self.graph.steps_named(ref, node)]

    def writers(self, node: Node) -> list[Node]:
        """The generate steps behind a step's data, through the selections in between."""
        settings: Any = node.settings
        found: list[Node] = []
        for maker in self.makers(node, settings.data):
            if maker.kind in ("select", "retrieve"):
                found += self.writers(maker)
            elif maker.kind == GenerateSettings.kind:
                found.append(maker)
        return found

    def reads_files(self, data: Any) -> bool:
        """Whether data come, in part at least, from outside the recipe."""
        members = [
            one.step if isinstance(one, StepPart) else one
            for one in (data if isinstance(data, list) else [data])
        ]
        return any(not isinstance(one, DataRef) or one.is_path for one in members)

    def frozen_bytes(self, node: Node, reference: ModelRef, device: str | None) -> float | None:
        """Bytes of all weights of a model that is not trained, on a device."""

        def of(model: TransformersModel) -> float | None:
            parameters = parameters_of(model)
            each = frozen_weight_bytes(model.model_copy(update={"device": device or model.device}))
            if each < 1:  # in four bits, also where that is an adapter's base
                each += _EMBEDDING_BYTES
            return None if parameters is None else parameters * each

        return self.of_model(node, reference, of)

    def device(self, node: Node) -> "torch.device":
        """Where a step's models run: that of the first one that this machine runs."""
        import torch

        stated = getattr(node.settings, "device", None)
        for _, reference in references(node.settings):
            if isinstance(reference, ModelRef):
                found = self.of_model(
                    node,
                    reference,
                    lambda model: choose_device(model.model_copy(update={"device": stated or model.device})),
                )
                if found is not None:
                    return found
        return torch.device("cpu")

    def prompts_of(self, node: Node, data: Any, count: int | None = _PROMPTS_LOOKED_AT) -> list[Record]:
        """Some of the prompts behind a step's data; none where only a run can tell."""
        if isinstance(data, StepPart):
            data = data.step
        if isinstance(data, DataRef) and not data.is_path:
            maker = self.graph.steps_named(data, node)[0]
            return self.prompts_of(maker, getattr(maker.settings, "data", []), count)
        return first_prompts(data, self.seed, count)

    def parameters(self, node: Node, reference: ModelRef) -> int | None:
        """Parameters of the model behind a reference; where it is not made yet, planned or its source's."""
        if not reference.is_path and reference.target not in self.graph.models:
            maker = self.steps[self.graph.steps_named(reference, node)[0].name]
            if maker.parameters:
                return maker.parameters
        return self.of_model(node, reference, parameters_of)

    def of_model(
        self, node: Node, reference: ModelRef, figure: Callable[[TransformersModel], Figure | None]
    ) -> Figure | None:
        """A figure of the model behind a reference; where it is not made yet, of the one it comes from."""
        inputs = Inputs(self.graph, node, self.made)
        try:
            settings = inputs.model(reference)
            return figure(settings) if isinstance(settings, TransformersModel) else None
        except MissingInput as missing:
            maker = self.graph.nodes[missing.step]
            sources = [ref for _, ref in references(maker.settings) if isinstance(ref, ModelRef)]
            quantize = getattr(maker.settings, "quantize", None)

            def as_made(model: TransformersModel) -> Figure | None:
                return figure(model.model_copy(update={"quantize": quantize or model.quantize}))

            return self.of_model(maker, sources[0], as_made) if sources else None
        except PotstillError as error:
            self.problem(f"step {node.name}: {error}")
            return None


def parameters_of(model: TransformersModel) -> int | None:
    """From a model's files; of a hub model that is not here, about what its name says (Qwen3-4B)."""
    if (found := parameter_count(model)) is not None or find_source(model.path).kind != "hub":
        return found
    named = _SIZE_IN_NAME.search(model.path)
    return None if named is None else round(float(named[1]) * {"B": 1e9, "M": 1e6}[named[2].upper()])


def _work(kind: str, writer: Any) -> str:
    return f"{kind} by {hash_json(writer)}"


def _known_speeds(store: Store) -> dict[str, float]:
    """Tokens a second of the latest artifact in the store, by the work it was (`Planner.work`)."""
    newest: dict[str, tuple[float, float]] = {}
    for path in (store.root / "artifacts").glob("*/manifest.json"):
        try:
            manifest = Artifact.open(path.parent).manifest
        except PotstillError:
            continue
        if manifest.tokens and manifest.seconds:
            work = manifest.kind
            if work == GenerateSettings.kind:
                work = _work(work, manifest.inputs.get(manifest.settings["model"]))
            entry = (path.stat().st_mtime, manifest.tokens / manifest.seconds)
            newest[work] = max(newest.get(work, entry), entry)
    return {work: speed for work, (_, speed) in newest.items()}


def kept_ids(planner: Planner, node: Node) -> dict[str, int | None]:
    """The caches that are a train step's data, and how many of the most probable ids each keeps."""
    settings: Any = node.settings
    data = settings.data
    if not isinstance(data, DataRef):
        return {}
    if data.is_path:
        found = Artifact.open(Path(data)) if (Path(data) / MANIFEST_FILE).is_file() else None
        return {str(data): found.manifest.extra.get("k")} if found and found.kind == "cache" else {}
    makers: dict[str, Any] = {step.name: step for step in planner.graph.steps_named(data, node)}
    return {
        name: step.settings.top_k if step.settings.codec == "topk" else None
        for name, step in makers.items()
        if step.kind == "cache"
    }


def trains_adapter(planner: Planner, node: Node) -> bool:
    """Whether a train step trains an adapter: its own, or that of its student."""
    settings: Any = node.settings
    return settings.lora is not None or is_adapter(planner, node, settings.student)


def is_adapter(planner: Planner, node: Node, model: ModelRef) -> bool:
    """Whether the model behind a step's reference is an adapter, or will be one."""
    if model.is_path or model.target in planner.graph.models:
        return bool(planner.of_model(node, model, lambda found: find_source(found.path).kind == "adapter"))
    makers = planner.graph.steps_named(model, node)
    return all(maker.kind == "train" and trains_adapter(planner, maker) for maker in makers)


def model_names(planner: Planner, node: Node, model: ModelRef) -> list[str]:
    """The names of the models that a reference means."""
    if model.is_path or model.target in planner.graph.models:
        return [str(model)]
    return [maker.name for maker in planner.graph.steps_named(model, node)]
