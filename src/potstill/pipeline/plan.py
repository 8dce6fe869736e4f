"""What a recipe will do, before anything is spent, and everything that is missing or impossible."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from potstill.core.errors import PotstillError
from potstill.core.events import format_seconds
from potstill.core.hashing import hash_json
from potstill.core.settings import DataRef, ModelRef, meaning, references
from potstill.core.store import Artifact, Store
from potstill.generate import GenerateSettings
from potstill.models import TransformersModel, parameter_count
from potstill.pipeline.fingerprint import Inputs, MissingInput
from potstill.pipeline.graph import Graph, Node
from potstill.pipeline.run import Runnable
from potstill.teachers import check_teacher
from potstill.teachers.solver import SolverModel

__all__ = ["Plan", "PlannedStep", "make_plan"]

_GB = 1e9
# Bytes a parameter: fp32 weight, gradient and AdamW's two moments; a frozen bf16 weight; a weight on disk.
_TRAINED_BYTES, _FROZEN_BYTES, _STORED_BYTES = 16, 2, 4
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
    memory_gb: float | None = None
    disk_gb: float | None = None
    seconds: float | None = None


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
        head = ["step", "kind", "status", "rows", "tokens", "memory", "disk", "time"]
        rows = [
            [
                step.name,
                step.kind,
                step.status,
                _shown(step.rows, "{:,}"),
                _shown(step.tokens, "{:,}"),
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
            node.settings.model_dump(mode="json", exclude_none=True),
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

    def work(self, node: Node) -> str:
        """What a step's speed depends on: its kind and, where a teacher writes, which one."""
        if not isinstance(node.settings, GenerateSettings):
            return node.kind
        return _work(node.kind, meaning(self.graph.models.get(node.settings.model.target)))

    def rows_of(self, node: Node, data: Any) -> int | None:
        """How many rows a step's data has, as far as that is known without making anything."""
        if isinstance(data, DataRef) and not data.is_path:
            rows = [self.steps[step.name].rows for step in self.graph.steps_named(data, node)]
            return None if any(one is None for one in rows) else sum(one or 0 for one in rows)
        from potstill.data.sources import count_rows

        try:
            return count_rows(data, self.seed)
        except PotstillError as error:
            self.problem(f"step {node.name}: {error}")
            return None

    def parameters(self, node: Node, reference: ModelRef) -> int | None:
        """Parameters of the model behind a reference; where it is not made yet, of the one it comes from."""
        inputs = Inputs(self.graph, node, self.made)
        try:
            settings = inputs.model(reference)
            return parameter_count(settings) if isinstance(settings, TransformersModel) else None
        except MissingInput as missing:
            maker = self.graph.nodes[missing.step]
            sources = [ref for _, ref in references(maker.settings) if isinstance(ref, ModelRef)]
            return self.parameters(maker, sources[0]) if sources else None
        except PotstillError as error:
            self.problem(f"step {node.name}: {error}")
            return None


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
    prompts = planner.rows_of(node, settings.data)
    if prompts is not None:
        planned.rows = (min(prompts, settings.limit) if settings.limit else prompts) * settings.samples
        if not isinstance(
            planner.graph.models.get(settings.model.target), SolverModel
        ):  # a function writes as much as it likes, and at once
            planned.tokens = planned.rows * settings.max_new_tokens
            planned.disk_gb = planned.tokens * 16 / _GB


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
        planned.memory_gb = planned.disk_gb = parameters * _STORED_BYTES / _GB


def _plan_train(planner: _Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    planned.rows = planner.rows_of(node, settings.data)
    epochs = settings.epochs
    if settings.max_steps and planned.rows:
        epochs = settings.max_steps * settings.batch / planned.rows
    if tokens := _upstream_tokens(planner, node):
        planned.tokens = int(tokens * epochs)
    if parameters := planner.parameters(node, settings.student):
        adapter = _trains_adapter(planner, node)
        planned.memory_gb = parameters * (_FROZEN_BYTES if adapter else _TRAINED_BYTES) / _GB
        # A checkpoint holds the weights and both moments while the next one is written.
        planned.disk_gb = parameters * (0.1 if adapter else 2 * 12 + _STORED_BYTES) / _GB
        if settings.teacher is not None and (teacher := planner.parameters(node, settings.teacher)):
            planned.memory_gb += teacher * _FROZEN_BYTES / _GB


def _trains_adapter(planner: _Planner, node: Node) -> bool:
    """Whether a train step trains an adapter: its own, or that of the train step before it."""
    settings: Any = node.settings
    if settings.lora is not None:
        return True
    student = settings.student
    if student.is_path or student.target in planner.graph.models:
        return False
    maker = planner.graph.steps_named(student, node)[0]
    return maker.kind == "train" and _trains_adapter(planner, maker)


def _plan_evaluate(planner: _Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    names = list(settings.roles.values())
    known = [found for one in names if (found := planner.parameters(node, one))]
    if known:
        planned.memory_gb = 2 * max(known) * _STORED_BYTES / _GB
    counts = [planner.rows_of(node, data) for data in settings.tasks.values()]
    if counts and None not in counts:
        planned.rows = sum(one or 0 for one in counts) * len(names)


def _upstream_tokens(planner: _Planner, node: Node) -> int | None:
    makers = [
        name
        for name in planner.graph.needs[node.name]
        if planner.graph.nodes[name].kind in ("generate", "cache")
    ]
    tokens = [planner.steps[name].tokens for name in makers]
    return None if not tokens or None in tokens else sum(one or 0 for one in tokens)


_ESTIMATES: dict[str, Callable[[_Planner, Node, PlannedStep], None]] = {
    "generate": _plan_generate,
    "cache": _plan_cache,
    "init": _plan_init,
    "train": _plan_train,
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
