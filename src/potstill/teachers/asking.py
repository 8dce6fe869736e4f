"""Asks a teacher what the request store does not hold yet, and keeps every answer as it arrives."""

import asyncio
import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from potstill.core.errors import BudgetError, DataError, EngineError
from potstill.core.events import Progress, format_seconds
from potstill.core.records import Record
from potstill.core.step import StepContext
from potstill.teachers.budget import Budget
from potstill.teachers.protocol import Answer, Request, RequestError, Teacher, Usage
from potstill.teachers.request_store import RequestStore

__all__ = ["FAILURES_FILE", "Asking", "Plan", "Planned"]

FAILURES_FILE = "failures.jsonl"
_STOP_POLL_S = 0.2
_GRACE_S = 10.0
_FAILURES_IN_A_ROW = 20
_REASONS_SHOWN = 3


class Planned(Protocol):
    """One request: which prompt, which sample of it, and the key its answer is kept under."""

    @property
    def prompt(self) -> Record:
        """The prompt."""

    @property
    def sample(self) -> int:
        """The sample's number."""

    @property
    def key(self) -> str:
        """The key of its answer."""


PlannedT = TypeVar("PlannedT", bound=Planned)


class Plan(Protocol[PlannedT]):
    """Every request in order, anew each time that it is gone through."""

    total: int

    def __iter__(self) -> Iterator[PlannedT]:
        """The requests in order. Raises Interrupted when the run is to stop."""

    def request(self, planned: PlannedT) -> Request:
        """What the engine is asked. Raises DataError when the prompt cannot be asked."""


class Asking(Generic[PlannedT]):
    """Asks what the request store does not hold yet, as many requests at a time as engine and budget take.

    Memory does not grow with the number of requests. An answer is in the store before anything else happens:
    a process that is killed loses at most those that were under way. `model` is what errors call it.
    """

    def __init__(
        self,
        plan: Plan[PlannedT],
        teacher: Teacher,
        store: RequestStore,
        budget: Budget,
        context: StepContext,
        *,
        model: str,
    ) -> None:
        self.plan, self.teacher, self.store, self.budget, self.context = plan, teacher, store, budget, context
        self.model, self.where = model, f"model {model}"
        self.reused = self.answered = self.failed = 0
        self.failures_path = context.folder / FAILURES_FILE
        self._reasons: Counter[str] = Counter()
        self._in_a_row = 0
        self._under_way: dict[asyncio.Task[Answer], PlannedT] = {}
        self._arrived: deque[asyncio.Task[Answer]] = deque()
        self._arrival = asyncio.Event()

    @property
    def left(self) -> int:
        """Requests that are neither answered nor failed."""
        return self.plan.total - self.reused - self.answered - self.failed

    async def ask(self) -> None:
        """Ask until every request is answered or has failed.

        Failures are rows of `failures.jsonl`, of the latest attempt alone. Raises BudgetError when the budget
        ends before the requests, EngineError when no request can succeed or failures do not end, Interrupted
        when the run is to stop. Answers under way are waited for then, at a stop or an error for 10 s.
        """
        self.reused = sum(planned.key in self.store for planned in self.plan)
        kept = f", {self.reused:,} of them answered already" if self.reused else ""
        self.context.say(f"{self.plan.total:,} requests to {self.model}{kept}")
        self.context.event("requests", model=self.teacher.identity, total=self.plan.total, reused=self.reused)
        self.failures_path.unlink(missing_ok=True)
        if not self.left:
            return
        requests = self._missing()
        with self.context.progress("answers", self.left, "answers") as progress:
            try:
                while self._start(requests):
                    await self._next_arrivals(progress)
            finally:
                await self._give_up()
                self.context.event(
                    "answers",
                    answered=self.answered,
                    failed=self.failed,
                    left=self.left,
                    concurrency=self.teacher.concurrency,
                    bought=self.budget.totals(),
                )
        if self.left:
            raise self.budget.used_up(self.left, where=self.where, kept=self._kept())

    def _missing(self) -> Iterator[PlannedT]:
        """What the store does not hold when its turn comes: another run may have bought it meanwhile."""
        held = 0
        for planned in self.plan:
            if planned.key in self.store:
                held += 1
                self.reused = max(self.reused, held)
            else:
                yield planned

    def _start(self, requests: Iterator[PlannedT]) -> bool:
        """Start what engine and budget have room for; False when there is nothing to wait for."""
        room = self.budget.places(self.teacher.concurrency) - len(self._under_way)
        for planned in itertools.islice(requests, max(0, room)):
            task = asyncio.create_task(self._answer(planned))
            self._under_way[task] = planned
            task.add_done_callback(self._note_arrival)
        return bool(self._under_way)

    async def _answer(self, planned: PlannedT) -> Answer:
        buyer = self.context.folder.name
        try:
            answer = await self.teacher.answer(self.plan.request(planned))
        except RequestError as error:
            if error.usage != Usage():
                self.store.bill(buyer, error.usage)
            raise
        self.store.put(planned.key, answer, buyer=buyer)
        return answer

    def _note_arrival(self, task: asyncio.Task[Answer]) -> None:
        self._arrived.append(task)
        self._arrival.set()

    async def _next_arrivals(self, progress: Progress) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._arrival.wait(), _STOP_POLL_S)
        self._arrival.clear()
        while self._arrived:
            self._settle(self._arrived.popleft())
            figures = {**self.budget.figures(self.left), "at once": self.teacher.concurrency}
            progress.advance(1, **figures, failed=self.failed)
        self.context.check_stop()

    def _settle(self, task: asyncio.Task[Answer]) -> None:
        """Count an answer, or note why there is none; errors that no other request can escape go on."""
        planned = self._under_way.pop(task)
        try:
            answer = task.result()
        except (RequestError, DataError) as error:
            self._fail(planned, error)
        else:
            self.answered, self._in_a_row = self.answered + 1, 0
            self.budget.count(Usage(answer.prompt_tokens, answer.response_tokens))

    def _fail(self, planned: PlannedT, error: RequestError | DataError) -> None:
        self.failed += 1
        status = error.status if isinstance(error, RequestError) else None
        row = {
            "prompt_id": planned.prompt.prompt_id,
            "sample": planned.sample,
            "reason": error.what,
            "status": status,
        }
        with self.failures_path.open("a", encoding="utf-8", newline="\n") as failures:
            failures.write(json.dumps(row, ensure_ascii=False) + "\n")
        if error.what in self._reasons or len(self._reasons) < _REASONS_SHOWN:
            self._reasons[error.what] += 1
        if isinstance(error, RequestError) and error.usage != Usage():
            self.budget.count(error.usage)
        blames_row = isinstance(error, DataError) or error.blames_row
        # Rows at fault say nothing about the engine, unless there has been no other row yet.
        if not blames_row or not (self.reused or self.answered):
            self._in_a_row += 1
        if self._in_a_row >= _FAILURES_IN_A_ROW:
            raise EngineError(
                f"{self._in_a_row} requests in a row failed, the last with: {error.what}",
                where=self.where,
                expected=error.expected,
                mend=f"{error.mend or 'see ' + str(self.failures_path)}. {self._kept()}",
            )

    def _kept(self) -> str:
        failures = f" (failures: {self.failures_path})" if self.failed else ""
        kept = f"{self.reused + self.answered:,} answers are kept"
        return f"{kept}; the next run asks only what is missing{failures}"

    async def _give_up(self) -> None:
        """Let answers under way arrive, since they are paid for, then cancel what hangs."""
        if not self._under_way:
            return
        self.context.say(
            f"waiting up to {format_seconds(_GRACE_S)} for {len(self._under_way):,} answers under way"
        )
        _, hanging = await asyncio.wait(self._under_way, timeout=_GRACE_S)
        for task in hanging:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        for task in self._under_way:
            if not task.cancelled() and task.exception() is None:
                self.answered += 1
                with suppress(BudgetError):  # of counts that are missing, which nothing can bound any more
                    self.budget.count(Usage(task.result().prompt_tokens, task.result().response_tokens))
        self._under_way.clear()

    def check_failures(self, max_failed_share: float) -> None:
        """Raise EngineError when more requests failed than may."""
        if self.failed <= max_failed_share * self.plan.total and self.failed < self.plan.total:
            return
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in self._reasons.most_common())
        raise EngineError(
            f"{self.failed:,} of {self.plan.total:,} requests failed: {reasons}",
            where=self.where,
            expected=f"at most {max_failed_share:.3g} of them (max_failed_share), and an answer at all",
            mend=f"run again to retry, or allow more with `max_failed_share`. {self._kept()}",
        )
