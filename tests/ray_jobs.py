"""Replicas that misbehave, on Ray on this machine; prints as JSON what became of their jobs.

Run as a script by tests/unit/scale/test_ray_pool.py, since Ray stays in the process that began with it.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from potstill.core.errors import EngineError, ModelError, PotstillError
from potstill.core.events import Reporter, read_events
from potstill.core.step import StepContext
from potstill.scale.job import work_folder
from potstill.scale.ray_pool import RayReplicas
from potstill.scale.settings import Ray
from potstill.teachers import RequestError


class Echo:
    """Answers with its own number, a hundredth of a second later."""

    def __init__(self, folder: str = "") -> None:
        self.folder = Path(folder)
        self.identity: dict[str, Any] = {"model": "echo"}
        self.capacity = {"concurrency": 4}

    async def work(self, job: Any) -> Any:
        await asyncio.sleep(0.01)
        return job

    def first_time(self, name: str) -> bool:
        """Whether no process of this test has asked before."""
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class Poisoned(Echo):
    """Its process ends over one job, as where memory runs out over it; another it refuses."""

    async def work(self, job: Any) -> Any:
        if job == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        if job == 8:
            raise RequestError("the row is too long", blames_row=True)
        return await super().work(job)


class Failing(Echo):
    """The first engine fails."""

    async def work(self, job: Any) -> Any:
        if job == 3 and self.first_time("failed"):
            raise EngineError("the engine is gone")
        return await super().work(job)


class Surprised(Echo):
    """A library raises an error of its own, once."""

    async def work(self, job: Any) -> Any:
        if job == 3 and self.first_time("surprised"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return await super().work(job)


class Hanging(Echo):
    """Stands still once, as a process does that is stopped."""

    async def work(self, job: Any) -> Any:
        if job == 3 and self.first_time("hung"):
            os.kill(os.getpid(), signal.SIGSTOP)
        return await super().work(job)


class Dying(Echo):
    """Cannot be made, for a reason that nobody foresaw."""

    def __init__(self, folder: str) -> None:
        raise RuntimeError("no driver found")


class Missing(Echo):
    """Cannot be made, for a reason that is the same for every copy."""

    def __init__(self, folder: str) -> None:
        raise ModelError("no such model", where="some/model", mend="name another")


class Different(Echo):
    """Each is another model."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.identity = {"model": os.getpid()}


async def work(replicas: RayReplicas, replica: type, jobs: list[int], **options: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            pool = await replicas.open(f"ray_jobs:{replica.__name__}", folder, **options)
        except PotstillError as error:
            return {"error": str(error), "kind": type(error).__name__}
        try:
            if replica is Different:
                await asyncio.sleep(60)  # until the second is there
            found = await asyncio.gather(*(pool.work(job) for job in jobs), return_exceptions=True)
        except PotstillError as error:
            return {"error": str(error), "kind": type(error).__name__}
        finally:
            await pool.close()
    return {
        "answers": [one if isinstance(one, int) else None for one in found],
        "errors": {job: str(one) for job, one in zip(jobs, found, strict=True) if not isinstance(one, int)},
        "kinds": sorted({type(one).__name__ for one in found}),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    context = StepContext(
        name="step",
        kind="generate",
        folder=folder,
        seed=1,
        cache_folder=folder,
        reporter=Reporter("quiet", folder / "events.jsonl"),
        resolve_models=lambda _: {},
        resolve_data=lambda _: [],
    )
    work_folder(folder).mkdir(parents=True)
    jobs = list(range(12))
    told: dict[str, Any] = {}

    def scenario(
        name: str, replica: type, *, count: int = 2, timeout_s: float = 120.0, **options: Any
    ) -> None:
        scale = Ray(engine="ray", replicas=count, cpus_per_replica=1, timeout_s=timeout_s)
        replicas.count, replicas._scale = count, scale
        before = len(read_events(folder / "events.jsonl"))
        told[name] = asyncio.run(work(replicas, replica, jobs, **options))
        events = read_events(folder / "events.jsonl")[before:]
        told[name]["ended"] = [one["reason"] for one in events if one["event"] == "replica_ended"]

    replicas = RayReplicas(Ray(engine="ray", replicas=2, cpus_per_replica=1), context, uses_gpu=False)
    try:
        scenario("plain", Echo)
        found: set[str] = set()
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # Ray ends idle ones
                found.update(one.laddr.ip for one in process.net_connections("inet"))
        told["addresses"] = sorted(found)
        scenario("poisoned", Poisoned)
        scenario("failing", Failing)
        scenario("failing for all", Failing, count=1, restart_on_error=False)
        scenario("surprised", Surprised, count=1)
        scenario("hanging", Hanging, timeout_s=5.0)
        scenario("dying", Dying, count=1)
        scenario("missing", Missing, count=1)
        scenario("different", Different)
    finally:
        replicas.close()
    told["left"] = [one.name() for one in psutil.Process().children(recursive=True) if one.is_running()]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
