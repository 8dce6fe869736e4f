"""The child process of `bounded`: answers requests on what was standard input, one JSON line each."""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from potstill.core.errors import PotstillError
from potstill.verifiers.sandbox_child import shut_in

__all__ = ["serve"]

_ORPHAN_TIMEOUT_S = 120


_loaded: dict[str, Callable[..., Any]] = {}


def _function(call: str) -> Callable[..., Any]:
    """The function behind a call, with the libraries it needs already imported."""
    if call == "symbolic":
        import math_verify  # noqa: F401  # imported before the clock starts

        from potstill.verifiers.math import symbolically_equal

        return symbolically_equal
    if ":" in call:
        from potstill.verifiers.function import load_function

        if call not in _loaded:
            _loaded[call] = load_function(call)
        return _loaded[call]
    from potstill.data.tasks import import_reasoning_gym, score_task_answer

    import_reasoning_gym()
    return score_task_answer


def _described(error: Exception) -> dict[str, str | None]:
    if isinstance(error, PotstillError):
        return {"what": error.what, "where": error.where, "expected": error.expected, "mend": error.mend}
    return {"what": f"the libraries that check answers cannot be used: {error}"}


def serve(memory_mb: int, *, own_code: bool) -> None:
    """Answer until the requests end: an empty object once the libraries are there, then the result.

    `own_code` says that the user's functions are called, which may do what they like; the libraries are kept
    from files, other processes and the network, since some evaluate what they are given.
    """
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    # What is printed here, or by a process that a function starts, must not get between the answers, and
    # nobody else may read the requests.
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if not own_code:
        shut_in(sys.path)

    def tell(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    for line in requests:
        call, arguments = json.loads(line)
        try:
            function = _function(call)
        except Exception as error:  # importing what the parent names runs any code
            tell({"error": _described(error)})
            continue
        tell({})
        if sys.platform != "win32":
            # Of use only when the parent is gone: it sees to the time itself.
            signal.alarm(_ORPHAN_TIMEOUT_S)
        try:
            tell({"result": function(*arguments)})
        except PotstillError as error:
            tell({"error": _described(error)})
        except Exception:
            # Text that the libraries cannot take is text that does not answer right.
            tell({"result": False})
        if sys.platform != "win32":
            signal.alarm(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]), own_code=sys.argv[2] == "own-code")
