"""The solver engine: a Python function that writes responses."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import StringConstraints

from potstill.core.errors import EngineError
from potstill.core.hashing import hash_file
from potstill.core.records import Record
from potstill.core.settings import Settings
from potstill.teachers.protocol import Answer, Capabilities, Request, RequestError

__all__ = ["SolverModel", "SolverTeacher"]

_CONCURRENCY = 8


class SolverModel(Settings):
    """A Python function `module:function` that is given a Record and returns the raw response.

    The module is looked for where Python imports from, then in the working folder. Its source file is what
    the solver is known by; what it imports is not looked at.
    """

    engine: Literal["solver"]
    function: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]

    def content(self) -> dict[str, str]:
        """The hash of the module's source."""
        return {"source": hash_file(self.source())}

    def source(self) -> Path:
        """The module's file. Raises EngineError when there is none."""
        module = self.function.partition(":")[0]
        try:
            with _working_folder_last():
                spec = importlib.util.find_spec(module)
        except ImportError as error:
            raise self._missing(f"its package cannot be imported ({error})") from error
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            raise self._missing(f"there is no module {module!r}")
        return Path(spec.origin)

    def resolve(self) -> Callable[[Record], str]:
        """The function itself. Raises EngineError when it cannot be imported or is none."""
        self.source()
        module, _, name = self.function.partition(":")
        try:
            with _working_folder_last():
                found = getattr(importlib.import_module(module), name, None)
        except Exception as error:  # a user's module may fail in any way while it is imported
            raise self._missing(f"its module fails on import ({type(error).__name__}: {error})") from error
        if not callable(found):
            raise self._missing(f"the module {module!r} has no function {name!r}")
        solver: Callable[[Record], str] = found
        return solver

    def _missing(self, what: str) -> EngineError:
        return EngineError(
            what,
            where=f"solver {self.function}",
            expected="module:function, importable here: given a Record, it returns the response's text",
            mend="check the spelling; run where the module's file or package lies, or install it",
        )


@contextmanager
def _working_folder_last() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


class SolverTeacher:
    """Answers by calling the function; what it raises is a failure of that row."""

    def __init__(self, settings: SolverModel) -> None:
        self._function, self._solve = settings.function, settings.resolve()
        self.identity = f"{settings.function}@{settings.content()['source'][:16]}"
        self.capabilities = Capabilities(
            "record", token_ids=False, logprobs=0, full_logits=False, deterministic=True
        )
        self.concurrency = _CONCURRENCY
        self.sampling: dict[str, Any] = {}
        self.renderer = None

    async def answer(self, request: Request) -> Answer:
        """The function's text for the request's record."""
        assert request.record is not None, "a solver is asked with the record"
        try:
            response = self._solve(request.record)
        except Exception as error:  # whatever a user's function raises concerns this row
            raise RequestError(
                f"the solver {self._function} failed: {type(error).__name__}: {error}", blames_row=True
            ) from error
        if not isinstance(response, str):
            raise RequestError(
                f"the solver {self._function} returned {type(response).__name__}, not text", blames_row=True
            )
        return Answer(response, "stop")

    async def close(self) -> None:
        """Nothing is held."""
