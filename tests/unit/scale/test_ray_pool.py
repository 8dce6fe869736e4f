"""What becomes of jobs where replicas end, hang, fail or are others, on real Ray."""

import asyncio
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import EngineError
from potstill.scale.job import work_folder
from potstill.scale.ray_host import Told
from potstill.scale.ray_pool import RayPool, RayReplicas
from potstill.scale.settings import Ray

pytest.importorskip("ray", reason="Ray, which `make ray` installs, is not there")

SCRIPT = Path(__file__).parents[2] / "ray_jobs.py"
JOBS = [*range(12)]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All of the script's scenarios: starting Ray takes longer than each of them."""
    from potstill.scale.on_ray import ray_environment

    folder = tmp_path_factory.mktemp("jobs")
    with ray_environment(Ray(engine="ray", replicas=2)) as environment:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(folder)],
            capture_output=True,
            text=True,
            check=False,
            env={**environment, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
            timeout=1800,
        )
        scratch = Path(environment["RAY_TMPDIR"])
        assert scratch.is_dir()
    assert done.returncode == 0, done.stderr[-4000:]
    assert not scratch.exists()
    assert "RAY_AUTH_TOKEN" not in os.environ
    return json.loads(done.stdout.splitlines()[-1])


def answered_but(job: int | None = None, *others: int) -> list[int | None]:
    return [None if one == job or one in others else one for one in JOBS]


@pytest.mark.slow
def test_jobs_are_answered_and_all_of_ray_is_on_loopback_and_ends(told: Any) -> None:
    assert told["plain"]["answers"] == JOBS
    assert told["plain"]["ended"] == []
    assert {one.removeprefix("::ffff:") for one in told["addresses"]} == {"127.0.0.1"}
    assert told["left"] == []


@pytest.mark.slow
def test_a_job_over_which_every_replica_ends_fails_alone(told: Any) -> None:
    found = told["poisoned"]
    assert found["answers"] == answered_but(7, 8)
    assert "a replica ended each of 3 times that it was asked this" in found["errors"]["7"]
    assert found["errors"]["8"] == "the row is too long"
    assert len(found["ended"]) == 3


@pytest.mark.slow
def test_an_engine_that_fails_is_started_again_where_that_helps(told: Any) -> None:
    assert told["failing"]["answers"] == JOBS
    assert told["failing"]["ended"] == ["the engine is gone"]
    assert told["failing for all"]["answers"] == answered_but(3)
    assert told["failing for all"]["errors"] == {"3": "the engine is gone"}
    assert told["failing for all"]["ended"] == []
    assert told["surprised"]["answers"] == JOBS
    assert told["surprised"]["ended"] == [
        "RuntimeError: CUDA error: an illegal memory access was encountered"
    ]


@pytest.mark.slow
def test_a_replica_that_hangs_is_ended_and_its_jobs_go_to_others(told: Any) -> None:
    assert told["hanging"]["answers"] == JOBS
    assert told["hanging"]["ended"] == ["no answer within 5 s (scale.timeout_s)"]


@pytest.mark.slow
def test_a_replica_that_dies_each_time_is_given_up_with_its_reason(told: Any) -> None:
    assert told["dying"]["kind"] == "EngineError"
    assert "every replica ended 5 times without an answer between" in told["dying"]["error"]
    assert "no driver found" in told["dying"]["error"]
    assert told["dying"]["ended"] == ["RuntimeError: no driver found"] * 5


@pytest.mark.slow
def test_what_is_wrong_with_every_copy_is_told_at_once(told: Any) -> None:
    assert told["missing"] == {
        "kind": "ModelError",
        "error": "some/model: no such model\n  to mend:  name another",
        "ended": [],
    }
    assert told["different"]["kinds"] == ["EngineError"]
    assert "is not the first one's copy: model differ" in told["different"]["errors"]["0"]


class GivenUp:
    """An actor of which Ray says at each call that it is dead; `most` calls are no loop."""

    def __init__(self, most: int = 3) -> None:
        self.work = self.start = self
        self.most, self.calls = most, 0

    def remote(self, *job: Any) -> Any:
        self.calls += 1
        if self.calls > self.most:
            pytest.fail("a dead actor is asked again and again")
        raise RuntimeError("the actor is dead")


class Answering:
    """An actor that answers each job with it."""

    def __init__(self) -> None:
        self.work = self

    def remote(self, *job: Any) -> Any:
        answer: Future[Told] = Future()
        answer.set_result(Told(value=job[0], capacity={"concurrency": 1}))
        self.answer = answer
        return self

    def future(self) -> "Future[Told]":
        return self.answer


def pool_of(step_context: Any, *actors: Any) -> RayPool:
    scale = Ray(engine="ray", replicas=9)
    pool = RayPool("ray_jobs:Echo", (), len(actors), scale, step_context("generate"), 1.0, 0.0, True)
    for slot, actor in zip(pool._slots, actors, strict=True):
        slot.actor, slot.capacity = actor, {"concurrency": 1}
    return pool


def test_a_job_that_a_dead_actor_refuses_goes_to_another(step_context: Any) -> None:
    async def ask() -> Any:
        pool = pool_of(step_context, dead, Answering())
        async with asyncio.timeout(10):
            answer = await pool.work(5)
        return answer, [slot.reason for slot in pool._slots]

    dead = GivenUp()
    assert asyncio.run(ask()) == (5, ["the actor is dead", None])
    assert dead.calls == 1


def test_a_suspect_that_a_dead_actor_refuses_is_still_asked_alone(step_context: Any) -> None:
    async def refuse() -> RayPool:
        pool = pool_of(step_context, GivenUp())
        asking = asyncio.create_task(pool.work(5))
        pool._slots[0].capacity = {}
        await asyncio.sleep(0)
        pool._slots[0].capacity = {"concurrency": 1}
        pool._suspects.append(pool._waiting.popleft())
        pool._dispatch()
        asking.cancel()
        return pool

    pool = asyncio.run(refuse())
    assert (len(pool._suspects), len(pool._waiting)) == (1, 0)
    assert pool._slots[0].reason == "the actor is dead"


def test_an_actor_that_cannot_even_be_made_is_given_up_with_the_reason(step_context: Any) -> None:
    def make() -> Any:
        raise RuntimeError("Ray is no more")

    async def start() -> None:
        pool = pool_of(step_context, None)
        pool._make = make  # type: ignore[assignment]
        pool._watch_head = partial(asyncio.sleep, 60)  # type: ignore[method-assign]
        async with asyncio.timeout(10):
            await pool.start()

    with pytest.raises(EngineError, match=r"every replica ended 5 times .*the last with: Ray is no more"):
        asyncio.run(start())


def machine(cores: int, gpus: int = 0, *, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": float(cores), **({"GPU": float(gpus)} if gpus else {})}}


@pytest.mark.parametrize(
    ("machines", "count", "cores"),
    [
        ([machine(8)], 2, 4),
        ([machine(8), machine(8)], 3, 4),  # 16 // 3 would leave the third no place
        ([machine(10), machine(6)], 4, 3),
        ([machine(16), machine(2)], 2, 8),
        ([machine(64), machine(64, alive=False)], 2, 32),
        ([machine(2)], 2, 1),
    ],
)
def test_replicas_have_the_most_cores_with_which_all_find_a_place(
    step_context: Any, machines: list[Any], count: int, cores: int
) -> None:
    replicas = RayReplicas(Ray(engine="ray", replicas=count), step_context("generate"), uses_gpu=False)
    replicas._divide(machines)
    assert replicas._cpus == cores
    assert sum(int(one["Resources"]["CPU"]) // cores for one in machines if one["Alive"]) >= count


@pytest.mark.parametrize(
    ("machines", "count", "share", "room"),
    [
        ([machine(8, 2), machine(8, 1)], 4, None, "3 of 4 replicas with 1 cores and 1 GPUs"),
        ([machine(8, 2), machine(8, 1)], 3, None, None),
        ([machine(8, 1)], 2, 0.6, "1 of 2"),  # of a GPU of which one has 0.6 nobody else can have as much
        ([machine(20, 1)], 10, 0.1, None),
        ([machine(2, 4)], 4, None, "2 of 4"),  # cores run out before GPUs
        ([machine(1), machine(1)], 3, 0, "2 of 3 replicas with 1 cores and 0 GPUs"),
        ([machine(8, 8), machine(8, 2)], 3, 4.0, "2 of 3 replicas with 1 cores and 4 GPUs"),
    ],
)
def test_copies_without_a_place_are_told_of_on_a_cluster_and_refused_on_one_machine(
    step_context: Any,
    machines: list[Any],
    count: int,
    share: float | None,
    room: str | None,
) -> None:
    def divide(address: str) -> list[str]:
        scale = Ray(engine="ray", replicas=count, address=address, gpus_per_replica=share)
        context, said = step_context("generate"), []
        context.say = said.append
        RayReplicas(scale, context, uses_gpu=True)._divide(machines)
        return said

    told = divide("auto")
    if room is None:
        assert (told, divide("local")) == ([], [])
        return
    assert f"the Ray cluster has room for {room}" in told[0]
    with pytest.raises(EngineError, match="this machine has room for"):
        divide("local")


def test_what_no_machine_has_is_refused(step_context: Any) -> None:
    scale = Ray(engine="ray", replicas=1, address="auto", cpus_per_replica=16)
    with pytest.raises(EngineError, match="no machine of the Ray cluster has 16 cores"):
        RayReplicas(scale, step_context("generate"), uses_gpu=False)._divide([machine(8), machine(8)])


def test_cores_are_known_before_replicas_are_opened(
    step_context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "nodes", lambda: [machine(8), machine(8)])
    context = step_context("generate")
    work_folder(context.folder).mkdir(parents=True)
    replicas = RayReplicas(Ray(engine="ray", replicas=4), context, uses_gpu=False)
    assert replicas.cpus == 4
