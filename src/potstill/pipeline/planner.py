"""What is known of a recipe's steps before any is made: rows, prompts, models, who made what they read."""

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from potstill.core.errors import ModelError, PotstillError
from potstill.core.hashing import hash_json
from potstill.core.records import Record
from potstill.core.settings import DataRef, ModelRef, meaning, references
from potstill.core.store import ARTIFACTS_FOLDER, MANIFEST_FILE, Artifact, Manifest, Store
from potstill.data.parts import matches, read_part
from potstill.data.sources import StepPart, count_rows, first_prompts
from potstill.generate import GenerateSettings
from potstill.models import (
    TransformersModel,
    choose_device,
    expert_share,
    find_source,
    frozen_weight_bytes,
    parameter_count,
)
from potstill.pipeline.fingerprint import Inputs, MissingInput
from potstill.pipeline.graph import Graph, Node

if TYPE_CHECKING:
    import torch

    from potstill.core.shared import SharedArtifacts

__all__ = [
    "GB",
    "LETTERS_A_TOKEN",
    "READING",
    "WRITING",
    "PlannedStep",
    "Planner",
    "Speed",
    "init_work",
    "is_adapter",
    "kept_ids",
    "kept_share",
    "memory_limit",
    "model_names",
    "named_parameters",
    "parameters_of",
    "trains_adapter",
    "upstream_tokens",
]

Figure = TypeVar("Figure")
GB = 1e9
_SIZE_IN_NAME = re.compile(r"-(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z0-9])")
READING, WRITING = "reading", "writing"
_PROMPTS_LOOKED_AT = 200
LETTERS_A_TOKEN = 3.0
# Of a quantised model about a tenth, the embedding, stays in 16 bits.
_EMBEDDING_BYTES = 0.2
# Up to this many times as large, and as small, a model's speed goes by its size.
_LIKE_SIZE = 4


@dataclass
class PlannedStep:
    """One step of a plan; figures are None where they cannot be known beforehand, upper bounds otherwise.

    `memory_gb` is that of `device`; of a training `weights_gb` are its part for weights, frozen ones too,
    gradients and moments.
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
    weights_gb: float | None = None
    device: str = "cpu"
    disk_gb: float | None = None
    seconds: float | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Speed:
    """What an artifact in the store did a second, and when it was made.

    `per_s` is of tokens, of init steps of rows, times the parameters of the model that did it; of one that is
    known by itself these are None, and it is of tokens alone.
    """

    made_at: float
    parameters: float | None
    per_s: float


class Planner:
    """The steps planned so far, what is already made, and what stands in the way.

    A plan for other machines (`elsewhere`) is not kept from running by what this one lacks.
    """

    def __init__(self, graph: Graph, seed: int, store: Store, *, elsewhere: bool = False) -> None:
        self.graph, self.seed, self.store, self.elsewhere = graph, seed, store, elsewhere
        self.made: dict[str, Artifact] = {}
        self.place: SharedArtifacts | None = None  # of what other machines made
        self.shared: dict[str, Artifact] = {}  # whose files are at that place
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.steps: dict[str, PlannedStep] = {}
        self.speeds = _known_speeds(store)

    def problem(self, text: str) -> None:
        """Note what keeps the recipe from running, once."""
        if text not in self.problems:
            self.problems.append(text)

    def note(self, text: str) -> None:
        """Note what is good to know before the recipe runs, once."""
        if text not in self.notes:
            self.notes.append(text)

    def failed(self, where: str, error: PotstillError) -> None:
        """Note an error; of a model that this machine lacks only in passing, where the plan is for others."""
        if not (self.elsewhere and isinstance(error, ModelError)):
            self.problem(f"{where}: {error}")
        else:
            self.note(f"{where}: not on this machine ({error.what})")

    def speed(self, work: str, parameters: float | None) -> Speed | None:
        """The latest of the store at some work, by a model of about this size; None where there is none."""

        def is_like(one: Speed) -> bool:
            if one.parameters is None or parameters is None:
                return one.parameters is parameters
            return parameters / _LIKE_SIZE <= one.parameters <= parameters * _LIKE_SIZE

        found = filter(is_like, self.speeds.get(work, ()))
        return max(found, key=lambda one: one.made_at, default=None)

    def work(self, node: Node) -> str:
        """What a step's speed depends on, beside sizes: its kind and, of what is asked for answers, which."""
        settings: Any = node.settings
        if node.kind == GenerateSettings.kind or self.is_served(node):
            with suppress(PotstillError):  # of a model that is not here, which is a problem told elsewhere
                return _work(node.kind, meaning(self.graph.models.get(settings.model.target)))
        return node.kind

    def is_served(self, node: Node) -> bool:
        """Whether a step has one model, which another program runs."""
        reference = getattr(node.settings, "model", None)
        model = None if reference is None else self.graph.models.get(reference.target)
        return model is not None and not isinstance(model, TransformersModel)

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
        parameters = self.parameters(node, reference)

        def of(model: TransformersModel) -> float | None:
            each = frozen_weight_bytes(model.model_copy(update={"device": device or model.device}))
            if each < 1:  # in four bits, also where that is an adapter's base
                each += _EMBEDDING_BYTES
            if model.quantize and (experts := expert_share(model)):
                note = f"step {node.name}: quantize packs linear layers, and {experts:.0%} of {reference} is "
                note += "experts, which are none and stay in full"
                self.note(note)
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

    def prompt_tokens(self, node: Node, data: Any) -> float:
        """About how many tokens a prompt behind a step's data has; 0 where only a run can tell."""
        try:
            prompts = self.prompts_of(node, data)
        except PotstillError:  # told of where the step's rows are counted
            return 0.0
        letters = sum(len(message["content"]) for prompt in prompts for message in prompt.messages)
        return letters / len(prompts) / LETTERS_A_TOKEN if prompts else 0.0

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
            self.failed(f"step {node.name}", error)
            return None


def memory_limit(device: str) -> tuple[float, str] | None:
    """The most that a step can have of a device's memory in GB, and what to say of it; None where unknown."""
    if device.startswith("cuda"):
        import torch

        free, total = (one / GB for one in torch.cuda.mem_get_info(device))
        return free, f"{device} has {free:.1f} of its {total:.1f} GB free"
    if device != "cpu" or not hasattr(os, "sysconf"):
        return None
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    return memory_gb, f"this machine has {memory_gb:.0f} GB"


def parameters_of(model: TransformersModel) -> int | None:
    """From a model's files; of a hub model that is not here, about what its name says (Qwen3-4B)."""
    if (found := parameter_count(model)) is not None or find_source(model.path).kind != "hub":
        return found
    return named_parameters(model.path)


def named_parameters(name: str) -> int | None:
    """About how many parameters a model has by its name (Qwen3-4B); None where it says nothing."""
    named = _SIZE_IN_NAME.search(name)
    return None if named is None else round(float(named[1]) * {"B": 1e9, "M": 1e6}[named[2].upper()])


def _work(kind: str, writer: Any) -> str:
    return f"{kind} by {hash_json(writer)}"


def init_work(method: str, depth_by: Any) -> str:
    """What the time of an init step depends on beside its rows and the model's size."""
    return f"init by {method}, {depth_by}"


def _known_speeds(store: Store) -> dict[str, list[Speed]]:
    """What the artifacts that were made here did a second, by the work: `Planner.work`, reading, writing."""
    found: dict[str, list[Speed]] = {}
    for path in (store.root / ARTIFACTS_FOLDER).glob("*/manifest.json"):
        try:
            artifact = Artifact.open(path.parent)
        except PotstillError:
            continue
        manifest = artifact.manifest
        if manifest.seconds and not artifact.was_fetched:
            made_at = path.stat().st_mtime
            for work, parameters, done in _done(manifest):
                found.setdefault(work, []).append(Speed(made_at, parameters, done / manifest.seconds))
    return found


def _done(manifest: Manifest) -> Iterator[tuple[str, float | None, float]]:
    """The work of an artifact, the size of the model that did it, and what it would have done in its seconds.

    Of artifacts that an earlier version made sizes are not known, and they say nothing of speed.
    """
    settings, kind, tokens, sizes = manifest.settings, manifest.kind, manifest.tokens, manifest.parameters
    if tokens and kind in (GenerateSettings.kind, "cache") and isinstance(settings.get("model"), str):
        writer = manifest.inputs.get(settings["model"])
        if kind == GenerateSettings.kind or settings["model"] not in sizes:
            yield _work(kind, writer), None, tokens
    if tokens and sizes and kind in ("cache", "select", "train") and not settings.get("from_traces"):
        # A selection's models score as many tokens each.
        ran = [sizes.get(str(settings.get("student")), 0)] if kind == "train" else [*sizes.values()]
        parameters = sum(ran) / len(ran)
        for work in (kind,) if kind == "train" else (kind, READING):
            yield work, parameters, tokens * parameters
    if kind == "init" and (before := manifest.metrics.get("parameters_before")):
        rows = manifest.counts.get("calibration_rows", 0)
        if rows and "method" in settings:
            yield init_work(settings["method"], settings.get("depth_by")), before, rows * before
    if kind == "evaluate":
        stated = settings.get("models") or ()
        roles = stated if isinstance(stated, dict) else {name: name for name in stated}
        for role, model in manifest.metrics.get("models", {}).items():
            parameters = sizes.get(roles.get(role, ""), 0)
            timed = [
                one
                for one in model.get("tasks", {}).values()
                if one.get("seconds_per_response") and "mean_response_tokens" in one
            ]
            if parameters and timed:
                written = sum(one["mean_response_tokens"]["value"] for one in timed)
                seconds = sum(one["seconds_per_response"] for one in timed)
                yield WRITING, parameters, written * parameters * manifest.seconds / seconds


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


def kept_share(planner: Planner, node: Node) -> float:
    """At most this share of what a select step reads is kept, as far as its settings say."""
    settings: Any = node.settings
    if settings.keep is None or settings.keep.threshold is not None:
        return 1.0
    if settings.keep.top is not None:
        return float(settings.keep.top)
    samples = [getattr(maker.settings, "samples", None) for maker in planner.makers(node, settings.data)]
    known = [one for one in samples if one is not None]
    if len(known) < len(samples) or not known or planner.reads_files(settings.data):
        return 1.0
    return min(1.0, float(settings.keep.per_prompt / min(known)))


def upstream_tokens(planner: Planner, node: Node) -> int | None:
    """At most so many tokens of traces or logits a step reads, less what selections before it drop."""
    tokens: list[int | None] = []
    settings: Any = node.settings
    for maker in planner.makers(node, settings.data):
        if maker.kind != "select":
            tokens.append(planner.steps[maker.name].tokens)
        else:
            read = upstream_tokens(planner, maker)
            made = planner.made.get(maker.name) or planner.shared.get(maker.name)
            share = (
                kept_share(planner, maker)
                if made is None
                else made.manifest.counts["records"] / made.manifest.counts["rows"]
            )
            tokens.append(None if read is None else math.ceil(read * share))
    if not tokens or None in tokens:
        return None
    whole, known = sum(one or 0 for one in tokens), planner.steps[node.name].rows
    if isinstance(settings.data, StepPart) and known and (rows := planner.rows_of(node, settings.data.step)):
        return math.ceil(whole * min(1.0, known / rows))
    return whole
