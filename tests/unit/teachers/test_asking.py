"""Workers that ask one request after the other, for a teacher that answers when it is told to."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import EngineError
from potstill.core.records import Record
from potstill.teachers import Answer, Request
from potstill.teachers.asking import Asking
from potstill.teachers.budget import Budget
from potstill.teachers.request_store import Bought, RequestStore


@dataclass(frozen=True)
class Question:
    """A planned request; its key is its number."""

    number: int
    sample: int = 0

    @property
    def prompt(self) -> Record:
        return Record(str(self.number), [{"role": "user", "content": str(self.number)}])

    @property
    def key(self) -> str:
        return str(self.number)


@dataclass
class Questions:
    """So many of them."""

    total: int

    def __iter__(self) -> Iterator[Question]:
        return map(Question, range(self.total))

    def request(self, planned: Question) -> Request:
        return Request(planned.prompt.messages)


@dataclass
class ToldTeacher:
    """Answers as `reply` does, to as many at once as it is told; keeps what it was asked, in order."""

    reply: Callable[[str], Awaitable[None]]
    concurrency: int = 4
    asked: list[str] = field(default_factory=list)
    identity: str = "told"

    async def answer(self, request: Request) -> Answer:
        question = request.messages[0]["content"]
        self.asked.append(question)
        await self.reply(question)
        return Answer(f"echo {question}", "stop", prompt_tokens=1, response_tokens=1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RequestStore]:
    with RequestStore(tmp_path / "answers.sqlite") as opened:
        yield opened


@pytest.fixture
def ask(store: RequestStore, step_context: Any) -> Callable[..., Asking[Question]]:
    """`ask(total, teacher, **bounds)`: ask that many questions within a budget."""

    def run(total: int, teacher: Any, **bounds: Any) -> Asking[Question]:
        budget = Budget(Bought(), **{"price": None, "max_cost": None, "max_tokens": None, **bounds})
        plan = Questions(total)

        async def main() -> Asking[Question]:
            asking = Asking(plan, teacher, store, budget, step_context("generate"), model="told")
            await asking.ask()
            return asking

        return asyncio.run(main())

    return run


async def at_once(question: str) -> None:
    """An answer that takes a turn of the event loop."""
    await asyncio.sleep(0)


def test_an_answer_is_kept_and_its_place_taken_before_anything_else_has_a_turn(ask, store):
    order: list[str] = []

    async def reply(question: str) -> None:
        kept = int(question) - 1
        order.append(f"asked {question}" + (f", {kept} is kept" if str(kept) in store else ""))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(order.append, f"turn after {question}")

    ask(3, ToldTeacher(reply, concurrency=1))
    assert order == [
        "asked 0",
        "asked 1, 0 is kept",
        "turn after 0",
        "asked 2, 1 is kept",
        "turn after 1",
        "turn after 2",
    ]


def test_places_are_filled_up_to_what_the_teacher_wants_and_left_when_it_wants_fewer(ask):
    under_way, most = 0, []
    teacher = ToldTeacher(at_once)

    async def reply(question: str) -> None:
        nonlocal under_way
        under_way += 1
        most.append(under_way)
        teacher.concurrency = {0: 2, 10: 8, 40: 3}.get(int(question), teacher.concurrency)
        await asyncio.sleep(0)
        under_way -= 1

    teacher.reply, teacher.concurrency = reply, 2
    assert ask(80, teacher).answered == 80
    assert max(most[:10]) == 2
    assert max(most) == 8
    assert max(most[50:]) == 3
    assert sorted(map(int, teacher.asked)) == list(range(80))


def test_places_that_no_answer_makes_are_found_all_the_same(ask, monkeypatch):
    """A server that is down is to be probed with another request, though none was answered."""
    monkeypatch.setattr("potstill.teachers.asking._POLL_S", 0.01)
    second_asked = asyncio.Event()
    teacher = ToldTeacher(at_once, concurrency=1)

    async def reply(question: str) -> None:
        if question == "0":
            teacher.concurrency = 2
            await asyncio.wait_for(second_asked.wait(), 10)
        second_asked.set()

    teacher.reply = reply
    assert ask(3, teacher).answered == 3


def test_what_no_request_can_escape_ends_the_asking_before_another_is_asked(ask):
    async def reply(question: str) -> None:
        await asyncio.sleep(0)
        if question == "2":
            raise EngineError("out of order")

    teacher = ToldTeacher(reply, concurrency=3)
    with pytest.raises(EngineError, match="out of order"):
        ask(50, teacher)
    assert len(teacher.asked) <= 5


def test_no_more_are_asked_than_the_budget_has_places_for(ask):
    teacher = ToldTeacher(at_once, concurrency=16)
    most: list[int] = []
    under_way = 0

    async def reply(question: str) -> None:
        nonlocal under_way
        under_way += 1
        most.append(under_way)
        await asyncio.sleep(0)
        under_way -= 1

    teacher.reply = reply
    ask(30, teacher, max_tokens=60)
    assert most[0] == 1, "one answer of an unknown cost"
    assert max(most[1:3]) <= 3
    assert len(teacher.asked) == 30
