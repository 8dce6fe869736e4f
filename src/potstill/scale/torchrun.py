"""A train step in several processes: torchrun starts them, this one waits, and no process outlives it.

Started is the program (`python -m torch.distributed.run`), not its Python interface: its signal handlers
stay out of this process, what it says goes into a file, and by hand on several machines it is the same line.
"""

import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from potstill.core.environment import usable_cores
from potstill.core.errors import Interrupted, PotstillError, TrainingError
from potstill.core.events import Reporter
from potstill.core.step import StepContext
from potstill.scale.job import WORKER_MODULE, Failure, Job, Outcome, work_folder
from potstill.scale.settings import LOOPBACK, Torchrun, visible_gpus
from potstill.train import TrainSettings

__all__ = ["Beside", "HandedOver", "Training", "finished", "hand_over", "log_end"]

_LOG_FILE, _LINES_SHOWN = "torchrun.log", 40
_LISTEN_S, _END_S = 0.1, 30.0
_MEETING_FILE = "rendezvous"
# What lives on one machine need not say so every five seconds, into a file that grows by it.
_IN_A_FILE = "store_type=file,keep_alive_interval=3600"
# torchrun would else begin a server for its processes, at every address as well.
_LOOPBACK_ALONE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# Of gradients.
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
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


def hand_over(scale: Torchrun, settings: TrainSettings, context: StepContext, fingerprint: str) -> NoReturn:
    """Prepare a train step to be started by hand, and raise HandedOver."""
    job = Job.of(settings, context, scale.strategy, elsewhere=fingerprint).write()
    raise HandedOver(_line_for_a_shell(scale, job, fingerprint))


class Training:
    """A train step under way in processes of its own, from its newest checkpoint where there is one.

    They hold one end of a pipe, and this process the other: a byte asks them to stop at the next safe point,
    and when the pipe closes, as it does whatever ends this process, they end at once. They are no part of the
    terminal's group, whose Ctrl-C is for this process to pass on. `place`, from 0, is this training's among
    those that may run side by side, each with its own GPUs and its part of the cores.
    """

    def __init__(
        self, scale: Torchrun, settings: TrainSettings, context: StepContext, *, place: int = 0
    ) -> None:
        side_by_side = scale.parallel_steps > 1
        job = Job.of(settings, context, scale.strategy, elsewhere=None, side_by_side=side_by_side).write()
        Failure.take_all(context.folder)
        self._context = context
        self._log_path = work_folder(context.folder) / _LOG_FILE
        self._processes = Beside(_command(scale, job), _environment(scale, place), context, self._log_path)

    def outcome(self) -> Outcome | None:
        """What it gave back; None while it is under way.

        Raises Interrupted once the processes have made a checkpoint after the context's `stop` was set, and
        PotstillError for what ended them.
        """
        context = self._context
        if (code := self._processes.code()) is None:
            return None
        if (outcome := Outcome.read(context.folder)) is not None:
            return outcome
        failures = Failure.take_all(context.folder)
        if code == 0 or (context.stop.is_set() and not any(one.foreseen for one in failures)):
            raise Interrupted
        log_text = log_end(self._log_path, context)
        raise _explained(failures, log_text, code, self._log_path)

    def close(self) -> None:
        """End its processes where they run, and wait until none is left."""
        self._processes.close()


def log_end(path: Path, context: StepContext) -> str:
    """What the processes said; its end goes into the run's log."""
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines()[-_LINES_SHOWN:]:
        context.reporter.log(line)
    return text


def _explained(failures: Sequence[Failure], log_text: str, code: int, log_path: Path) -> PotstillError:
    if failures and failures[0].foreseen:
        return failures[0].error()
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


def _on_this_machine(job: Path) -> list[str]:
    """Where the processes of one machine meet: torchrun in a file, since its server has no address but all.

    Its processes meet at a port of LOOPBACK, where `potstill.scale.worker` listens (see `_LOOPBACK_ALONE`).
    """
    meeting = job.parent / _MEETING_FILE
    return [f"--rdzv-conf={_IN_A_FILE}", f"--rdzv-endpoint={meeting}", f"--local-addr={LOOPBACK}"]


def _command(scale: Torchrun, job: Path) -> list[str]:
    """How torchrun runs on this machine alone, at a port that the system chooses."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *_rendezvous(scale),
        f"--rdzv-id={secrets.token_hex(8)}",
        *_on_this_machine(job),
        *("--module", WORKER_MODULE, str(job)),
    ]


def _line_for_a_shell(scale: Torchrun, job: Path, fingerprint: str) -> str:
    """What each machine runs: with several, the first one's name is in MASTER_ADDR."""
    threads = f"$(( $(nproc) < {scale.nproc_per_node} ? 1 : $(nproc) / {scale.nproc_per_node} ))"
    settings = {"OMP_NUM_THREADS": f'"${{OMP_NUM_THREADS:-{threads}}}"'}
    launcher = [shlex.quote(sys.executable), "-P", "-m", "torch.distributed.run", *_rendezvous(scale)]
    if scale.nnodes == 1:
        settings |= _LOOPBACK_ALONE
        settings |= {name: f'"${{{name}:-{_loopback_interface()}}}"' for name in _INTERFACES}
        meeting = ['--rdzv-id="$$"', *map(shlex.quote, _on_this_machine(job))]
    else:
        place = f"${{MASTER_ADDR:?set it to the name of the first machine}}:${{MASTER_PORT:-{_PORT}}}"
        meeting = [f'--rdzv-id="${{SLURM_JOB_ID:-{fingerprint[:12]}}}"', f'--rdzv-endpoint="{place}"']
    worker = ["--module", WORKER_MODULE, shlex.quote(str(job))]
    return " ".join([*map("=".join, settings.items()), *launcher, *meeting, *worker])


def _loopback_interface() -> str:
    return "lo0" if sys.platform == "darwin" else "lo"


def _environment(scale: Torchrun, place: int) -> Mapping[str, str]:
    ours = {
        # torchrun would give each process one thread.
        "OMP_NUM_THREADS": str(max(1, usable_cores() // (scale.nproc_per_node * scale.parallel_steps))),
        **dict.fromkeys(_INTERFACES, _loopback_interface()),
    }
    made = {**ours, **os.environ, **_LOOPBACK_ALONE}
    if scale.parallel_steps > 1 and (gpus := visible_gpus()):
        first = place * scale.nproc_per_node
        made["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + scale.nproc_per_node])
    return made


class Beside:
    """A step's processes beside this one.

    They hold one end of a pipe, and this process the other: a byte asks them to stop at the next safe point,
    and when the pipe closes, as it does whatever ends this process, they end at once. They are no part of the
    terminal's group, whose Ctrl-C is for this process to pass on.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], context: StepContext, log_path: Path
    ) -> None:
        self._stop, self._asked = context.stop, False
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=_shown(context.reporter),
                stderr=log,
                # What lies in the user's folder is no module of ours.
                env={"PYTHONSAFEPATH": "1", **environment},
                start_new_session=True,
            )

    def code(self) -> int | None:
        """The exit code of the first of them; None, after a moment, while it runs. A stop is passed on."""
        try:
            return self._process.wait(_LISTEN_S)
        except subprocess.TimeoutExpired:
            if self._stop.is_set() and not self._asked:
                self._asked = True
                assert self._process.stdin is not None
                with suppress(BrokenPipeError):
                    os.write(self._process.stdin.fileno(), b"s")
            return None

    def close(self) -> None:
        """End them where they run, and wait until none is left."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _shown(reporter: Reporter) -> Any:
    """Where the first process shows what this one would show itself."""
    stream = {"json": sys.stdout, "quiet": None}.get(reporter.display, reporter.stream)
    try:
        return subprocess.DEVNULL if stream is None else stream.fileno()
    except OSError:  # a stream that is no file; the log has all lines
        return subprocess.DEVNULL
