"""What all benchmarks say beside their figures (when, where, with what), and how they print them."""

import argparse
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata, util
from typing import Any

__all__ = ["argument_parser", "show", "surroundings"]

_LOAD_BEFORE = round(os.getloadavg()[0], 1)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of what every benchmark takes: --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def surroundings(*packages: str) -> dict[str, Any]:
    """Date, machine, its load before the benchmark began, and versions of packages that are installed."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "load_before": _LOAD_BEFORE,
    }
    if packages:
        found["versions"] = {name: metadata.version(name) for name in packages if util.find_spec(name)}
    return found


def show(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print findings as one JSON object, or a line each."""
    if as_json:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    for key, value in found.items():
        print(f"{key:{width}} {json.dumps(value)}")
