"""What a server's model gives to tokens that are there already: rows of a cache, traces of a selection."""

import asyncio
from collections.abc import Callable, Iterable, Sequence

from potstill.core.errors import ModelError
from potstill.core.step import StepContext
from potstill.teachers.openai import OpenAIModel, OpenAITeacher, server_context_tokens
from potstill.teachers.protocol import RequestError

__all__ = ["GivenTokens", "check_gives_logprobs"]

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

    `context_tokens` is how many tokens a row may have, where the server says so. Raises EngineError as
    `server_context_tokens` does.
    """

    def __init__(self, model: OpenAIModel, context: StepContext) -> None:
        served = server_context_tokens(model)
        # One token is always generated.
        self.context_tokens = None if served is None else served - 1
        self._context = context
        self._runner = asyncio.Runner()
        self._server = OpenAITeacher(model, say=context.say)
        context.say(
            "a server's log-probabilities depend on the order of requests while it caches prefixes: "
            "serve by vLLM with --no-enable-prefix-caching"
        )

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._server.close())
        self._runner.close()

    def ask(
        self,
        rows: Iterable[tuple[str, Sequence[int]]],
        k: int,
        keep: Callable[[int, list[dict[int, float]]], None],
    ) -> None:
        """Ask all rows, as many at once as the server takes; a row is what errors call it, and its token ids.

        `keep` is given a row's number and what `OpenAITeacher.prompt_logprobs` says of it as it arrives.
        Raises RequestError, which names the row, and EngineError as that does; Interrupted when the run is to
        stop. Requests under way are given up then.
        """
        self._runner.run(self._ask(rows, k, keep))

    async def _ask(
        self,
        rows: Iterable[tuple[str, Sequence[int]]],
        k: int,
        keep: Callable[[int, list[dict[int, float]]], None],
    ) -> None:
        async def one(number: int, called: str, token_ids: Sequence[int]) -> None:
            try:
                found = await self._server.prompt_logprobs(token_ids, k)
            except RequestError as error:
                raise RequestError(
                    error.what,
                    status=error.status,
                    blames_row=error.blames_row,
                    where=f"{error.where}, {called}",
                    expected=error.expected,
                    mend=error.mend,
                ) from error
            keep(number, found)

        asked = [asyncio.create_task(one(number, *row)) for number, row in enumerate(rows)]
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
