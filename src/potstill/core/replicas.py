"""Copies of a model in processes of their own, as steps ask them: whatever starts them is behind this."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, Protocol, Self, TypeVar

__all__ = ["OpenReplicas", "Replica", "ReplicaPool", "Replicas"]

JobT = TypeVar("JobT")
_POLL_S = 0.2  # for a stop
_AHEAD = 4  # jobs in the pool for each replica: enough while one of them is slow or started again


class Replica(Protocol):
    """One copy, in a process of its own. It is made, asked and ended inside one event loop.

    `identity` is what all copies must have alike; `capacity` is this one's own, and may change with every
    job: `concurrency`, the jobs that it wants at a time, at least.
    """

    identity: dict[str, Any]

    @property
    def capacity(self) -> Mapping[str, int]:
        """What this copy takes at once."""

    async def work(self, *job: Any) -> Any:
        """What comes of a job. A PotstillError is the job's; a bare EngineError is the copy's."""


class ReplicaPool(Protocol):
    """Copies that take jobs, whichever is free; one that ends is started again, and its jobs go to others."""

    identity: dict[str, Any]

    @property
    def capacity(self) -> Mapping[str, int]:
        """What all copies that are there take at once, their capacities added up."""

    @property
    def first_capacity(self) -> Mapping[str, int]:
        """The capacity of the first copy that was there."""

    async def work(self, *job: Any) -> Any:
        """What a copy makes of a job.

        Raises the job's own error, RequestError where copies end again and again over this one job, and
        EngineError where none is left.
        """

    async def close(self) -> None:
        """End all copies; jobs under way are given up."""


class Replicas(Protocol):
    """Where copies can be had, and how many."""

    count: int

    @property
    def cpus(self) -> float:
        """What each has of its machine's cores."""

    @property
    def gpus(self) -> float:
        """What each has of its machine's GPUs."""

    async def open(
        self, replica: str, *arguments: Any, at_most: int | None = None, restart_on_error: bool = True
    ) -> ReplicaPool:
        """Start copies (`module:class` and what it is made of) and give them once the first is there.

        They are `count`, or `at_most` where that is fewer; the others come when they can. With
        `restart_on_error` an EngineError of a copy that is no RequestError ends that copy and no more;
        without, it is an answer like others. Raises what a copy's construction raises, and EngineError where
        none comes.
        """


class OpenReplicas:
    """Copies that a step without an event loop of its own asks, in order; closed by leaving it."""

    def __init__(self, count: int, opening: Coroutine[Any, Any, ReplicaPool]) -> None:
        self.count = count
        self._runner = asyncio.Runner()
        try:
            self._pool = self._runner.run(opening)
        except BaseException:
            self._runner.close()
            raise
        self.identity, self.first_capacity = self._pool.identity, self._pool.first_capacity

    def close(self) -> None:
        """End them."""
        with closing(self._runner):
            self._runner.run(self._pool.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def in_order(
        self,
        jobs: Iterable[JobT],
        content: Callable[[JobT], tuple[Any, ...] | None],
        check_stop: Callable[[], None],
    ) -> Iterator[tuple[JobT, Any]]:
        """Each job with what came of it, in the jobs' order; None for one without content, which is not sent.

        So many are on their way that no replica waits, and no more, however many there are. Raises what the
        first failing job does, and what `check_stop` does.
        """
        under_way: deque[tuple[JobT, asyncio.Task[Any] | None]] = deque()

        async def begin(job: tuple[Any, ...]) -> asyncio.Task[Any]:
            return asyncio.create_task(self._pool.work(*job))

        async def wait(task: asyncio.Task[Any]) -> Any:
            while not task.done():
                await asyncio.wait({task}, timeout=_POLL_S)
                check_stop()
            return task.result()

        def finish() -> tuple[JobT, Any]:
            check_stop()
            job, task = under_way.popleft()
            return job, None if task is None else self._runner.run(wait(task))

        try:
            for job in jobs:
                if len(under_way) >= _AHEAD * self.count:
                    yield finish()
                found = content(job)
                under_way.append((job, None if found is None else self._runner.run(begin(found))))
            while under_way:
                yield finish()
        finally:
            for _, task in under_way:
                if task is not None:
                    task.cancel()
