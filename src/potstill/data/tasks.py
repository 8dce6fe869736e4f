"""reasoning-gym's procedural tasks: entries by name, parameters and seed, and the library's own scores."""

import ast
import builtins
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from potstill.core.errors import DataError
from potstill.core.hashing import derive_seed

__all__ = ["TASK_PREFIX", "check_task", "import_reasoning_gym", "score_task_answer", "task_rows"]

TASK_PREFIX = "reasoning_gym:"
# Modules whose scorers put a model's text through eval(); a literal is all that they expect.
_EVALUATING_MODULES = (
    "algorithmic.string_insertion",
    "algorithmic.spiral_matrix",
    "algorithmic.binary_matrix",
    "games.n_queens",
)
# Scorers that put it through SymPy's parser, which evaluates it as Python.
_PARSING_TASKS = {
    "simple_integration",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "countdown",
}
_NAME = re.compile(r"[A-Za-z_]\w*")
_FORMULA = re.compile(r"[\w\s+\-*/^().,=|]*")
_TUPLE, _ITEMS = "__tuple__", "__items__"
_PARAMETERS = "task_parameters"


@functools.cache
def import_reasoning_gym() -> ModuleType:
    """The library, imported without pycosat where that is not installed: a C extension without wheels.

    Only the tasks that solve with it (zebra_puzzles) then fail, when they are used. The stand-in is visible
    to the library alone. Raises DataError when reasoning-gym itself is missing.
    """
    stand_in = importlib.util.find_spec("pycosat") is None
    if stand_in:
        module = ModuleType("pycosat")
        module.itersolve = module.solve = _no_solver  # type: ignore[attr-defined]  # a module made here
        sys.modules["pycosat"] = module
    try:
        importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise DataError(
            f"reasoning-gym cannot be imported ({error})", mend="python -m pip install reasoning-gym"
        ) from error
    finally:
        if stand_in:
            del sys.modules["pycosat"]
    for name in _EVALUATING_MODULES:
        vars(importlib.import_module(f"reasoning_gym.{name}"))["eval"] = ast.literal_eval
    return sys.modules["reasoning_gym"]


def _no_solver(*_: Any, **__: Any) -> Any:
    raise DataError(
        "this reasoning-gym task needs pycosat, which is not installed",
        mend="python -m pip install pycosat (it needs a C compiler), or take another task",
    )


def _create(name: str, parameters: Mapping[str, Any], size: int, seed: int) -> Any:
    library = import_reasoning_gym()
    known = importlib.import_module("reasoning_gym.factory").DATASETS
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise DataError(
            f"reasoning-gym has no task {name!r}",
            expected=f"one of its {len(known)} tasks",
            mend=f"did you mean {' or '.join(near)}?" if near else f"such as {', '.join(sorted(known)[:6])}",
        )
    accepted = [one.name for one in dataclasses.fields(known[name][1]) if one.name not in ("seed", "size")]
    if unknown := sorted(set(parameters) - set(accepted)):
        near = difflib.get_close_matches(unknown[0], accepted, n=1, cutoff=0.4)
        raise DataError(
            f"the task {name!r} has no parameter {unknown[0]!r}",
            expected=f"one of {', '.join(accepted)}",
            mend=f"did you mean {near[0]}?" if near else None,
        )
    try:
        return library.create_dataset(name, seed=seed, size=size, **parameters)
    except (AssertionError, TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in parameters.items()) or "none given"
        raise DataError(
            f"the task {name!r} refuses its parameters ({given}): {error or type(error).__name__}"
        ) from error


def check_task(name: str, parameters: Mapping[str, Any], size: int) -> None:
    """Raise DataError, with the nearest names, unless the task exists and takes these parameters."""
    _create(name, parameters, size, 0)


def task_rows(name: str, parameters: Mapping[str, Any], size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Entries as rows: question, answer (None where many are right), the entry's figures, and these as meta.

    The library's row i depends on seed + i, so that neighbouring seeds would share nearly all rows: the seed
    is hashed first.
    """
    data_set = _create(name, parameters, size, derive_seed(seed, "reasoning_gym", name) % 2**31)
    for number in range(size):
        entry = data_set[number]
        meta = {key: _to_json(value) for key, value in entry["metadata"].items() if key != "difficulty"}
        if parameters:
            meta[_PARAMETERS] = dict(parameters)
        yield {**meta, "question": entry["question"], "answer": entry["answer"], "meta": meta}


def score_task_answer(name: str, answer: str, reference: str | None, meta: Mapping[str, Any]) -> bool:
    """Whether the library's own scorer gives an answer full marks (1.0); `meta` is that of the row.

    Answers that the scorer would run as Python are refused unless they are formulas. Unbounded in time: some
    scorers compute what the answer says.
    """
    parameters = meta.get(_PARAMETERS, {})
    scorer = _scorer(name, json.dumps(parameters, sort_keys=True))
    if name in _PARSING_TASKS and not _is_formula(answer):
        return False
    metadata = {key: _from_json(value) for key, value in meta.items() if key != _PARAMETERS}
    try:
        return float(scorer(answer, {"answer": reference, "metadata": metadata})) >= 1.0
    except Exception:  # scorers were not written for any text; one that fails on it has not found it right
        return False


@functools.cache
def _scorer(name: str, parameters: str) -> Callable[[str, dict[str, Any]], float]:
    scorer: Callable[[str, dict[str, Any]], float] = _create(name, json.loads(parameters), 1, 0).score_answer
    return scorer


def _is_formula(answer: str) -> bool:
    names = _NAME.findall(answer)
    return (
        bool(_FORMULA.fullmatch(answer))
        and not re.search(r"\.\s*[A-Za-z_]", answer)
        and not any("__" in name or (hasattr(builtins, name) and name != "abs") for name in names)
    )


def _to_json(value: Any) -> Any:
    """`value` as JSON holds it; tuples and keys that are no strings are marked, as scorers need them."""
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {str(key): _to_json(item) for key, item in value.items()}
        return {_ITEMS: [[_to_json(key), _to_json(item)] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        items = [_to_json(item) for item in value]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or type(value) in (bool, int, float, str):
        return value
    return _to_json(value.item()) if hasattr(value, "item") else str(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if _TUPLE in value:
            return tuple(_from_json(item) for item in value[_TUPLE])
        if _ITEMS in value:
            return {_from_json(key): _from_json(item) for key, item in value[_ITEMS]}
        return {key: _from_json(item) for key, item in value.items()}
    return [_from_json(item) for item in value] if isinstance(value, list) else value
