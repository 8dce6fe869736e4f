"""One run of a recipe from start to report, and sweeps of several."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from potstill.core.errors import Interrupted, PotstillError
from potstill.core.events import Display, Reporter
from potstill.core.memory import is_out_of_memory
from potstill.core.shared import open_shared
from potstill.core.store import MODEL_CARD_FILE, Artifact, Store, write_atomically
from potstill.pipeline.graph import Graph
from potstill.pipeline.outputs import Output, write_outputs
from potstill.pipeline.run_folder import (
    EVENTS_FILE,
    LOG_FILE,
    REPORT_FILE,
    link_artifact,
    load_run,
    open_run_folder,
)
from potstill.pipeline.runner import RunOptions, run_graph
from potstill.report import RunView, model_card, write_comparison, write_report
from potstill.scale import Scale

__all__ = ["Runnable", "run_recipe", "run_sweep"]


class Runnable(Protocol):
    """What a run needs of a recipe."""

    @property
    def name(self) -> str:
        """The run's name."""

    @property
    def seed(self) -> int:
        """The one seed all others derive from."""

    @property
    def graph(self) -> Graph:
        """Steps and models."""

    @property
    def outputs(self) -> Sequence[Output]:
        """What the run hands out beside its own files."""

    @property
    def scale(self) -> Scale | None:
        """How many processes train or answer, if it says so."""

    @property
    def shared(self) -> str | None:
        """Where its artifacts are shared, if it says so."""

    @property
    def resolved(self) -> Mapping[str, Any]:
        """The resolved recipe."""

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""


def _steps(graph: Graph) -> list[tuple[str, str, list[str]]]:
    return [(name, graph.nodes[name].kind, graph.needs[name]) for name in graph.order]


def run_recipe(
    recipe: Runnable,
    folder: Path,
    store: Store,
    display: Display = "plain",
    options: RunOptions | None = None,
) -> RunView:
    """Run a recipe into a folder: artifacts linked when made; report, model cards and outputs at the end.

    They are written as well when a step fails or the run is interrupted, as far as the run came.
    """
    options = options or RunOptions()
    open_run_folder(folder, recipe.to_yaml())
    reporter = Reporter(display, folder / EVENTS_FILE, log_path=folder / LOG_FILE)
    steps = _steps(recipe.graph)
    described: list[dict[str, Any]] = [
        {"name": name, "kind": kind, "needs": needs} for name, kind, needs in steps
    ]
    outcome = "failed"
    made: dict[str, Artifact] = {}

    def on_made(step: str, artifact: Artifact) -> None:
        link_artifact(folder, step, artifact)
        made[step] = artifact

    try:
        reporter.event("run_started", recipe=recipe.name, seed=recipe.seed, steps=described)
        shared = None if recipe.shared is None else open_shared(recipe.shared, options.stop)
        run_graph(
            recipe.graph,
            recipe.seed,
            store,
            reporter,
            options,
            on_made=on_made,
            scale=recipe.scale,
            shared=shared,
        )
        outcome = "finished"
    except (Interrupted, KeyboardInterrupt):
        outcome = "interrupted"
        raise
    except Exception as error:
        with suppress(OSError):
            reporter.log(str(error))
        raise
    finally:
        try:
            reporter.event(f"run_{outcome}")
        finally:
            reporter.close()
        try:
            view = load_run(folder, steps)
            write_report(view, folder / REPORT_FILE)
            for step in view.steps:
                if step.kind in ("train", "init", "merge") and step.folder is not None:
                    write_atomically(step.folder / MODEL_CARD_FILE, model_card(view, step))
            write_outputs(folder, recipe.outputs, made, recipe.resolved)
        except Exception as error:  # of many kinds where memory runs out
            # What stopped the run is the news; what cannot be written then is not.
            is_lack = isinstance(error, OSError | PotstillError) or is_out_of_memory(error)
            if outcome == "finished" or not is_lack:
                raise
    return view


def run_sweep(
    recipes: Mapping[str, Runnable], folder: Path, store: Store, display: Display, options: RunOptions
) -> list[RunView]:
    """Run each recipe into its own folder below `folder`, then write one comparison of all."""
    views = [
        run_recipe(recipe, folder / label.replace("/", "_"), store, display, options)
        for label, recipe in recipes.items()
    ]
    write_comparison(views, folder / REPORT_FILE)
    return views
