"""What runs in a replica's own process: a Ray actor that makes one copy and lets it work."""

import importlib
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from potstill.core.environment import prepare_libraries
from potstill.core.errors import PotstillError

if TYPE_CHECKING:
    from potstill.core.replicas import Replica

__all__ = ["ReplicaHost", "Told"]


@dataclass(frozen=True, slots=True)
class Told:
    """What a replica says: a value, an error for a person, or what unforeseen thing broke it."""

    value: Any = None
    error: PotstillError | None = None
    broken: str | None = None
    capacity: Mapping[str, int] | None = None


class ReplicaHost:
    """An actor with one replica, of `module:class` and what that is made of."""

    def __init__(self, replica: str, arguments: tuple[Any, ...]) -> None:
        self._replica, self._arguments = replica, arguments
        self._made: Replica | None = None

    async def start(self) -> Told:
        """Make the replica, and tell its identity and where it works."""
        os.dup2(2, 1)  # what libraries say goes where errors go, into the log of the process that asks
        prepare_libraries()
        module, _, name = self._replica.partition(":")
        try:
            made = getattr(importlib.import_module(module), name)(*self._arguments)
        except PotstillError as error:
            return Told(error=error)
        except Exception as error:  # of a library's own
            return _broken(error)
        self._made = made
        return Told(value=(made.identity, os.getpid()), capacity=made.capacity)

    async def work(self, *job: Any) -> Told:
        """What comes of a job."""
        assert self._made is not None
        try:
            value = await self._made.work(*job)
        except PotstillError as error:
            return Told(error=error, capacity=self._made.capacity)
        except Exception as error:  # of a library's own
            return _broken(error)
        return Told(value=value, capacity=self._made.capacity)


def _broken(error: Exception) -> Told:
    traceback.print_exc(file=sys.stderr)
    return Told(broken=f"{type(error).__name__}: {error}")
