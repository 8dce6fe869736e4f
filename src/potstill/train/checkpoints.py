"""Checkpoints that are whole or not there: a mark with every file's hash is written last."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from potstill.core.errors import StoreError
from potstill.core.store import write_atomically

__all__ = ["complete", "newest", "writing"]

_MARK = "complete.json"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failed write (a full disk), for which each library has its own error, into a StoreError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StoreError(
            f"cannot be written ({error})",
            where=str(folder),
            expected="room on the disk for the weights and, in a checkpoint, the optimiser's two moments",
            mend="make room and run again: training goes on at its last whole checkpoint",
        ) from error


def complete(checkpoint: Path) -> None:
    """Mark a checkpoint as whole once its files are on the disk, then remove its siblings."""
    hashes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
                hashes[path.relative_to(checkpoint).as_posix()] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    write_atomically(checkpoint / _MARK, json.dumps(hashes, indent=2))
    for other in checkpoint.parent.glob("checkpoint-*"):
        if other != checkpoint:
            shutil.rmtree(other)


def newest(folder: Path) -> Path | None:
    """The whole checkpoint of the highest step under `folder`, or None; half-written ones are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if _is_whole(path):
            whole.append(path)
        else:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        hashes = json.loads((checkpoint / _MARK).read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            with (checkpoint / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return False
    except (OSError, json.JSONDecodeError):
        return False
    return True
