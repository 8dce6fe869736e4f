"""A trained student on the disk: a folder that plain transformers, or PEFT for an adapter, loads."""

import copy
from pathlib import Path

from safetensors.torch import save_file

from potstill.data.chat import Renderer
from potstill.models import LoadedModel
from potstill.models.pretrained import quiet_transformers
from potstill.train import checkpoints
from potstill.train.features import PROJECTIONS_FILE, FeatureLoss
from potstill.train.lora import save_adapter

__all__ = ["save_student"]


def save_student(student: LoadedModel, folder: Path, feature: FeatureLoss | None = None) -> None:
    """Write model or adapter, and tokenizer; the model ends a response where training did.

    The projections of a feature loss, where it has any, are written apart.
    """
    _set_generation_config(student)
    with checkpoints.writing(folder), quiet_transformers():
        if hasattr(student.model, "peft_config"):
            save_adapter(student.model, folder)
        else:
            student.model.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        if feature is not None and feature.projections:
            (folder / PROJECTIONS_FILE).parent.mkdir(exist_ok=True)
            save_file(dict(feature.projections.state_dict()), folder / PROJECTIONS_FILE)


def _set_generation_config(student: LoadedModel) -> None:
    config = copy.deepcopy(student.model.generation_config)
    stated = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = Renderer(student.tokenizer).end_of_turn_ids
    config.eos_token_id = sorted({*ends, student.tokenizer.eos_token_id, *stated} - {None})
    if config.pad_token_id is None:
        config.pad_token_id = student.tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        # Models on the hub state a temperature without sampling, which cannot be saved.
        config.do_sample = True
    student.model.generation_config = config
