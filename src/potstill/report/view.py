"""What a report is made from: a run's steps, its recipe and its events."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from potstill.core.store import Manifest

__all__ = ["RunView", "Status", "StepView"]

_ROUNDING_S = 0.01  # events tell thousandths of a second
Status = Literal["made", "reused", "failed", "interrupted", "not run"]


@dataclass(frozen=True)
class StepView:
    """One step of a run; `manifest` and `folder` are None where no artifact was sealed.

    `seconds` is the time that making the artifact took, over all attempts, in whichever runs made them.
    """

    name: str
    kind: str
    needs: list[str]
    seconds: float | None
    reused: bool
    manifest: Manifest | None
    folder: Path | None


@dataclass(frozen=True)
class RunView:
    """One run as its folder shows it; `recipe_text` is the resolved recipe, `events` those of its file."""

    name: str
    recipe_text: str
    steps: list[StepView]
    events: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None

    @property
    def latest_events(self) -> list[dict[str, Any]]:
        """The events since the run was last started."""
        starts = [index for index, event in enumerate(self.events) if event.get("event") == "run_started"]
        return self.events[starts[-1] :] if starts else self.events

    @property
    def outcome(self) -> Literal["finished", "failed", "interrupted", "unknown"]:
        """How the run ended; unknown where it was killed or has not ended."""
        for event in reversed(self.latest_events):
            if event.get("event") == "run_finished":
                return "finished"
            if event.get("event") == "run_failed":
                return "failed"
            if event.get("event") == "run_interrupted":
                return "interrupted"
        return "unknown"

    @property
    def wall_seconds(self) -> float | None:
        """From the latest start to the last event, or None without timed events.

        Between two events of which the clock was set back no time is counted.
        """
        times = [event["time"] for event in self.latest_events if isinstance(event.get("time"), int | float)]
        passed = (max(0.0, after - before) for before, after in itertools.pairwise(times))
        return sum(passed) if len(times) > 1 else None

    def side_by_side(self, steps: Iterable[StepView]) -> tuple[float, float] | None:
        """Seconds in which this run made some steps, and what they took together.

        None unless it made all of them, and some while others were under way.
        """
        spans = []
        for step in steps:
            started, ended = (
                [
                    one["time"]
                    for one in self.latest_events
                    if (one["event"], one.get("step")) == (name, step.name)
                ]
                for name in ("step_started", "step_finished")
            )
            if not started or not ended:
                return None
            spans.append((started[-1], ended[-1]))
        wall, until = 0.0, -math.inf
        for start, end in sorted(spans):
            wall += max(0.0, end - max(start, until))
            until = max(until, end)
        summed = sum(end - start for start, end in spans)
        return (wall, summed) if summed - wall > _ROUNDING_S else None

    def status(self, step: StepView) -> Status:
        """What became of a step in this run."""
        for event in reversed(self.latest_events):
            if event.get("step") == step.name:
                if event.get("event") == "step_failed":
                    return "failed"
                if event.get("event") == "step_interrupted":
                    return "interrupted"
                if event.get("event") in ("step_finished", "step_reused"):
                    break
        if step.manifest is None:
            return "not run"
        return "reused" if step.reused else "made"

    def error(self, step: StepView) -> str | None:
        """The message of a step that failed in this run."""
        for event in reversed(self.latest_events):
            if event.get("step") == step.name and event.get("event") == "step_failed":
                return str(event.get("error", ""))
        return None

    def steps_of(self, kind: str) -> list[StepView]:
        """The finished steps of a kind, in order."""
        return [step for step in self.steps if step.kind == kind and step.manifest is not None]

    def logged(self, step: StepView, kind: str) -> list[dict[str, Any]]:
        """The events of a kind that the attempts at a step's present settings left, oldest first."""
        found: list[dict[str, Any]] = []
        fingerprint = None
        for event in self.events:
            if event.get("step") != step.name:
                continue
            if event.get("event") == "step_started" and event.get("fingerprint") != fingerprint:
                found, fingerprint = [], event.get("fingerprint")
            elif event.get("event") == kind:
                found.append(event)
        return found
