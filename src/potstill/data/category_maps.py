"""Files that say which label a value stands for: a subject's category."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from potstill.core.errors import DataError

__all__ = ["read_category_map"]

_FORMS = "a .csv of two columns (value, label) under a line of names, or a .yaml or .json mapping"


def read_category_map(path: Path) -> dict[str, str]:
    """The label of each value. DataError for a file that is no such map, or gives a value two labels."""
    if not path.is_file():
        raise DataError("no such file of labels", where=str(path), expected=_FORMS)
    try:
        text = path.read_text(encoding="utf-8-sig")
        pairs = _table(text) if path.suffix.lower() == ".csv" else _mapping(text, path.suffix.lower())
    except (UnicodeDecodeError, ValueError, yaml.YAMLError, csv.Error) as error:
        raise DataError(f"cannot be read as labels ({error})", where=str(path), expected=_FORMS) from error
    found: dict[str, str] = {}
    for value, label in pairs:
        if found.setdefault(value, label) != label:
            raise DataError(
                f"{value!r} has two labels, {found[value]!r} and {label!r}",
                where=str(path),
                expected="one label a value",
            )
    if not found:
        raise DataError("holds no labels", where=str(path), expected=_FORMS)
    return found


def _table(text: str) -> list[tuple[str, str]]:
    rows = [row for row in csv.reader(text.splitlines(), strict=True) if row]
    if wrong := next((row for row in rows if len(row) != 2 or not all(map(str.strip, row))), None):
        raise ValueError(f"a line holds {wrong}")
    return [(value.strip(), label.strip()) for value, label in rows[1:]]


def _mapping(text: str, suffix: str) -> list[tuple[str, str]]:
    loaded: Any = json.loads(text) if suffix == ".json" else yaml.safe_load(text)
    if not isinstance(loaded, dict) or not all(isinstance(label, str) for label in loaded.values()):
        raise ValueError("it is no mapping from values to texts")
    return [(str(value), label) for value, label in loaded.items()]
