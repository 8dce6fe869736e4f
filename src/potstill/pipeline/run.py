"""One run of a recipe from start to report, and sweeps of several."""

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from potstill.core.errors import Interrupted
from potstill.core.events import Display, Reporter
from potstill.core.store import MODEL_CARD_FILE, Store, write_atomically
from potstill.pipeline.graph import Graph
from potstill.pipeline.run_folder import EVENTS_FILE, REPORT_FILE, link_artifact, load_run, open_run_folder
from potstill.pipeline.runner import RunOptions, run_graph
from potstill.report import RunView, model_card, write_comparison, write_report

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

    def to_yaml(self) -> str:
        """The resolved recipe."""


def _steps(graph: Graph) -> list[tuple[str, str, list[str]]]:
    return [(name, graph.nodes[name].kind, graph.needs[name]) for name in graph.order]


def run_recipe(
    recipe: Runnable,
    folder: Path,
    store: Store,
    display: Display = "plain",
    options: RunOptions | None = None,
) -> RunView:
    """Run a recipe into a folder: artifacts linked as they are made, report and model cards at the end.

    The report is written as well when a step fails or the run is interrupted, as far as the run came.
    """
    options = options or RunOptions()
    open_run_folder(folder, recipe.to_yaml())
    reporter = Reporter(display, folder / EVENTS_FILE)
    steps = _steps(recipe.graph)
    described: list[dict[str, Any]] = [
        {"name": name, "kind": kind, "needs": needs} for name, kind, needs in steps
    ]
    outcome = "failed"
    try:
        reporter.event("run_started", recipe=recipe.name, seed=recipe.seed, steps=described)
        run_graph(
            recipe.graph,
            recipe.seed,
            store,
            reporter,
            options,
            on_made=lambda step, artifact: link_artifact(folder, step, artifact),
        )
        outcome = "finished"
    except (Interrupted, KeyboardInterrupt):
        outcome = "interrupted"
        raise
    finally:
        try:
            reporter.event(f"run_{outcome}")
        finally:
            reporter.close()
        view = load_run(folder, steps)
        # What stopped the run is the news; a report that cannot be written then is not.
        with nullcontext() if outcome == "finished" else suppress(OSError):
            write_report(view, folder / REPORT_FILE)
    for step in view.steps:
        if step.kind in ("train", "init") and step.folder is not None:
            write_atomically(step.folder / MODEL_CARD_FILE, model_card(view, step))
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
