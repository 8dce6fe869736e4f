"""The child process of `bounded`: answers requests on standard input, one JSON line each."""

import json
import signal
import sys
from collections.abc import Callable
from typing import Any

from potstill.core.errors import PotstillError

__all__ = ["serve"]

_MEMORY_BYTES = 4 << 30
_ORPHAN_TIMEOUT_S = 120


def _function(call: str) -> Callable[..., bool]:
    """The function behind a call, with the libraries it needs already imported."""
    if call == "symbolic":
        import math_verify  # noqa: F401  # imported before the clock starts

        from potstill.verifiers.math import symbolically_equal

        return symbolically_equal
    from potstill.data.tasks import import_reasoning_gym, score_task_answer

    import_reasoning_gym()
    return score_task_answer


def _described(error: Exception) -> dict[str, str | None]:
    if isinstance(error, PotstillError):
        return {"what": error.what, "where": error.where, "expected": error.expected, "mend": error.mend}
    return {"what": f"the libraries that check answers cannot be used: {error}"}


def serve() -> None:
    """Answer until standard input ends: an empty object once the libraries are there, then the result."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    # Whatever the libraries print must not get between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr

    def tell(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    for line in sys.stdin:
        call, arguments = json.loads(line)
        try:
            function = _function(call)
        except Exception as error:  # importing what the parent names runs any code
            tell(_described(error))
            continue
        tell({})
        if sys.platform != "win32":
            # Of use only when the parent is gone: it sees to the time itself.
            signal.alarm(_ORPHAN_TIMEOUT_S)
        try:
            tell(bool(function(*arguments)))
        except PotstillError as error:
            tell(_described(error))
        except Exception:
            # Text that the libraries cannot take is text that does not answer right.
            tell(False)
        if sys.platform != "win32":
            signal.alarm(0)


if __name__ == "__main__":
    serve()
