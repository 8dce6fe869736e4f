"""How memory is kept, how much of it a piece of work needed at its height, and whether it was too much."""

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

from potstill.core.errors import PotstillError

__all__ = ["PeakMemory", "is_out_of_memory", "keep_freed_memory", "ran_out_of_memory"]

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_SAID = (
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "failed to map segment",
    "can't start new thread",  # for want of room for its stack
    "could not create a primitive",  # oneDNN, for want of room for the code that it makes
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_RESET_PEAK = "5"  # proc(5): the peak of resident memory starts from what is resident now


def keep_freed_memory() -> None:
    """Make the C library keep freed memory, and ask torch for huge pages; Linux with glibc only.

    By default glibc hands every large block back to the system, so that tensors of logits and activations
    are faulted in anew, page by page, each time that they are made: cross-entropy over 49,152 ids took six
    times as long, and a training step of SmolLM2-135M half as long again. torch reads the variable at its
    first allocation, so huge pages need a call before any tensor is made.
    """
    if not sys.platform.startswith("linux"):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


class PeakMemory:
    """The peak of this process's resident memory, and of a GPU's allocations, from its making on.

    What earlier work has freed goes back to the system first, so that it does not count. Where the system
    keeps no peak that can be set back (Linux does), that of resident memory is unknown.
    """

    def __init__(self) -> None:
        gc.collect()
        if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
            trim(0)
        try:
            _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
            self._was_reset = True
        except OSError:
            self._was_reset = False
        if (cuda := _cuda()) is not None:
            cuda.empty_cache()
            cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, int]:
        """`peak_memory_bytes` where it is known, `peak_gpu_memory_bytes` where a GPU was used."""
        found = {}
        if self._was_reset and (resident := _peak_resident_bytes()) is not None:
            found["peak_memory_bytes"] = resident
        if (cuda := _cuda()) is not None:
            found["peak_gpu_memory_bytes"] = int(cuda.max_memory_allocated())
        return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's own, torch's of a GPU or a CPU, the system's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which is too heavy to import for a name
        or (
            isinstance(error, RuntimeError | OSError | ImportError)
            and any(one in str(error) for one in _SAID)
        )
    )


def ran_out_of_memory(error: BaseException) -> PotstillError:
    """What a person is told of a step for which there was not enough."""
    return PotstillError(
        f"ran out of memory ({error or type(error).__name__})",
        expected="room for the model, and for the rows that go through it at once",
        mend="close other programs or take a machine with more memory; fewer tokens at once "
        "(max_tokens, batch_tokens), `quantize: nf4` or a smaller model need less. What was made is kept",
    )


def _peak_resident_bytes() -> int | None:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _cuda() -> Any:
    """torch.cuda where this process has used it; torch itself is too heavy to import for a figure."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
