"""Calls that model text could make endless: a child process carries them out and is ended when time is up."""

import atexit
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any

from potstill.core.errors import DataError

__all__ = ["call_bounded"]

_START_TIMEOUT_S = 300.0
_CHILD_MODULE = "potstill.verifiers.child"
_MEMORY_MB = 4096
_NEEDED = (
    *("PATH", "HOME", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP"),
    *("LANG", "LC_ALL", "LC_CTYPE", "TZ"),
)


def call_bounded(call: str, *arguments: Any, timeout_s: float, memory_mb: int = _MEMORY_MB) -> Any:
    """Carry out a call in a child process; None when it takes longer or the process dies of it.

    The call is `symbolic`, `score` or a user's function, `file.py:name`, which has a process of its own. The
    libraries behind the first two evaluate some of what they are given: where the system allows it their
    process reads no files but Python's, starts no others and opens no connection; it has no keys from this
    process's environment. Safe in threads, which take turns. The time that the child needs to import its
    libraries does not count. DataError when it cannot import them, or from the call itself.
    """
    key = (call if ":" in call else "", memory_mb)
    with _lock:
        if key not in _workers:
            _workers[key] = _Worker(memory_mb, own_code=":" in call)
        answer = None
        try:
            answer = _workers[key].ask(json.dumps([call, arguments]), timeout_s)
        finally:
            # Also when interrupted: an answer still to come would be taken for that to the next request.
            if answer is None:
                _workers.pop(key).end()
    if answer is None:
        return None
    if "error" in answer:
        raise DataError(**answer["error"])
    return answer["result"]


class _Worker:
    """The child process and the thread that reads its lines, so that a wait for one can end."""

    def __init__(self, memory_mb: int, *, own_code: bool) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", _CHILD_MODULE, str(memory_mb), "own-code" if own_code else "libraries"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent to answer
            env=_environment(own_code=own_code),
            text=True,
            encoding="utf-8",
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def ask(self, request: str, timeout_s: float) -> dict[str, Any] | None:
        """{"result": ...} or {"error": ...}; None when the child was too slow or died of it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
            ready = self.lines.get(timeout=_START_TIMEOUT_S)
        except (OSError, queue.Empty):
            ready = ""
        if not ready:
            what = "the process that checks answers could not start"
            return {"error": {"what": what, "mend": "run `potstill doctor`"}}
        if refusal := json.loads(ready):
            return dict(refusal)
        try:
            line = self.lines.get(timeout=timeout_s)
        except queue.Empty:
            return None
        try:
            answer = json.loads(line)
        except ValueError:  # it died, or what it ran wrote in the place of an answer
            return None
        return answer if isinstance(answer, dict) else None

    def end(self) -> None:
        """End the child and what belongs to it."""
        if sys.platform == "win32":
            self.process.kill()
        else:  # with what a function has started; the child is its group's leader, and is not yet waited for
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    # What was still to be written has no reader any more.
                    continue


def _environment(*, own_code: bool) -> dict[str, str]:
    """The child's variables: all of this process's for the user's own code, else what Python needs to run."""
    # Threads of a linear algebra library would each take address space from what is granted.
    found = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if own_code:
        return {**os.environ, **found}
    return {name: value for name, value in os.environ.items() if name in _NEEDED} | {
        "PYTHONSAFEPATH": "1",
        **found,
    }


_lock = threading.Lock()
_workers: dict[tuple[str, int], _Worker] = {}


@atexit.register
def _end_worker() -> None:
    while _workers:
        _workers.popitem()[1].end()
