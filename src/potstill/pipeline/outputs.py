"""What a run hands out under names of its recipe's choice: a step's files, its figures, its rows."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from potstill.core.errors import DataError, RecipeError, StoreError
from potstill.core.records import RECORDS_FILE, Record, read_records
from potstill.core.store import (
    MANIFEST_FILE,
    MODEL_CARD_FILE,
    Artifact,
    manifest_text,
    replacing,
    write_atomically,
)
from potstill.data.shapes import WRITTEN_SHAPES, WrittenShape, write_row
from potstill.pipeline.graph import Graph, nearest
from potstill.pipeline.run_folder import EVENTS_FILE, LOG_FILE, RECIPE_FILE, REPORT_FILE

__all__ = ["Output", "WrittenRows", "check_output", "record_rows", "write_outputs", "write_rows"]

_RUN = "run"
_RUN_VIEWS = ("log", "recipe")
_STEP_VIEWS = ("metrics", "settings", *WRITTEN_SHAPES)
_OWN_FILES = (EVENTS_FILE, LOG_FILE, RECIPE_FILE, REPORT_FILE, "report.figures")
_MAKES_ROWS = ("generate", "select", "retrieve")
_EPOCH = re.compile(r"epoch[1-9]\d*")


@dataclass(frozen=True)
class Output:
    """A name in the run folder and what stands there: a step's files, or a `view` of a step or the run."""

    name: str
    step: str
    view: str | None


@dataclass
class WrittenRows:
    """How many rows were written, and how many were left out for which reason."""

    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def check_output(
    name: object, source: object, graph: Graph, where: str, *, others: Iterable[Output] = ()
) -> Output:
    """The output that `name: source` declares. RecipeError where it cannot be made or would hide a file.

    `others` are those declared before it, none of which may be the same place or a folder above or below.
    """
    name = _checked_name(name, graph, where, others)
    if not isinstance(source, str):
        raise RecipeError(
            f"outputs.{name} is no text", where=where, expected="a step, or a view such as exam:metrics"
        )
    step, _, view = source.partition(":")
    of_run = step == _RUN and _RUN not in graph.nodes
    if not of_run and step not in graph.nodes:
        raise RecipeError(
            f"outputs.{name}: there is no step {step!r}",
            where=where,
            mend=nearest(step, [*graph.nodes, _RUN]),
        )
    views = _RUN_VIEWS if of_run else _STEP_VIEWS
    if not of_run and _EPOCH.fullmatch(view):
        _check_epoch(graph, step, view, f"outputs.{name}", where)
    elif (view or of_run) and view not in views:
        raise RecipeError(
            f"outputs.{name}: {source!r} has no view {view!r}",
            where=where,
            expected=f"{step}:{' or '.join(views)}",
            mend=nearest(view, views) if view else None,
        )
    if view in WRITTEN_SHAPES and graph.nodes[step].kind not in _MAKES_ROWS:
        raise RecipeError(
            f"outputs.{name} wants rows, and {step!r} is a step of kind {graph.nodes[step].kind}",
            where=where,
            expected=f"a step of kind {' or '.join(_MAKES_ROWS)}",
        )
    return Output(name, step, view or None)


def _checked_name(name: object, graph: Graph, where: str, others: Iterable[Output]) -> str:
    if not isinstance(name, str):
        raise RecipeError(f"outputs: the name {name!r} is no text", where=where, mend=f'write "{name}"')
    path = PurePosixPath(name)
    if path.is_absolute() or name in ("", ".") or ".." in path.parts or "\\" in name:
        raise RecipeError(
            f"outputs: {name!r} leads out of the run folder",
            where=where,
            expected="a name such as final_model",
        )
    if path.parts[0] in (*_OWN_FILES, *graph.nodes):
        raise RecipeError(
            f"outputs: {name!r} stands in the run folder already", where=where, mend="rename it"
        )
    for other in others:
        if path.is_relative_to(other.name) or PurePosixPath(other.name).is_relative_to(path):
            raise RecipeError(
                f"outputs: {name!r} and {other.name!r} are one place, or one lies in the other",
                where=where,
                expected="places apart, since each is replaced as a whole",
                mend="rename one of them",
            )
    return name


def _check_epoch(graph: Graph, step: str, view: str, key: str, where: str) -> None:
    refuses = getattr(graph.nodes[step].settings, "refuses_view", None)
    kind = graph.nodes[step].kind
    reason = f"a step of kind {kind} has none" if refuses is None else refuses(view)
    if reason is not None:
        raise RecipeError(f"{key} asks for the view {view!r} of {step!r}, and {reason}", where=where)


def write_outputs(
    folder: Path, outputs: Iterable[Output], made: Mapping[str, Artifact], recipe: Mapping[str, Any]
) -> None:
    """Write what a run hands out, as far as its steps were made: files of the user's own, no links.

    A folder that is up to date is left as it is. Raises StoreError where something else has the name, or
    where the disk does not take it.
    """
    for output in outputs:
        target = folder / output.name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if output.view == "log":
                write_atomically(target, (folder / LOG_FILE).read_text(encoding="utf-8"))
            elif output.view == "recipe":
                _write_json(target, recipe)
            elif output.step in made:
                _write_view(made[output.step], output.view, target)
        except OSError as error:
            raise StoreError(f"cannot be written ({error.strerror})", where=str(target)) from error


def record_rows(artifact: Artifact) -> Path:
    """The file of an artifact's records. DataError where it has none."""
    path = artifact.folder / RECORDS_FILE
    if not path.is_file():
        raise DataError(
            f"an artifact of kind {artifact.kind!r} holds no traces",
            where=str(artifact.folder),
            expected="a step that makes traces, or a train step",
        )
    return path


def write_rows(records: Iterable[Record], path: Path, shape: WrittenShape) -> WrittenRows:
    """Write records as JSONL of a shape, atomically and in constant memory; counts what has no place."""
    written = WrittenRows()
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            row = write_row(record, shape)
            if isinstance(row, str):
                written.left_out[row] += 1
            else:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written.rows += 1
    return written


def _write_view(artifact: Artifact, view: str | None, target: Path) -> None:
    manifest = artifact.manifest
    if view is None or view in artifact.views:
        _copy_folder(artifact, view, target)
    elif view == "metrics":
        _write_json(target, manifest.metrics)
    elif view == "settings":
        told = manifest.model_dump(include={"seed", "inputs", "versions", "fingerprint"})
        _write_json(target, {**manifest.settings, **told})
    elif shape := next((one for one in WRITTEN_SHAPES if one == view), None):
        write_rows(read_records(record_rows(artifact)), target, shape)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def _copy_folder(artifact: Artifact, view: str | None, target: Path) -> None:
    """Copy an artifact or a view of it, with the manifest by which a copy is known and found up to date."""
    card, manifest = artifact.folder / MODEL_CARD_FILE, _manifest_of(artifact, view)
    if _bytes_of(target / MANIFEST_FILE) == manifest and _bytes_of(target / MODEL_CARD_FILE) == _bytes_of(
        card
    ):
        return
    if target.exists() and not (target / MANIFEST_FILE).is_file():
        raise StoreError(
            "is there already, and no run has put it there",
            where=str(target),
            mend="move it away, or name another --output",
        )
    partial, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    leave_out = artifact.views if view is None else []
    shutil.copytree(artifact.folder / (view or ""), partial, ignore=shutil.ignore_patterns(*leave_out))
    (partial / MANIFEST_FILE).write_bytes(manifest)
    if card.is_file():
        shutil.copy2(card, partial / MODEL_CARD_FILE)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def _manifest_of(artifact: Artifact, view: str | None) -> bytes:
    """The manifest of what is copied: of its files alone."""
    if view is None and not artifact.views:
        return (artifact.folder / MANIFEST_FILE).read_bytes()
    files = {name.removeprefix(f"{view}/"): entry for name, entry in artifact.files_of(view).items()}
    extra = {key: value for key, value in artifact.manifest.extra.items() if key != "views"}
    update: dict[str, Any] = {"files": files, "extra": extra, "content": artifact.content_of(view)}
    if view is not None:
        update["model_identity"] = None  # that of the last weights
    manifest = artifact.manifest.model_copy(update=update)
    return manifest_text(manifest).encode()


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
