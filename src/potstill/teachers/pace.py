"""How many requests a server is given at once, and when it is given none: both found from how it answers."""

import asyncio
import math
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from potstill.core.events import format_seconds

__all__ = ["Failure", "GivenUp", "Pace", "Turn"]

Failure = Literal["refused", "slow", "failed"]

_FIRST_LIMIT = 16
_CUT = 0.7
# Of the rise in answers that would be in proportion to the limit's: to keep a limit, to double it next.
_WORTHWHILE, _PROMISING = 0.25, 0.5
_FINE_STEP = 1.25
# Answers that a rate is taken from, in multiples of the limit: many where a small gain is to be seen.
_DOUBLING_ROUNDS, _FINE_ROUNDS = 2, 8
_BROKEN_AFTER = 20
_LONGEST_PAUSE_S = 60.0


class GivenUp(Exception):
    """The server has failed every request for longer than one is patient."""

    def __init__(self, failures: int, seconds: float) -> None:
        super().__init__(failures, seconds)
        self.failures, self.seconds = failures, seconds


@dataclass(frozen=True, slots=True)
class Turn:
    """One try of a request: when it was let through, and whether it is to find out if the server is back."""

    started: float
    probe: bool


_Measured = tuple[int, float]
"""A limit and the answers a second that it brought."""


def _share(base: _Measured, tried: _Measured) -> float:
    """How much of a rise in proportion to the limit's a higher limit brought."""
    return (tried[1] / base[1] - 1) / (tried[0] / base[0] - 1)


class Pace:
    """Lets requests through to one server, `limit` at once: as many as raise its rate, never above `cap`.

    The limit doubles while the rate of answers rises with it. A refusal (429, 503, no answer in time) takes
    it to 0.7 of what it was, from where it grows by one each time that as many answers have come: additive
    increase, multiplicative decrease (Chiu & Jain 1989). Once more requests than were refused then have been
    answered for a while, and faster, it may double again. A rise that brings less than a quarter of its share
    in answers is taken back (a doubling only when the limit before it, measured once more, brings as much),
    and tried again later in a smaller step. A refusal pauses all requests, for as long as the server asks,
    else ever longer until an answer comes.

    After 20 failures in a row one request at a time is let through, until one is answered; when none is for
    `patience_s`, everyone who waits gets GivenUp. Each of these probes is another request, best one that was
    never tried, so that one that always fails does not stand for the server. Used inside one event loop.
    """

    def __init__(
        self,
        cap: int,
        *,
        backoff_s: float = 1.0,
        patience_s: float = 300.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.cap, self.limit = cap, min(cap, _FIRST_LIMIT)
        self.in_flight = 0
        self._backoff_s, self._patience_s = backoff_s, patience_s
        self._say = say or (lambda message: None)
        self._fresh: deque[asyncio.Future[None]] = deque()
        self._again: deque[asyncio.Future[None]] = deque()  # had a turn that brought no answer
        self._timer: asyncio.TimerHandle | None = None
        self._paused_until = self._cut_at = -math.inf
        self._doubling, self._target = True, self.limit
        self._base: _Measured | None = None  # a limit that was worth it
        self._doubted: _Measured | None = None  # one that seemed not to be
        self._refused_at: int | None = None  # in flight at the last refusal
        self._answers, self._settled_at, self._most_in_flight = 0, 0.0, 0
        self._refusals = self._failures = self._probes = 0
        self._broken_since: float | None = None
        self._begun = 0
        self._given_up: tuple[int, float] | None = None

    @property
    def wanted(self) -> int:
        """How many requests to have begun: the limit, or one more with every probe than had been before."""
        return self.limit if self._broken_since is None else self._begun + self._probes

    @property
    def _allowed(self) -> int:
        """How many requests may be with the server now."""
        return self.limit if self._broken_since is None else 1

    @asynccontextmanager
    async def turn(self, *, again: bool = False) -> AsyncIterator[Turn]:
        """Wait for one's turn, and have it while the block lasts; who tries `again` goes before the others.

        Raises GivenUp once the server has been given up.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        (self._again if again else self._fresh).append(waiter)
        self._let_in()
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # let in at the same moment
                self._leave()
            raise
        try:
            if self._given_up is not None:
                raise GivenUp(*self._given_up)
            yield Turn(loop.time(), self._broken_since is not None)
        finally:
            self._leave()

    def _let_in(self) -> None:
        loop = asyncio.get_running_loop()
        if self._paused_until > loop.time() and not self._given_up:
            if self._timer is None:
                self._timer = loop.call_at(self._paused_until, self._resume)
            return
        while (self.in_flight < self._allowed or self._given_up) and (waiter := self._next_waiter()):
            self.in_flight += 1
            self._most_in_flight = max(self._most_in_flight, self.in_flight)
            waiter.set_result(None)

    def _next_waiter(self) -> asyncio.Future[None] | None:
        for queue in (self._again, self._fresh) if self._broken_since is None else (self._fresh, self._again):
            while queue:
                if not (waiter := queue.popleft()).done():  # else its asker has gone
                    return waiter
        return None

    def _resume(self) -> None:
        self._timer = None
        self._let_in()

    def _leave(self) -> None:
        self.in_flight -= 1
        self._let_in()

    def answered(self) -> None:
        """Note that the server answered a request."""
        now = asyncio.get_running_loop().time()
        self._refusals = self._failures = self._probes = 0
        if self._broken_since is not None:
            self._say(f"the server answers again, after {format_seconds(now - self._broken_since)}")
            self._broken_since, self.limit = None, min(self.cap, _FIRST_LIMIT)
            self._start_over(target=self.limit, refused_at=None)
        self._answers += 1
        if self.limit < self._target:
            if self._answers >= self.limit:
                self.limit, self._answers = self.limit + 1, 0
        elif self._answers == self.limit:  # those before were asked under another limit
            self._settled_at, self._most_in_flight = now, self.in_flight
        elif (counted := self._answers - self.limit) >= self._round:
            # A rate is the limit's own only where the limit was used.
            if now > self._settled_at and self._most_in_flight >= self.limit:
                self._end_round(counted / (now - self._settled_at))
            self._answers = 0

    @property
    def _round(self) -> int:
        return self.limit * (_DOUBLING_ROUNDS if self._doubling else _FINE_ROUNDS)

    def _end_round(self, rate: float) -> None:
        """Set the next limit to try by what this one brought: `rate` is in answers a second."""
        base, doubted, tried = self._base, self._doubted, (self.limit, rate)
        if doubted is not None:  # the limit below it was measured once more
            self._doubted, self._doubling = None, _share(tried, doubted) >= _WORTHWHILE
            if not self._doubling:
                return  # to be measured finely before finer steps
            tried, self.limit = doubted, doubted[0]
        elif base is not None and self.limit > base[0]:
            if (share := _share(base, tried)) < _WORTHWHILE:
                self._doubted = tried if self._doubling else None
                self._base, self.limit = None, base[0]
                self._target = self.limit
                return
            if self._refused_at is not None and base[0] >= self._refused_at:
                self._refused_at = None  # of a moment that is over
            self._doubling = share >= _PROMISING and self._refused_at is None
        self._base = tried
        step = self.limit if self._doubling else math.ceil(self.limit * (_FINE_STEP - 1))
        self._target = min(self.cap, self.limit + step)
        if self._doubling:
            self.limit = self._target

    def _start_over(self, *, target: int, refused_at: int | None) -> None:
        self._target, self._refused_at, self._doubling = target, refused_at, refused_at is None
        self._base, self._doubted, self._answers = None, None, 0

    def failed(
        self, turn: Turn, failure: Failure, *, retry_after_s: float | None = None, why: str = ""
    ) -> None:
        """Note that a try brought no answer: refused, not answered in time, or failed on the way."""
        now = asyncio.get_running_loop().time()
        self._failures += 1
        # What was sent before the last cut says nothing new.
        if failure != "failed" and turn.started >= self._cut_at:
            self._cut(now)
            if retry_after_s is None:
                self._pause(now, self._backoff(self._refusals))
            self._refusals += 1
        if retry_after_s is not None:
            # The jitter goes on top, so that clients told to wait equally long do not all come back at once.
            self._pause(now, retry_after_s + random.uniform(0, min(retry_after_s, self._backoff_s)))
        if self._broken_since is None and self._failures >= _BROKEN_AFTER:
            self._broken_since, self._begun = now, self.limit
            self._say(
                f"{self._failures} requests in a row failed ({why}); asking one at a time "
                f"for up to {format_seconds(self._patience_s)}"
            )
        elif self._broken_since is None or not turn.probe:
            return
        if now - self._broken_since >= self._patience_s:
            self._given_up = self._failures, now - self._broken_since
        else:
            self._pause(now, self._backoff(self._probes))
            self._probes += 1

    def _cut(self, now: float) -> None:
        self._cut_at, before = now, min(self.limit, self.in_flight)
        self.limit = max(1, int(_CUT * before))
        self._start_over(target=before, refused_at=before)

    def _backoff(self, number: int) -> float:
        return random.uniform(0.5, 1.5) * min(_LONGEST_PAUSE_S, self._backoff_s * 2.0 ** min(number, 30))

    def _pause(self, now: float, seconds: float) -> None:
        self._paused_until = max(self._paused_until, now + seconds)
