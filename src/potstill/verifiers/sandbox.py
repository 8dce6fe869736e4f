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
import time
from collections.abc import Iterator
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
_FOLDER_BYTES, _FOLDER_ENTRIES = 256 << 20, 10_000
_LOOK_S = 0.2  # between two looks at how full the folder is


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
    with _working_folder() as folder, contextlib.ExitStack() as files:
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
            env=_environment(str(folder)),
            pass_fds=(asked.fileno(), result.fileno()),
            start_new_session=True,
        )
        ended_for = _wait(process, folder, timeout_s)
        put_on, _, told = _read(result).partition("\n")
        finished = told.strip() == token and process.returncode == 0 and ended_for is None
        note = None if finished else ended_for or _reason(process.returncode, _read(stderr))
        return Ran(finished, _read(stdout), note, _names(put_on))


@functools.cache
def confinement() -> tuple[str, ...]:
    """What shuts programs in on this system."""
    return run_program("", timeout_s=_STARTING_S).confinement


def _environment(folder: str) -> dict[str, str]:
    # Threads of a linear algebra library would each take address space; sets print in one order.
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **threads}


@contextlib.contextmanager
def _working_folder() -> Iterator[Path]:
    """An empty folder, gone afterwards whatever a program has made of it."""
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        # What lies deep is moved up, so that there is no depth at which this would fail.
        while folders := _only_folders(folder):
            for outer in folders:
                for inner in _only_folders(outer):
                    inner.rename(folder / secrets.token_hex(16))
                outer.rmdir()
        folder.rmdir()


def _only_folders(folder: Path) -> list[Path]:
    """The folders in a folder, opened up as it is; all else in it is removed."""
    folder.chmod(0o700)
    folders = []
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)  # to be moved as well
            folders.append(path)
        else:
            path.unlink()
    return folders


def _wait(process: "subprocess.Popen[Any]", folder: Path, timeout_s: float) -> str | None:
    """Wait for the end; why it had to be brought about, with all that the process had started, if it had."""
    end = time.monotonic() + timeout_s
    try:
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(left, _LOOK_S))
                return None
            if _is_overfull(folder):
                return f"it wrote more than {_FOLDER_BYTES >> 20} MB, or {_FOLDER_ENTRIES:,} files"
        return f"no end within {timeout_s:g} s"
    finally:
        # Too slow, or this wait was interrupted, or it left others behind where it can start any.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_overfull(folder: Path) -> bool:
    """Whether there is more in a folder than a program needs; what vanishes meanwhile does not count."""
    folders, size, count = [str(folder)], 0, 0
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                count += 1
                if count > _FOLDER_ENTRIES:
                    return True
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
    return size > _FOLDER_BYTES


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(_LONGEST_OUTPUT).decode("utf-8", "replace")


def _names(line: str) -> tuple[str, ...]:
    """What shuts the program in, as it says itself; nothing where it has written over that."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _reason(code: int | None, errors: str) -> str:
    if code is not None and code < 0:
        names = {signal.SIGXCPU: "its CPU time was used up", signal.SIGXFSZ: "it wrote too large a file"}
        try:
            ended_by = signal.Signals(-code)
        except ValueError:  # most of the real-time signals have no name
            return f"ended by signal {-code}"
        return names.get(ended_by, f"ended by {ended_by.name}")
    lines = errors.strip().splitlines()
    return (lines[-1] if lines else f"ended with code {code} before it came to its end")[:_LONGEST_NOTE]
