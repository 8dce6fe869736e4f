"""What a step function is given and what it gives back."""

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.core.errors import Interrupted
from potstill.core.events import Progress, Reporter
from potstill.core.hashing import derive_seed
from potstill.core.replicas import Replicas
from potstill.core.settings import DataRef, ModelRef, ModelsRef, Settings
from potstill.core.store import SCRATCH_FOLDER, Artifact

__all__ = ["StepContext", "StepResult"]


@dataclass
class StepResult:
    """What a step reports about its artifact; it becomes the manifest.

    `counts` are whole numbers (rows, tokens), `metrics` are figures for the report, `extra` is what readers
    of the artifact need (codec, base model). `tokens` is how many tokens a teacher produced or the trainer
    consumed.
    """

    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    model_identity: str | None = None
    tokens: int = 0


@dataclass
class StepContext:
    """Everything a step may touch: its folder, its resolved inputs, its seed, and how to report and stop.

    `replicas` is where copies of the models that it asks are to work, if not in this process.
    """

    name: str
    kind: str
    folder: Path
    seed: int
    cache_folder: Path
    reporter: Reporter
    resolve_models: Callable[[ModelRef], Mapping[str, Settings]]
    resolve_data: Callable[[DataRef], list[tuple[Artifact, str | None]]]
    stop: threading.Event = field(default_factory=threading.Event)
    replicas: Replicas | None = None

    @property
    def scratch(self) -> Path:
        """A folder for unfinished work (checkpoints); it survives a kill and is removed at sealing."""
        folder = self.folder / SCRATCH_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def derive_seed(self, purpose: str, *key: object) -> int:
        """A seed for one use, from the recipe's seed, the step's kind, the purpose and the row's key."""
        return derive_seed(self.seed, self.kind, purpose, *key)

    def model(self, reference: ModelRef) -> Settings:
        """The settings of the model a reference names, whether declared, made by a step or a path."""
        [found] = self.resolve_models(reference).values()
        return found

    def models(self, reference: ModelsRef) -> Mapping[str, Settings]:
        """The settings of the models a reference names, each by its own name."""
        return self.resolve_models(reference)

    def artifacts(self, reference: DataRef) -> list[tuple[Artifact, str | None]]:
        """The artifacts a reference names, each with its view; several where it means every `each` value."""
        return self.resolve_data(reference)

    def progress(
        self, description: str, total: float | None = None, unit: str = "rows"
    ) -> AbstractContextManager[Progress]:
        """A progress display."""
        return self.reporter.progress(description, total, unit)

    def say(self, message: str) -> None:
        """A line for the person watching."""
        self.reporter.say(f"  {message}")

    def event(self, name: str, /, **fields: Any) -> None:
        """An event of this step for events.jsonl."""
        self.reporter.event(name, step=self.name, **fields)

    def check_stop(self) -> None:
        """Raise Interrupted once the user has asked the run to stop."""
        if self.stop.is_set():
            raise Interrupted
