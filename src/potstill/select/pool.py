"""The rows that a selection chooses from, read and filtered once, and what becomes of each of them."""

import heapq
import itertools
import json
import math
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from potstill.core.errors import DataError
from potstill.core.records import RECORDS_FILE, Record, count_records, read_records, write_records
from potstill.core.step import StepContext, StepResult
from potstill.data.sources import label_names, read
from potstill.select.candidates import Arm, Candidates, Outcome
from potstill.select.filters import Dropped, FilterSettings, filter_records
from potstill.select.settings import SelectSettings

__all__ = ["DROPPED_FILE", "MISSING", "Chosen", "Pool", "logprob_temperature"]

DROPPED_FILE = "dropped.jsonl"
_CANDIDATES_FILE = "candidates.parquet"
_LEFT_OUT_FILE, _BY_RULE_FILE = "left-out.jsonl", "by-rule.jsonl"
_NO_RESPONSE = Dropped("response", "no response")
_KEPT = Outcome({}, None, kept=True)
MISSING = -1.0


def logprob_temperature(record: Record) -> float | None:
    """The temperature of a trace's log-probabilities: None where nobody states it, MISSING without any."""
    if record.logprobs is None or all(map(math.isnan, record.logprobs)):
        return MISSING
    stated = record.sampling.get("logprob_temperature")
    return float(stated) if isinstance(stated, int | float) else None


@dataclass(frozen=True)
class Chosen:
    """The scored rows, which arm's rows stay beside the held-out ones and why others go, and the metrics."""

    candidates: Candidates
    by: Arm
    reason: str
    metrics: dict[str, Any]


class Pool:
    """The rows that are left once those without a response and those that the filters drop are gone.

    They are written once, so that every later pass reads them in constant memory and an interrupted step
    takes up what it had. A row's number counts from 1 in the order of the data.
    """

    def __init__(self, settings: SelectSettings, context: StepContext) -> None:
        self.settings, self.context = settings, context
        self.path, self._left_out = context.scratch / _CANDIDATES_FILE, context.scratch / _LEFT_OUT_FILE
        if not self.path.exists():
            with self._left_out.open("w", encoding="utf-8", newline="\n") as left_out:
                write_records(self.path, self._read(left_out))
        self.left_out = Counter(json.loads(line)["by"] for line in self._left_out_lines())
        rows = self.rows = count_records(self.path) + self.left_out.total()
        self.numbers = array("q", self._numbers())
        if not self.numbers:
            raise DataError(
                f"none of the {rows:,} rows is left to choose from ({_counted(self.left_out)})",
                expected="traces: rows with a response",
                mend="name a step that makes traces, or loosen the filters",
            )
        self.temperatures = Counter(logprob_temperature(record) for _, record in self.candidates())
        if settings.rule != "none" and not self.temperatures:
            raise DataError(
                f"all of the {len(self.numbers):,} rows that are left are held out",
                where=str(settings.data),
                expected="rows to train on, of which a rule chooses",
                mend="leave out the view `held_out`, or lower the held-out share",
            )

    def _read(self, left_out: IO[str]) -> Iterator[Record]:
        needs_logprobs = self.settings.rule != "none" and self.settings.teacher is None
        for number, record, dropped in self._filtered():
            if dropped is not None:
                left_out.write(_dropped_line(number, record, dropped.filter, dropped.reason))
                continue
            if needs_logprobs and record.logprobs is None and not record.held_out:
                raise DataError(
                    "the trace has no log-probabilities of its teacher",
                    where=f"row {number} (record {record.id})",
                    expected="log p of every response token, from the model that wrote it",
                    mend="set `logprobs: 1` in the generate step, or name a `teacher` here to score "
                    "the traces",
                )
            yield record
        # The candidates' file, which comes last, says that both are whole.
        left_out.flush()

    def _filtered(self) -> Iterator[tuple[int, Record, Dropped | None]]:
        """Every row in order, with what drops it; held-out rows pass by the filters."""
        numbers: deque[int] = deque()
        beside: deque[tuple[int, Record, Dropped | None]] = deque()

        def filtered() -> Iterator[Record]:
            for number, record in enumerate(read(self.settings.data, self.context), start=1):
                if record.response is None or not record.response.strip():
                    beside.append((number, record, _NO_RESPONSE))
                elif record.held_out:
                    beside.append((number, record, None))
                else:
                    numbers.append(number)
                    yield record

        # A record comes out before the next one goes in, so that those beside stand in front of it.
        filters = self.settings.filters or FilterSettings()
        for record, dropped in filter_records(filtered(), filters, self.context):
            while beside:
                yield beside.popleft()
            yield numbers.popleft(), record, dropped
        yield from beside

    def _left_out_lines(self) -> Iterator[str]:
        with self._left_out.open(encoding="utf-8") as lines:
            yield from lines

    def _numbers(self) -> Iterator[int]:
        """The numbers of the rows that were not left out."""
        left_out = (int(json.loads(line)["row"]) for line in self._left_out_lines())
        before = 0
        for number in itertools.chain(left_out, [self.rows + 1]):
            yield from range(before + 1, number)
            before = number

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        """Each row's number and record."""
        return zip(self.numbers, read_records(self.path), strict=True)

    def candidates(self) -> Iterator[tuple[int, Record]]:
        """The rows that a rule chooses from: those that are not held out."""
        return ((number, record) for number, record in self if not record.held_out)

    def write(self, chosen: Chosen | None = None, *, tokens: int = 0) -> StepResult:
        """Write what stays, with its scores, and a line for every row that does not."""
        by_rule = self.context.scratch / _BY_RULE_FILE
        held_out = kept = unscored = 0
        with by_rule.open("w", encoding="utf-8", newline="\n") as dropped:

            def staying() -> Iterator[Record]:
                nonlocal held_out, kept, unscored
                for number, record in self:
                    found = _KEPT
                    if chosen is not None and not record.held_out:
                        found = chosen.candidates.outcome(number, chosen.by)
                    record.scores = {**record.scores, **found.scores}
                    if found.unscored is not None:
                        unscored += 1
                        dropped.write(_dropped_line(number, record, "score", found.unscored))
                    elif not found.kept:
                        assert chosen is not None
                        dropped.write(_dropped_line(number, record, chosen.by, chosen.reason, record.scores))
                    else:
                        held_out += record.held_out
                        kept += not record.held_out
                        yield record

            write_records(self.context.folder / RECORDS_FILE, staying())
        with (
            by_rule.open(encoding="utf-8") as from_rule,
            (self.context.folder / DROPPED_FILE).open("w", encoding="utf-8", newline="\n") as target,
        ):
            target.writelines(
                heapq.merge(self._left_out_lines(), from_rule, key=lambda line: int(json.loads(line)["row"]))
            )
        reasons = Counter(self.left_out)
        reasons["score"] = unscored
        counts = {"records": kept + held_out, "held_out": held_out, "rows": self.rows}
        counts |= {f"dropped_by_{name}": count for name, count in sorted(reasons.items()) if count}
        if chosen is not None:
            counts[f"dropped_by_{chosen.by}"] = len(self.numbers) - held_out - unscored - kept
        return StepResult(
            counts=counts,
            metrics=chosen.metrics if chosen else {},
            extra={"labels": label_names(self.settings.data, self.context)},
            tokens=tokens,
        )


def _dropped_line(
    number: int, record: Record, by: str, reason: str, scores: dict[str, float] | None = None
) -> str:
    row: dict[str, Any] = {"row": number, "id": record.id, "prompt_id": record.prompt_id, "by": by}
    row["reason"] = reason
    return json.dumps(row | ({"scores": scores} if scores else {}), ensure_ascii=False) + "\n"


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count:,} by {name}" for name, count in counter.most_common()) or "there is none"
