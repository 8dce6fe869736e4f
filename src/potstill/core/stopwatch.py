"""How long a step has taken, over all attempts at it."""

import _thread
import math
import threading
import time
from contextlib import suppress
from pathlib import Path

from potstill.core.store import write_atomically

__all__ = ["Stopwatch"]

_FILE = "seconds"


class Stopwatch:
    """Runs from its making until it is closed, on top of what earlier attempts took.

    The sum lies in the step's scratch folder. It is written once in `beat_seconds`, so that a kill loses no
    more than that.
    """

    def __init__(self, scratch: Path, beat_seconds: float = 5.0) -> None:
        self._file = scratch / _FILE
        self._earlier_seconds = _seconds_in(self._file)
        self._started = time.monotonic()
        self._beat_seconds = beat_seconds
        self._closed, self._writing = threading.Event(), threading.Lock()
        # `Thread.start` waits for ever for a thread that has no memory to begin with.
        with suppress(RuntimeError, MemoryError):
            _thread.start_new_thread(self._beat, ())

    @property
    def seconds(self) -> float:
        """What this attempt and those before it have taken by now."""
        return self._earlier_seconds + time.monotonic() - self._started

    def close(self) -> None:
        """Write the sum for the next attempt, and nothing after that."""
        with self._writing:
            if not self._closed.is_set():
                self._closed.set()
                self._write()

    def _beat(self) -> None:
        while not self._closed.wait(self._beat_seconds):
            with self._writing:
                if not self._closed.is_set():
                    self._write()

    def _write(self) -> None:
        with suppress(OSError):  # a full disk ends the step where its own files are written
            write_atomically(self._file, f"{self.seconds:.3f}")


def _seconds_in(file: Path) -> float:
    try:
        seconds = float(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0
    return seconds if 0 < seconds < math.inf else 0.0
