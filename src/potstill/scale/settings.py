"""The `scale` block of a recipe: how many processes run it, and by what engine."""

import sys
from typing import Literal

from potstill.core.errors import RecipeError
from potstill.core.settings import Settings, execution

__all__ = ["Torchrun", "check_processes"]


class Torchrun(Settings):
    """Train steps run by torchrun in several processes (DDP); every other step by the one that began."""

    engine: Literal["torchrun"] = execution(..., description="what starts the processes")
    nnodes: int = execution(
        1, ge=1, description="machines; more than one are started by `potstill run --launcher-command`"
    )
    nproc_per_node: int = execution(..., ge=1, description="processes on each machine: on GPUs, one for each")


def check_processes(scale: Torchrun, device: str | None, *, elsewhere: bool) -> None:
    """Raise RecipeError where a training on a device (by default a GPU if there is one) cannot be started.

    `elsewhere` says that it is to be started by hand, on machines of which nothing is known here.
    """
    if sys.platform == "win32":
        raise RecipeError(
            "torchrun starts no processes on Windows",
            where="scale",
            expected="Linux or macOS",
            mend="leave scale out",
        )
    if scale.nnodes > 1 and not elsewhere:
        raise RecipeError(
            f"{scale.nnodes} machines cannot be started from this one",
            where="scale.nnodes",
            mend="potstill run --launcher-command prints the line that each of them runs; or set nnodes to 1",
        )
    if device is not None and device.partition(":")[2] and scale.nproc_per_node > 1:
        raise RecipeError(
            f"device: {device} is one GPU, and each of {scale.nproc_per_node} processes takes its own",
            where="scale.nproc_per_node",
            mend="leave device out, or say which GPUs by CUDA_VISIBLE_DEVICES",
        )
    if elsewhere or device == "cpu":
        return
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < scale.nproc_per_node:
        raise RecipeError(
            f"{scale.nproc_per_node} processes, and this machine has {gpus} GPU{'s' if gpus > 1 else ''}",
            where="scale.nproc_per_node",
            expected="at most one process a GPU",
            mend=f"set it to {gpus}, or the step's device to cpu",
        )
