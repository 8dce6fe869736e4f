"""A peak is that of the work since it was set back, not of what came before."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from potstill.core import memory
from potstill.core.memory import PeakMemory, is_out_of_memory

_SIZE_BYTES = 256 << 20


def _work() -> None:
    block = bytearray(_SIZE_BYTES)
    block[::4096] = bytes(len(block[::4096]))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system keeps no peak")
def test_the_peak_is_that_of_the_work_since_then() -> None:
    peak = PeakMemory()
    before = peak.read()["peak_memory_bytes"]
    _work()
    assert peak.read()["peak_memory_bytes"] - before > 0.9 * _SIZE_BYTES
    assert PeakMemory().read()["peak_memory_bytes"] - before < 0.5 * _SIZE_BYTES


def test_where_the_system_keeps_no_peak_it_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "such" / "file")
    assert "peak_memory_bytes" not in PeakMemory().read()


def test_memory_that_ran_out_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(MemoryError) as of_python:
        bytearray(2**62)
    for error in (of_torch.value, of_python.value, torch.OutOfMemoryError("CUDA out of memory")):
        assert is_out_of_memory(error)
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert is_out_of_memory(RuntimeError("can't start new thread"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone is told")
def test_freed_memory_is_kept_for_the_next_block_of_its_size() -> None:
    script = """
import resource, sys
from potstill.core.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(64 << 20)
    block[::4096] = bytes(len(block[::4096]))
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""

    def faults(how: str) -> int:
        call = [sys.executable, "-c", script, how]
        return int(subprocess.run(call, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < 0.1 * faults("given back")
