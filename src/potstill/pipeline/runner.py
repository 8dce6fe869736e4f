"""Runs a graph step by step: reuses what is sealed, resumes what is half made, seals what it makes."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from potstill.core.errors import Interrupted, PotstillError, RecipeError
from potstill.core.events import Reporter, format_seconds
from potstill.core.memory import PeakMemory, is_out_of_memory, ran_out_of_memory
from potstill.core.settings import ModelRef, meaning, references
from potstill.core.shared import SharedArtifacts
from potstill.core.step import StepContext
from potstill.core.stopwatch import Stopwatch
from potstill.core.store import Artifact, Manifest, Store
from potstill.models import TransformersModel, stored_quantization
from potstill.pipeline.fingerprint import Inputs, MissingInput
from potstill.pipeline.graph import Graph, Node, nearest
from potstill.pipeline.kinds import step_function
from potstill.scale import (
    Outcome,
    Ray,
    ReplicatedSettings,
    Scale,
    Torchrun,
    Training,
    ask_replicas,
    check_processes,
    check_ray,
    finished,
    hand_over,
    has_replicas,
)
from potstill.train import TrainSettings

__all__ = ["RunOptions", "StepFailed", "check_scale", "run_graph"]

_MB = 1e6


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


def check_scale(scale: Scale, graph: Graph, name: str, *, elsewhere: bool) -> None:
    """Raise RecipeError where a step that `scale` is about cannot have its processes here."""
    settings = graph.nodes[name].settings
    if isinstance(scale, Ray):
        if isinstance(settings, ReplicatedSettings):
            named = [
                graph.models.get(one.target) for _, one in references(settings) if isinstance(one, ModelRef)
            ]
            asked = getattr(settings, "device", None)
            devices = [asked or getattr(model, "device", None) for model in named]
            # A path and what a step makes are for transformers.
            check_ray(scale, devices, [getattr(model, "engine", "transformers") for model in named])
        return
    if isinstance(settings, TrainSettings):
        student = graph.models.get(settings.student.target)
        check_processes(
            scale,
            settings.device or getattr(student, "device", None),
            elsewhere=elsewhere,
            quantized=_quantization(graph, settings.student) if scale.strategy == "fsdp2" else None,
        )


def _quantization(graph: Graph, student: ModelRef) -> str | None:
    """In what a student's frozen weights will be, as far as the recipe and its files tell; or None."""
    while (maker := graph.nodes.get(student.target)) is not None:
        if not isinstance(maker.settings, TrainSettings):
            return getattr(maker.settings, "quantize", None)
        student = maker.settings.student
    model = TransformersModel(path=str(student)) if student.is_path else graph.models.get(student.target)
    if not isinstance(model, TransformersModel):
        return None
    return model.quantize or stored_quantization(model)


def run_graph(
    graph: Graph,
    seed: int,
    store: Store,
    reporter: Reporter,
    options: RunOptions,
    on_made: Callable[[str, Artifact], None] = lambda step, artifact: None,
    scale: Scale | None = None,
    shared: SharedArtifacts | None = None,
) -> dict[str, Artifact]:
    """Make every step of a graph in order and return the artifacts by step name.

    With `scale` train steps, or the models that others ask, have processes of their own; as many trainings as
    it says run at once where none needs the other, every other step runs alone. What is `shared` is fetched
    and not made, and what was made is put there; what could not be put there is said. Raises Interrupted when
    `options.stop` is set between or inside steps, HandedOver (one of these) where a train step is left to be
    started by hand, StepFailed when a step fails; steps that run beside it are made to their end before.
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
    run = _Run(graph, seed, store, reporter, options, scale, shared, wanted)
    try:
        _run_to_the_end(run, on_made)
    finally:
        for one in run.under_way:
            one.close()
    return run.made


def _run_to_the_end(run: "_Run", on_made: Callable[[str, Artifact], None]) -> None:
    ended_by: Exception | None = None
    waiting = list(run.wanted)
    while run.under_way or (waiting and ended_by is None):
        if run.options.stop.is_set() and not run.under_way:
            raise Interrupted
        name = None
        try:
            may_begin = not run.options.stop.is_set() and ended_by is None
            name, made = _begin_or_listen(run, waiting if may_begin else [])
        except (Interrupted, PotstillError) as error:
            ended_by = ended_by or error
            if run.under_way and not run.options.stop.is_set():
                names = ", ".join(one.node.name for one in run.under_way)
                run.reporter.say(f"{error}\n  nothing else is begun; going on to their end: {names}")
            made = {}
        if name is not None:
            waiting.remove(name)
        for step, artifact in made.items():
            run.made[step] = artifact
            on_made(step, artifact)
            run.share(step, artifact)
    if ended_by is not None:
        raise ended_by


def _begin_or_listen(run: "_Run", waiting: Sequence[str]) -> tuple[str | None, dict[str, Artifact]]:
    """Begin a step that waits, or listen to those under way: which one was begun, and what is made by now."""
    if (name := run.next_of(waiting)) is not None and (made := run.begin(name)) is not None:
        return name, made
    return None, run.made_of_those_under_way()


@dataclass
class _Making:
    """A step that is being made: the right to make it, and its processes where it has its own."""

    node: Node
    inputs: Inputs
    fingerprint: str
    label: str
    context: StepContext
    place: int
    holding: ExitStack
    watch: Stopwatch
    training: Training | None = None

    def close(self) -> None:
        """End its processes, and let others make it."""
        if self.training is not None:
            self.training.close()
        self.holding.close()


@dataclass
class _Run:
    """A graph, what is made of it and what is under way."""

    graph: Graph
    seed: int
    store: Store
    reporter: Reporter
    options: RunOptions
    scale: Scale | None
    shared: SharedArtifacts | None
    wanted: list[str]
    made: dict[str, Artifact] = field(default_factory=dict)
    under_way: list[_Making] = field(default_factory=list)
    intact: set[Path] = field(default_factory=set)  # artifacts that were sealed or read through by this run
    fetched: set[Path] = field(default_factory=set)
    _fingerprints: dict[str, str] = field(default_factory=dict)
    _elsewhere: dict[str, Manifest | None] = field(default_factory=dict)

    def next_of(self, waiting: Sequence[str]) -> str | None:
        """The step to begin now, if any: what trains as others end, all else while nothing trains."""
        places = 1
        if isinstance(self.scale, Torchrun) and not self.options.hand_over:
            places = self.scale.parallel_steps
        if places == 1:
            return None if self.under_way else next(iter(waiting), None)
        ready = [name for name in waiting if all(need in self.made for need in self.graph.needs[name])]
        alone = [name for name in ready if not isinstance(self.graph.nodes[name].settings, TrainSettings)]
        if alone and not self.under_way:
            return alone[0]
        if len(self.under_way) == places:
            return None
        # Two names of one meaning are made once.
        taken = {one.fingerprint for one in self.under_way}
        trains = (name for name in ready if name not in alone)
        return next((name for name in trains if self._fingerprint(name) not in taken), None)

    def _fingerprint(self, name: str) -> str:
        if name not in self._fingerprints:
            inputs = Inputs(self.graph, self.graph.nodes[name], self.made)
            self._fingerprints[name] = inputs.fingerprint(self.seed)
        return self._fingerprints[name]

    def begin(self, name: str) -> dict[str, Artifact] | None:
        """Make a step, or begin to where it has its own processes; what is made by now, by its name.

        None where another run makes it, and steps of this one are under way. To wait for it then could be to
        wait for a run that waits for this one.
        """
        node, fingerprint = self.graph.nodes[name], self._fingerprint(name)
        label = f"[{self.wanted.index(name) + 1}/{len(self.wanted)}] {name}"
        is_forced, only = name in self.options.force, self.options.only
        found = None if is_forced else self.store.find(node.kind, fingerprint)
        elsewhere = None if is_forced or found is not None else self._shared(node, fingerprint)
        if found is None and elsewhere is None and only and name not in only:
            needing = next(one for one in self.wanted if one in only and name in self.graph.ancestors(one))
            raise RecipeError(
                f"{needing!r} needs {name!r}, which has not been made",
                where="--only",
                mend=f"add --only {name}, or run without --only once",
            )
        if found is None:
            with ExitStack() as holding:
                lock = self.store.lock(
                    fingerprint, on_wait=_waiter(self.reporter, label), wait=not self.under_way
                )
                if not holding.enter_context(lock):
                    return None
                found = None if is_forced else self.store.find(node.kind, fingerprint)
                if found is None and elsewhere is not None:
                    found = self._fetch(node, elsewhere, label)
                if found is None:
                    making = self._prepare(node, fingerprint, label)
                    holding.callback(making.watch.close)
                    with self._telling(node):
                        making.inputs.check_content(self.intact)
                        outcome = self._carry_out(making)
                    if outcome is not None:
                        return {name: self._seal(making, outcome)}
                    making.holding = holding.pop_all()
                    self.under_way.append(making)
                    return {}
        _say_reused(found, name, label, self.reporter)
        return {name: found}

    def _shared(self, node: Node, fingerprint: str) -> Manifest | None:
        """The manifest of a step that is shared; asked once a run."""
        if self.shared is None or fingerprint in self._elsewhere:
            return self._elsewhere.get(fingerprint)

        def say(damage: str) -> None:
            self.reporter.say(f"{node.name}: what is shared is not whole ({damage}); it is put there again")

        with self._telling(node):
            found = self._elsewhere[fingerprint] = self.shared.find(node.kind, fingerprint, say)
        return found

    def _fetch(self, node: Node, manifest: Manifest, label: str) -> Artifact:
        assert self.shared is not None
        self._tell_damage(node, manifest.fingerprint, label, "it is fetched")
        self.reporter.say(f"{label}: {node.kind} is shared in {self.shared.place}")
        started = time.monotonic()
        with self._telling(node), self._transfer("fetching", manifest) as advance:
            found = self.shared.fetch(manifest, self.store, advance)
        self.reporter.event(
            "step_fetched", step=node.name, kind=node.kind, seconds=round(time.monotonic() - started, 3)
        )
        self.fetched.add(found.folder)
        self.intact.add(found.folder)
        return found

    def share(self, name: str, artifact: Artifact) -> None:
        """Put up what a step made, or was made before, unless it is there; a failure is told, and no more."""
        if self.shared is None or artifact.folder in self.fetched:
            return
        manifest, told = artifact.manifest, {"step": name, "kind": artifact.kind}
        try:
            with self._transfer("sharing", manifest) as advance:
                there = self.shared.put(
                    artifact,
                    replace=name in self.options.force,
                    is_intact=artifact.folder in self.intact,
                    advance=advance,
                )
        except (Interrupted, PotstillError, OSError) as error:
            reason = "interrupted" if isinstance(error, Interrupted) else str(error)
            self.reporter.say(
                f"{name}: made, and not shared: {reason}\n  the same command puts up what is missing"
            )
            self.reporter.event("step_not_shared", **told, error=reason)
            return
        if there.content != manifest.content:
            self.reporter.say(
                f"{name}: another of it is shared already and stays; this run goes on with its own "
                f"(--force {name} puts one there instead)"
            )
        self.reporter.event("step_shared", **told, content=there.content)

    @contextmanager
    def _transfer(self, what: str, manifest: Manifest) -> Iterator[Callable[[int], None]]:
        size_mb = sum(entry.size_bytes for entry in manifest.files.values()) / _MB
        with self.reporter.progress(what, round(size_mb, 3), "MB") as progress:
            yield lambda size_bytes: progress.advance(size_bytes / _MB)

    def _tell_damage(self, node: Node, fingerprint: str, label: str, then: str) -> None:
        if (damage := self.store.damage(node.kind, fingerprint)) is not None:
            self.reporter.say(f"{label}: what was made is damaged ({damage}); {then}")
            self.reporter.event("step_damaged", step=node.name, kind=node.kind, damage=damage)

    def _prepare(self, node: Node, fingerprint: str, label: str) -> _Making:
        is_forced = node.name in self.options.force
        if not is_forced:
            self._tell_damage(node, fingerprint, label, "it is made again")
        folder = self.store.prepare(node.kind, fingerprint, discard=is_forced)
        self.reporter.say(f"{label}: {node.kind}")
        self.reporter.event(
            "step_started", step=node.name, kind=node.kind, fingerprint=fingerprint, folder=str(folder)
        )
        inputs = Inputs(self.graph, node, self.made)
        context = StepContext(
            name=node.name,
            kind=node.kind,
            folder=folder,
            seed=self.seed,
            cache_folder=self.store.root,
            reporter=self.reporter,
            resolve_models=inputs.models,
            resolve_data=inputs.artifacts,
            stop=self.options.stop,
        )
        taken = {one.place for one in self.under_way}
        place = next(number for number in itertools.count() if number not in taken)
        watch = Stopwatch(context.scratch)
        return _Making(node, inputs, fingerprint, label, context, place, ExitStack(), watch)

    def _carry_out(self, making: _Making) -> Outcome | None:
        """What the step gave back; None where it was begun in processes of its own."""
        settings, context = making.node.settings, making.context
        if (outcome := finished(context.folder)) is not None:
            return outcome
        if isinstance(self.scale, Ray):
            if has_replicas(settings, context):
                return ask_replicas(self.scale, settings, context)
        elif self.scale is not None and isinstance(settings, TrainSettings):
            if self.options.hand_over:
                hand_over(self.scale, settings, context, making.fingerprint)
            making.training = Training(self.scale, settings, context, place=making.place)
            return None
        memory, started = PeakMemory(), time.monotonic()
        result = step_function(making.node.kind)(settings, context)
        return Outcome(result=result, seconds=time.monotonic() - started, peaks=memory.read())

    def made_of_those_under_way(self) -> dict[str, Artifact]:
        """Listen to each step under way for a moment; what one of them has made."""
        for making in tuple(self.under_way):
            assert making.training is not None
            try:
                with self._telling(making.node):
                    outcome = making.training.outcome()
                if outcome is None:
                    continue
                made = {making.node.name: self._seal(making, outcome)}
            except BaseException:
                self._leave(making)
                raise
            self._leave(making)
            return made
        return {}

    def _leave(self, making: _Making) -> None:
        self.under_way.remove(making)
        making.close()

    @contextmanager
    def _telling(self, node: Node) -> Iterator[None]:
        """Note in the run's events what ends a step."""
        told = {"step": node.name, "kind": node.kind}
        try:
            yield
        except Interrupted:
            self.reporter.event("step_interrupted", **told)
            raise
        except PotstillError as error:
            self.reporter.event("step_failed", **told, error=str(error))
            raise StepFailed(str(error), where=f"step {node.name}") from error
        except MissingInput:
            raise
        except Exception as error:  # noted, then raised again
            self.reporter.event("step_failed", **told, error=f"{type(error).__name__}: {error}")
            if not is_out_of_memory(error):
                raise
            raise StepFailed(str(ran_out_of_memory(error)), where=f"step {node.name}") from error

    def _seal(self, making: _Making, outcome: Outcome) -> Artifact:
        node, folder = making.node, making.context.folder
        seconds = max(outcome.seconds, making.watch.seconds)
        making.watch.close()
        artifact = self.store.seal(
            folder,
            kind=node.kind,
            fingerprint=making.fingerprint,
            settings=meaning(node.settings),
            inputs=making.inputs.described(),
            parameters=making.inputs.parameters(),
            seed=self.seed,
            seconds=round(seconds, 3),
            **outcome.peaks,
            **vars(outcome.result),
        )
        self.reporter.say(f"{making.label}: done in {format_seconds(seconds)} ({_counts(artifact)})")
        self.reporter.event(
            "step_finished",
            step=node.name,
            kind=node.kind,
            seconds=round(seconds, 3),
            folder=str(folder),
            counts=artifact.manifest.counts,
        )
        self.intact.add(artifact.folder)
        return artifact


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
