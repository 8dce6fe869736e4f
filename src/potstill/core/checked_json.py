"""JSON that knows when it is damaged: an object holds the hash of all that is beside it."""

import json
from collections.abc import Mapping
from typing import Any

from potstill.core.hashing import hash_bytes

__all__ = ["DamagedJsonError", "checked_json", "read_checked_json"]

_CHECKSUM = "checksum"


class DamagedJsonError(ValueError):
    """The text is no JSON object, or not the one that was written."""


def checked_json(value: Mapping[str, Any], *, indent: int | None = None) -> str:
    """A JSON text of an object, with its checksum as the last key."""
    assert _CHECKSUM not in value
    # Keys that are no texts become such, tuples become lists: what is hashed is what will be read.
    as_read = json.loads(json.dumps(value, ensure_ascii=False))
    return json.dumps({**as_read, _CHECKSUM: _checksum(as_read)}, indent=indent, ensure_ascii=False)


def read_checked_json(data: bytes) -> dict[str, Any]:
    """The object of a text in UTF-8; one without a checksum is taken as it is. DamagedJsonError otherwise."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedJsonError(f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise DamagedJsonError(f"no JSON object but {type(value).__name__}")
    if (checksum := value.pop(_CHECKSUM, None)) is not None and checksum != _checksum(value):
        raise DamagedJsonError("its checksum is another")
    return value


def _checksum(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hash_bytes(text.encode("utf-8", "surrogatepass"))
