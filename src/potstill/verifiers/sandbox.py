"""Programs that a model wrote, run in a process that shuts itself in; see `sandbox_child` for how."""

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from potstill.core.errors import DataError

__all__ = ["Ran", "confinement", "run_program"]

# No packages of the user's, no folder of ours to import from, no files written beside modules.
_OPTIONS = ("-s", "-P", "-B", "-X", "utf8")
_CHILD = Path(__file__).with_name("sandbox_child.py")
_LONGEST_OUTPUT, _LONGEST_NOTE = 1 << 20, 300
_STARTING_S = 10.0


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program ended: whether it and its tests came to their end, what it printed, or why it did not.

    `confinement` names what shut it in: limits, files, processes and network.
    """

    finished: bool
    output: str
    note: str | None
    confinement: tuple[str, ...] = ()


def run_program(
    program: str, *, tests: str = "", given: str = "", timeout_s: float, memory_mb: int = 1024
) -> Ran:
    """Run Python code and then its tests in an empty folder of their own; `given` is the standard input.

    The process has limits and an environment with nothing of this one's, so no keys. Where the system allows
    it (`confinement`), it reads no files but the interpreter's and opens no connection. Raises DataError on
    a system without limits of processes (Windows).
    """
    if sys.platform == "win32":
        raise DataError(
            "code that a model wrote is run only where processes have limits",
            expected="Linux or macOS",
            mend="leave out the tasks whose answers are code, or run in WSL",
        )
    token = secrets.token_hex(16)
    request = {
        "program": program,
        "tests": tests,
        "token": token,
        "timeout_s": timeout_s,
        "memory_mb": memory_mb,
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as files:
        asked, stdin, stdout, stderr, result = (
            files.enter_context(tempfile.TemporaryFile()) for _ in range(5)
        )
        asked.write(json.dumps(request).encode("utf-8"))
        stdin.write(given.encode("utf-8", "replace"))
        for file in (asked, stdin):
            file.seek(0)
        process = subprocess.Popen(
            [sys.executable, *_OPTIONS, str(_CHILD), str(asked.fileno()), str(result.fileno())],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=folder,
            env=_environment(folder),
            pass_fds=(asked.fileno(), result.fileno()),
            start_new_session=True,
        )
        late = _wait(process, timeout_s)
        put_on, _, told = _read(result).partition("\n")
        finished = told.strip() == token and process.returncode == 0 and not late
        note = None
        if not finished:
            note = f"no end within {timeout_s:g} s" if late else _reason(process.returncode, _read(stderr))
        return Ran(finished, _read(stdout), note, tuple(json.loads(put_on)) if put_on else ())


@functools.cache
def confinement() -> tuple[str, ...]:
    """What shuts programs in on this system."""
    return run_program("", timeout_s=_STARTING_S).confinement


def _environment(folder: str) -> dict[str, str]:
    # Threads of a linear algebra library would each take address space; sets print in one order.
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **threads}


def _wait(process: "subprocess.Popen[Any]", timeout_s: float) -> bool:
    """Wait for the end; whether it had to be brought about, with all that the process had started."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return True
    finally:
        if process.poll() is None:  # too slow, or this wait was interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return False


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(_LONGEST_OUTPUT).decode("utf-8", "replace")


def _reason(code: int | None, errors: str) -> str:
    if code is not None and code < 0:
        names = {signal.SIGXCPU: "its CPU time was used up", signal.SIGXFSZ: "it wrote too large a file"}
        return names.get(signal.Signals(-code), f"ended by {signal.Signals(-code).name}")
    lines = errors.strip().splitlines()
    return (lines[-1] if lines else f"ended with code {code} before it came to its end")[:_LONGEST_NOTE]
