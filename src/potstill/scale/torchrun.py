"""A train step in several processes: torchrun starts them, this one waits, and no process outlives it.

Started is the program (`python -m torch.distributed.run`), not its Python interface: its signal handlers
stay out of this process, what it says goes into a file, and by hand on several machines it is the same line.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from potstill.core.errors import Interrupted, PotstillError, TrainingError
from potstill.core.events import Reporter
from potstill.core.step import StepContext
from potstill.scale.job import Failure, Job, Outcome, work_folder
from potstill.scale.settings import Torchrun
from potstill.train import TrainSettings

__all__ = ["HandedOver", "finished", "train"]

_LOG_FILE, _LINES_SHOWN = "torchrun.log", 40
_LISTEN_S, _END_S = 0.1, 30.0
_WORKER = "potstill.scale.worker"
_LOOPBACK = "127.0.0.1"
_PORT = 29500  # where PyTorch's own tools meet
# torchrun's summary of a process that failed.
_ENDED = re.compile(r"^\s*rank\s*:\s*(\d+).*\n\s*exitcode\s*:\s*(-?\d+)", re.MULTILINE)


class HandedOver(Interrupted):
    """A train step is to be started by hand: `command` is what each machine runs."""

    def __init__(self, command: str) -> None:
        super().__init__(command)
        self.command = command


def finished(step_folder: Path) -> Outcome | None:
    """What a training in several processes gave back that ended without being sealed, else None."""
    return Outcome.read(step_folder)


def train(
    scale: Torchrun, settings: TrainSettings, context: StepContext, *, elsewhere: str | None = None
) -> Outcome:
    """Carry out a train step in processes of its own, from its newest checkpoint where there is one.

    With `elsewhere`, the step's fingerprint, it is prepared alone. Raises HandedOver then, Interrupted once
    the processes have made a checkpoint after `context.stop` was set, and PotstillError for what ended them.
    """
    job = Job.of(settings, context, elsewhere=elsewhere).write()
    if elsewhere is not None:
        raise HandedOver(_line_for_a_shell(scale, job, elsewhere))
    Failure.take_all(context.folder)
    log_path = work_folder(context.folder) / _LOG_FILE
    with log_path.open("wb") as log:
        code = _run(_command(scale, job), scale, context, log)
    if (outcome := Outcome.read(context.folder)) is not None:
        return outcome
    failures = Failure.take_all(context.folder)
    if code == 0 or (context.stop.is_set() and not any(one.foreseen for one in failures)):
        raise Interrupted
    log_text = log_path.read_text(encoding="utf-8", errors="replace")
    for line in log_text.splitlines()[-_LINES_SHOWN:]:
        context.reporter.log(line)
    raise _explained(failures, log_text, code, log_path)


def _explained(failures: Sequence[Failure], log_text: str, code: int, log_path: Path) -> PotstillError:
    if failures and failures[0].foreseen:
        told = failures[0]
        return PotstillError(told.what, where=told.where, expected=told.expected, mend=told.mend)
    # A process that was killed counts before the others, which fail because it no longer answers.
    by_signal = [
        (int(rank), -int(ended))
        for rank, ended in _ENDED.findall(log_text)
        if int(ended) < 0 and -int(ended) != signal.SIGTERM
    ]
    if by_signal:
        rank, number = by_signal[0]
        what = f"process {rank} of the training was ended by {signal.Signals(number).name}"
        if number == signal.SIGKILL:
            what += ", as the system does where memory runs out"
    elif failures:
        what = f"process {failures[0].rank} of the training failed: {failures[0].what}"
    else:
        what = f"torchrun ended with code {code}"
    return TrainingError(
        what, where=str(log_path), mend="look there; the same command goes on after the last checkpoint"
    )


def _rendezvous(scale: Torchrun) -> list[str]:
    return [f"--nnodes={scale.nnodes}", f"--nproc-per-node={scale.nproc_per_node}", "--rdzv-backend=c10d"]


def _command(scale: Torchrun, job: Path) -> list[str]:
    """How torchrun runs on this machine alone, at a port that the system chooses."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *_rendezvous(scale)]
    return [
        *launcher,
        f"--rdzv-endpoint={_LOOPBACK}:0",
        f"--local-addr={_LOOPBACK}",
        "--module",
        _WORKER,
        str(job),
    ]


def _line_for_a_shell(scale: Torchrun, job: Path, fingerprint: str) -> str:
    """What each machine runs: with several, the first one's name is in MASTER_ADDR."""
    threads = f"$(( $(nproc) < {scale.nproc_per_node} ? 1 : $(nproc) / {scale.nproc_per_node} ))"
    launcher = [shlex.quote(sys.executable), "-P", "-m", "torch.distributed.run", *_rendezvous(scale)]
    if scale.nnodes == 1:
        meeting = [f"--rdzv-endpoint={_LOOPBACK}:0", f"--local-addr={_LOOPBACK}"]
    else:
        place = f"${{MASTER_ADDR:?set it to the name of the first machine}}:${{MASTER_PORT:-{_PORT}}}"
        meeting = [f'--rdzv-id="${{SLURM_JOB_ID:-{fingerprint[:12]}}}"', f'--rdzv-endpoint="{place}"']
    worker = ["--module", _WORKER, shlex.quote(str(job))]
    return " ".join([f'OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"', *launcher, *meeting, *worker])


def _environment(scale: Torchrun) -> Mapping[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    ours = {
        # torchrun would give each process one thread.
        "OMP_NUM_THREADS": str(max(1, cores // scale.nproc_per_node)),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        # What lies in the user's folder is no module of ours.
        "PYTHONSAFEPATH": "1",
    }
    return {**ours, **os.environ}


def _run(command: Sequence[str], scale: Torchrun, context: StepContext, log: IO[bytes]) -> int:
    """Run it until no process is left, and give its exit code.

    Its processes hold one end of a pipe, and this one the other: a byte asks them to stop at the next safe
    point, and when the pipe closes, as it does whatever ends this process, they end at once. They are no part
    of the terminal's group, whose Ctrl-C is for this process to pass on.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=_shown(context.reporter),
        stderr=log,
        env=_environment(scale),
        start_new_session=True,
    )
    assert process.stdin is not None
    asked = False
    try:
        while True:
            try:
                return process.wait(_LISTEN_S)
            except subprocess.TimeoutExpired:
                if context.stop.is_set() and not asked:
                    asked = True
                    with suppress(BrokenPipeError):
                        os.write(process.stdin.fileno(), b"s")
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _shown(reporter: Reporter) -> Any:
    """Where the first process shows what this one would show itself."""
    stream = {"json": sys.stdout, "quiet": None}.get(reporter.display, reporter.stream)
    try:
        return subprocess.DEVNULL if stream is None else stream.fileno()
    except OSError:  # a stream that is no file; the log has all lines
        return subprocess.DEVNULL
