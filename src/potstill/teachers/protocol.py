"""What every teacher is asked and answers, and how a failure of one request differs from a broken engine."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from potstill.core.alternatives import Alternatives
from potstill.core.errors import EngineError
from potstill.core.records import Record

if TYPE_CHECKING:
    from potstill.data.chat import Renderer

__all__ = ["Answer", "Capabilities", "Request", "RequestError", "Teacher", "Usage"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine takes and gives.

    `takes` is what a request must hold: messages that the server renders, token ids that we rendered, or the
    record that a solver reads. `logprobs` is the most that a request may ask for, 0 where there are none;
    they are at `logprob_temperature` and over the whole vocabulary. Of both None means that only the server
    knows. `deterministic` means that a request has one answer, whatever is asked beside it.
    """

    takes: Literal["messages", "token_ids", "record"]
    token_ids: bool
    logprobs: int | None
    full_logits: bool
    deterministic: bool
    logprob_temperature: float | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to sample from it; `seed` decides nothing at temperature 0.

    `prefix` is the beginning of the response, where the model is to go on from it; `prompt_token_ids` then
    end with its tokens. `logprobs` asks for the log-probability of each sampled token and, where it is more
    than 1, for so many of the likeliest tokens in its place.
    """

    messages: list[dict[str, str]]
    prompt_token_ids: list[int] | None = None
    prefix: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0
    logprobs: int | None = None
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request that an engine counts and a server bills; None where it does not say."""

    prompt_tokens: int | None = None
    response_tokens: int | None = None


_UNKNOWN = Usage()


@dataclass(frozen=True, slots=True)
class Answer:
    """One response, or the rest of one whose beginning was given.

    `response` is the raw text, its reasoning in a think block before the answer. `response_token_ids` end
    before the end-of-turn token, and `logprobs` (natural logarithms) has one entry for each of them, NaN
    where the engine knows none; where there are no ids it is what the server gave. `tokenizer` is the hash of
    the tokenizer that the ids belong to. `token_bytes`, from engines that give no usable ids, is as in a
    record, and so are `alternatives`. The counts are those that the engine works with, end-of-turn included.
    """

    response: str
    finish_reason: Literal["stop", "length"]
    prompt_token_ids: list[int] | None = None
    response_token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    token_bytes: list[int] | None = None
    alternatives: Alternatives | None = None
    tokenizer: str | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None


class RequestError(EngineError):
    """One request failed; others may succeed. Any other EngineError means that none will.

    `status` is the HTTP status where there was one. `blames_row` tells a prompt that the engine will never
    answer from an engine in trouble. `usage` is what was billed all the same.
    """

    def __init__(
        self,
        what: str,
        *,
        status: int | None = None,
        blames_row: bool = False,
        usage: Usage = _UNKNOWN,
        **message: str | None,
    ) -> None:
        super().__init__(what, **message)
        self.status, self.blames_row, self.usage = status, blames_row, usage


class Teacher(Protocol):
    """An open model that answers requests, used inside one event loop.

    `identity` is what its answers are known by. `sampling` holds the model's own settings that shape every
    answer. `renderer` makes the token ids where the engine takes ids.
    """

    identity: str
    capabilities: Capabilities
    sampling: dict[str, Any]

    @property
    def concurrency(self) -> int:
        """How many requests it wants in flight now; a server's may change with every answer."""

    @property
    def renderer(self) -> "Renderer | None":
        """Messages to token ids."""

    async def answer(self, request: Request) -> Answer:
        """One response. Raises RequestError when this request failed, another EngineError when all will."""

    async def close(self) -> None:
        """Free what the engine holds; requests under way are given up."""
