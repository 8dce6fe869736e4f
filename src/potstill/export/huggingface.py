"""A run's model as one plain Hugging Face folder with its card: neither PEFT nor a base is needed for it."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from potstill.core.errors import StoreError
from potstill.core.store import MODEL_CARD_FILE, Artifact, write_atomically
from potstill.merge.step import merge_into
from potstill.models import TransformersModel, find_source, shares_experts, stored_dtype, writing
from potstill.models.pretrained import quiet_transformers, read_weights
from potstill.pipeline.run_folder import EVENTS_FILE, load_run
from potstill.report import RunView, StepView, model_card

__all__ = ["export_huggingface", "new_folder"]

_MODEL_KINDS = ("init", "train", "merge")


def export_huggingface(place: Path, output: Path) -> str:
    """Write the model of a run into a new folder, an adapter merged into its base; gives its step's name.

    Experts that share a core become whole ones, as transformers has them.

    `place` is a run's folder, whose last model is meant, a step in it, or one epoch of a step
    (runs/a/student/epoch2). Raises StoreError for another place or a folder in use, ModelError as a merge
    step does.
    """
    run, step, view = _model_of(place)
    assert step.folder is not None
    assert step.manifest is not None
    folder = step.folder if view is None else step.folder / view
    with new_folder(output) as target:
        if find_source(str(folder)).kind == "adapter":
            merge_into(target, TransformersModel(path=str(folder)), name=step.name)
        else:
            _copy(Artifact(step.folder, step.manifest), view, target)
        if shares_experts(target):
            _make_experts_whole(target)
        # The card says how to load what lies here, and that is no adapter; an epoch has not the figures of
        # the last weights.
        name = step.name if view is None else f"{step.name}:{view}"
        known = step.manifest.model_identity if view is None else None
        plain = step.manifest.model_copy(update={"files": {}, "model_identity": known})
        shown = dataclasses.replace(step, name=name, manifest=plain, folder=Path(output.name))
        write_atomically(target / MODEL_CARD_FILE, model_card(run, shown, files=target))
    return name


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder in the making that becomes `output` at the end, so that a mistake leaves nothing behind."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StoreError("is there already", where=str(output), mend="name a new or empty folder as --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        made = Path(folder) / "export"
        made.mkdir()
        yield made
        output.mkdir(exist_ok=True)
        for path in made.iterdir():
            os.replace(path, output / path.name)


def _model_of(place: Path) -> tuple[RunView, StepView, str | None]:
    """The run that a place belongs to, the step whose model it means, and the epoch of that step."""
    above = (place, *place.parents[:2])
    depth = next((n for n, one in enumerate(above) if (one / EVENTS_FILE).is_file()), None)
    if depth is None:
        raise StoreError(
            "is no run's folder and no step in one",
            where=str(place),
            expected="such as runs/quickstart, runs/quickstart/student or runs/quickstart/student/epoch1",
        )
    run = load_run(above[depth])
    models = [step for step in run.steps if step.kind in _MODEL_KINDS and step.manifest is not None]
    names = [step.name for step in models]
    name = place.parts[-depth] if depth else names[-1] if names else None
    step = next((one for one in models if one.name == name), None)
    if step is None:
        raise StoreError(
            "the run has no model" if name is None else f"{name!r} is no finished step that makes a model",
            where=str(place),
            expected=f"one of: {', '.join(names)}" if names else "a train, init or merge step that has run",
        )
    view = place.name if depth == 2 else None
    assert step.manifest is not None
    assert step.folder is not None
    views = Artifact(step.folder, step.manifest).views
    if view is not None and view not in views:
        raise StoreError(
            f"{step.name} kept no {view!r}",
            where=str(place),
            expected=", ".join(views) or "a step with keep_epochs",
        )
    return run, step, view


def _make_experts_whole(folder: Path) -> None:
    """Put in place of a model with shared experts the plain one that it stands for, in the same type."""
    import torch

    from potstill.models.shared_experts import expanded_model

    dtype = getattr(torch, stored_dtype(TransformersModel(path=str(folder))))
    with quiet_transformers(), writing(folder):
        model = expanded_model(read_weights(str(folder), where=str(folder), dtype=torch.float32)).to(dtype)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        model.save_pretrained(folder)


def _copy(artifact: Artifact, view: str | None, target: Path) -> None:
    """Copy the files of a model or of one of its epochs, without the projections of a feature loss."""
    source = artifact.folder if view is None else artifact.folder / view
    for path in source.iterdir():
        listed = path.name if view is None else f"{view}/{path.name}"
        if path.is_file() and listed in artifact.manifest.files:
            shutil.copy2(path, target / path.name)
