"""A run's folder: the resolved recipe, links to the artifacts, the events, the log and the report."""

import os
from collections.abc import Sequence
from pathlib import Path

from potstill.core.errors import StoreError
from potstill.core.events import read_events
from potstill.core.store import Artifact, write_atomically
from potstill.report import RunView, StepView

__all__ = [
    "EVENTS_FILE",
    "LOG_FILE",
    "RECIPE_FILE",
    "REPORT_FILE",
    "link_artifact",
    "linked_artifact",
    "load_run",
    "open_run_folder",
]

EVENTS_FILE = "events.jsonl"
LOG_FILE = "run.log"
RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "report.html"


def open_run_folder(folder: Path, recipe_text: str) -> Path:
    """Make (or take up again) a run folder and write the resolved recipe into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RECIPE_FILE, recipe_text)
    except OSError as error:
        raise StoreError(
            f"the run folder cannot be written ({error.strerror})",
            where=str(folder),
            mend="name another with --output, or make it writable",
        ) from error
    return folder


def link_artifact(folder: Path, step: str, artifact: Artifact) -> None:
    """Point `<run folder>/<step>` at an artifact: a link, or a file that names it."""
    link = folder / step
    partial = folder / f".{step}.{os.getpid()}.partial"
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(artifact.folder.resolve(), target_is_directory=True)
    except OSError:
        partial.write_text(str(artifact.folder.resolve()), encoding="utf-8")
    os.replace(partial, link)


def linked_artifact(folder: Path, step: str) -> Artifact | None:
    """The artifact that a run folder links to under a step's name, or None where none is sealed."""
    link = folder / step
    target = Path(link.read_text(encoding="utf-8")) if link.is_file() else link.resolve()
    try:
        return Artifact.open(target)
    except StoreError:
        return None


def load_run(folder: Path, steps: Sequence[tuple[str, str, list[str]]] | None = None) -> RunView:
    """What a run folder holds, for the report. `steps` is (name, kind, needs), by default from its events."""
    recipe = folder / RECIPE_FILE
    if not recipe.is_file():
        raise StoreError(
            "not a run folder: it has no recipe.yaml",
            where=str(folder),
            expected="a folder made by potstill run, such as runs/quickstart",
        )
    events = read_events(folder / EVENTS_FILE)
    last_start = max((i for i, event in enumerate(events) if event["event"] == "run_started"), default=0)
    latest = events[last_start:]
    if steps is None:
        steps = next(
            (
                [(one["name"], one["kind"], one["needs"]) for one in event["steps"]]
                for event in latest
                if "steps" in event
            ),
            [],
        )
    reused = {event.get("step") for event in latest if event["event"] == "step_reused"}
    views = []
    for name, kind, needs in steps:
        artifact = linked_artifact(folder, name)
        views.append(
            StepView(
                name=name,
                kind=kind,
                needs=needs,
                seconds=artifact.manifest.seconds if artifact else None,
                reused=name in reused,
                manifest=artifact.manifest if artifact else None,
                folder=artifact.folder if artifact else None,
            )
        )
    return RunView(
        name=folder.name,
        recipe_text=recipe.read_text(encoding="utf-8"),
        steps=views,
        events=events,
        folder=folder,
    )
