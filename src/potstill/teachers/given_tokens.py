"""What a server's model gives to tokens that are there already: rows of a cache, traces of a selection."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from potstill.core.errors import ModelError
from potstill.core.step import StepContext
from potstill.teachers.failures import Failures
from potstill.teachers.openai import OpenAIModel, OpenAITeacher, server_context_tokens
from potstill.teachers.protocol import RequestError

__all__ = ["KEPT", "GivenTokens", "check_gives_logprobs"]

KEPT = "What is kept so far stays; the next run asks what is missing"
_POLL_S = 0.2  # for a stop


def check_gives_logprobs(model: object, called: str) -> None:
    """Raise ModelError for a model of which nothing tells the log-probabilities of a given text's tokens.

    That is any but one of transformers and a server whose tokenizer is known; `called` is what to call it.
    """
    engine = getattr(model, "engine", type(model).__name__)
    if engine == "transformers" or (isinstance(model, OpenAIModel) and model.tokenizer is not None):
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
        expected="a model that transformers loads, or a vLLM server with a `tokenizer`",
        mend="declare the same weights with a path (a folder, hub id or .gguf file), or name a step that "
        "makes a model",
    )


class GivenTokens:
    """A server that gives the log-probabilities of given tokens at temperature 1 (vLLM's `prompt_logprobs`).

    Before the first rows a known text is scored, which shows whether they are that. `context_tokens` is how
    many tokens a row may have, where the server says so. Rows that it refuses are noted in `failures`. Raises
    EngineError as `server_context_tokens` does.
    """

    def __init__(self, model: OpenAIModel, context: StepContext, failures: Failures) -> None:
        served = server_context_tokens(model)
        # One token is always generated.
        self.context_tokens = None if served is None else served - 1
        self._context, self._failures = context, failures
        self._runner = asyncio.Runner()
        self._server = OpenAITeacher(model, say=context.say)
        self._is_checked = False

    def close(self) -> None:
        """Close the connections."""
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
