"""The user's own verifier: loaded and called in the child process of `bounded`."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.verifiers.bounded import call_bounded
from potstill.verifiers.judgement import Judgement
from potstill.verifiers.settings import FunctionVerifier

__all__ = ["judge_by_function", "load_function"]

_LONGEST_NOTE = 300


def judge_by_function(record: Record, answer: str, verifier: FunctionVerifier) -> Judgement:
    """What the function says of an answer. `judged` is false where it failed, and `note` says how.

    Raises DataError where the function cannot be loaded.
    """
    asked = [message["content"] for message in record.messages if message["role"] == "user"]
    row = {
        "prompt": asked[-1] if asked else "",
        "messages": record.messages,
        "reference": record.reference,
        "meta": record.meta,
    }
    found = call_bounded(
        verifier.function,
        answer,
        row,
        timeout_s=verifier.timeout_s,
        memory_mb=verifier.memory_mb,
    )
    if not isinstance(found, dict):
        found = {"note": f"the verifier did not end within {verifier.timeout_s:g} s, or broke its process"}
    if "note" in found:
        return Judgement({"correct": False, "judged": False}, note=found["note"])
    value = found["value"]
    scores = {} if isinstance(value, bool) else {"score": float(value)}
    return Judgement({"correct": value >= 1, "judged": True}, scores)


def load_function(function: str) -> Callable[[str, Mapping[str, Any]], dict[str, Any]]:
    """The function, so wrapped that it gives {"value": ...} or, where it fails, {"note": ...}; in the child.

    Raises DataError where the file cannot be imported or has no such function.
    """
    place, _, name = function.rpartition(":")
    try:
        module = _module(place)
    except (Exception, SystemExit) as error:  # the user's module may raise what it likes
        raise DataError(
            f"the verifier's file cannot be imported: {type(error).__name__}: {error}", where=function
        ) from error
    called = getattr(module, name, None)
    if not callable(called):
        raise DataError(f"there is no function {name!r}", where=function, expected="def name(answer, row)")

    def judged(answer: str, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            value = called(answer, row)
            value = value.item() if hasattr(value, "item") else value  # a number of numpy's
        except (Exception, SystemExit) as error:
            return {"note": f"{type(error).__name__}: {error}"[:_LONGEST_NOTE]}
        if isinstance(value, bool) or (isinstance(value, int | float) and 0 <= value <= 1):
            return {"value": value}
        return {"note": f"it gave {value!r}"[:_LONGEST_NOTE] + "; expected True, False or a number in 0..1"}

    return judged


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    # What stands beside the file can be imported from it.
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"verifier_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
