"""What is told of processes that failed."""

import time
from pathlib import Path

import pytest

from potstill.core.errors import TrainingError
from potstill.scale.job import Failure
from potstill.scale.torchrun import _explained

# As torchrun writes it where a process was killed and the other then found nobody to talk to.
SUMMARY = """
Failures:
[1]:
  time      : 2026-01-01_00:00:01
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 11)
  error_file: <N/A>
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 12)
  error_file: <N/A>
"""
LOG = Path("torchrun.log")
FOLLOWED = Failure(rank=0, time=time.time(), foreseen=False, what="RuntimeError: connection closed by peer")


@pytest.mark.parametrize(
    ("failures", "log", "told"),
    [
        (
            [FOLLOWED],
            SUMMARY.format(code=-9),
            "process 1 of the training was ended by SIGKILL, as the system",
        ),
        ([FOLLOWED], SUMMARY.format(code=-11), "process 1 of the training was ended by SIGSEGV"),
        # torchrun ends the others itself, by SIGTERM.
        ([FOLLOWED], SUMMARY.format(code=-15), "process 0 of the training failed: RuntimeError: connection"),
        ([], "ImportError: libcudart.so", "torchrun ended with code 1"),
    ],
)
def test_the_process_that_failed_first_is_named_with_the_log(
    failures: list[Failure], log: str, told: str
) -> None:
    error = _explained(failures, log, 1, LOG)
    assert isinstance(error, TrainingError)
    assert error.what.startswith(told)
    assert error.where == str(LOG)
