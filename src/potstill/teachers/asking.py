"""Asks a teacher what the request store does not hold yet, and keeps every answer as it arrives."""

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from potstill.core.errors import DataError
from potstill.core.events import Progress, format_seconds
from potstill.core.records import Record
from potstill.core.step import StepContext
from potstill.teachers.budget import Budget
from potstill.teachers.failures import FAILURES_FILE, Failures
from potstill.teachers.protocol import Request, RequestError, Teacher, Usage
from potstill.teachers.request_store import RequestStore

__all__ = ["Asking", "Plan", "Planned"]

_POLL_S = 0.2  # for a stop, and for places that no answer has made
_GRACE_S = 10.0


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
    a process that is killed loses at most those that were under way. `model` is what errors call it, and
    failures are rows of `failures_path`, in the step's folder unless it is stated.
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
        failures_path: Path | None = None,
    ) -> None:
        self.plan, self.teacher, self.store, self.budget, self.context = plan, teacher, store, budget, context
        self.model, self.where = model, f"model {model}"
        self.reused = self.answered = 0
        self.failures = Failures(failures_path or context.folder / FAILURES_FILE, where=self.where)
        self._workers: set[asyncio.Task[None]] = set()
        self._ending = False
        self._error: Exception | None = None
        self._wake = asyncio.Event()

    @property
    def failed(self) -> int:
        """Requests that failed."""
        return self.failures.count

    @property
    def left(self) -> int:
        """Requests that are neither answered nor failed."""
        return self.plan.total - self.reused - self.answered - self.failed

    async def ask(self) -> None:
        """Ask until every request is answered or has failed.

        Raises BudgetError when the budget ends before the requests, EngineError when no request can succeed
        or failures do not end, Interrupted when the run is to stop. Answers under way are waited for then, at
        a stop or an error for 10 s.
        """
        self.reused = sum(planned.key in self.store for planned in self.plan)
        kept = f", {self.reused:,} of them answered already" if self.reused else ""
        self.context.say(f"{self.plan.total:,} requests to {self.model}{kept}")
        self.context.event("requests", model=self.teacher.identity, total=self.plan.total, reused=self.reused)
        if self.reused:
            self.failures.answered()
        if not self.left:
            return
        requests = self._missing()
        with self.context.progress("answers", self.left, "answers") as progress:
            try:
                self._begin(requests, progress)
                while self._workers:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_POLL_S):
                            await self._wake.wait()
                    self._wake.clear()
                    if self._error is not None:
                        raise self._error
                    self.context.check_stop()
                    self._begin(requests, progress)
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

    def _begin(self, requests: Iterator[PlannedT], progress: Progress) -> None:
        """Let a worker begin for every place that engine and budget have beyond those there are."""
        for planned in itertools.islice(requests, max(0, self._places() - len(self._workers))):
            self._workers.add(asyncio.create_task(self._work(planned, requests, progress)))

    def _places(self) -> int:
        return self.budget.places(self.teacher.concurrency)

    async def _work(self, planned: PlannedT | None, requests: Iterator[PlannedT], progress: Progress) -> None:
        """Ask one request after the other while there is a place; one that is kept is followed at once."""
        try:
            while planned is not None and not self._ending:
                await self._ask_one(planned)
                figures = {**self.budget.figures(self.left), "at once": self.teacher.concurrency}
                progress.advance(1, **figures, failed=self.failed)
                if self._ending or len(self._workers) > self._places():
                    return
                planned = next(requests, None)
                self._begin(requests, progress)
        except Exception as error:  # raised where all are waited for
            self._ending, self._error = True, self._error or error
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._workers.discard(task)
            if self._error is not None or not self._workers:
                self._wake.set()

    async def _ask_one(self, planned: PlannedT) -> None:
        """Keep an answer, or note why there is none; errors that no other request can escape go on."""
        buyer = self.context.folder.name
        try:
            answer = await self.teacher.answer(self.plan.request(planned))
        except (RequestError, DataError) as error:
            if isinstance(error, RequestError) and error.usage != Usage():
                self.store.bill(buyer, error.usage)
            if not self._ending:
                self._fail(planned, error)
        else:
            self.store.put(planned.key, answer, buyer=buyer)
            self.answered += 1
            self.failures.answered()
            self.budget.count(Usage(answer.prompt_tokens, answer.response_tokens))

    def _fail(self, planned: PlannedT, error: RequestError | DataError) -> None:
        if isinstance(error, RequestError) and error.usage != Usage():
            self.budget.count(error.usage)
        row = {"prompt_id": planned.prompt.prompt_id, "sample": planned.sample}
        self.failures.add(row, error, kept=self._kept())

    def _kept(self) -> str:
        failures = f" (failures: {self.failures.path})" if self.failed else ""
        kept = f"{self.reused + self.answered:,} answers are kept"
        return f"{kept}; the next run asks only what is missing{failures}"

    async def _give_up(self) -> None:
        """Let answers under way arrive, since they are paid for, then cancel what hangs."""
        self._ending = True
        if not (under_way := list(self._workers)):
            return
        self.context.say(f"waiting up to {format_seconds(_GRACE_S)} for {len(under_way):,} answers under way")
        _, hanging = await asyncio.wait(under_way, timeout=_GRACE_S)
        for task in hanging:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    def check_failures(self, max_failed_share: float) -> None:
        """Raise EngineError when more requests failed than may."""
        self.failures.check(max_failed_share, self.plan.total, kept=self._kept())
