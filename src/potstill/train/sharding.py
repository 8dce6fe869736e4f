"""A student divided among processes (FSDP2): each keeps a part of every weight, gradient and moment.

A block's weights are whole while the block runs. All others (embedding, head, projections) are whole for the
whole of a micro-batch, since the loss multiplies with the head chunk by chunk: gathered a chunk, ranks with
fewer chunks would leave the others waiting. The head's gradient is summed for the whole weight and then
reduced to parts, as every other.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from potstill.core.errors import TrainingError

__all__ = [
    "OPTIMISERS",
    "assign",
    "block_classes",
    "check_divided",
    "divide",
    "divide_moments",
    "has_shards",
    "is_divisible",
    "other_weights",
    "read_shards",
    "release",
    "state_of_parts",
    "whole",
    "write_shards",
]

OPTIMISERS = frozenset({"adamw_torch", "adamw_torch_fused", "sgd", "rmsprop"})
"""Those of transformers that keep tensors of a weight's own shape, so that its parts have theirs."""

_FOLDER = "shards"
_WEIGHT, _MOMENT, _SCALAR = "weight/", "moment/", "scalar/"


def block_classes(module: nn.Module) -> list[str]:
    """The class names of the blocks within a module whose weights are gathered together.

    They are those that transformers' models state. Raises TrainingError where there are none.
    """
    within = [one for one in module.modules() if one is not module]
    present = {type(one).__name__ for one in within}
    stated = {name for one in within for name in getattr(one, "_no_split_modules", None) or ()}
    if not (found := sorted(stated & present)):
        raise TrainingError(
            "strategy fsdp2: the blocks of this model are not known, by which its weights would be gathered",
            expected="a model that names the modules which device maps must not split",
            mend="set strategy: ddp",
        )
    return found


def is_divisible(model: nn.Module) -> bool:
    """Whether all weights are plain numbers; quantised ones are packed, with their scales beside them."""
    return all(type(one) is nn.Parameter and one.is_floating_point() for one in model.parameters())


def divide(module: nn.Module) -> None:
    """Leave each process its part of the weights of a module that is its own root, block by block."""
    if isinstance(module, FSDPModule):
        return
    names = block_classes(module)
    for block in [one for one in module.modules() if type(one).__name__ in names]:
        fully_shard(block)
    fully_shard(module)


def check_divided(module: nn.Module) -> None:
    """Make sure of it, whoever divided it: libraries that cannot train whole weights without a word."""
    left = [name for name, one in module.named_parameters() if not isinstance(one, DTensor)]
    assert not left, f"not divided: {left[:3]}"


def release(module: nn.Module) -> None:
    """After passes that no backward one follows, leave each process no more than its part, of a root too."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this process may have a part; then every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Set a tensor to a value of which every process has all."""
    target.copy_(_like(value, target))


def _like(value: Tensor, target: Tensor) -> Tensor:
    if not isinstance(target, DTensor):
        return value.to(target.device)
    mesh, placements = target.device_mesh, target.placements
    return distribute_tensor(value.to(target.device), mesh, placements, src_data_rank=None)


def state_of_parts(model: Any, *, keep: bool) -> dict[str, Tensor] | None:
    """A divided model's whole weights on the CPU, of an adapter its own; None for one that is not divided.

    Every process has to ask; without `keep` the answer is empty, and nothing but a tensor is held at a time.
    """
    if not any(isinstance(one, DTensor) for one in model.parameters()):
        return None
    state: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}  # tied weights stay one tensor
    for name, one in model.state_dict(keep_vars=True).items():
        if hasattr(model, "peft_config") and "lora_" not in name and "trainable_tokens" not in name:
            continue
        if id(one) not in known:
            value = whole(one.detach())
            known[id(one)] = value.cpu() if keep else value.new_empty(0)
        if keep:
            state[name] = known[id(one)]
    return state


def has_shards(checkpoint: Path) -> bool:
    """Whether a checkpoint was written by processes that had a part each."""
    return (checkpoint / _FOLDER).is_dir()


def write_shards(checkpoint: Path, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Write each process's parts of weights and moments (torch's distributed checkpoint, in safetensors).

    Nothing in it is pickled, and it serves any number of processes.
    """
    state: dict[str, Any] = {_WEIGHT + name: one.detach() for name, one in trained.items()}
    for name, one in trained.items():
        for key, value in optimizer.state.get(one, {}).items():
            scalar = value.ndim == 0
            state[f"{_SCALAR if scalar else _MOMENT}{name}/{key}"] = value.reshape(1) if scalar else value
    with _failing_as_files_do():
        writer = HuggingFaceStorageWriter(str(checkpoint / _FOLDER), save_distributed=True)
        save(state, storage_writer=writer)


def read_shards(
    checkpoint: Path, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Set weights, or with an optimiser its moments of them, to those of a checkpoint.

    Whoever wrote it, and whatever parts of them this process has. Raises TrainingError for other weights.
    """
    reader = HuggingFaceStorageReader(str(checkpoint / _FOLDER))
    saved = reader.read_metadata().state_dict_metadata
    if {name.removeprefix(_WEIGHT) for name in saved if name.startswith(_WEIGHT)} != trained.keys():
        raise other_weights(checkpoint)
    state: dict[str, Any] = {}
    for stored, entry in saved.items():
        assert isinstance(entry, TensorStorageMetadata)
        kind, _, rest = stored.partition("/")
        if optimizer is None:
            if kind + "/" == _WEIGHT:
                state[stored] = trained[rest].detach()
        elif kind + "/" != _WEIGHT:
            name, _, key = rest.rpartition("/")
            one, dtype = trained[name].detach(), entry.properties.dtype
            scalar = kind + "/" == _SCALAR
            made = (
                torch.zeros(1, dtype=dtype, device=one.device)
                if scalar
                else torch.zeros_like(one, dtype=dtype)
            )
            state[stored] = made
            optimizer.state[trained[name]][key] = made.reshape(()) if scalar else made
    with _failing_as_files_do():
        load(state, storage_reader=reader)


@contextmanager
def _failing_as_files_do() -> Iterator[None]:
    """Turn torch's error, which no handler of errors catches, into what the ranks met with."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # not there: one process reads alone
            yield
    except CheckpointException as error:
        met = (f"process {rank}: {wrapped[0]}" for rank, wrapped in sorted(error.failures.items()))
        raise OSError("; ".join(met)) from error


def divide_moments(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Set the moments to this process's parts of an optimiser's state that was saved whole, in its order."""
    for own, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for one, number in zip(own["params"], theirs["params"], strict=True):
            for key, value in saved["state"].get(number, {}).items():
                is_moment = value.shape == one.shape
                optimizer.state[one][key] = _like(value, one) if is_moment else value.to(one.device)


def other_weights(checkpoint: Path) -> TrainingError:
    """What is said of a checkpoint that holds other weights than are trained."""
    return TrainingError(
        "the checkpoint holds other weights than are trained now",
        where=str(checkpoint),
        mend="run the step again with --force",
    )
