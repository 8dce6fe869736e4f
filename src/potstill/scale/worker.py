"""A process that carries out a step beside the run: python -m potstill.scale.worker JOB.

Of a training torchrun starts several; one that asks replicas on Ray is alone.
"""

import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.core.environment import prepare_libraries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from potstill.core.step import StepContext
    from potstill.scale.job import Job

__all__ = ["main"]

_STOPPED = 128 + signal.SIGTERM  # where nobody waits who knows of it: for the script that started it by hand


def main() -> None:
    """Carry out the job's step with all other processes; the first one tells of it and leaves the outcome."""
    started, path = time.monotonic(), Path(sys.argv[1])
    rank, stop = int(os.environ.get("RANK", "0")), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # Before anything else is imported: who started this process may be gone already.
    if json.loads(path.read_bytes())["elsewhere"] is None:
        threading.Thread(target=_listen, args=(stop, rank), daemon=True).start()
    prepare_libraries()
    if rank != 0:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # one process speaks to people
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a TextIOWrapper, as in the command line
    code = _work(path, rank, stop, started)
    if "ray" in sys.modules:  # whose own clean-up waits for a cluster that may be gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _listen(stop: threading.Event, rank: int) -> None:
    """Hear the process that started this one, at the other end of standard input.

    A byte there asks for a stop, for which one process is enough, since all agree on it. When it closes, that
    process has ended or breaks off, and so does this one.
    """
    if rank == 0:
        while os.read(0, 1):
            stop.set()
    else:
        poll = select.poll()
        poll.register(0, 0)  # for its closing alone, which is always told
        poll.poll()
    os._exit(1)


def _work(path: Path, rank: int, stop: threading.Event, started: float) -> int:
    from potstill.core.errors import Interrupted
    from potstill.core.events import Reporter
    from potstill.core.memory import PeakMemory
    from potstill.scale.job import Failure, Job, Outcome
    from potstill.train import TrainSettings

    job = Job.read(path)
    reporter = Reporter("quiet")
    if rank == 0:
        reporter = Reporter(job.display, job.events, sys.stdout, job.log, label=job.label)
    context = job.context(reporter, stop)
    alone: AbstractContextManager[None] = nullcontext()
    if rank == 0 and job.elsewhere is not None:
        alone = _alone(job.elsewhere, context)
    code = 0
    with ExitStack() as meeting:  # behind whoever leaves the group
        try:
            meeting.enter_context(_meeting(rank))
            with alone, _replicas(job, context):
                memory = PeakMemory()
                run = importlib.import_module(f"potstill.{context.kind}").run
                more = (job.strategy,) if isinstance(job.settings, TrainSettings) else ()
                result = run(job.settings, context, *more)
                if rank == 0:
                    outcome = Outcome(result=result, seconds=time.monotonic() - started, peaks=memory.read())
                    outcome.write(job.folder)
        except Interrupted:
            code = 0 if job.elsewhere is None else _STOPPED
        except Exception as error:  # whatever it is, it ends the step, and is told there
            traceback.print_exc()
            Failure.of(error, rank).write(job.folder)
            return 1
        _leave_the_group()
    return code


@contextmanager
def _alone(fingerprint: str, context: "StepContext") -> "Iterator[None]":
    """The right to make the step, and the count of the time that it takes, where no run does both."""
    from potstill.core.stopwatch import Stopwatch
    from potstill.core.store import Store

    def say(pid: int | None) -> None:
        context.reporter.say("another run makes this now")

    lock = Store(context.cache_folder).lock(fingerprint, on_wait=say)
    with lock, closing(Stopwatch(context.scratch)):
        yield


@contextmanager
def _meeting(rank: int) -> "Iterator[None]":
    """Where the processes of one machine find each other: a store of the first one's, on loopback alone.

    Left to itself torch would have that store listen on every interface.
    """
    from potstill.scale.settings import LOOPBACK

    said = (os.environ.get("MASTER_ADDR"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE"))
    if said != (LOOPBACK, "False"):  # several machines, or no torchrun
        yield
        return
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # they join a store, and begin none
    if rank != 0:
        yield
        return
    from torch import distributed

    # The port that torchrun found free; the store closes it.
    port = int(os.environ["MASTER_PORT"])
    listening = socket.create_server((LOOPBACK, port), backlog=socket.SOMAXCONN).detach()
    store = distributed.TCPStore(  # type: ignore[attr-defined]  # public, and not in torch's own list
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening
    )
    yield
    del store


@contextmanager
def _replicas(job: "Job", context: "StepContext") -> "Iterator[None]":
    """Where the step finds copies of its models, if they are to work on Ray."""
    if job.ray is None:
        yield
        return
    from potstill.scale.ray_pool import RayReplicas

    uses_gpu = any(device is None or device.startswith("cuda") for device in job.devices)
    with closing(RayReplicas(job.ray, context, uses_gpu=uses_gpu)) as replicas:
        context.replicas = replicas
        yield


def _leave_the_group() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
