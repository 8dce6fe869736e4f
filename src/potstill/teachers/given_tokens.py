"""What models that are asked give to tokens that are there: rows of a cache, traces of a selection."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

from potstill.core.errors import ModelError
from potstill.core.replicas import ReplicaPool, Replicas
from potstill.core.step import StepContext
from potstill.data.chat import Renderer
from potstill.models import load_tokenizer
from potstill.teachers.failures import Failures
from potstill.teachers.openai import OpenAIModel, OpenAITeacher, server_context_tokens
from potstill.teachers.protocol import RequestError
from potstill.teachers.replicated import identity_of_copy, open_copies, vllm_copy
from potstill.teachers.vllm import VllmModel, VllmTeacher, check_scoring

__all__ = ["KEPT", "GivenTokens", "GivenTokensReplica", "check_gives_logprobs"]

KEPT = "What is kept so far stays; the next run asks what is missing"
_POLL_S = 0.2  # for a stop


def check_gives_logprobs(model: object, called: str) -> None:
    """Raise ModelError for a model of which nothing tells the log-probabilities of a given text's tokens.

    That is any but one of transformers or vLLM and a server whose tokenizer is known; `called` is what to
    call it.
    """
    engine = getattr(model, "engine", type(model).__name__)
    if engine in ("transformers", "vllm") or (isinstance(model, OpenAIModel) and model.tokenizer is not None):
        return
    if isinstance(model, OpenAIModel):
        raise ModelError(
            f"{called} is a server, which is asked by token ids, and no tokenizer makes them",
            expected="the `tokenizer` (a folder or hub id) of the model that it serves",
            mend="state it, where vLLM is the server; others give no log-probabilities of a prompt: then "
            "declare the same weights with a path",
        )
    raise ModelError(
        f"{called} is a model of engine {engine}, which gives no log-probabilities of a given text",
        expected="a model that transformers or vLLM loads, or a vLLM server with a `tokenizer`",
        mend="declare the same weights with a path (a folder, hub id or .gguf file), or name a step that "
        "makes a model",
    )


class _Scorer(Protocol):
    """Whoever is asked."""

    async def prompt_logprobs(self, token_ids: Sequence[int], k: int) -> list[dict[int, float]]:
        """Of each token but the first, log p at T = 1 of the k likeliest ids in its place and of its own."""

    async def check_prompt_logprobs(self, k: int, context_tokens: int | None) -> None:
        """Raise EngineError unless those of a known text are what they should be."""

    async def close(self) -> None:
        """Free what it holds."""


class GivenTokensReplica:
    """A copy of a model that vLLM runs, in a process of its own."""

    def __init__(self, model: VllmModel) -> None:
        self._teacher = VllmTeacher(model, scoring=True)
        self.identity: dict[str, Any] = {
            **identity_of_copy(self._teacher.identity, self._teacher.renderer),
            "context_tokens": self._teacher.context_tokens,
        }
        self.capacity = {"concurrency": self._teacher.concurrency}

    async def work(self, token_ids: list[int], k: int) -> list[dict[int, float]]:
        """What the copy gives to a row."""
        return await self._teacher.prompt_logprobs(token_ids, k)


class _Copies:
    """Copies of a model that vLLM runs; a row goes to whichever has room."""

    def __init__(self, model: VllmModel, renderer: Renderer, pool: ReplicaPool) -> None:
        self._model, self._renderer, self._pool = model, renderer, pool
        self.context_tokens: int = pool.identity["context_tokens"]

    @classmethod
    async def open(cls, model: VllmModel, replicas: Replicas) -> "_Copies":
        here = model.as_transformers()
        renderer, arguments = Renderer(load_tokenizer(here)), (vllm_copy(model, replicas),)
        pool = await open_copies(replicas, GivenTokensReplica, arguments, here, renderer)
        return cls(model, renderer, pool)

    async def prompt_logprobs(self, token_ids: Sequence[int], k: int) -> list[dict[int, float]]:
        found: list[dict[int, float]] = await self._pool.work([*token_ids], k)
        return found

    async def check_prompt_logprobs(self, k: int, context_tokens: int | None) -> None:
        await check_scoring(self.prompt_logprobs, self._model, self._renderer, k, context_tokens)

    async def close(self) -> None:
        await self._pool.close()


class GivenTokens:
    """A model that is asked for the log-probabilities of given tokens at temperature 1 (`prompt_logprobs`).

    It is vLLM's, behind a server or run for this step, or copies of the latter. Before the first rows a known
    text is scored, which shows whether they are that. `context_tokens` is how many tokens a row may have,
    where that is known; `copies` are asked side by side. Rows that are refused are noted in `failures`.
    Raises EngineError as `server_context_tokens` and `VllmTeacher` do.
    """

    def __init__(self, model: OpenAIModel | VllmModel, context: StepContext, failures: Failures) -> None:
        self._context, self._failures = context, failures
        self._is_checked = False
        self.copies = 1
        self._runner = asyncio.Runner()
        self._server: _Scorer
        try:
            if isinstance(model, OpenAIModel):
                tokens = server_context_tokens(model)
                self._server = OpenAITeacher(model, say=context.say)
            elif context.replicas is None:
                self._server = teacher = VllmTeacher(model, scoring=True, say=context.say)
                tokens = teacher.context_tokens
            else:
                self._server = copies = self._runner.run(_Copies.open(model, context.replicas))
                tokens, self.copies = copies.context_tokens, context.replicas.count
        except BaseException:
            self._runner.close()
            raise
        # One token is always generated.
        self.context_tokens = None if tokens is None else tokens - 1

    def close(self) -> None:
        """Close the connections, or end vLLM."""
        self._runner.run(self._server.close())
        self._runner.close()

    def ask(
        self,
        rows: Iterable[tuple[str, Sequence[int]]],
        k: int,
        keep: Callable[[int, list[dict[int, float]]], None],
        refused: Callable[[int, str], None],
    ) -> None:
        """Ask all rows, as many at once as the server takes; a row is what failures call it, and its ids.

        `keep` is given a row's number and what `OpenAITeacher.prompt_logprobs` says of it as it arrives,
        `refused` the number of a row that failed and why. Raises EngineError as that and
        `check_prompt_logprobs` do and where failures do not end, Interrupted when the run is to stop.
        Requests under way are given up then.
        """
        self._runner.run(self._ask(rows, k, keep, refused))

    async def _ask(
        self,
        rows: Iterable[tuple[str, Sequence[int]]],
        k: int,
        keep: Callable[[int, list[dict[int, float]]], None],
        refused: Callable[[int, str], None],
    ) -> None:
        async def one(number: int, called: str, token_ids: Sequence[int]) -> None:
            try:
                found = await self._server.prompt_logprobs(token_ids, k)
            except RequestError as error:
                self._failures.add({"row": called}, error, kept=KEPT)
                refused(number, error.what)
            else:
                self._failures.answered()
                keep(number, found)

        if not self._is_checked:
            await self._wait([self._server.check_prompt_logprobs(k, self.context_tokens)])
            self._is_checked = True
        await self._wait([one(number, *row) for number, row in enumerate(rows)])

    async def _wait(self, requests: Sequence[Coroutine[Any, Any, None]]) -> None:
        asked = [asyncio.create_task(one) for one in requests]
        pending = set(asked)
        try:
            while pending:
                done, pending = await asyncio.wait(
                    pending, timeout=_POLL_S, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()
                self._context.check_stop()
        finally:  # where one failed, the others still hold connections
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
