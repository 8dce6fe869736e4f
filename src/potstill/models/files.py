"""Hashes of big files, computed once for as long as a file stays as it is."""

import json
import os
from contextlib import suppress
from pathlib import Path

from potstill.core.hashing import hash_bytes, hash_file
from potstill.core.store import default_store_root, write_atomically

__all__ = ["cached_file_hash"]

_SMALL_FILE_BYTES = 1 << 20


def cached_file_hash(path: Path) -> str:
    """SHA-256 of a file; for a big one remembered in the store by path, size and modification time."""
    state = path.stat()
    if state.st_size < _SMALL_FILE_BYTES:
        return hash_file(path)
    place = str(path.resolve())
    key = {"path": place, "size_bytes": state.st_size, "modified_ns": state.st_mtime_ns}
    memory = default_store_root() / "models" / "hashes" / f"{hash_bytes(os.fsencode(place))[:24]}.json"
    with suppress(OSError, ValueError, AttributeError):
        known = json.loads(memory.read_text(encoding="utf-8"))
        if {name: known.get(name) for name in key} == key:
            return str(known["sha256"])
    sha256 = hash_file(path)
    with suppress(OSError):  # a read-only store costs the time of hashing again, nothing else
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps({**key, "sha256": sha256}))
    return sha256
