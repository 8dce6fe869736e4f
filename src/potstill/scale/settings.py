"""The `scale` block of a recipe: how many processes run it, and by what engine."""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field, field_validator

from potstill.core.errors import RecipeError
from potstill.core.settings import Settings, execution
from potstill.train import Strategy

__all__ = ["LOOPBACK", "Ray", "Scale", "Torchrun", "check_processes", "check_ray", "visible_gpus"]

LOOPBACK = "127.0.0.1"
"""The address of a machine that no other reaches."""

_ADDRESS = re.compile(r"local|auto|(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}")


class Torchrun(Settings):
    """Train steps run by torchrun in several processes; every other step by the one that began."""

    engine: Literal["torchrun"] = execution(..., description="what starts the processes")
    nnodes: int = execution(
        1, ge=1, description="machines; more than one are started by `potstill run --launcher-command`"
    )
    nproc_per_node: int = execution(..., ge=1, description="processes on each machine: on GPUs, one for each")
    strategy: Strategy = execution(
        "ddp",
        description="what each process holds: the whole student (ddp), or its part of every weight, gradient "
        "and moment (fsdp2)",
    )
    parallel_steps: int = execution(
        1,
        ge=1,
        description="train steps that run at once where none needs the other, each in as many processes; on "
        "GPUs each has its own",
    )


class Ray(Settings):
    """Teachers on Ray: generate, cache and select ask copies of their models, each in a process of its own.

    Every other step runs in the process that began, as without it.
    """

    engine: Literal["ray"] = execution(..., description="what starts the processes")
    address: str = execution(
        "local",
        description="local starts Ray on this machine for the time of a step; auto is the cluster that "
        "runs here or is in RAY_ADDRESS; else the host:port of a cluster's head",
    )
    replicas: int = execution(..., ge=1, description="copies of a step's model")
    gpus_per_replica: float | None = execution(
        None,
        ge=0,
        description="share of a GPU that each has, or how many GPUs, for vLLM to spread a model over; by "
        "default one where there are GPUs for the model to use",
    )
    cpus_per_replica: int | None = execution(
        None,
        ge=1,
        description="cores that each has; by default 1 beside a GPU, else its part of those there are",
    )
    timeout_s: float = execution(
        1800.0,
        gt=0,
        description="seconds that a copy may take from one answer to the next, before it is started again",
    )
    start_timeout_s: float = execution(1800.0, gt=0, description="the same for a start, its model loaded")

    @field_validator("gpus_per_replica")
    @classmethod
    def _check_gpus(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and not gpus.is_integer():
            raise ValueError("expected a share of one GPU, or a whole number of them")
        return gpus

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        if not _ADDRESS.fullmatch(address):
            raise ValueError("expected local, auto, or the host:port of a Ray cluster's head")
        return address


Scale = Annotated[Torchrun | Ray, Field(discriminator="engine")]
"""The block, by its engine."""


def check_ray(scale: Ray, devices: Iterable[str | None], engines: Sequence[str]) -> None:
    """Raise RecipeError where Ray cannot be used here, or not for models of these devices and engines."""
    of_one_gpu = {"transformers", "llama_cpp"}.intersection(engines)
    if (
        scale.gpus_per_replica is not None
        and scale.gpus_per_replica > 1
        and of_one_gpu
        and "vllm" not in engines
    ):
        raise RecipeError(
            f"{scale.gpus_per_replica:g} GPUs for each replica, of which a model of engine "
            f"{' or '.join(sorted(of_one_gpu))} uses one",
            where="scale.gpus_per_replica",
            expected="at most 1; vllm alone spreads a model over several",
            mend="set it to 1 and replicas to the number of GPUs, or declare the model with `engine: vllm`; "
            "where other steps need more, make them first (--only)",
        )
    for device in devices:
        if device is not None and device.partition(":")[2]:
            raise RecipeError(
                f"device: {device} is one GPU, and each of {scale.replicas} replicas takes its own",
                where="scale.replicas",
                mend="leave device out, or say which GPUs by CUDA_VISIBLE_DEVICES",
            )
    if sys.platform == "win32":
        raise RecipeError("Ray is not used on Windows", where="scale", expected="Linux or macOS")
    if find_spec("ray") is None:
        raise RecipeError(
            f"{scale.replicas} replicas on Ray, and Ray is not installed",
            where="scale",
            mend="python -m pip install 'potstill[ray]', on every machine of the cluster; or leave scale out",
        )


def visible_gpus() -> list[str]:
    """The GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [str(one) for one in range(count)] if named is None else named.split(",")[:count]


def check_processes(
    scale: Torchrun, device: str | None, *, elsewhere: bool, quantized: str | None = None
) -> None:
    """Raise RecipeError where a training on a device (by default a GPU if there is one) cannot be started.

    `elsewhere` says that it is to be started by hand, on machines of which nothing is known here;
    `quantized` names the student's quantisation, if it has one.
    """
    if scale.strategy == "fsdp2" and quantized is not None:
        raise RecipeError(
            f"a student in {quantized} cannot be divided: its weights are packed, with scales beside them "
            "that do not divide as they do",
            where="scale.strategy",
            mend="set strategy: ddp, where each process holds the student in four bits, or leave quantize "
            "out, so that each holds its part of the frozen base",
        )
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
    processes = scale.nproc_per_node * scale.parallel_steps
    if device is not None and device.partition(":")[2] and processes > 1:
        raise RecipeError(
            f"device: {device} is one GPU, and each of {processes} processes takes its own",
            where="scale",
            mend="leave device out, or say which GPUs by CUDA_VISIBLE_DEVICES",
        )
    if elsewhere or device == "cpu":
        return
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        side_by_side = scale.parallel_steps > 1
        what = (
            f"{scale.parallel_steps} steps at once of {scale.nproc_per_node}"
            if side_by_side
            else f"{processes}"
        )
        raise RecipeError(
            f"{what} processes, and this machine has {gpus} GPU{'s' if gpus > 1 else ''}",
            where="scale.parallel_steps" if side_by_side else "scale.nproc_per_node",
            expected="at most one process a GPU",
            mend="take fewer, or set the step's device to cpu",
        )
