"""Copies of a model in this process, where Ray's would be in others, with answers out of order."""

import asyncio
import importlib
from collections.abc import Mapping
from typing import Any

from potstill.core.replicas import Replica
from potstill.teachers.given_tokens import GivenTokensReplica
from potstill.teachers.replicated import TeacherReplica


class CopiesHere:
    """`count` copies; `jobs` counts what each did. Every other job comes back behind the next one."""

    def __init__(self, count: int = 2) -> None:
        self.count, self.cpus, self.gpus = count, 1.0, 0.0
        self.jobs = [0] * count
        self.most_under_way = self.opened = self.closed = 0
        self.made: list[Replica] = []

    async def open(
        self, replica: str, *arguments: Any, at_most: int | None = None, restart_on_error: bool = True
    ) -> "_Pool":
        module, _, name = replica.partition(":")
        made = getattr(importlib.import_module(module), name)
        self.opened += 1
        self.made = [made(*arguments) for _ in range(min(self.count, at_most or self.count))]
        return _Pool(self, self.made)


class _Pool:
    def __init__(self, owner: CopiesHere, copies: list[Replica]) -> None:
        self.owner, self.copies = owner, copies
        self.identity, self.first_capacity = copies[0].identity, copies[0].capacity
        self.begun = self.under_way = 0
        assert all(one.identity == self.identity for one in copies)

    @property
    def capacity(self) -> Mapping[str, int]:
        return {name: sum(one.capacity[name] for one in self.copies) for name in self.first_capacity}

    async def work(self, *job: Any) -> Any:
        number, self.begun = self.begun, self.begun + 1
        self.under_way += 1
        self.owner.most_under_way = max(self.owner.most_under_way, self.under_way)
        try:
            await asyncio.sleep(0.002 if number % 2 == 0 else 0)
            self.owner.jobs[number % len(self.copies)] += 1
            return await self.copies[number % len(self.copies)].work(*job)
        finally:
            self.under_way -= 1

    async def close(self) -> None:
        self.owner.closed += 1
        for one in self.copies:
            if isinstance(one, TeacherReplica | GivenTokensReplica):
                await one._teacher.close()  # as the end of its process does
