"""A trained student on the disk: a folder that plain transformers, or PEFT for an adapter, loads."""

import os
import shutil
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file

from potstill.core.store import wait_for_disk
from potstill.data.chat import Renderer
from potstill.models import LoadedModel, save_model, writing
from potstill.models.pretrained import quiet_transformers
from potstill.train.features import PROJECTIONS_FILE, FeatureLoss
from potstill.train.lora import save_adapter
from potstill.train.sharding import state_of_parts, whole

__all__ = ["kept_epochs", "save_epoch", "save_student"]


def save_student(
    student: LoadedModel, folder: Path, feature: FeatureLoss | None = None, *, writes: bool = True
) -> None:
    """Write model or adapter, and tokenizer; the model ends a response where training did.

    The projections of a feature loss, where it has any, are written apart. Of processes that have a part of
    the student each all call this, and one `writes`.
    """
    state = state_of_parts(student.model, keep=writes)
    projections = {} if feature is None else dict(feature.projections.state_dict())
    projections = {name: whole(one).contiguous() for name, one in projections.items()}
    if not writes:
        return
    if hasattr(student.model, "peft_config"):
        with writing(folder), quiet_transformers():
            save_adapter(student.model, folder, state)
            student.tokenizer.save_pretrained(folder)
    else:
        ends = Renderer(student.tokenizer).end_of_turn_ids
        save_model(student.model, student.tokenizer, folder, ends, state)
    if projections:
        with writing(folder):
            (folder / PROJECTIONS_FILE).parent.mkdir(exist_ok=True)
            save_file(projections, folder / PROJECTIONS_FILE)


def save_epoch(
    student: LoadedModel,
    epoch: int,
    folder: Path,
    scratch: Path,
    keep: Literal["all"] | int,
    *,
    writes: bool = True,
) -> None:
    """Write the model of an epoch, counted from 1, into a folder of its own; whole or not at all.

    Of the earlier ones only the last `keep`, this one among them, stay. `writes` is `save_student`'s.
    """
    partial, target = scratch / "epoch.partial", folder / f"epoch{epoch}"
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
    save_student(student, partial, writes=writes)
    if not writes:
        return
    with writing(target):
        for path in partial.rglob("*"):
            if path.is_file():
                wait_for_disk(path)  # a checkpoint that goes on behind it may outlive a power cut
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    if keep != "all":
        for name in kept_epochs(folder):
            if int(name.removeprefix("epoch")) <= epoch - keep:
                shutil.rmtree(folder / name)


def kept_epochs(folder: Path) -> list[str]:
    """The names of the epochs whose models a train step's folder holds, in order."""
    numbers = [path.name.removeprefix("epoch") for path in folder.glob("epoch*") if path.is_dir()]
    return [f"epoch{number}" for number in sorted(int(one) for one in numbers if one.isdecimal())]
