"""What a recipe will do, before anything is spent, and everything that is missing or impossible."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from potstill.core.errors import PotstillError
from potstill.core.events import format_seconds
from potstill.core.hashing import hash_json
from potstill.core.records import Record
from potstill.core.settings import DataRef, ModelRef, meaning, references
from potstill.core.store import MANIFEST_FILE, Artifact, Store
from potstill.data.parts import matches, read_part
from potstill.data.sources import StepPart, count_rows, first_prompts
from potstill.generate import GenerateSettings, check_budget
from potstill.models import (
    TransformersModel,
    choose_device,
    find_source,
    frozen_weight_bytes,
    parameter_count,
    stored_quantization,
    supports_bf16,
)
from potstill.pipeline.fingerprint import Inputs, MissingInput
from potstill.pipeline.graph import Graph, Node
from potstill.pipeline.run import Runnable
from potstill.retrieval.dense import check_qdrant
from potstill.student.sizes import planned_parameters
from potstill.teachers import OpenAIModel, check_teacher
from potstill.teachers.continuation import check_continues
from potstill.teachers.solver import SolverModel
from potstill.train.settings import default_max_tokens

__all__ = ["Plan", "PlannedStep", "make_plan"]

Figure = TypeVar("Figure")

_GB = 1e9
_SIZE_IN_NAME = re.compile(r"-(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z0-9])")
_LETTERS_A_TOKEN, _PROMPTS_LOOKED_AT = 3.0, 200
# Bytes a parameter: fp32 weight, gradient and AdamW's two moments; a weight on disk.
_TRAINED_BYTES, _STORED_BYTES = 16, 4
_TRACE_TOKEN_BYTES = 16
# Of a quantised model about a tenth, the embedding, stays in 16 bits; an adapter has about a hundredth of the
# weights, which are trained.
_EMBEDDING_BYTES, _ADAPTER_BYTES = 0.2, 0.16
_WIDTH_TO_DEPTH = 70  # hidden size a block of common language models
# Where nothing was measured: what an API writes a request, and the share of a matrix product's speed.
_STREAM_TOKENS_PER_S, _PEAK_SHARE = 40.0, 0.35
# Bytes of a token's cached logits: a kept or drawn id, a temperature's sums, ids and key of the row itself.
_TOP_K_ID_BYTES, _SAMPLED_ID_BYTES, _TEMPERATURE_BYTES, _ROW_BYTES = 1.85, 1.9, 4.0, 4.0


@dataclass
class PlannedStep:
    """One step of a plan; figures are None where they cannot be known beforehand, upper bounds otherwise."""

    name: str
    kind: str
    status: str
    needs: list[str]
    settings: dict[str, Any]
    rows: int | None = None
    tokens: int | None = None
    cost_usd: float | None = None
    memory_gb: float | None = None
    disk_gb: float | None = None
    seconds: float | None = None
    parameters: int | None = None


@dataclass
class Plan:
    """Every step in order, and what stands in the way."""

    name: str
    steps: list[PlannedStep]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The plan as one JSON object."""
        return json.dumps({**asdict(self), "runs": not self.problems}, default=str)

    def to_text(self) -> str:
        """The plan for a terminal."""
        head = ["step", "kind", "status", "rows", "tokens", "cost", "memory", "disk", "time"]
        rows = [
            [
                step.name,
                step.kind,
                step.status,
                _shown(step.rows, "{:,}"),
                _shown(step.tokens, "{:,}"),
                _shown(step.cost_usd, "${:,.2f}"),
                _shown(step.memory_gb, "{:.1f} GB"),
                _shown(step.disk_gb, "{:.2f} GB"),
                format_seconds(step.seconds) if step.seconds is not None else "-",
            ]
            for step in self.steps
        ]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = [f"plan of {self.name}", ""]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in [head, *rows]
        ]
        lines.append("")
        for step in self.steps:
            settings = ", ".join(
                f"{key}={value}" for key, value in step.settings.items() if value not in (None, {}, [])
            )
            lines.append(f"  {step.name}: {settings}")
        lines += ["", *(f"note: {note}" for note in self.notes)]
        lines += [f"problem: {problem}" for problem in self.problems]
        lines.append("cannot run" if self.problems else "can run; nothing was spent")
        return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


class _Planner:
    def __init__(self, graph: Graph, seed: int, store: Store) -> None:
        self.graph, self.seed, self.store = graph, seed, store
        self.made: dict[str, Artifact] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.steps: dict[str, PlannedStep] = {}
        self.speeds = _known_speeds(store)

    def problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def check_models(self) -> None:
        used = {
            ref.target
            for node in self.graph.nodes.values()
            for _, ref in references(node.settings)
            if isinstance(ref, ModelRef) and not ref.is_path
        }
        for name in sorted(used & set(self.graph.models)):
            problem, note = check_teacher(self.graph.models[name])
            if problem:
                self.problem(f"model {name}: {problem}")
            if note:
                self.notes.append(f"model {name}: {note}")

    def step(self, name: str) -> None:
        node = self.graph.nodes[name]
        planned = PlannedStep(
            name,
            node.kind,
            "to make",
            self.graph.needs[name],
            node.settings.model_dump(mode="json", exclude_none=True, by_alias=True),
        )
        self.steps[name] = planned
        inputs = Inputs(self.graph, node, self.made)
        try:
            found = self.store.find(node.kind, inputs.fingerprint(self.seed))
        except MissingInput:
            found = None
        except PotstillError as error:
            self.problem(f"step {name}: {error}")
            found = None
        if found is not None:
            self.made[name] = found
            planned.status = "made"
            counts = found.manifest.counts
            planned.rows = counts.get("records", counts.get("rows"))
            planned.tokens = found.manifest.tokens
            planned.seconds = 0.0
            return
        _ESTIMATES[node.kind](self, node, planned)
        if planned.tokens and (speed := self.speeds.get(self.work(node))):
            planned.seconds = planned.tokens / speed
        elif planned.tokens:
            planned.seconds = _guessed_seconds(self, node, planned)

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
            parameters = _parameters(model)
            each = frozen_weight_bytes(model.model_copy(update={"device": device or model.device}))
            if each < 1:  # in four bits, also where that is an adapter's base
                each += _EMBEDDING_BYTES
            return None if parameters is None else parameters * each

        return self.of_model(node, reference, of)

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
        return self.of_model(node, reference, _parameters)

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


def _parameters(model: TransformersModel) -> int | None:
    """From a model's files; of a hub model that is not here, about what its name says (Qwen3-4B)."""
    if (found := parameter_count(model)) is not None or find_source(model.path).kind != "hub":
        return found
    named = _SIZE_IN_NAME.search(model.path)
    return None if named is None else round(float(named[1]) * {"B": 1e9, "M": 1e6}[named[2].upper()])


def _work(kind: str, writer: Any) -> str:
    return f"{kind} by {hash_json(writer)}"


def _known_speeds(store: Store) -> dict[str, float]:
    """Tokens a second of the latest artifact in the store, by the work it was (`_Planner.work`)."""
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


def _plan_generate(planner: _Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    if settings.continue_ is not None and (model := planner.graph.models.get(settings.model.target)):
        try:
            check_continues(model, f"model {settings.model}")
        except PotstillError as error:
            planner.problem(f"step {node.name}: {error}")
    # A limit bounds what cannot be counted beforehand.
    bounds = [
        planner.rows_of(node, settings.data),
        settings.limit,
        getattr(settings.data, "limit", None),
    ]
    if known := [bound for bound in bounds if bound is not None]:
        planned.rows = min(known) * settings.samples
        if not isinstance(
            planner.graph.models.get(settings.model.target), SolverModel
        ):  # a function writes as much as it likes, and at once
            planned.tokens = planned.rows * settings.max_new_tokens
            planned.disk_gb = planned.tokens * _TRACE_TOKEN_BYTES / _GB
    _plan_cost(planner, node, planned)


def _guessed_seconds(planner: _Planner, node: Node, planned: PlannedStep) -> float | None:
    """How long a step may take that nothing like it has been made before; noted, since it is a guess."""
    settings: Any = node.settings
    if node.kind == "train":
        # Forward, to the inputs, and to the weights where they are trained; once more forward to recompute.
        passes = 3 - _trains_adapter(planner, node) + settings.activation_checkpointing

        def seconds(model: TransformersModel) -> float | None:
            import torch

            from potstill.train.throughput import peak_flops_per_s

            device = choose_device(model.model_copy(update={"device": settings.device or model.device}))
            dtype = torch.bfloat16 if supports_bf16(device) else torch.float32
            flops = 2.0 * passes * (_parameters(model) or 0) * (planned.tokens or 0)
            return flops / (_PEAK_SHARE * peak_flops_per_s(device, dtype)) or None

        planner.notes.append(
            f"step {node.name}: its time is a guess, from what this machine's matrix products reach"
        )
        return planner.of_model(node, settings.student, seconds)
    model = planner.graph.models.get(settings.model.target) if node.kind == GenerateSettings.kind else None
    if not isinstance(model, OpenAIModel) or not planned.rows:
        return None
    at_once = min(settings.concurrency or model.concurrency, planned.rows)
    planner.notes.append(
        f"step {node.name}: its time is a guess, {at_once} requests at once at {_STREAM_TOKENS_PER_S:g} "
        "tokens/s each"
    )
    return (planned.tokens or 0) / (at_once * _STREAM_TOKENS_PER_S)


def _plan_cost(planner: _Planner, node: Node, planned: PlannedStep) -> None:
    """About the most that a generate step can cost, with its prompts where they can be read beforehand."""
    settings: Any = node.settings
    model = planner.graph.models.get(settings.model.target)
    try:
        check_budget(settings, model)
        prompts = planner.prompts_of(node, settings.data)
    except PotstillError as error:
        planner.problem(f"step {node.name}: {error}")
        return
    if not isinstance(model, OpenAIModel) or model.price is None or planned.rows is None:
        return
    letters = sum(len(message["content"]) for prompt in prompts for message in prompt.messages)
    prompt_tokens = planned.rows * letters / len(prompts) / _LETTERS_A_TOKEN if prompts else 0.0
    if not prompts:
        planner.notes.append(f"step {node.name}: its cost is without that of the prompts")
    planned.cost_usd = model.price.cost(prompt_tokens, planned.tokens or 0)
    if settings.max_cost is not None:
        planned.cost_usd = min(planned.cost_usd, settings.max_cost)


def _plan_select(planner: _Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    read = planner.rows_of(node, settings.data)
    planned.rows = None if read is None else math.ceil(read * _kept_share(planner, node))
    upstream = _upstream_tokens(planner, node)
    if upstream is not None:
        planned.disk_gb = upstream * _TRACE_TOKEN_BYTES / _GB
        # A teacher that fills in what is missing may have to score everything.
        planned.tokens = upstream * len(settings.models)
    needed = [
        weights
        for reference in settings.models.values()
        if (weights := planner.frozen_bytes(node, reference, settings.device))
    ]
    if needed:
        planned.memory_gb = max(needed) / _GB  # one after the other
    if settings.rule == "none" or settings.teacher is not None:
        return
    for maker in planner.writers(node):
        if getattr(maker.settings, "logprobs", None) is None:
            planner.problem(
                f"step {node.name}: the traces of {maker.name} have no log-probabilities; set "
                f"`{maker.name}.logprobs=1`, or name a local `teacher` in {node.name}"
            )
    if planner.reads_files(settings.data):
        planner.notes.append(
            f"step {node.name}: whether all its rows have log-probabilities shows when they are read"
        )


def _kept_share(planner: _Planner, node: Node) -> float:
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


def _plan_cache(planner: _Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    planned.rows = planner.rows_of(node, settings.data)
    planned.tokens = _upstream_tokens(planner, node)
    if planned.tokens is None and planned.rows and settings.max_length:
        planned.tokens = planned.rows * settings.max_length
    if planned.tokens:
        planned.disk_gb = planned.tokens * _cache_bytes_a_token(settings) / _GB
    if parameters := planner.parameters(node, settings.model):
        planned.memory_gb = parameters * _STORED_BYTES / _GB


def _cache_bytes_a_token(settings: Any) -> float:
    """About what a token takes, from benchmarks/logit_cache.py; other traces differ by some percent."""
    if settings.codec == "sampled":
        # The distinct ids among n draws grow with about the square root of n.
        return float(_SAMPLED_ID_BYTES * settings.draws**0.5 + _ROW_BYTES)
    ids = settings.top_k * _TOP_K_ID_BYTES
    return float(ids + len(settings.temperatures) * _TEMPERATURE_BYTES + _ROW_BYTES)


def _plan_init(planner: _Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    planned.rows = planner.rows_of(node, settings.data)
    if parameters := planner.parameters(node, settings.model):
        # The model and its student, or two students of a search.
        planned.memory_gb = 2 * parameters * _STORED_BYTES / _GB
        planned.disk_gb = parameters * _STORED_BYTES / _GB
    planned.parameters = planner.of_model(
        node, settings.model, lambda model: planned_parameters(settings, model)
    )
    if planned.parameters:
        most = "at most " if settings.target_params or settings.target_ratio else ""
        planner.notes.append(f"step {node.name}: a student of {most}{planned.parameters:,} parameters")


def _plan_train(planner: _Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    planned.rows = planner.rows_of(node, settings.data)
    epochs = settings.epochs
    if settings.max_steps and planned.rows:
        epochs = settings.max_steps * settings.batch / planned.rows
    if settings.tokens is not None:
        planned.tokens = settings.tokens
    elif tokens := _upstream_tokens(planner, node):
        planned.tokens = int(tokens * epochs)
    if settings.top_k is not None:
        _check_top_k(planner, node)
    _check_temperature(planner, node)
    if settings.feature is not None:
        _check_feature(planner, node)
    adapter = _trains_adapter(planner, node)
    _check_student(planner, node, adapter=adapter)
    if parameters := planner.parameters(node, settings.student):
        frozen = planner.frozen_bytes(node, settings.student, settings.device) if adapter else None
        weights = frozen + parameters * _ADAPTER_BYTES if frozen else parameters * _TRAINED_BYTES
        planned.memory_gb = weights / _GB
        device = planner.of_model(
            node,
            settings.student,
            lambda model: choose_device(model.model_copy(update={"device": settings.device or model.device})),
        )
        max_tokens = settings.max_tokens or default_max_tokens("cpu" if device is None else device.type)
        planned.memory_gb += _activation_bytes(settings, parameters, max_tokens) / _GB
        if settings.base_kl and not adapter:
            planned.memory_gb += parameters * _STORED_BYTES / _GB
        # A checkpoint holds the weights and both moments while the next one is written.
        planned.disk_gb = parameters * (0.1 if adapter else 2 * 12 + _STORED_BYTES) / _GB
        if settings.keep_epochs is not None:
            kept = math.floor(epochs) if settings.keep_epochs == "all" else settings.keep_epochs
            planned.disk_gb += kept * parameters * _STORED_BYTES * (0.01 if adapter else 1) / _GB
        if settings.teacher is not None:
            teacher = planner.frozen_bytes(node, settings.teacher, settings.device)
            planned.memory_gb += (teacher or 0.0) / _GB


def _check_student(planner: _Planner, node: Node, *, adapter: bool) -> None:
    """Problems where the student cannot be trained as the step asks."""
    settings: Any = node.settings
    if settings.lora is not None and _is_adapter(planner, node, settings.student):
        planner.problem(
            f"step {node.name}: {settings.student} is an adapter, and lora asks for another one on top of "
            "it; leave lora out to train the adapter on"
        )
    quantised = planner.of_model(
        node, settings.student, lambda model: model.quantize or stored_quantization(model)
    )
    if quantised and not adapter:
        planner.problem(
            f"step {node.name}: {settings.student} is quantised to {quantised}, and quantised weights cannot "
            "be trained; add lora"
        )
    if settings.mask_prefix and _kept_ids(planner, node):
        planner.problem(
            f"step {node.name}: {settings.data} holds a teacher's logits, which have their own mask; set "
            "mask_prefix in the cache step"
        )
    elif settings.mask_prefix and not planner.reads_files(settings.data):
        writers = planner.writers(node)
        if writers and all(getattr(one.settings, "continue_", None) is None for one in writers):
            names = ", ".join(one.name for one in writers)
            planner.problem(
                f"step {node.name}: mask_prefix leaves nothing out, as {names} continues no response; leave "
                "it out, or set continue: there"
            )


def _activation_bytes(settings: Any, parameters: int, max_tokens: int) -> float:
    """About what a micro-batch's activations take, from the size of the model alone.

    A block has 12 H^2 weights and keeps 34 H bytes a token in 16 bits (Korthikanti et al. 2022); with
    checkpointing a block's input alone is kept, and one block is made again at a time.
    """
    hidden = (parameters * _WIDTH_TO_DEPTH / 12) ** (1 / 3)
    blocks = hidden / _WIDTH_TO_DEPTH
    if settings.activation_checkpointing:
        token_bytes = 2 * hidden * blocks + 34 * hidden
    else:
        token_bytes = 34 * hidden * blocks
    return float(token_bytes * max_tokens)


def _check_top_k(planner: _Planner, node: Node) -> None:
    """A problem where a train step asks for more ids than its data keep, or for any where they were drawn."""
    settings: Any = node.settings
    asked = f"step {node.name}: top_k is {settings.top_k}, but"
    kept = _kept_ids(planner, node)
    if not kept:
        planner.problem(f"{asked} its data are no cached logits")
    for name, k in kept.items():
        if k is None:
            planner.problem(f"{asked} {name} keeps drawn ids, not the most probable ones")
        elif k < settings.top_k:
            planner.problem(f"{asked} {name} keeps {k}")


def _check_temperature(planner: _Planner, node: Node) -> None:
    """A problem where a train step asks for a temperature that its data, cached logits, are not kept for."""
    settings: Any = node.settings
    data = settings.data
    if not isinstance(data, DataRef):
        return
    if data.is_path:
        found = Artifact.open(Path(data)) if (Path(data) / MANIFEST_FILE).is_file() else None
        kept = {str(data): found.manifest.settings.get("temperatures")} if found is not None else {}
    else:
        makers: dict[str, Any] = {one.name: one.settings for one in planner.graph.steps_named(data, node)}
        kept = {name: getattr(maker, "temperatures", None) for name, maker in makers.items()}
    for name, temperatures in kept.items():
        if temperatures and settings.temperature not in temperatures:
            stated = ", ".join(f"{one:g}" for one in temperatures)
            planner.problem(
                f"step {node.name}: temperature is {settings.temperature:g}, and {name} keeps {stated}: "
                "cache it with this one, or train at one of those"
            )


def _check_feature(planner: _Planner, node: Node) -> None:
    """A problem where a train step compares inner states, and no teacher in memory has any."""
    settings: Any = node.settings
    if caches := _kept_ids(planner, node):
        planner.problem(
            f"step {node.name}: feature compares inner states with the teacher's, and {', '.join(caches)} "
            "holds the teacher's answers alone; name the traces as data, and the model as teacher"
        )
    elif settings.teacher is None:
        planner.problem(
            f"step {node.name}: feature compares inner states with the teacher's, and there is no teacher; "
            f"set `{node.name}.teacher` to a model of the student's tokenizer"
        )


def _kept_ids(planner: _Planner, node: Node) -> dict[str, int | None]:
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


def _trains_adapter(planner: _Planner, node: Node) -> bool:
    """Whether a train step trains an adapter: its own, or that of its student."""
    settings: Any = node.settings
    return settings.lora is not None or _is_adapter(planner, node, settings.student)


def _is_adapter(planner: _Planner, node: Node, model: ModelRef) -> bool:
    """Whether the model behind a step's reference is an adapter, or will be one."""
    if model.is_path or model.target in planner.graph.models:
        return bool(planner.of_model(node, model, lambda found: find_source(found.path).kind == "adapter"))
    maker = planner.graph.steps_named(model, node)[0]
    return maker.kind == "train" and _trains_adapter(planner, maker)


def _plan_merge(planner: _Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    if not _is_adapter(planner, node, settings.model):
        planner.problem(f"step {node.name}: {settings.model} is no adapter: there is nothing to merge")
    if settings.data is not None:
        planned.rows = planner.rows_of(node, settings.data)
        planned.rows = None if planned.rows is None else min(planned.rows, settings.limit)
    if parameters := planner.parameters(node, settings.model):
        # Full weights to merge, and what was saved to compare them with.
        planned.memory_gb = 2 * parameters * _STORED_BYTES / _GB
        planned.disk_gb = parameters * _STORED_BYTES / _GB


def _plan_retrieve(planner: _Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    planned.rows = planner.rows_of(node, settings.data)
    planner.rows_of(node, settings.corpus)  # for what is wrong with it
    try:
        meaning(settings)  # likewise of the encoders
        if settings.method != "bm25":
            check_qdrant()
    except PotstillError as error:
        planner.problem(f"step {node.name}: {error}")
    upstream = _upstream_tokens(planner, node)
    if upstream is not None and planned.rows is not None:
        planned.tokens = upstream + planned.rows * settings.document_tokens


def _plan_evaluate(planner: _Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    names = list(settings.roles.values())
    needed = [weights for one in names if (weights := planner.frozen_bytes(node, one, settings.device))]
    if needed:
        # Models take turns; their teacher stays.
        teacher = settings.teacher and planner.frozen_bytes(node, settings.teacher, settings.device)
        planned.memory_gb = (max(needed) + (teacher or 0.0)) / _GB
    compared = None if settings.teacher is None else planner.graph.models.get(settings.teacher.target)
    if compared is not None and not isinstance(compared, TransformersModel):
        planner.problem(
            f"step {node.name}: the teacher {settings.teacher} is of another engine, and KL needs whole "
            "distributions; name the same weights by a path, or leave teacher out"
        )
    answers, tokens = [], 0
    for task in settings.all_tasks.values():
        decoding, limit = settings.decoding(task), task.limit or settings.limit
        rows = planner.rows_of(node, task.data)
        answers.append(None if rows is None else min(rows, limit or rows) * decoding.samples)
        tokens += (answers[-1] or 0) * decoding.max_new_tokens * task.generates
    if answers and None not in answers:
        planned.rows = sum(one or 0 for one in answers) * len(names)
        served = [planner.graph.models.get(one.target) for one in names]
        prices = [price for one in served if (price := getattr(one, "price", None))]
        if prices:
            planned.cost_usd = sum(price.cost(0, tokens) for price in prices)
            planner.notes.append(f"step {node.name}: its cost is without that of the prompts")


def _upstream_tokens(planner: _Planner, node: Node) -> int | None:
    """At most so many tokens of traces or logits a step reads, less what selections before it drop."""
    tokens: list[int | None] = []
    settings: Any = node.settings
    for maker in planner.makers(node, settings.data):
        if maker.kind != "select":
            tokens.append(planner.steps[maker.name].tokens)
        else:
            read = _upstream_tokens(planner, maker)
            made = planner.made.get(maker.name)
            share = (
                _kept_share(planner, maker)
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


_ESTIMATES: dict[str, Callable[[_Planner, Node, PlannedStep], None]] = {
    "generate": _plan_generate,
    "select": _plan_select,
    "cache": _plan_cache,
    "init": _plan_init,
    "train": _plan_train,
    "merge": _plan_merge,
    "retrieve": _plan_retrieve,
    "evaluate": _plan_evaluate,
}


def _machine_problems(steps: list[PlannedStep], store: Store) -> Iterator[str]:
    memory_gb = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GB if hasattr(os, "sysconf") else None
    )
    for step in steps:
        if step.memory_gb and memory_gb and step.memory_gb > memory_gb:
            needed = f"step {step.name} needs about {step.memory_gb:.0f} GB of memory"
            yield f"{needed}; this machine has {memory_gb:.0f} GB"
    folder = next(one for one in (store.root, *store.root.parents) if one.exists())
    if not os.access(folder, os.W_OK):
        yield f"the store {store.root} cannot be written; name another with --store"
    free_gb = shutil.disk_usage(folder).free / _GB
    needed_gb = sum(step.disk_gb or 0.0 for step in steps)
    if needed_gb > free_gb:
        yield f"the steps need about {needed_gb:.1f} GB of disk; {folder} has {free_gb:.1f} GB free"


def make_plan(recipe: Runnable, store: Store) -> Plan:
    """Plan a recipe: what each step will do, reuse and need. Reads inputs, makes nothing, spends nothing."""
    planner = _Planner(recipe.graph, recipe.seed, store)
    planner.check_models()
    for name in recipe.graph.order:
        planner.step(name)
    steps = list(planner.steps.values())
    for problem in _machine_problems(steps, store):
        planner.problem(problem)
    return Plan(recipe.name, steps, planner.problems, planner.notes)
