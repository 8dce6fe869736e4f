"""What this machine can do for potstill, and what to do about what it cannot."""

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.core.environment import usable_cores
from potstill.core.errors import ModelError
from potstill.core.store import default_store_root

if TYPE_CHECKING:
    import torch

__all__ = ["Check", "examine"]

_PYTHONS = ((3, 11), (3, 13))
_ENOUGH_MEMORY_GB = 8
_ENOUGH_DISK_GB = 10
_GB = 1e9


@dataclass(frozen=True)
class Check:
    """One finding; where it is not `ok` something is slower, missing or impossible: the hint says how."""

    name: str
    ok: bool
    finding: str
    hint: str | None = None


def examine() -> list[Check]:
    """Look this machine over, without the network; all that is written is in temporary folders."""
    return [
        _python(),
        *_torch(),
        _cores(),
        _memory(),
        _disk(),
        *_models(),
        _hub(),
        *_extras(),
        _terminal(),
        _links(),
        _sandbox(),
    ]


def _python() -> Check:
    least, most = _PYTHONS
    ok = least <= sys.version_info[:2] <= most
    wanted = f"{least[0]}.{least[1]} to {most[0]}.{most[1]}"
    hint = None if ok else f"use Python {wanted}: make clean quickstart PYTHON=python{most[0]}.{most[1]}"
    return Check("python", ok, f"{platform.python_version()} on {platform.platform(terse=True)}", hint)


def _torch() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        yield Check(
            "torch", ok=False, finding="not installed", hint="run make quickstart, or pip install potstill"
        )
        return
    import torch

    yield Check("torch", ok=True, finding=metadata.version("torch"))
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        yield Check(
            f"gpu {device.index}", ok=True, finding=f"{name}, {free / _GB:.0f} of {total / _GB:.0f} GB free"
        )
    if not devices:
        yield Check(
            "gpu",
            ok=False,
            finding="none that this torch can use; training and local teachers run on the CPU",
            hint="small models train well enough here; with an NVIDIA GPU install a CUDA build of torch "
            "(make clean quickstart TORCH_INDEX=…)",
        )
    yield _bf16(devices[0] if devices else torch.device("cpu"))


def _bf16(device: "torch.device") -> Check:
    from potstill.models import supports_bf16

    place = "the GPU" if device.type == "cuda" else "the CPU"
    if supports_bf16(device):
        return Check("bf16", ok=True, finding=f"{place} has it: training runs under bfloat16 autocast")
    return Check(
        "bf16",
        ok=False,
        finding=f"{place} has none: everything runs in float32",
        hint="nothing to do; expect training to take longer",
    )


def _cores() -> Check:
    cores = usable_cores()
    return Check(
        "cpu cores",
        cores > 1,
        str(cores),
        None if cores > 1 else "expect the quickstart to take twice as long",
    )


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    ok = memory.available >= _ENOUGH_MEMORY_GB * _GB
    finding = f"{memory.available / _GB:.1f} of {memory.total / _GB:.1f} GB free"
    hint = f"the quickstart wants {_ENOUGH_MEMORY_GB} GB: close other programs, or lower `max_tokens`"
    return Check("memory", ok, finding, None if ok else hint)


def _disk() -> Check:
    root = default_store_root()
    folder = next(place for place in (root, *root.absolute().parents) if place.exists())
    if not os.access(folder, os.W_OK):
        return Check(
            "store",
            ok=False,
            finding=f"{root} cannot be written",
            hint="set POTSTILL_STORE to another folder",
        )
    free = shutil.disk_usage(folder).free
    ok = free >= _ENOUGH_DISK_GB * _GB
    hint = (
        f"models and logits fill {_ENOUGH_DISK_GB} GB soon: set POTSTILL_STORE to a folder on a larger disk"
    )
    return Check("store", ok, f"{root}, {free / _GB:.0f} GB free", None if ok else hint)


def _models() -> Iterator[Check]:
    from potstill.models import EMBEDDED, embedded_path, is_fetched

    for name, model in EMBEDDED.items():
        path = embedded_path(name)
        try:
            fetched = is_fetched(name)
        except ModelError as error:
            yield Check(name, ok=False, finding=f"{path} {error.what}", hint=error.mend)
            continue
        hint = None if fetched else f"it is fetched when first needed, or by: potstill models fetch {name}"
        yield Check(
            name,
            fetched,
            str(path) if fetched else f"not fetched yet ({model.size_bytes / 1e6:.0f} MB)",
            hint,
        )


def _hub() -> Check:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    held = sum(1 for _ in cache.glob("models--*")) if cache.is_dir() else 0
    finding = f"{held} models cached in {cache}"
    if constants.HF_HUB_OFFLINE:
        hint = (
            "unset HF_HUB_OFFLINE to fetch others"
            if held
            else "only embedded models and local folders can be used"
        )
        return Check("model hub", ok=False, finding=f"switched off (HF_HUB_OFFLINE); {finding}", hint=hint)
    return Check("model hub", ok=True, finding=finding)


def _extras() -> Iterator[Check]:
    for name, package, extra, use in (
        ("4-bit models", "bitsandbytes", "bnb", "quantize: nf4"),
        ("hub datasets", "datasets", "hub", "data from the hub"),
        ("tasks", "reasoning_gym", "tasks", "generated tasks with verifiers"),
    ):
        if importlib.util.find_spec(package) is not None:
            yield Check(name, ok=True, finding=f"{package} {metadata.version(package.replace('_', '-'))}")
        else:
            hint = f'for `{use}` run: pip install "potstill[{extra}]"'
            yield Check(name, ok=False, finding=f"{package} is not installed", hint=hint)


def _terminal() -> Check:
    encoding = (getattr(sys.stdout, "encoding", None) or "unknown").lower()
    ok = encoding.replace("-", "") == "utf8"
    hint = "set PYTHONUTF8=1, or text beyond this encoding is shown with replacement signs"
    return Check("terminal", ok, encoding, None if ok else hint)


def _sandbox() -> Check:
    from potstill.verifiers.sandbox import confinement

    use = "programs that models wrote (verifier: {allow_code: true})"
    if sys.platform == "win32":
        return Check("sandbox", ok=False, finding=f"none here for {use}", hint="use Linux, or WSL")
    found = confinement()
    whole = {"files", "processes and network"} <= set(found)
    hint = None if whole else "run code of models that you do not trust in a virtual machine or container"
    return Check("sandbox", ok=whole, finding=f"{use} have: {', '.join(found)}", hint=hint)


def _links() -> Check:
    with tempfile.TemporaryDirectory() as folder:
        try:
            (Path(folder) / "link").symlink_to(folder, target_is_directory=True)
        except OSError:
            return Check(
                "symbolic links",
                ok=False,
                finding="not allowed: a run folder names its artifacts' places instead of linking to them",
                hint="on Windows, switch on developer mode",
            )
    return Check("symbolic links", ok=True, finding="allowed")
