"""Files of rows, as users bring them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Iterable[Any]) -> str:
    """Write rows as JSONL; gives the path as settings take it."""
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)
