"""What the processes of a training are given and what they give back: files in the step's scratch folder."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from potstill.cache import CacheSettings
from potstill.core.errors import PotstillError
from potstill.core.events import Display, Reporter
from potstill.core.memory import is_out_of_memory, ran_out_of_memory
from potstill.core.settings import DataRef, ModelRef, Settings, references
from potstill.core.step import StepContext, StepResult
from potstill.core.store import SCRATCH_FOLDER, Artifact, write_atomically
from potstill.generate import GenerateSettings
from potstill.models import TransformersModel
from potstill.scale.settings import Ray
from potstill.select import SelectSettings
from potstill.teachers import AnyModel, VllmModel
from potstill.train import Strategy, TrainSettings

__all__ = ["WORKER_MODULE", "Failure", "Job", "JobSettings", "Outcome", "ReplicatedSettings", "work_folder"]

WORKER_MODULE = "potstill.scale.worker"
"""What carries a job out: `python -m` of it with the job's file."""

ReplicatedSettings = GenerateSettings | CacheSettings | SelectSettings
"""Settings of the steps that ask models of which there may be copies."""

JobSettings = TrainSettings | ReplicatedSettings
"""Settings of the steps that may run in processes of their own."""

_JOB_FILE, _OUTCOME_FILE = "job.json", "outcome.json"


def work_folder(step_folder: Path) -> Path:
    """Where a step's processes leave all that is no checkpoint."""
    return step_folder / SCRATCH_FOLDER / "processes"


class Job(BaseModel):
    """A step with its references resolved.

    `elsewhere`, which is the step's fingerprint, says that it is started by hand: nobody holds the right to
    make it, and nobody waits. `ray` is where its models' copies work.
    """

    model_config = ConfigDict(protected_namespaces=())

    name: str
    settings: Annotated[JobSettings, Field(discriminator="do")]
    strategy: Strategy
    folder: Path
    seed: int
    store: Path
    models: dict[str, AnyModel]
    data: dict[str, list[tuple[Path, str | None]]]
    display: Display
    label: str | None
    events: Path | None
    log: Path | None
    elsewhere: str | None
    ray: Ray | None = None

    @classmethod
    def of(
        cls,
        settings: JobSettings,
        context: StepContext,
        strategy: Strategy = "ddp",
        *,
        elsewhere: str | None = None,
        side_by_side: bool = False,
        ray: Ray | None = None,
    ) -> "Job":
        """The job of a step that is about to be carried out, alone or beside others."""
        display = context.reporter.display
        found = [reference for _, reference in references(settings)]
        return cls(
            name=context.name,
            settings=settings,
            strategy=strategy,
            folder=context.folder.resolve(),
            seed=context.seed,
            store=context.cache_folder.resolve(),
            models={str(one): context.model(one) for one in found if isinstance(one, ModelRef)},
            data={
                str(one): [(artifact.folder.resolve(), view) for artifact, view in context.artifacts(one)]
                for one in found
                if isinstance(one, DataRef) and (not one.is_path or Path(one).is_dir())
            },
            # Two bars would write over one another.
            display="plain" if elsewhere or (side_by_side and display == "bar") else display,
            label=context.name if side_by_side else None,
            events=context.reporter.events_path,
            log=context.reporter.log_path,
            elsewhere=elsewhere,
            ray=ray,
        )

    @property
    def devices(self) -> list[str | None]:
        """Where each model that works here is to do so, by the step or by itself; None is the default."""
        asked = getattr(self.settings, "device", None)
        found: list[str | None] = []
        for one in self.models.values():
            if isinstance(one, VllmModel):
                found.append(None)  # vLLM takes the GPUs that it is shown
            elif isinstance(one, TransformersModel):
                found.append(asked or one.device)
        return found

    def write(self) -> Path:
        """Write it where its processes look for it, and say where."""
        path = work_folder(self.folder) / _JOB_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.model_dump_json(by_alias=True, exclude_unset=True, indent=2))
        return path

    @classmethod
    def read(cls, path: Path) -> "Job":
        """The job in a file."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))

    def context(self, reporter: Reporter, stop: threading.Event) -> StepContext:
        """What the step function is given."""

        def models(reference: ModelRef) -> Mapping[str, Settings]:
            return {str(reference): self.models[str(reference)]}

        def artifacts(reference: DataRef) -> list[tuple[Artifact, str | None]]:
            return [(Artifact.open(folder), view) for folder, view in self.data[str(reference)]]

        return StepContext(
            name=self.name,
            kind=self.settings.kind,
            folder=self.folder,
            seed=self.seed,
            cache_folder=self.store,
            reporter=reporter,
            resolve_models=models,
            resolve_data=artifacts,
            stop=stop,
        )


class Failure(BaseModel):
    """The error that ended one process; a `foreseen` one, a PotstillError, is told as by one process."""

    rank: int
    time: float
    foreseen: bool
    what: str
    where: str | None = None
    expected: str | None = None
    mend: str | None = None

    @classmethod
    def of(cls, error: Exception, rank: int) -> "Failure":
        """What is told of an error."""
        if is_out_of_memory(error):
            error = ran_out_of_memory(error)
        if isinstance(error, PotstillError):
            return cls(
                rank=rank,
                time=time.time(),
                foreseen=True,
                what=error.what,
                where=error.where,
                expected=error.expected,
                mend=error.mend,
            )
        return cls(rank=rank, time=time.time(), foreseen=False, what=f"{type(error).__name__}: {error}")

    def error(self) -> PotstillError:
        """The error that it tells of, for whoever started the process."""
        return PotstillError(self.what, where=self.where, expected=self.expected, mend=self.mend)

    def write(self, step_folder: Path) -> None:
        """Leave it to whoever started the processes."""
        write_atomically(work_folder(step_folder) / f"failure-{self.rank}.json", self.model_dump_json())

    @classmethod
    def take_all(cls, step_folder: Path) -> list["Failure"]:
        """Every process's failure, the foreseen ones first and else the earliest; the files are removed."""
        found = []
        for path in work_folder(step_folder).glob("failure-*.json"):
            found.append(cls.model_validate_json(path.read_text(encoding="utf-8")))
            path.unlink()
        return sorted(found, key=lambda one: (not one.foreseen, one.time))


class Outcome(BaseModel):
    """What the step function gave back, and what that took the first process."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    result: StepResult
    seconds: float
    peaks: dict[str, int]

    def write(self, step_folder: Path) -> None:
        """Write it, once all files of the artifact are there."""
        write_atomically(work_folder(step_folder) / _OUTCOME_FILE, self.model_dump_json())

    @classmethod
    def read(cls, step_folder: Path) -> "Outcome | None":
        """What a finished training left; None where there is none."""
        try:
            text = (work_folder(step_folder) / _OUTCOME_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return cls.model_validate_json(text)
