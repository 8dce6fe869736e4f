"""Runs a graph step by step: reuses what is sealed, resumes what is half made, seals what it makes."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from potstill.core.errors import Interrupted, PotstillError, RecipeError
from potstill.core.events import Reporter, format_seconds
from potstill.core.memory import PeakMemory
from potstill.core.settings import ModelRef, meaning, references
from potstill.core.step import StepContext
from potstill.core.store import Artifact, Store
from potstill.pipeline.fingerprint import Inputs, MissingInput
from potstill.pipeline.graph import Graph, Node, nearest
from potstill.pipeline.kinds import step_function
from potstill.scale import Outcome, Torchrun, check_processes, finished, train
from potstill.train import TrainSettings

__all__ = ["RunOptions", "StepFailed", "check_scale", "run_graph"]


@dataclass(frozen=True)
class RunOptions:
    """Which steps to make again (`force`), and the only ones to make, if any are named (`only`).

    With `hand_over` a run ends at its first train step, which is prepared to be started by hand.
    """

    force: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()
    stop: threading.Event = field(default_factory=threading.Event)
    hand_over: bool = False


class StepFailed(PotstillError):
    """A step failed; what earlier steps made is kept."""


def _check_names(graph: Graph, options: RunOptions) -> None:
    for name in sorted(options.force | options.only):
        if name not in graph.nodes:
            raise RecipeError(
                f"there is no step {name!r}", where="command line", mend=nearest(name, graph.nodes)
            )


def _check_inputs(graph: Graph, names: list[str]) -> None:
    """Read all that comes from outside, so that a late step's mistake shows before anything is paid for."""
    for name in names:
        node = graph.nodes[name]
        meaning(node.settings)
        for _, reference in references(node.settings):
            if isinstance(reference, ModelRef) and reference.target in graph.models:
                meaning(graph.models[reference.target])


def _check_one_process(graph: Graph) -> None:
    """Refuse to be one of several processes that run a recipe, before they wait for one another."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and any(node.kind == TrainSettings.kind for node in graph.nodes.values()):
        raise RecipeError(
            f"{processes} processes run this recipe, and a step has one maker: the others would wait for it",
            mend="start potstill itself, without torchrun or accelerate launch: with scale.engine=torchrun "
            f"scale.nproc_per_node={processes} it starts them for train steps",
        )


def check_scale(scale: Torchrun, graph: Graph, name: str, *, elsewhere: bool) -> None:
    """Raise RecipeError where a step is one to train, and cannot be trained by so many processes here."""
    settings = graph.nodes[name].settings
    if isinstance(settings, TrainSettings):
        student = graph.models.get(settings.student.target)
        check_processes(scale, settings.device or getattr(student, "device", None), elsewhere=elsewhere)


def run_graph(
    graph: Graph,
    seed: int,
    store: Store,
    reporter: Reporter,
    options: RunOptions,
    on_made: Callable[[str, Artifact], None] = lambda step, artifact: None,
    scale: Torchrun | None = None,
) -> dict[str, Artifact]:
    """Make every step of a graph in order and return the artifacts by step name.

    With `scale` train steps have processes of their own. Raises Interrupted when `options.stop` is set
    between or inside steps, HandedOver (one of these) where a train step is left to be started by hand,
    StepFailed when a step fails.
    """
    _check_one_process(graph)
    _check_names(graph, options)
    wanted = graph.order
    if options.only:
        reached = options.only.union(*map(graph.ancestors, options.only))
        wanted = [name for name in graph.order if name in reached]
    _check_inputs(graph, wanted)
    if scale is not None:
        for name in wanted:
            check_scale(scale, graph, name, elsewhere=options.hand_over)
    made: dict[str, Artifact] = {}
    for position, name in enumerate(wanted, start=1):
        if options.stop.is_set():
            raise Interrupted
        node = graph.nodes[name]
        inputs = Inputs(graph, node, made)
        fingerprint = inputs.fingerprint(seed)
        label = f"[{position}/{len(wanted)}] {name}"
        found = None if name in options.force else store.find(node.kind, fingerprint)
        if found is None and options.only and name not in options.only:
            needing = next(one for one in wanted if one in options.only and name in graph.ancestors(one))
            raise RecipeError(
                f"{needing!r} needs {name!r}, which has not been made",
                where="--only",
                mend=f"add --only {name}, or run without --only once",
            )
        if found is None:
            with store.lock(fingerprint, on_wait=_waiter(reporter, label)):
                found = None if name in options.force else store.find(node.kind, fingerprint)
                if found is None:
                    made[name] = _make(
                        node, inputs, fingerprint, seed, store, reporter, options, label, scale
                    )
        if found is not None:
            made[name] = found
            _say_reused(found, name, label, reporter)
        on_made(name, made[name])
    return made


def _say_reused(found: Artifact, name: str, label: str, reporter: Reporter) -> None:
    manifest = found.manifest
    reporter.say(f"{label}: {manifest.kind} already made ({_counts(found)})")
    if failed := manifest.counts.get("failed"):
        reporter.say(f"  {failed:,} failed: --force {name} tries those again and makes anew what uses them")
    reporter.event(
        "step_reused", step=name, kind=manifest.kind, folder=str(found.folder), seconds=manifest.seconds
    )


def _waiter(reporter: Reporter, label: str) -> Callable[[int | None], None]:
    def say(pid: int | None) -> None:
        owner = f"process {pid}" if pid is not None else "another process"
        reporter.say(f"{label}: {owner} is making this now; waiting for it")
        reporter.event("step_waiting", pid=pid)

    return say


def _counts(artifact: Artifact) -> str:
    counts = ", ".join(
        f"{value:,} {name.replace('_', ' ')}" for name, value in artifact.manifest.counts.items()
    )
    return counts or artifact.manifest.fingerprint[:12]


def _carry_out(
    node: Node, context: StepContext, fingerprint: str, options: RunOptions, scale: Torchrun | None
) -> Outcome:
    if isinstance(node.settings, TrainSettings):
        if (outcome := finished(context.folder)) is not None:
            return outcome
        if scale is not None:
            elsewhere = fingerprint if options.hand_over else None
            return train(scale, node.settings, context, elsewhere=elsewhere)
    memory, started = PeakMemory(), time.monotonic()
    result = step_function(node.kind)(node.settings, context)
    return Outcome(result=result, seconds=time.monotonic() - started, peaks=memory.read())


def _make(
    node: Node,
    inputs: Inputs,
    fingerprint: str,
    seed: int,
    store: Store,
    reporter: Reporter,
    options: RunOptions,
    label: str,
    scale: Torchrun | None,
) -> Artifact:
    folder = store.prepare(node.kind, fingerprint, discard=node.name in options.force)
    reporter.say(f"{label}: {node.kind}")
    reporter.event(
        "step_started", step=node.name, kind=node.kind, fingerprint=fingerprint, folder=str(folder)
    )
    context = StepContext(
        name=node.name,
        kind=node.kind,
        folder=folder,
        seed=seed,
        cache_folder=store.root,
        reporter=reporter,
        resolve_models=inputs.models,
        resolve_data=inputs.artifacts,
        stop=options.stop,
    )
    started = time.monotonic()
    try:
        outcome = _carry_out(node, context, fingerprint, options, scale)
    except Interrupted:
        reporter.event("step_interrupted", step=node.name, kind=node.kind)
        raise
    except PotstillError as error:
        reporter.event("step_failed", step=node.name, kind=node.kind, error=str(error))
        raise StepFailed(str(error), where=f"step {node.name}") from error
    except MissingInput:
        raise
    except Exception as error:  # noted in the run's events, then raised again
        reporter.event(
            "step_failed", step=node.name, kind=node.kind, error=f"{type(error).__name__}: {error}"
        )
        raise
    seconds = max(outcome.seconds, time.monotonic() - started)
    artifact = store.seal(
        folder,
        kind=node.kind,
        fingerprint=fingerprint,
        settings=meaning(node.settings),
        inputs=inputs.described(),
        seed=seed,
        seconds=round(seconds, 3),
        **outcome.peaks,
        **vars(outcome.result),
    )
    reporter.say(f"{label}: done in {format_seconds(seconds)} ({_counts(artifact)})")
    reporter.event(
        "step_finished",
        step=node.name,
        kind=node.kind,
        seconds=round(seconds, 3),
        folder=str(folder),
        counts=artifact.manifest.counts,
    )
    return artifact
