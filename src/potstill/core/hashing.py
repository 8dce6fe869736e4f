"""Content hashes and the seeds derived from them; stable across processes and machines."""

import hashlib
import json
from pathlib import Path
from typing import Any

__all__ = ["derive_seed", "hash_bytes", "hash_file", "hash_json"]


def hash_bytes(data: bytes) -> str:
    """SHA-256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of key order and white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hash_bytes(text.encode("utf-8", "surrogatepass"))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derive_seed(seed: int, *parts: object) -> int:
    """A 63-bit seed for one use, from the recipe's seed and what the use is."""
    return int(hash_json([seed, *map(str, parts)])[:16], 16) >> 1
