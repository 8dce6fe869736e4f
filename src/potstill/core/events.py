"""What a run tells: events for machines (JSONL), progress and plain lines for people."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any, Literal, Protocol

__all__ = ["Display", "Progress", "Reporter", "format_seconds", "read_events"]

Display = Literal["bar", "plain", "quiet", "json"]
_PLAIN_INTERVAL_S = 10.0
_LONGEST_NUMBER = 30  # digits


def format_seconds(seconds: float) -> str:
    """A duration as a person says it: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress(Protocol):
    """A counter with a rate and an estimated end."""

    def advance(self, count: float = 1, **figures: object) -> None:
        """Count work done; figures (loss=…, cost=…) are shown beside the bar."""


class _PlainProgress:
    def __init__(
        self, write: Callable[[str], None], description: str, total: float | None, unit: str
    ) -> None:
        self.write, self.description, self.total, self.unit = write, description, total, unit
        self.done, self.started = 0.0, time.monotonic()
        self.last_line = self.started
        self.said: float | None = None
        self.figures = ""

    def advance(self, count: float = 1, **figures: object) -> None:
        self.done += count
        self.figures = "".join(f"  {name} {value}" for name, value in figures.items())
        if time.monotonic() - self.last_line >= _PLAIN_INTERVAL_S:
            self.line()

    def line(self) -> None:
        if self.said == self.done:
            return
        self.said, self.last_line = self.done, time.monotonic()
        rate = self.done / max(self.last_line - self.started, 1e-9)
        text = f"  {self.description}: {self.done:g}"
        if self.total:
            text += f"/{self.total:g} {self.unit}"
            if 0 < self.done < self.total:
                text += f", {format_seconds((self.total - self.done) / rate)} left"
        else:
            text += f" {self.unit}"
        self.write(f"{text}  ({rate:.3g} {self.unit}/s){self.figures}")


class _BarProgress:
    """A bar on the screen, and plain lines in the log."""

    def __init__(self, bar: Any, task: Any, plain: _PlainProgress) -> None:
        self.bar, self.task, self.plain = bar, task, plain

    def advance(self, count: float = 1, **figures: object) -> None:
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
        self.bar.update(self.task, advance=count, figures=text)
        self.plain.advance(count, **figures)


class Reporter:
    """Writes events.jsonl and a log (when given), and shows the run as bar, plain, quiet or json.

    The log has every line for people with its time, whatever is shown, and is appended to. A `label` stands
    before each line, where several write to one log.
    """

    def __init__(
        self,
        display: Display = "plain",
        events_path: Path | None = None,
        stream: IO[str] | None = None,
        log_path: Path | None = None,
        label: str | None = None,
    ) -> None:
        self._start = "" if label is None else f"{label}: "
        self.display: Display = display
        self.stream = stream if stream is not None else sys.stderr
        self.events_path, self.log_path = events_path, log_path
        # Unbuffered: an event has left this process when `event` returns, and a full disk is told at once.
        self._events: IO[bytes] | None = None if events_path is None else events_path.open("ab", buffering=0)
        self._log: IO[bytes] | None = None if log_path is None else log_path.open("ab", buffering=0)

    def close(self) -> None:
        """Close the files."""
        for file in (self._events, self._log):
            if file is not None:
                file.close()

    def event(self, name: str, /, **fields: Any) -> None:
        """Append one event; in json display it goes to standard output as well."""
        if self._events is None and self.display != "json":
            return
        row = {"time": round(time.time(), 3), "event": name, **fields}
        line = json.dumps(row, ensure_ascii=False, default=str)
        if self._events is not None:
            self._events.write(f"{line}\n".encode("utf-8", "replace"))
        if self.display == "json":
            print(line, flush=True)

    def say(self, message: str) -> None:
        """A line for people."""
        self.log(message)
        if self.display in ("bar", "plain"):
            print(f"{self._start}{message}", file=self.stream, flush=True)

    def log(self, message: str) -> None:
        """A line for the log alone."""
        if self._log is not None:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {self._start}{message}\n"
            self._log.write(line.encode("utf-8", "replace"))

    @contextmanager
    def progress(
        self, description: str, total: float | None = None, unit: str = "rows"
    ) -> Iterator[Progress]:
        """A progress display for one piece of work."""
        write = self.log if self.display == "bar" else self.say
        plain = _PlainProgress(write, description, total, unit)
        try:
            if self.display != "bar":
                yield plain
                return
            with self._bar(unit) as bar:
                yield _BarProgress(bar, bar.add_task(description, total=total, figures=""), plain)
        finally:
            if plain.done:
                plain.line()  # unless the last figure was said as it came

    def _bar(self, unit: str) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.progress import Task as RichTask
        from rich.text import Text

        class RateColumn(TextColumn):
            def render(self, task: RichTask) -> Text:
                return Text(f"{task.speed:.3g} {unit}/s" if task.speed else "", style="cyan")

        return RichProgress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            RateColumn(""),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", style="dim"),
            console=Console(file=self.stream),
        )


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every whole event of a file, oldest first; a line cut off by a kill or damaged is left out."""
    events = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                event = json.loads(line, parse_int=_number)
            except (ValueError, RecursionError):
                continue
            if _is_event(event):
                events.append(event)
    return events


def _number(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _is_event(value: Any) -> bool:
    """Whether a value has what all events have, each of its type."""
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        return False
    steps = value.get("steps", [])
    return (
        isinstance(value.get("step", ""), str)
        and all(isinstance(value.get(name, 0), int | float) for name in ("time", "optimiser_step"))
        and isinstance(steps, list)
        and all(isinstance(one, dict) and _is_declared(one) for one in steps)
    )


def _is_declared(step: dict[str, Any]) -> bool:
    name, needs = step.get("name"), step.get("needs")
    return (
        isinstance(name, str)
        and PurePath(name).name == name  # it is a file's name in the run folder
        and isinstance(step.get("kind"), str)
        and isinstance(needs, list)
        and all(isinstance(one, str) for one in needs)
    )
