"""Checkpoints that are whole or not there: a mark with every file's hash is written last."""

import json
import shutil
from pathlib import Path

from potstill.core.hashing import hash_file
from potstill.core.store import wait_for_disk, write_atomically

__all__ = ["complete", "newest"]

_MARK = "complete.json"


def complete(checkpoint: Path) -> None:
    """Mark a checkpoint as whole once its files are on the disk, then remove its siblings."""
    hashes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            wait_for_disk(path)
            hashes[path.relative_to(checkpoint).as_posix()] = hash_file(path)
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
        return all(hash_file(checkpoint / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, AttributeError):  # AttributeError: no JSON object
        return False
