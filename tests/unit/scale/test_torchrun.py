"""What is told of processes that failed, and which GPUs and cores those have that run at once."""

import time
from pathlib import Path

import pytest

from potstill.core.errors import RecipeError, TrainingError
from potstill.scale.job import Failure
from potstill.scale.settings import Torchrun, check_processes
from potstill.scale.torchrun import _environment, _explained

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


@pytest.mark.parametrize(("visible", "second"), [(None, "2,3"), ("7,5,3,1", "3,1")])
def test_each_training_of_several_at_once_has_gpus_of_its_own_and_its_part_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, second: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    at_once = Torchrun(engine="torchrun", nproc_per_node=2, parallel_steps=2)
    made = [_environment(at_once, place) for place in range(2)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in made] == [
        ",".join((visible or "0,1,2,3").split(",")[:2]),
        second,
    ]
    assert [one["OMP_NUM_THREADS"] for one in made] == ["4", "4"]
    alone = _environment(Torchrun(engine="torchrun", nproc_per_node=2), 0)
    assert alone.get("CUDA_VISIBLE_DEVICES") == visible


def test_trainings_at_once_that_have_no_gpu_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    at_once = Torchrun(engine="torchrun", nproc_per_node=2, parallel_steps=2)
    with pytest.raises(RecipeError, match="2 steps at once of 2 processes, and this machine has 3 GPUs"):
        check_processes(at_once, None, elsewhere=False)
    check_processes(at_once, "cpu", elsewhere=False)


def test_a_quantised_student_is_divided_nowhere() -> None:
    parts = Torchrun(engine="torchrun", nproc_per_node=2, strategy="fsdp2")
    with pytest.raises(RecipeError, match="a student in nf4 cannot be divided"):
        check_processes(parts, "cpu", elsewhere=True, quantized="nf4")
    check_processes(parts, "cpu", elsewhere=False)
    whole = Torchrun(engine="torchrun", nproc_per_node=2)
    check_processes(whole, "cpu", elsewhere=False, quantized="nf4")
