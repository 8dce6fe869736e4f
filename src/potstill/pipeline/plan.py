"""What a recipe will do, before anything is spent, and everything that is missing or impossible."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from potstill.core.errors import PotstillError
from potstill.core.events import format_seconds
from potstill.core.settings import ModelRef, references
from potstill.core.store import Store
from potstill.pipeline.estimates import ESTIMATES, guessed_seconds
from potstill.pipeline.fingerprint import Inputs, MissingInput
from potstill.pipeline.planner import GB, PlannedStep, Planner
from potstill.pipeline.run import Runnable
from potstill.pipeline.runner import check_scale
from potstill.scale import Torchrun
from potstill.teachers import check_teacher

__all__ = ["Plan", "PlannedStep", "make_plan"]


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
                _shown(step.memory_gb, "{:.1f} GB" if step.device == "cpu" else f"{{:.1f}} GB {step.device}"),
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


def _memory_limit(device: str) -> tuple[float, str] | None:
    """The most that a step can have of a device's memory in GB, and what to say of it; None where unknown."""
    if device.startswith("cuda"):
        import torch

        free, total = (one / GB for one in torch.cuda.mem_get_info(device))
        return free, f"{device} has {free:.1f} of its {total:.1f} GB free"
    if device != "cpu" or not hasattr(os, "sysconf"):
        return None
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    return memory_gb, f"this machine has {memory_gb:.0f} GB"


def _check_models(planner: Planner) -> None:
    used = {
        ref.target
        for node in planner.graph.nodes.values()
        for _, ref in references(node.settings)
        if isinstance(ref, ModelRef) and not ref.is_path
    }
    for name in sorted(used & set(planner.graph.models)):
        problem, note = check_teacher(planner.graph.models[name])
        if problem:
            planner.problem(f"model {name}: {problem}")
        if note:
            planner.notes.append(f"model {name}: {note}")


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
    inputs = Inputs(planner.graph, node, planner.made)
    try:
        found = planner.store.find(node.kind, inputs.fingerprint(planner.seed))
    except MissingInput:
        found = None
    except PotstillError as error:
        planner.problem(f"step {name}: {error}")
        found = None
    if found is not None:
        planner.made[name] = found
        planned.status = "made"
        counts = found.manifest.counts
        planned.rows = counts.get("records", counts.get("rows"))
        planned.tokens = found.manifest.tokens
        planned.seconds = 0.0
        return
    ESTIMATES[node.kind](planner, node, planned)
    if planned.memory_gb:
        planned.device = str(planner.device(node))
    if planned.tokens and (speed := planner.speeds.get(planner.work(node))):
        planned.seconds = planned.tokens / speed
    elif planned.tokens:
        planned.seconds = guessed_seconds(planner, node, planned)


def _machine_problems(steps: list[PlannedStep], store: Store) -> Iterator[str]:
    for step in steps:
        if step.memory_gb and (limit := _memory_limit(step.device)) and step.memory_gb > limit[0]:
            yield f"step {step.name} needs about {step.memory_gb:.0f} GB of memory; {limit[1]}"
    folder = next(one for one in (store.root, *store.root.parents) if one.exists())
    if not os.access(folder, os.W_OK):
        yield f"the store {store.root} cannot be written; name another with --store"
    free_gb = shutil.disk_usage(folder).free / GB
    needed_gb = sum(step.disk_gb or 0.0 for step in steps)
    if needed_gb > free_gb:
        yield f"the steps need about {needed_gb:.1f} GB of disk; {folder} has {free_gb:.1f} GB free"


def _plan_scale(planner: Planner, scale: Torchrun) -> None:
    """What train steps need in several processes, each with the whole student, and whether they can start."""
    for name, planned in planner.steps.items():
        if planned.kind != "train" or planned.status == "made":
            continue
        try:
            check_scale(scale, planner.graph, name, elsewhere=scale.nnodes > 1)
        except PotstillError as error:
            planner.problem(f"step {name}: {error}")
        if planned.memory_gb is not None and planned.device == "cpu":  # else each has a GPU of its own
            planned.memory_gb *= scale.nproc_per_node
        processes = scale.nnodes * scale.nproc_per_node
        planner.notes.append(
            f"step {name}: in {processes:,} processes; memory is a machine's or each GPU's, time that of one"
        )


def make_plan(recipe: Runnable, store: Store) -> Plan:
    """Plan a recipe: what each step will do, reuse and need. Reads inputs, makes nothing, spends nothing."""
    planner = Planner(recipe.graph, recipe.seed, store)
    _check_models(planner)
    for name in recipe.graph.order:
        _plan_step(planner, name)
    if recipe.scale is not None:
        _plan_scale(planner, recipe.scale)
    steps = list(planner.steps.values())
    for problem in _machine_problems(steps, store):
        planner.problem(problem)
    return Plan(recipe.name, steps, planner.problems, planner.notes)
