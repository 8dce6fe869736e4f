"""A step whose models' copies work on Ray: one process asks them, and this one waits for it.

Ray sets signal handlers and hooks of its own, and ends the process that uses it where its cluster is gone. So
the step runs in a process beside the run, as a training under torchrun does, and only that one imports Ray.
"""

import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TypeGuard

from potstill.core.errors import EngineError, Interrupted
from potstill.core.settings import ModelRef, Settings, references
from potstill.core.step import StepContext
from potstill.generate import GenerateSettings
from potstill.models import TransformersModel
from potstill.scale.job import WORKER_MODULE, Failure, Job, Outcome, ReplicatedSettings, work_folder
from potstill.scale.settings import Ray
from potstill.scale.torchrun import Beside, log_end
from potstill.teachers import VllmModel
from potstill.teachers.replicated import is_replicated

__all__ = ["ask_replicas", "has_replicas", "ray_environment"]

_LOG_FILE = "ray.log"


def has_replicas(settings: Settings, context: StepContext) -> TypeGuard[ReplicatedSettings]:
    """Whether a step asks a model of which there can be copies: one that works here and not on a server.

    `generate` asks servers through copies as well, each with requests of its own in flight.
    """
    if not isinstance(settings, ReplicatedSettings):
        return False
    models = [context.model(one) for _, one in references(settings) if isinstance(one, ModelRef)]
    if isinstance(settings, GenerateSettings):
        return any(map(is_replicated, models))
    return any(isinstance(model, TransformersModel | VllmModel) for model in models)


def ask_replicas(scale: Ray, settings: ReplicatedSettings, context: StepContext) -> Outcome:
    """Carry out a step that asks copies of its models.

    Raises Interrupted once `context.stop` was set and the step has stopped, and PotstillError for what ended
    it: all that was answered or sealed is kept.
    """
    job = Job.of(settings, context, ray=scale).write()
    Failure.take_all(context.folder)
    log_path = work_folder(context.folder) / _LOG_FILE
    command = [sys.executable, "-m", WORKER_MODULE, str(job)]
    code = None
    with (
        ray_environment(scale) as environment,
        closing(Beside(command, environment, context, log_path)) as beside,
    ):
        while code is None:
            code = beside.code()
    if (outcome := Outcome.read(context.folder)) is not None:
        return outcome
    failures = Failure.take_all(context.folder)
    if code == 0 or (context.stop.is_set() and not any(one.foreseen for one in failures)):
        raise Interrupted
    log_end(log_path, context)
    if failures and failures[0].foreseen:
        raise failures[0].error()
    what = f"the process that asks the replicas ended with code {code}"
    if failures:
        what = f"the process that asks the replicas failed: {failures[0].what}"
    elif code < 0:
        what = f"the process that asks the replicas was ended by {signal.Signals(-code).name}"
    raise EngineError(
        what, where=str(log_path), mend="look there; the same command goes on with what is missing"
    )


@contextmanager
def ray_environment(scale: Ray) -> Iterator[Mapping[str, str]]:
    """The environment of a process that uses Ray: no statistics are sent.

    What is started on this machine listens on loopback alone, asks for a token that nobody else has, and
    keeps its files in a folder that is gone afterwards.
    """
    always = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_SCHEDULER_EVENTS": "0"}
    if scale.address != "local":
        yield always
        return
    # A short path: sockets lie there, whose paths may have no more than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="potstill-ray-", ignore_cleanup_errors=True) as folder:
        ours = {
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # Else it takes an address that others reach, even where it is told another.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Copies do the step's work, as this process would; Ray's own would stand behind all others.
            "RAY_worker_niceness": "0",
        }
        yield {**always, **ours}
