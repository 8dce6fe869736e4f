"""Checkpoints that are whole or not there: a mark with every file's hash is written last."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from potstill.core.store import write_atomically

__all__ = ["complete", "newest"]

_MARK = "complete.json"


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
    except (OSError, ValueError, AttributeError):  # AttributeError: no JSON object
        return False
    return True
