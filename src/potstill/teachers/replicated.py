"""A model's copies as one teacher: each request goes to a copy that has room for it."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

from potstill.core.errors import EngineError
from potstill.core.replicas import Replica, ReplicaPool, Replicas
from potstill.core.settings import Settings
from potstill.data.chat import Renderer
from potstill.models import TransformersModel, identity, load_tokenizer
from potstill.teachers.llama_cpp import LlamaCppModel
from potstill.teachers.openai import OpenAIModel
from potstill.teachers.protocol import Answer, Capabilities, Request
from potstill.teachers.vllm import VllmModel

__all__ = [
    "ReplicatedTeacher",
    "TeacherReplica",
    "identity_of_copy",
    "is_replicated",
    "open_copies",
    "vllm_copy",
]

_LIBRARIES = ("potstill", "transformers", "torch")


def is_replicated(settings: Settings) -> bool:
    """Whether copies of a model answer more than one does: any but a solver, which takes no time."""
    return isinstance(settings, OpenAIModel | LlamaCppModel | TransformersModel | VllmModel)


def vllm_copy(settings: VllmModel, replicas: Replicas) -> VllmModel:
    """The settings of each copy: all GPUs that it has share the model, unless a number of them is stated.

    A copy with a share of a GPU takes `memory_share` of that share.
    """
    gpus = settings.tensor_parallel_size or max(1, int(replicas.gpus))
    of_one = min(replicas.gpus, 1.0) or 1.0  # without GPUs it is of the machine's memory
    memory_share = settings.memory_share * of_one
    return settings.model_copy(update={"tensor_parallel_size": gpus, "memory_share": memory_share})


def identity_of_copy(model: str, renderer: Renderer | None) -> dict[str, Any]:
    """What every copy of a model must have alike: the model, how text becomes its tokens, and the libraries.

    Of a library's version that is without what it was built for: a machine with a GPU has another build.
    """
    return {
        "model": model,
        "tokenizer": None if renderer is None else renderer.tokenizer_hash,
        "template": None if renderer is None else renderer.template_hash,
        **{name: metadata.version(name).partition("+")[0] for name in _LIBRARIES},
    }


async def open_copies(
    replicas: Replicas,
    copy: type[Replica],
    arguments: tuple[Any, ...],
    model: TransformersModel,
    renderer: Renderer,
) -> ReplicaPool:
    """Open copies of a model, made of `arguments`.

    Raises EngineError as well where they have another identity than this machine finds under the same name,
    or other versions of the libraries.
    """
    pool = await replicas.open(_name(copy), *arguments)
    try:
        expected = identity_of_copy(identity(model), renderer)
        if different := [name for name in expected if expected[name] != pool.identity[name]]:
            versions = [
                f"{name} {pool.identity[name]} there, {expected[name]} here"
                for name in different
                if name in _LIBRARIES
            ]
            raise EngineError(
                f"the replicas' {' and '.join(different)} differ from this machine's"
                + (f" ({'; '.join(versions)})" if versions else ""),
                where=f"model {model.path}",
                expected="the same files and the same versions everywhere",
                mend="put the model on a file system that all machines share, or copy it to each, and "
                "install the same versions",
            )
    except BaseException:
        await pool.close()
        raise
    return pool


def _name(copy: type[Replica]) -> str:
    return f"{copy.__module__}:{copy.__name__}"


class TeacherReplica:
    """One copy: a teacher in a process of its own."""

    def __init__(self, settings: Settings, concurrency: int | None) -> None:
        from potstill.teachers import open_teacher

        self._teacher = open_teacher(settings, concurrency=concurrency, say=_say)
        self.identity: dict[str, Any] = {
            **identity_of_copy(self._teacher.identity, self._teacher.renderer),
            "sampling": self._teacher.sampling,
            "capabilities": asdict(self._teacher.capabilities),
        }

    @property
    def capacity(self) -> Mapping[str, int]:
        """Requests at a time."""
        return {"concurrency": self._teacher.concurrency}

    async def work(self, request: Request) -> Answer:
        """The teacher's answer."""
        return await self._teacher.answer(request)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class ReplicatedTeacher:
    """Answers as one teacher of these settings would."""

    def __init__(self, pool: ReplicaPool, renderer: Renderer | None) -> None:
        self._pool, self.renderer = pool, renderer
        self.identity: str = pool.identity["model"]
        self.capabilities = Capabilities(**pool.identity["capabilities"])
        self.sampling: dict[str, Any] = pool.identity["sampling"]

    @classmethod
    async def open(
        cls, settings: Settings, replicas: Replicas, *, concurrency: int | None = None
    ) -> "ReplicatedTeacher":
        """Open the copies. To a server `concurrency` is the most that all have in flight, else each one's.

        No more copies of a server's client are opened than there are requests in flight.

        Raises EngineError as well where a copy is another model, or renders by another tokenizer or template,
        than this machine finds under the same name.
        """
        if isinstance(settings, OpenAIModel):
            in_flight = concurrency or settings.concurrency
            share = max(1, in_flight // replicas.count)
            pool = await replicas.open(
                _name(TeacherReplica), settings, share, at_most=in_flight, restart_on_error=False
            )
            return cls(pool, None)
        assert isinstance(settings, LlamaCppModel | TransformersModel | VllmModel)
        here = settings if isinstance(settings, TransformersModel) else settings.as_transformers()
        if isinstance(settings, VllmModel):
            settings = vllm_copy(settings, replicas)
        if isinstance(settings, LlamaCppModel) and settings.threads is None:
            settings = settings.model_copy(update={"threads": max(1, int(replicas.cpus))})
        renderer = Renderer(load_tokenizer(here))
        arguments = (settings, concurrency)
        return cls(await open_copies(replicas, TeacherReplica, arguments, here, renderer), renderer)

    @property
    def concurrency(self) -> int:
        """What the copies that are there want in flight together."""
        return self._pool.capacity["concurrency"]

    async def answer(self, request: Request) -> Answer:
        """One response, from whichever copy has room."""
        answer: Answer = await self._pool.work(request)
        return answer

    async def close(self) -> None:
        """End the copies."""
        await self._pool.close()
