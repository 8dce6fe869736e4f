"""Servers that never were, in a time that does not pass: seconds here are those of a virtual clock."""

import asyncio
import random
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.teachers.pace import GivenUp, Pace

Outcome = tuple[str, float | None] | None
"""None for an answer, else how a try failed and the Retry-After."""


class VirtualClock(selectors.DefaultSelector):
    """Goes on to the next thing that is due instead of waiting for it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everyone waits for everyone"
            self.now += timeout
        return ready


def in_virtual_time(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    clock = VirtualClock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main())


@dataclass
class Server:
    """Answers `slots` requests at a time, the others wait; refuses those past `most`, or what `rule` says."""

    slots: int = 10**6
    most: int = 10**6
    latency_s: Callable[[], float] = lambda: 1.0
    rule: Callable[[float], Outcome] = lambda now: None
    starts: list[float] = field(default_factory=list)
    refused: int = 0
    here: int = 0
    most_here: int = 0
    _places: asyncio.Semaphore | None = None

    async def __call__(self) -> Outcome:
        now = asyncio.get_running_loop().time()
        self.starts.append(now)
        self._places = self._places or asyncio.Semaphore(self.slots)
        failure = self.rule(now)
        if failure is None and self.here >= self.most:
            failure = ("refused", None)
        if failure is not None:
            self.refused += 1
            await asyncio.sleep(0.01)
            return failure
        self.here += 1
        self.most_here = max(self.most_here, self.here)
        try:
            async with self._places:
                await asyncio.sleep(self.latency_s())
        finally:
            self.here -= 1
        return None


async def ask(pace: Pace, server: Callable[[], Awaitable[Outcome]], requests: int) -> float:
    """Ask until every request is answered; the seconds that it took."""

    async def one() -> None:
        again = False
        while True:
            async with pace.turn(again=again) as turn:
                outcome = await server()
                if outcome is None:
                    pace.answered()
                    return
                pace.failed(turn, outcome[0], retry_after_s=outcome[1], why="HTTP 503")  # type: ignore[arg-type]
            again = True

    await asyncio.gather(*(one() for _ in range(requests)))
    return asyncio.get_running_loop().time()


@pytest.fixture(autouse=True)
def _same_jitter() -> None:
    random.seed(7)


@pytest.mark.parametrize("slots", [3, 16, 50, 64, 150])
def test_the_limit_finds_the_slots_of_a_server_that_lets_the_others_wait(slots: int) -> None:
    pace, server = Pace(256), Server(slots=slots)
    seconds = in_virtual_time(lambda: ask(pace, server, 60 * slots))
    assert slots <= pace.limit <= max(1.6 * slots, 20)
    assert 60 / seconds > 0.8


@pytest.mark.parametrize("slots", [16, 50, 150])
def test_it_finds_them_through_answers_of_very_different_lengths(slots: int) -> None:
    drawn = random.Random(3)
    pace, server = Pace(512), Server(slots=slots, latency_s=lambda: drawn.expovariate(1.0))
    seconds = in_virtual_time(lambda: ask(pace, server, 80 * slots))
    assert 0.7 * slots <= pace.limit <= 3 * slots
    assert 80 / seconds > 0.8


def test_a_moment_of_slowness_does_not_end_the_growth() -> None:
    pace = Pace(64)

    async def main() -> float:
        loop = asyncio.get_running_loop()
        slow = Server(latency_s=lambda: 6.0 if 5 < loop.time() < 8 else 1.0)  # while 32 are tried
        return await ask(pace, slow, 3000)

    seconds = in_virtual_time(main)
    assert pace.limit == 64
    assert 3000 / 64 / seconds > 0.7


def test_the_cap_is_never_passed_and_soon_reached() -> None:
    pace, server = Pace(40), Server()
    in_virtual_time(lambda: ask(pace, server, 400))
    assert pace.limit == server.most_here == 40


def test_a_server_that_refuses_past_a_number_is_kept_busy_below_it() -> None:
    pace, server = Pace(256), Server(most=24)
    seconds = in_virtual_time(lambda: ask(pace, server, 3000))
    assert server.refused < 0.03 * 3000
    assert pace.limit <= 25
    assert 3000 / 24 / seconds > 0.7


def test_refusals_of_one_moment_cut_the_limit_once() -> None:
    pace = Pace(64)
    refused = 0

    def refuse_the_first_sixteen(now: float) -> Outcome:
        nonlocal refused
        refused += 1
        return ("refused", None) if refused <= 16 else None

    async def until_all_were_refused() -> int:
        asking = asyncio.create_task(ask(pace, Server(rule=refuse_the_first_sixteen), 40))
        await asyncio.sleep(0.1)
        found = pace.limit
        await asking
        return found

    assert in_virtual_time(until_all_were_refused) == 11


def test_retry_after_pauses_every_request_and_not_that_one_alone() -> None:
    told = iter([("refused", 30.0)])
    server = Server(rule=lambda now: next(told, None) if now > 5 else None)
    in_virtual_time(lambda: ask(Pace(8, backoff_s=1.0), server, 200))
    began = next(start for start in server.starts if start > 5)
    later = [start for start in server.starts if start > began]
    assert 30 <= min(later) - began <= 31.1


def test_a_rate_limit_without_retry_after_is_nearly_used_up() -> None:
    """One request a second, whatever else: 429 for all others."""
    free_at = 0.0

    def once_a_second(now: float) -> Outcome:
        nonlocal free_at
        if now < free_at:
            return ("refused", None)
        free_at = now + 1.0
        return None

    server = Server(rule=once_a_second, latency_s=lambda: 0.2)
    seconds = in_virtual_time(lambda: ask(Pace(64), server, 200))
    assert 200 / seconds > 0.4
    assert server.refused < 400


def test_a_server_that_is_down_for_minutes_is_probed_and_then_used_again() -> None:
    said: list[str] = []
    server = Server(rule=lambda now: ("failed", None) if 10 < now < 130 else None)
    pace = Pace(32, say=said.append)
    in_virtual_time(lambda: ask(pace, server, 1000))
    down = [start for start in server.starts if 10 < start < 130]
    assert len(down) < 60  # those under way, then probes
    assert sum(start > 20 for start in down) <= 6
    assert "20 requests in a row failed (HTTP 503); asking one at a time for up to 5 min 00 s" in said[0]
    assert said[1].startswith("the server answers again, after 2 min")
    assert pace.limit == 32


def test_a_server_that_stays_down_is_given_up_and_nobody_waits_for_ever() -> None:
    pace = Pace(8, patience_s=100)
    server = Server(rule=lambda now: ("failed", None) if now > 3 else None)

    async def main() -> Any:
        asking = [asyncio.create_task(ask(pace, server, 10)) for _ in range(20)]
        found = await asyncio.gather(*asking, return_exceptions=True)
        return found, asyncio.get_running_loop().time()

    found, seconds = in_virtual_time(main)
    ends = [one for one in found if isinstance(one, GivenUp)]
    assert len(ends) > 10
    assert all(end.seconds >= 100 and end.failures > 20 for end in ends)
    assert 100 < seconds < 200
    assert pace.in_flight == 0


def test_requests_that_always_fail_do_not_stand_for_the_server() -> None:
    """Pitfall: the last one that failed is every probe, and the patience ends with a server that is well."""
    answered: list[int] = []
    probes: list[int] = []

    async def main() -> None:
        pace = Pace(2, patience_s=100)

        async def one(number: int) -> None:
            again = False
            while number > 1 or len(answered) < 8:
                async with pace.turn(again=again) as turn:
                    probes.extend([number] * turn.probe)
                    await asyncio.sleep(0.01)
                    if number > 1:
                        pace.answered()
                        answered.append(number)
                        return
                    pace.failed(turn, "failed")
                again = True

        async def ask_others() -> None:
            await asyncio.sleep(5)
            assert probes, "the circuit is broken by now"
            await asyncio.gather(*map(one, range(2, 10)))

        await asyncio.gather(one(0), one(1), ask_others())

    in_virtual_time(main)
    assert sorted(answered) == list(range(2, 10))
    assert probes[-1] == 2, "one that was never tried goes before those that failed"


def test_those_that_failed_take_turns_as_probes_where_no_other_waits() -> None:
    probes: list[int] = []

    async def main() -> None:
        pace = Pace(3, patience_s=500)

        async def one(number: int) -> None:
            again = False
            while True:
                async with pace.turn(again=again) as turn:
                    probes.extend([number] * turn.probe)
                    await asyncio.sleep(0.01)
                    pace.failed(turn, "failed")
                again = True

        await asyncio.gather(*map(one, range(3)), return_exceptions=True)

    in_virtual_time(main)
    assert len(probes) > 6
    assert all({*probes[start : start + 3]} == {0, 1, 2} for start in range(len(probes) - 3))


def test_while_the_server_is_down_every_probe_wants_one_more_request_to_be_begun() -> None:
    wanted: list[int] = []

    async def main() -> None:
        pace = Pace(8, patience_s=100)

        async def server() -> Outcome:
            wanted.append(pace.wanted)
            await asyncio.sleep(0.01)
            return ("failed", None)

        with pytest.raises(GivenUp):
            await ask(pace, server, 8)

    in_virtual_time(main)
    down = [one for one in wanted if one > 8]
    assert down == list(range(9, 9 + len(down)))
    assert len(down) > 3


@pytest.mark.parametrize("refused_in_flight", [24, 64])
def test_after_a_good_spell_past_what_was_refused_the_limit_doubles_again(refused_in_flight: int) -> None:
    pace = Pace(512)
    refusals = 0

    def refuse_for_a_moment(now: float) -> Outcome:
        nonlocal refusals
        if pace.in_flight < refused_in_flight or refusals > 0:
            return None
        refusals += 1
        return ("refused", None)

    in_virtual_time(lambda: ask(pace, Server(rule=refuse_for_a_moment), 8000))
    assert refusals == 1
    assert pace.limit == 512  # by steps of a quarter it would be near 100


def test_without_patience_it_is_given_up_at_once() -> None:
    pace = Pace(4, patience_s=0)
    server = Server(rule=lambda now: ("failed", None))
    with pytest.raises(GivenUp):
        in_virtual_time(lambda: ask(pace, server, 10))
    assert 20 <= len(server.starts) <= 24


def test_who_gives_up_waiting_leaves_no_place_taken() -> None:
    async def main() -> int:
        pace, server = Pace(2), Server()
        asking = [asyncio.create_task(ask(pace, server, 1)) for _ in range(10)]
        await asyncio.sleep(0.5)
        for number in (0, 3, 4):  # one with the server, two that wait
            asking[number].cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        return pace.in_flight + len(server.starts)

    assert in_virtual_time(main) == 8


def test_who_tries_again_goes_before_those_who_have_not_been_asked() -> None:
    order: list[int] = []

    async def main() -> None:
        pace = Pace(1)

        async def one(number: int) -> None:
            for again in (False, True):
                async with pace.turn(again=again):
                    order.append(number)

        await asyncio.gather(*(one(number) for number in range(3)))

    in_virtual_time(main)
    assert order[:2] == [0, 0] or order == [0, 0, 1, 1, 2, 2]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 0.9), st.integers(1, 40))
def test_whatever_a_server_does_the_limit_stays_within_its_bounds(seed: int, bad: float, cap: int) -> None:
    drawn, pace = random.Random(seed), Pace(cap, patience_s=1e9)

    async def server() -> Outcome:
        assert 1 <= pace.limit <= cap
        assert pace.in_flight <= cap
        await asyncio.sleep(0.1)
        return (drawn.choice(["refused", "slow", "failed"]), None) if drawn.random() < bad else None

    in_virtual_time(lambda: ask(pace, server, 50))
    assert pace.in_flight == 0
