"""Replicas on a Ray cluster: each an actor, started again where it ends, its jobs given to others.

One actor is one process with one copy of a model. Which one gets a job, what is done about one that ends or
hangs, and how often, is decided here and not by Ray: its own restarts and retries know nothing of a job that
ends every process, nor of a process that no longer answers.
"""

import asyncio
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from potstill.core.environment import usable_cores
from potstill.core.errors import EngineError, PotstillError
from potstill.core.step import StepContext
from potstill.scale.job import work_folder
from potstill.scale.ray_host import ReplicaHost, Told
from potstill.scale.settings import Ray
from potstill.teachers import RequestError

__all__ = ["RayPool", "RayReplicas"]

_RESTARTS = 4  # of one replica without an answer between
_ENDS_A_JOB = 3  # the last of them alone
_STARTS = 3  # of Ray on this machine
_LOOK_S = 0.5  # for a replica that hangs
_ROOM_LOOK_S = 10.0  # for a machine that could take a replica
_HEAD_LOOK_S, _HEAD_GONE_S = 2.0, 20.0
_ACTOR_CALLS = 100_000  # Ray's own bound on what an actor has under way
_OBJECT_STORE_BYTES = 256 * 2**20
_DEAD_BECAUSE = re.compile(r"The actor is dead because (.+?)\.(?:\s|$)")


class RayReplicas:
    """A step's Ray cluster: connected to when it is first asked about or for replicas, left by `close`."""

    def __init__(self, scale: Ray, context: StepContext, *, uses_gpu: bool) -> None:
        self._scale, self._context, self._uses_gpu = scale, context, uses_gpu
        self.count = scale.replicas
        self._cpus, self._gpus = float(scale.cpus_per_replica or 1), scale.gpus_per_replica or 0.0
        self._connected = False

    @property
    def cpus(self) -> float:
        """What each has of its machine's cores, which the cluster tells."""
        if not self._connected:
            self._connect()
        return self._cpus

    @property
    def gpus(self) -> float:
        """What each has of its machine's GPUs, which the cluster tells."""
        if not self._connected:
            self._connect()
        return self._gpus

    async def open(
        self, replica: str, *arguments: Any, at_most: int | None = None, restart_on_error: bool = True
    ) -> "RayPool":
        """Start the actors; the first that is there is waited for."""
        count, cpus = min(self.count, at_most or self.count), self.cpus
        pool = RayPool(
            replica, arguments, count, self._scale, self._context, cpus, self._gpus, restart_on_error
        )
        self._context.say(
            f"{count:,} replicas on Ray ({self._scale.address}), each with {cpus:g} cores"
            + (f" and {self._gpus:g} GPU" if self._gpus else "")
        )
        await pool.start()
        return pool

    def _connect(self) -> None:
        import ray

        started, address = time.monotonic(), self._scale.address
        local: dict[str, Any] = {
            "num_cpus": self.count * (self._scale.cpus_per_replica or _cores(self.count)),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
        here = Path.cwd()
        # Ray puts the working folder on every replica's path; what lies in the user's is no module of ours.
        os.chdir(work_folder(self._context.folder))
        kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for attempt in range(1, _STARTS + 1):
                try:
                    ray.init(
                        address=address, configure_logging=False, **(local if address == "local" else {})
                    )
                    break
                except Exception as error:  # of many kinds; Ray's own text says what is the matter
                    ray.shutdown()
                    # Ray gives itself 30 s to start, which a busy machine may pass.
                    if address != "local" or attempt == _STARTS:
                        raise _no_cluster(address, error) from error
        finally:
            os.chdir(here)
            for number, handler in kept.items():
                signal.signal(number, handler)
        self._connected = True
        self._divide(ray.nodes())
        self._context.event("ray", address=address, seconds=round(time.monotonic() - started, 3))

    def _divide(self, nodes: list[dict[str, Any]]) -> None:
        """What each replica has; refused where no machine of the cluster can ever give it."""
        cores = [int(one.get("CPU", 0)) for one in _resources(nodes)]
        if self._scale.gpus_per_replica is None:
            there = any(one.get("GPU", 0.0) >= 1 for one in _resources(nodes))
            self._gpus = 1.0 if self._uses_gpu and there else 0.0
        if self._scale.cpus_per_replica is None and not self._gpus:
            # As many as each can have where all find a place: a machine has room for whole copies alone.
            shares = range(max(cores, default=1), 1, -1)
            self._cpus = float(next((one for one in shares if sum(n // one for n in cores) >= self.count), 1))
        places = _places(nodes, self._cpus, self._gpus)
        if not places:
            raise _no_room(self._cpus, self._gpus)
        if places >= self.count:
            return
        if self._scale.address == "local":
            raise EngineError(
                f"{self.count:,} replicas with {self._cpus:g} cores and {self._gpus:g} GPUs each, and this "
                f"machine has room for {places:,}",
                where="scale.replicas",
                mend="take fewer, or lower gpus_per_replica, so that several share a GPU",
            )
        self._context.say(
            f"the Ray cluster has room for {places:,} of {self.count:,} replicas with {self._cpus:g} cores "
            f"and {self._gpus:g} GPUs each: the others wait for machines"
        )

    def close(self) -> None:
        """Leave the cluster; one that was started for the step ends."""
        if not self._connected:
            return
        import ray

        # Where the head is gone it may wait for it.
        leaving = threading.Thread(target=ray.shutdown, daemon=True)
        leaving.start()
        leaving.join(_HEAD_GONE_S)


def _no_cluster(address: str, error: Exception) -> EngineError:
    reason = f"{type(error).__name__}: {_first_line(error)}"
    if address == "local":
        return EngineError(
            f"Ray does not start on this machine ({reason})",
            where="scale.address",
            mend="free cores and memory, or leave scale out",
        )
    return EngineError(
        f"there is no Ray cluster to connect to ({reason})",
        where=f"scale.address {address}",
        expected="a head that runs and, where it asks for one, its token (RAY_AUTH_TOKEN)",
        mend="start it with `ray start --head`, or leave address out for this machine alone",
    )


def _resources(nodes: list[dict[str, Any]]) -> list[Mapping[str, float]]:
    """What each machine of the cluster has, free or not."""
    return [node["Resources"] for node in nodes if node["Alive"]]


def _places(nodes: list[dict[str, Any]], cpus: float, gpus: float) -> int:
    """How many replicas find a place, were all machines free.

    A share of a GPU lies on one GPU; several lie on one machine.
    """

    def on(machine: Mapping[str, float]) -> int:
        by_cores = int(machine.get("CPU", 0.0) // cpus)
        if not gpus:
            return by_cores
        there = int(machine.get("GPU", 0.0))
        return min(by_cores, there // int(gpus) if gpus >= 1 else there * int(1 / gpus + 1e-9))

    return sum(map(on, _resources(nodes)))


def _no_room(cpus: float, gpus: float) -> EngineError:
    return EngineError(
        f"no machine of the Ray cluster has {cpus:g} cores and {gpus:g} GPUs, which each replica is to have",
        where="scale",
        mend="lower cpus_per_replica or gpus_per_replica, or add machines; what is made is kept",
    )


def _cores(count: int) -> int:
    return max(1, usable_cores() // count)


@dataclass(eq=False, slots=True)
class _Work:
    """A job: what came of it, and how many replicas ended over it."""

    job: tuple[Any, ...]
    answer: asyncio.Future[Any]
    ends: int = 0


@dataclass(eq=False, slots=True)
class _Slot:
    """A replica's place, whichever actor stands in it now.

    `ends` counts how often it ended since its last answer. `alone` keeps it for jobs over which others ended.
    """

    number: int
    actor: Any = None
    capacity: Mapping[str, int] = field(default_factory=dict)
    under_way: dict[asyncio.Future[Told], _Work] = field(default_factory=dict)
    heard: float = 0.0
    ends: int = 0
    alone: bool = False
    reason: str | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_there(self) -> bool:
        return bool(self.capacity) and not self.ended.is_set()

    @property
    def load(self) -> float:
        return len(self.under_way) / max(1, self.capacity["concurrency"])


class RayPool:
    """Actors that take jobs; at most `concurrency` of its capacity is under way at each."""

    identity: dict[str, Any]
    first_capacity: Mapping[str, int]

    def __init__(
        self,
        replica: str,
        arguments: tuple[Any, ...],
        count: int,
        scale: Ray,
        context: StepContext,
        cpus: float,
        gpus: float,
        restart_on_error: bool,
    ) -> None:
        import ray

        self._cpus, self._gpus = cpus, gpus
        self._timeout_s, self._start_timeout_s = scale.timeout_s, scale.start_timeout_s
        self._context, self._restart_on_error = context, restart_on_error
        actor = ray.remote(ReplicaHost).options(
            num_cpus=cpus,
            num_gpus=gpus,
            scheduling_strategy="SPREAD",
            max_concurrency=_ACTOR_CALLS,
            max_restarts=0,
            max_task_retries=0,
        )
        self._make = partial(actor.remote, replica, arguments)
        self._slots = [_Slot(number) for number in range(1, count + 1)]
        self._waiting: deque[_Work] = deque()
        self._suspects: deque[_Work] = deque()
        self._first = asyncio.Event()
        self._error: PotstillError | None = None
        self._head_seen = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin all, and wait for the first."""
        self._tasks = [asyncio.create_task(self._keep(slot)) for slot in self._slots]
        self._tasks.append(asyncio.create_task(self._watch_head()))
        try:
            while not self._first.is_set():
                self._context.check_stop()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._first.wait()
            if self._error is not None:
                raise self._error
        except BaseException:
            await self.close()
            raise

    @property
    def capacity(self) -> Mapping[str, int]:
        """What the replicas that are there take at once, added up; that of one while there is none."""
        there = [slot.capacity for slot in self._slots if slot.is_there] or [self.first_capacity]
        return {name: sum(one[name] for one in there) for name in self.first_capacity}

    async def work(self, *job: Any) -> Any:
        """What a replica makes of a job."""
        if self._error is not None:
            raise self._error
        work = _Work(job, asyncio.get_running_loop().create_future())
        self._waiting.append(work)
        self._dispatch()
        return await work.answer

    async def close(self) -> None:
        """End all actors."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in self._slots:
            _end(slot)

    def _dispatch(self) -> None:
        """Give jobs to replicas with room, the least loaded first; a suspect one to one that has no other."""
        self._waiting = deque(work for work in self._waiting if not work.answer.done())
        there = [slot for slot in self._slots if slot.is_there]
        if self._suspects and there and not any(slot.alone for slot in there):
            min(there, key=lambda slot: slot.load).alone = True
        for slot in there:
            if slot.alone and not slot.under_way:
                if self._suspects:
                    self._send(slot, self._suspects.popleft())
                else:
                    slot.alone = False
        while self._waiting:
            room = [slot for slot in there if slot.is_there and not slot.alone and slot.load < 1]
            if not room:
                return
            self._send(min(room, key=lambda slot: slot.load), self._waiting.popleft())

    def _send(self, slot: _Slot, work: _Work) -> None:
        if not slot.under_way:
            slot.heard = time.monotonic()
        try:
            future = asyncio.wrap_future(slot.actor.work.remote(*work.job).future())
        except Exception as error:  # Ray says at once that the actor is dead, or that it is itself no more
            (self._suspects if slot.alone else self._waiting).appendleft(work)
            _has_ended(slot, _first_line(error))
            return
        slot.under_way[future] = work
        future.add_done_callback(partial(self._take, slot))

    def _take(self, slot: _Slot, future: "asyncio.Future[Told]") -> None:
        """Hear what came of a job."""
        if slot.ended.is_set() or future not in slot.under_way or future.cancelled():
            return
        if (error := future.exception()) is not None:
            _has_ended(slot, _first_line(error))
            return
        told = future.result()
        engine_failed = isinstance(told.error, EngineError) and not isinstance(told.error, RequestError)
        if told.broken is not None or (engine_failed and self._restart_on_error):
            _has_ended(slot, told.broken or str(told.error))
            return
        work = slot.under_way.pop(future)
        slot.heard, slot.ends = time.monotonic(), 0
        slot.capacity = told.capacity or slot.capacity
        if not work.answer.done():  # else its asker has gone
            if told.error is not None:
                work.answer.set_exception(told.error)
            else:
                work.answer.set_result(told.value)
        self._dispatch()

    async def _keep(self, slot: _Slot) -> None:
        """Start a replica again and again, as often as is allowed."""
        while True:
            slot.ended, slot.reason, slot.capacity = asyncio.Event(), None, {}
            try:
                await self._start(slot)
                while not slot.ended.is_set():
                    self._dispatch()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK_S):
                            await slot.ended.wait()
                    if slot.under_way and time.monotonic() - slot.heard > self._timeout_s:
                        _has_ended(slot, f"no answer within {self._timeout_s:g} s (scale.timeout_s)")
            except PotstillError as error:
                self._fail(error)
                return
            _end(slot)
            self._take_back(slot)
            slot.ends += 1
            reason = slot.reason
            again = slot.ends <= _RESTARTS
            after = f"started again ({slot.ends} of {_RESTARTS})" if again else "given up"
            self._context.say(f"replica {slot.number} ended ({reason}): {after}")
            self._context.event("replica_ended", replica=slot.number, reason=reason, restarted=again)
            if not again:
                break
            self._dispatch()
        if all(one.ends > _RESTARTS for one in self._slots):
            self._fail(
                EngineError(
                    f"every replica ended {_RESTARTS + 1} times without an answer between, "
                    f"the last with: {reason}",
                    where="scale.replicas",
                    mend="the end of what they said is in run.log; answers so far are kept",
                )
            )

    async def _start(self, slot: _Slot) -> None:
        """Let an actor make its replica. Raises the error that every other would raise as well."""
        began = time.monotonic()
        try:
            slot.actor = self._make()
            starting = asyncio.wrap_future(slot.actor.start.remote().future())
            while not starting.done():
                await asyncio.wait({starting}, timeout=min(_ROOM_LOOK_S, self._start_timeout_s))
                if not starting.done() and time.monotonic() - began > self._start_timeout_s:
                    starting.cancel()
                    _has_ended(
                        slot, f"not started within {self._start_timeout_s:g} s (scale.start_timeout_s)"
                    )
                    return
                if not starting.done() and not await self._has_room():
                    raise _no_room(self._cpus, self._gpus)
            told = starting.result()
        except PotstillError:
            raise
        except Exception as error:  # of Ray: the process is gone, the machine, or Ray itself
            _has_ended(slot, _first_line(error))
            return
        if told.error is not None:
            raise told.error
        if told.broken is not None:
            _has_ended(slot, told.broken)
            return
        identity, pid = told.value
        assert told.capacity is not None
        if not self._first.is_set():
            self.identity, self.first_capacity = identity, told.capacity
            self._first.set()
        elif identity != self.identity:
            different = [name for name in identity if identity[name] != self.identity.get(name)]
            raise EngineError(
                f"replica {slot.number} is not the first one's copy: {', '.join(different)} differ",
                where="scale.replicas",
                expected="the same files and the same potstill, transformers and torch on every machine",
                mend="put the model on a file system that all machines share, or copy it to each, and "
                "install the same versions",
            )
        slot.capacity = told.capacity
        self._context.event(
            "replica_started",
            replica=slot.number,
            process=pid,
            seconds=round(time.monotonic() - began, 3),
        )

    async def _has_room(self) -> bool:
        """Whether a machine is left that could take a replica; yes where the head does not tell."""
        import ray

        if time.monotonic() - self._head_seen > 2 * _HEAD_LOOK_S:
            return True
        nodes = await asyncio.to_thread(ray.nodes)
        return _places(nodes, self._cpus, self._gpus) > 0

    def _take_back(self, slot: _Slot) -> None:
        """Let others do what an ended replica had; a job over which replicas end alone has failed."""
        for future, work in reversed(slot.under_way.items()):
            future.cancel()
            work.ends += 1
            if work.answer.done():
                continue
            if work.ends >= _ENDS_A_JOB:
                work.answer.set_exception(
                    RequestError(
                        f"a replica ended each of {work.ends} times that it was asked this, "
                        f"the last with: {slot.reason}",
                        blames_row=True,
                        where=f"replica {slot.number}",
                    )
                )
            elif work.ends == _ENDS_A_JOB - 1:
                self._suspects.appendleft(work)
            else:
                self._waiting.appendleft(work)
        slot.under_way.clear()
        slot.alone = False

    async def _watch_head(self) -> None:
        """Notice that the cluster's head is gone before Ray does, which then ends this process."""
        import ray

        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        while self._error is None:
            await asyncio.sleep(_HEAD_LOOK_S)
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(_HEAD_LOOK_S):
                    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                writer.close()
                self._head_seen = time.monotonic()
            if time.monotonic() - self._head_seen > _HEAD_GONE_S:
                self._fail(
                    EngineError(
                        f"the Ray cluster's head has not answered for {_HEAD_GONE_S:g} s",
                        where=f"{host}:{port}",
                        mend="start the cluster again, then give the same command: what is made is kept",
                    )
                )

    def _fail(self, error: PotstillError) -> None:
        """No job can succeed any more."""
        self._error = self._error or error
        under_way = [work for slot in self._slots for work in slot.under_way.values()]
        for work in (*self._waiting, *self._suspects, *under_way):
            if not work.answer.done():
                work.answer.set_exception(self._error)
        self._first.set()


def _has_ended(slot: _Slot, reason: str) -> None:
    slot.reason = slot.reason or reason
    slot.ended.set()


def _end(slot: _Slot) -> None:
    """End an actor, whatever state it is in."""
    import ray

    if slot.actor is not None:
        with suppress(Exception):  # there may be no cluster left to tell
            ray.kill(slot.actor, no_restart=True)
        slot.actor = None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    if (because := _DEAD_BECAUSE.search(text)) is not None:
        return because[1]
    return text.splitlines()[0] if text else type(error).__name__
