"""What a recipe will do, before anything is spent, and everything that is missing or impossible."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from potstill.core.errors import PotstillError
from potstill.core.events import format_seconds
from potstill.core.settings import ModelRef, references
from potstill.core.shared import open_shared
from potstill.core.store import Artifact, Store
from potstill.pipeline.cluster import ClusterStep, on_cluster
from potstill.pipeline.estimates import ESTIMATES
from potstill.pipeline.fingerprint import Inputs, MissingInput
from potstill.pipeline.graph import Node
from potstill.pipeline.planner import GB, PlannedStep, Planner, memory_limit
from potstill.pipeline.run import Runnable
from potstill.pipeline.runner import check_scale
from potstill.pipeline.times import planned_seconds
from potstill.report.text import aligned
from potstill.scale import Cluster, Ray, ReplicatedSettings, Torchrun
from potstill.teachers import check_teacher

__all__ = ["Plan", "PlannedStep", "make_plan"]


@dataclass
class Plan:
    """Every step in order, and what stands in the way."""

    name: str
    steps: list[PlannedStep]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cluster: str | None = None
    on_cluster: list[ClusterStep] = field(default_factory=list)

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
                _shown(step.memory_gb, "{:.1f} GB" if step.device == "cpu" else f"{{:.1f}} GB {step.device}"),
                _shown(step.disk_gb, "{:.2f} GB"),
                format_seconds(step.seconds) if step.seconds is not None else "-",
            ]
            for step in self.steps
        ]
        lines = [f"plan of {self.name}", "", aligned([head, *rows], header=False), ""]
        if self.cluster is not None:
            lines += [*self._cluster_lines(), ""]
        for step in self.steps:
            settings = ", ".join(
                f"{key}={value}" for key, value in step.settings.items() if value not in (None, {}, [])
            )
            lines.append(f"  {step.name}: {settings}")
        lines += ["", *(f"note: {note}" for note in self.notes)]
        lines += [f"problem: {problem}" for problem in self.problems]
        lines.append("cannot run" if self.problems else "can run; nothing was spent")
        return "\n".join(lines)

    def _cluster_lines(self) -> Iterator[str]:
        yield f"on {self.cluster}, steps that models carry out:"
        head = ["step", "GPUs", "FLOPs", "tokens/s", "time", "sent a step", "cost", "how"]
        rows = [
            [
                step.name,
                f"{step.gpus:,}",
                f"{step.flops:.2g}",
                f"{step.tokens_per_s:,.0f}",
                format_seconds(step.seconds),
                _shown(step.network_gb or None, "{:.2f} GB"),
                _shown(step.cost_usd, "${:,.2f}"),
                step.how,
            ]
            for step in self.on_cluster
        ]
        yield aligned([head, *rows], header=False)
        seconds = sum(step.seconds for step in self.on_cluster)
        disk = sum(step.disk_gb or 0.0 for step in self.steps)
        costs = [step.cost_usd for step in self.on_cluster if step.cost_usd is not None]
        cost = f", ${sum(costs):,.2f} of GPUs" if costs else ""
        yield f"one after the other {format_seconds(seconds)}{cost}; {disk:,.2f} GB of disk"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _check_models(planner: Planner) -> None:
    used = {
        ref.target
        for node in planner.graph.nodes.values()
        for _, ref in references(node.settings)
        if isinstance(ref, ModelRef) and not ref.is_path
    }
    for name in sorted(used & set(planner.graph.models)):
        problem, note = check_teacher(planner.graph.models[name])
        if problem and not planner.elsewhere:  # what is missing there, this machine cannot know
            planner.problem(f"model {name}: {problem}")
        if note:
            planner.note(f"model {name}: {note}")


def _find(planner: Planner, node: Node) -> Artifact | None:
    """What a step has made, here or, for all that reads files, in name alone, where it is shared."""
    name = node.name
    try:
        fingerprint = Inputs(planner.graph, node, {**planner.made, **planner.shared}).fingerprint(
            planner.seed
        )
    except MissingInput:
        return None
    except PotstillError as error:
        if unread := planner.shared.keys() & planner.graph.needs[name]:
            needed = ", ".join(sorted(unread))
            planner.note(f"step {name}: whether it is made is known once {needed} is fetched")
        else:
            planner.failed(f"step {name}", error)
        return None
    if (found := planner.store.find(node.kind, fingerprint)) is not None:
        planner.made[name] = found
    elif planner.place is not None:
        try:
            manifest = planner.place.find(node.kind, fingerprint)
        except PotstillError as error:
            planner.problem(str(error))
            planner.place = None  # each further step would wait as long for the same
            return None
        if manifest is not None:
            found = planner.shared[name] = Artifact(planner.store.folder(node.kind, fingerprint), manifest)
    return found


def _plan_step(planner: Planner, name: str) -> None:
    node = planner.graph.nodes[name]
    planned = PlannedStep(
        name,
        node.kind,
        "to make",
        planner.graph.needs[name],
        node.settings.model_dump(mode="json", exclude_none=True, by_alias=True),
    )
    planner.steps[name] = planned
    if (found := _find(planner, node)) is not None:
        counts = found.manifest.counts
        planned.rows = counts.get("records", counts.get("rows"))
        planned.tokens = found.manifest.tokens
        if name in planner.made:
            planned.status, planned.seconds = "made", 0.0
        else:
            planned.status, planned.parameters = "shared", counts.get("parameters")
            planned.disk_gb = sum(one.size_bytes for one in found.manifest.files.values()) / GB
        return
    ESTIMATES[node.kind](planner, node, planned)
    if planned.memory_gb:
        planned.device = str(planner.device(node))
    planned.seconds = planned_seconds(planner, node, planned)


def _machine_problems(steps: list[PlannedStep], store: Store) -> Iterator[str]:
    for step in steps:
        if step.memory_gb and (limit := memory_limit(step.device)) and step.memory_gb > limit[0]:
            yield f"step {step.name} needs about {step.memory_gb:.0f} GB of memory; {limit[1]}"
    folder = next(one for one in (store.root, *store.root.parents) if one.exists())
    if not os.access(folder, os.W_OK):
        yield f"the store {store.root} cannot be written; name another with --store"
    free_gb = shutil.disk_usage(folder).free / GB
    needed_gb = sum(step.disk_gb or 0.0 for step in steps)
    if needed_gb > free_gb:
        yield f"the steps need about {needed_gb:.1f} GB of disk; {folder} has {free_gb:.1f} GB free"


def _plan_scale(planner: Planner, scale: Torchrun) -> None:
    """What train steps need in several processes, and whether they can start."""
    processes = scale.nnodes * scale.nproc_per_node
    for name, planned in planner.steps.items():
        if planned.kind != "train" or planned.status != "to make":
            continue
        try:
            check_scale(scale, planner.graph, name, elsewhere=scale.nnodes > 1 or planner.elsewhere)
        except PotstillError as error:
            planner.problem(f"step {name}: {error}")
        if planned.memory_gb is not None and planned.weights_gb is not None:
            if scale.strategy == "fsdp2":
                planned.memory_gb -= planned.weights_gb * (1 - 1 / processes)
            if planned.device == "cpu":  # else each has a GPU of its own
                planned.memory_gb *= scale.nproc_per_node
        planner.note(
            f"step {name}: in {processes:,} processes; memory is a machine's or each GPU's, time that of one"
        )
    at_once = sorted(
        (one for one in planner.steps.values() if one.kind == "train" and one.status == "to make"),
        key=lambda one: -(one.memory_gb or 0.0) * (one.device == "cpu"),
    )[: scale.parallel_steps]
    needed_gb = sum(one.memory_gb or 0.0 for one in at_once if one.device == "cpu")
    if not planner.elsewhere and len(at_once) > 1 and (limit := memory_limit("cpu")) and needed_gb > limit[0]:
        names = ", ".join(one.name for one in at_once)
        planner.problem(f"{names} need about {needed_gb:.0f} GB of memory at once; {limit[1]}")


def _plan_replicas(planner: Planner, scale: Ray) -> None:
    """What steps need whose models have copies, and whether there can be any."""
    asking = [
        one
        for one in planner.steps.values()
        if isinstance(planner.graph.nodes[one.name].settings, ReplicatedSettings) and one.status == "to make"
    ]
    for one in asking:
        try:
            check_scale(scale, planner.graph, one.name, elsewhere=False)
        except PotstillError as error:
            planner.problem(str(error))
            break
        if one.memory_gb is not None and one.device == "cpu" and scale.address == "local":
            one.memory_gb *= scale.replicas
    if asking:
        planner.note(
            f"steps {', '.join(one.name for one in asking)}: models in {scale.replicas:,} copies on Ray "
            f"({scale.address}); time that of one"
        )


def make_plan(recipe: Runnable, store: Store, cluster: Cluster | None = None) -> Plan:
    """Plan a recipe: what each step will do, reuse, fetch and need. Reads inputs, makes and spends nothing.

    With a cluster it says besides what the steps would take there, and not whether this machine has room.
    """
    planner = Planner(recipe.graph, recipe.seed, store, elsewhere=cluster is not None)
    _check_models(planner)
    if recipe.shared is not None:
        try:
            planner.place = open_shared(recipe.shared)
        except PotstillError as error:
            planner.problem(str(error))
    for name in recipe.graph.order:
        _plan_step(planner, name)
    if isinstance(recipe.scale, Ray):
        if cluster is None:
            _plan_replicas(planner, recipe.scale)
    elif recipe.scale is not None:
        _plan_scale(planner, recipe.scale)
    steps = list(planner.steps.values())
    if cluster is not None:
        there = on_cluster(planner, cluster)
        return Plan(recipe.name, steps, planner.problems, planner.notes, str(cluster), there)
    for problem in _machine_problems(steps, store):
        planner.problem(problem)
    return Plan(recipe.name, steps, planner.problems, planner.notes)
