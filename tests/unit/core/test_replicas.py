"""Jobs of copies come back in order, so many at a time, whoever was quicker."""

import sys
from typing import Any

import pytest

from potstill.core.errors import DataError, Interrupted
from potstill.core.replicas import OpenReplicas

from ...copies import CopiesHere


class Squares:
    identity: dict[str, Any] = {"power": 2}  # noqa: RUF012 - a replica's identity belongs to the object
    capacity = {"concurrency": 2}  # noqa: RUF012

    async def work(self, number: int) -> int:
        if number < 0:
            raise DataError(f"{number} is negative")
        return number**2


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "squares", sys.modules[__name__])
    copies = CopiesHere(2)
    with OpenReplicas(copies.count, copies.open("squares:Squares")) as found:
        yield copies, found
    assert copies.closed == 1


def go_on() -> None:
    pass


def test_answers_are_in_the_jobs_order_and_a_job_without_content_is_not_sent(opened: Any) -> None:
    copies, replicas = opened
    found = list(replicas.in_order(range(30), lambda one: None if one % 10 == 3 else (one,), go_on))
    assert found == [(one, None if one % 10 == 3 else one**2) for one in range(30)]
    assert sum(copies.jobs) == 27
    assert all(copies.jobs)


def test_jobs_are_begun_only_as_far_ahead_as_keeps_every_copy_busy(opened: Any) -> None:
    copies, replicas = opened
    begun = []

    def jobs() -> Any:
        for number in range(1000):
            begun.append(number)
            yield number

    answers = replicas.in_order(jobs(), lambda one: (one,), go_on)
    next(answers)
    assert len(begun) <= 4 * copies.count + 1
    assert copies.most_under_way <= 4 * copies.count
    answers.close()


def test_a_jobs_error_is_raised_in_its_turn(opened: Any) -> None:
    _, replicas = opened
    answers = replicas.in_order([1, 2, -3, 4], lambda one: (one,), go_on)
    assert [next(answers), next(answers)] == [(1, 1), (2, 4)]
    with pytest.raises(DataError, match="-3 is negative"):
        next(answers)


def test_a_stop_is_heard_while_an_answer_is_waited_for(opened: Any) -> None:
    _, replicas = opened

    def stop() -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        list(replicas.in_order([1], lambda one: (one,), stop))
