"""What a trainer refuses before it begins: losses without a signal, odd parts, types that lose gradients."""

import os
from typing import Any

import torch
from torch import nn

from potstill.core.errors import TrainingError
from potstill.losses.divergences import check_divergence
from potstill.losses.types import Live
from potstill.train.arguments import DistillationArguments
from potstill.train.online import OnlineTeacher
from potstill.train.rows import CachedTeacher
from potstill.train.sharding import OPTIMISERS, is_divisible

__all__ = ["check_device", "check_loss", "check_precision", "check_strategy"]


def check_loss(arguments: DistillationArguments, teacher: object) -> None:
    """Refuse a loss that the teacher's signal cannot give, before anything is trained."""
    if teacher is None:
        asked = f"alpha is {arguments.alpha:g}" if arguments.alpha else None
        if arguments.divergence != "forward_kl":
            asked = f"divergence is {arguments.divergence}"
        if asked is not None:
            raise TrainingError(
                f"{asked}, but there is no teacher: the data are responses alone",
                expected="cached logits as data, a teacher, or alpha: 0 and no divergence",
                mend="add a cache step and name it as data, or name a teacher",
            )
    elif isinstance(teacher, OnlineTeacher | CachedTeacher):
        kind = Live if isinstance(teacher, OnlineTeacher) else teacher.signal_type
        check_divergence(arguments.divergence, kind, renormalise=arguments.renormalise)
    if arguments.feature is not None and not isinstance(teacher, OnlineTeacher):
        what = "there is no teacher" if teacher is None else "cached logits are a teacher's answers alone"
        raise TrainingError(
            f"feature compares inner states with the teacher's, and {what}",
            expected="traces or examples as data, and a teacher in memory",
            mend="name the model as teacher and what it wrote as data, or leave feature out",
        )
    if arguments.top_k is not None and getattr(teacher, "k", None) != arguments.top_k:
        raise TrainingError(
            f"top_k is {arguments.top_k}, but the teacher's logits are not read from a cache here",
            expected="a cache of top-k logits as data or teacher, which can be read with fewer ids",
            mend="leave top_k out",
        )


def check_strategy(arguments: DistillationArguments, student: nn.Module) -> None:
    """Refuse to divide the student otherwise than the strategy says, and what cannot be divided."""
    asked = [name for name in ("fsdp", "deepspeed", "parallelism_config") if getattr(arguments, name)]
    # As accelerate launch states its configuration.
    launched = [f"ACCELERATE_USE_{name.upper()}" for name in ("fsdp", "deepspeed", "parallelism_config")]
    asked += [name for name in launched if os.environ.get(name, "false").lower() in ("1", "true", "yes")]
    asked = [name for name in asked if arguments.strategy == "ddp" or not name.lower().endswith("fsdp")]
    if asked:
        raise TrainingError(
            f"{', '.join(asked)} would divide the student's weights among processes in another way than "
            "the trainer, its groups and its checkpoints know of",
            expected='strategy "ddp", where each process holds the whole student, or "fsdp2"',
            mend='leave it out, and set strategy="fsdp2" where one process cannot hold the student',
        )
    if not arguments.divides:
        return
    if not is_divisible(student):
        raise TrainingError(
            "strategy fsdp2: the student's weights are quantised, packed with scales that do not divide as "
            "they do",
            expected="weights in full, divided among the processes",
            mend="leave quantize out, or set strategy: ddp, where each process holds the quantised student",
        )
    if arguments.optim not in OPTIMISERS:
        raise TrainingError(
            f"strategy fsdp2: the optimiser {arguments.optim} keeps what does not divide as weights do",
            expected=", ".join(sorted(OPTIMISERS)),
            mend="choose one of these, or set strategy: ddp",
        )


def check_precision(model: nn.Module, *, autocast: bool) -> None:
    """Refuse types that lose updates or gradients.

    In half precision a small update of a trained weight rounds to nothing; in float16, which only autocast
    leaves, a head's gradient of one token among thousands does.
    """
    for name, one in model.named_parameters():
        if one.dtype == torch.float16 and not autocast:
            raise TrainingError(
                f"{name} is frozen in float16, where small gradients round to nothing"
                if not one.requires_grad
                else f"{name} is to be trained in float16",
                expected="float32, or bfloat16 where the device multiplies in it",
                mend="load the model with dtype: float32, or leave dtype out",
            )
        if one.requires_grad and one.dtype in (torch.bfloat16, torch.float16):
            raise TrainingError(
                f"{name} is to be trained in {str(one.dtype).removeprefix('torch.')}",
                expected="trained weights in float32: in half precision small updates round to nothing",
                mend="load the model with dtype=torch.float32, or give its path instead",
            )


def check_device(model: Any, device: torch.device, what: str) -> None:
    """Refuse a model on another device than the one that the training is on."""
    if (model.device.type, model.device.index or 0) != (device.type, device.index or 0):
        raise TrainingError(
            f"the {what} is on {model.device}, and this training is on {device}",
            expected="one device: transformers' trainer takes the first GPU that it sees, or none",
            mend="leave device out, or say cpu; for another GPU let CUDA_VISIBLE_DEVICES name it alone",
        )
