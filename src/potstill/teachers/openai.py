"""The openai engine: any server with OpenAI's chat completions, over HTTP."""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from potstill.core.errors import EngineError
from potstill.core.settings import Settings, execution
from potstill.data.chat import THINK_CLOSE, THINK_OPEN, Renderer
from potstill.data.responses import bytes_of_tokens, join_reasoning, without_half_characters
from potstill.models import TransformersModel, load_tokenizer
from potstill.teachers.pace import Failure, GivenUp, Pace
from potstill.teachers.protocol import Answer, Capabilities, Request, RequestError
from potstill.teachers.server_errors import MayPass, ServerErrors

if TYPE_CHECKING:
    import httpx2

__all__ = ["OpenAIModel", "OpenAITeacher", "Price", "check_server", "server_context_tokens"]

_OWN_KEYS = frozenset(
    {"model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed"}
    | {"logprobs", "top_logprobs", "n", "stream"}
)
_ASK_IDS = "return_token_ids"  # vLLM; others leave it unread or refuse it by name
_CONNECT_TIMEOUT_S = 15.0
_CHECK_TIMEOUT_S = 5.0
_LONGEST_BACKOFF_S = 60.0
_REFUSALS_A_RETRY = 4  # a refusal costs nothing and says little about the request
_SEEDS = 2**31  # what every server takes
_FINISHED: dict[str, Literal["stop", "length"]] = {"stop": "stop", "eos": "stop", "end_turn": "stop"}
_FINISHED |= {"length": "length", "max_tokens": "length"}


class Price(Settings):
    """What a server bills, in dollars a million tokens; reasoning counts as output."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)

    def cost(self, prompt_tokens: float, response_tokens: float) -> float:
        """Dollars for so many tokens."""
        return (prompt_tokens * self.input + response_tokens * self.output) / 1e6


class OpenAIModel(Settings):
    """A model behind an OpenAI-compatible server.

    `base_url` ends before /chat/completions. The key is read from the environment variable that `api_key_env`
    names. `identity` states what the model is known by, so that its answers stay valid when the address
    changes; otherwise that is name and address. `extra_body` goes with every request: {top_k: -1} where a
    server has a default of its own, reasoning_effort. `tokenizer` (a folder or hub id) makes the token ids
    that a server returns usable in training, and has vLLM asked for them. `logprob_temperature` is the
    temperature that its log-probabilities are at, where known. `continue_final_message` says that the server
    goes on from an assistant's unfinished last message when it is asked to by this name, as vLLM and SGLang
    do.
    """

    engine: Literal["openai"]
    base_url: str = execution(...)
    model: str = execution(..., min_length=1)
    api_key_env: str | None = execution(None)
    identity: str | None = None
    tokenizer: str | None = None
    extra_body: dict[str, Any] = Field(default={})
    logprob_temperature: float | None = Field(default=None, ge=0)
    continue_final_message: bool = execution(False)
    price: Price | None = execution(None, description="what it bills, for `max_cost` and the costs shown")
    timeout_s: float = execution(600.0, gt=0, description="of one try, to the last byte of its answer")
    max_retries: int = execution(6, ge=0, description="tries again of one request, where that can help")
    patience_s: float = execution(
        300.0, ge=0, description="how long a server that answers nothing any more is probed"
    )
    concurrency: int = execution(
        64, ge=1, description="the most requests in flight; the best number up to it is found"
    )

    @field_validator("base_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address such as http://127.0.0.1:8000/v1")
        if parts.username is not None:
            raise ValueError(
                "an address holds no user name or password; name the key's variable in api_key_env"
            )
        return value.rstrip("/").removesuffix("/chat/completions")

    @field_validator("extra_body")
    @classmethod
    def _check_extra(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_OWN_KEYS & value.keys()):
            raise ValueError(f"{taken[0]} is set by potstill; the step or the model has a setting for it")
        return value

    def known_as(self) -> str:
        """The stated identity, else name and address."""
        return self.identity or f"{self.model} at {self.base_url}"

    def content(self) -> dict[str, str]:
        """What the model is known by."""
        return {"identity": self.known_as()}

    def api_key(self) -> SecretStr | None:
        """The key from the environment. Raises EngineError when the variable that should hold it does not."""
        if self.api_key_env is None:
            return None
        if not (key := os.environ.get(self.api_key_env, "").strip()):
            raise EngineError(
                f"the environment variable {self.api_key_env} is not set",
                where=self.known_as(),
                expected="the API key",
                mend=f"export {self.api_key_env}=..., or name another variable in api_key_env",
            )
        if not (key.isascii() and key.isprintable()):
            raise EngineError(
                f"the environment variable {self.api_key_env} holds characters that no API key has",
                where=self.known_as(),
                expected="one line of ASCII",
                mend=f"export {self.api_key_env} again: a line break or a foreign character came along",
            )
        return SecretStr(key)


class OpenAITeacher:
    """Asks /chat/completions for one response a request, at the server's pace; tries again what may pass.

    `say` hears when the server ceases to answer and when it answers again.
    """

    def __init__(
        self,
        settings: OpenAIModel,
        *,
        backoff_s: float = 1.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        import httpx2

        self._settings, self._backoff_s = settings, backoff_s
        self._errors = _errors(settings)
        self._pace = Pace(settings.concurrency, backoff_s=backoff_s, patience_s=settings.patience_s, say=say)
        self._last_failure: RequestError | None = None
        self._reached = self._understood = False
        self._tokenizer_hash: str | None = None
        self._end_ids: frozenset[int] = frozenset()
        self._served: Renderer | None = None
        if settings.tokenizer is not None:
            self._served = renderer = Renderer(load_tokenizer(TransformersModel(path=settings.tokenizer)))
            self._tokenizer_hash = renderer.tokenizer_hash
            self._end_ids = frozenset({*renderer.end_of_turn_ids, renderer.tokenizer.eos_token_id} - {None})
        self._asks_ids = settings.tokenizer is not None
        self.identity = settings.known_as()
        self.capabilities = Capabilities(
            "messages",
            token_ids=self._tokenizer_hash is not None,
            logprobs=1,
            full_logits=False,
            deterministic=False,
            logprob_temperature=settings.logprob_temperature,
        )
        self.sampling = dict(settings.extra_body)
        self.renderer = None
        self._client = httpx2.AsyncClient(
            **_connection(settings, self._errors.key),
            timeout=httpx2.Timeout(None, connect=_CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        )

    @property
    def concurrency(self) -> int:
        """How many requests the server takes at once, by what is known so far."""
        return self._pace.allowed

    async def answer(self, request: Request) -> Answer:
        """The server's first choice.

        Raises RequestError for a request that failed or has used up its tries, another EngineError where no
        request can succeed or the server has not answered any for `patience_s`.
        """
        body = self._body(request)
        try:
            response, found = await self._post("/chat/completions", body)
        except RequestError as error:
            asked = _ASK_IDS in body and _ASK_IDS not in self._settings.extra_body
            if not (asked and error.status in (400, 422) and _ASK_IDS in error.what):
                raise
            self._asks_ids = False  # a server that takes no parameter it does not know
            response, found = await self._post("/chat/completions", self._body(request))
        return self._answer(response, found, request)

    async def prompt_logprobs(self, token_ids: Sequence[int], k: int) -> list[dict[int, float]]:
        """Of each token but the first, the k likeliest ids in its place and their log-probabilities at T = 1.

        Asks /completions for vLLM's `prompt_logprobs`, by token ids; entry i of these is about token i.
        Raises RequestError for an answer without them, and as `answer` does.
        """
        body = {
            **self._settings.extra_body,
            "model": self._settings.model,
            "prompt": list(token_ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
        }
        response, found = await self._post("/completions", body)
        entries = self._choice(response, found).get("prompt_logprobs")
        if not isinstance(entries, list) or len(entries) != len(token_ids):
            raise RequestError(
                f"the answer holds no log-probabilities of the prompt's {len(token_ids)} tokens",
                where=self._settings.base_url,
                expected="a server with `prompt_logprobs` in /completions, such as vLLM",
                mend="serve the model by vLLM, or let transformers run it here",
            )
        return [self._likeliest(entry, k) for entry in entries[1:]]

    def _likeliest(self, entry: Any, k: int) -> dict[int, float]:
        found = {
            int(id_): float(value["logprob"])
            for id_, value in _mapping(entry).items()
            if id_.isdigit() and isinstance(_mapping(value).get("logprob"), int | float)
        }
        if len(found) < k:
            raise RequestError(
                f"the answer has {len(found)} ids for a token, though {k} were asked for",
                where=self._settings.base_url,
                expected="a server that gives as many as it is asked for, or refuses, as vLLM does",
                mend="lower top_k, or serve the model by vLLM",
            )
        # The prompt's own token comes as well where it is not among the k likeliest.
        return dict(sorted(found.items(), key=lambda one: -one[1])[:k])

    async def _post(self, path: str, body: dict[str, Any]) -> "tuple[httpx2.Response, Mapping[str, Any]]":
        """The answer and its JSON, however many tries they take."""
        tries: Counter[Failure] = Counter()
        while True:
            try:
                async with self._pace.turn(again=bool(tries)) as turn:
                    try:
                        answered = await self._ask(path, body)
                    except MayPass as missed:
                        self._pace.failed(
                            turn,
                            missed.failure,
                            retry_after_s=missed.retry_after_s,
                            why=missed.error.what,
                        )
                        failure = missed
                    except EngineError:
                        self._pace.answered()
                        raise
                    else:
                        self._pace.answered()
                        return answered
            except GivenUp as end:
                raise self._errors.outage(self._last_failure, end) from None
            self._last_failure = failure.error
            # A probe's failure is the server's, not the request's.
            tries[failure.failure] += not turn.probe
            allowed = self._settings.max_retries
            refusals = tries["refused"]
            if refusals > _REFUSALS_A_RETRY * allowed or tries.total() - refusals > allowed:
                raise failure.error from None
            if failure.failure == "failed":
                longest_s = min(_LONGEST_BACKOFF_S, self._backoff_s * 2.0 ** min(tries["failed"] - 1, 30))
                await asyncio.sleep(random.uniform(0, longest_s))

    async def _ask(self, path: str, body: dict[str, Any]) -> "tuple[httpx2.Response, Mapping[str, Any]]":
        import httpx2

        try:
            async with asyncio.timeout(self._settings.timeout_s):
                response = await self._client.post(path, json=body)
        except TimeoutError:
            raise MayPass(self._errors.late(self._settings.timeout_s), "slow") from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            if self._reached:
                raise MayPass(self._errors.unanswered(error)) from error
            raise self._errors.unreachable(error) from error
        except httpx2.RequestError as error:
            raise MayPass(self._errors.unanswered(error)) from error
        self._reached = True
        if response.status_code != 200:
            raise self._errors.refusal(response)
        try:
            found = _mapping(response.json())
        except (ValueError, RecursionError):
            unusable = self._errors.unusable("the answer is not JSON", response)
            # From a server that never gave any it is the wrong address.
            raise (MayPass(unusable) if self._understood else unusable) from None
        self._understood = True
        return response, found

    def _body(self, request: Request) -> dict[str, Any]:
        # OpenAI's own reasoning models refuse the older name; many other servers know no other.
        own = urlsplit(self._settings.base_url).hostname == "api.openai.com"
        body = {
            **self._settings.extra_body,
            "model": self._settings.model,
            "messages": request.messages,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_completion_tokens" if own else "max_tokens": request.max_new_tokens,
            "seed": request.seed % _SEEDS,
        }
        if request.prefix is not None:
            body["messages"] = self._with_prefix(request.messages, request.prefix)
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        if request.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": request.logprobs}
        return {_ASK_IDS: True, **body} if self._asks_ids else body

    def _with_prefix(self, messages: list[dict[str, str]], prefix: str) -> list[dict[str, str]]:
        """The conversation with the beginning of the answer as its last message.

        Raises RequestError where the chat template would make another text of it: many drop a think block
        from an assistant's message, or close one that is still open.
        """
        if self._served is None:
            keeps = THINK_OPEN not in prefix and THINK_CLOSE not in prefix
            what = (
                "the beginning of the response has a think block, and the server's chat template is unknown"
            )
        else:
            keeps = self._served.keeps_beginning(messages, prefix)
            what = "the model's chat template changes the beginning of the response"
        if keeps:
            return [*messages, {"role": "assistant", "content": prefix}]
        raise RequestError(
            what,
            where=self._settings.base_url,
            blames_row=True,
            expected="a template that leaves an assistant's last message as it is",
            mend="state the model's `tokenizer`, so that this can be checked, or run the model in process",
        )

    def _answer(self, response: "httpx2.Response", found: Mapping[str, Any], request: Request) -> Answer:
        choice = self._choice(response, found)
        finish_reason = _FINISHED.get(str(choice.get("finish_reason")))
        if finish_reason is None:
            raise self._errors.unusable(
                f"the response ended by {choice.get('finish_reason')!r}, neither 'stop' nor 'length'",
                response,
                blames_row=True,
            )
        message = _mapping(choice.get("message"))
        reasoning, content = (
            message.get("reasoning_content") or message.get("reasoning"),
            message.get("content"),
        )
        if content is None and isinstance(reasoning, str):
            content = ""
        if not isinstance(content, str) or not isinstance(reasoning, str | None):
            raise self._errors.unusable("the answer holds no text", response, blames_row=True)
        content, reasoning = without_half_characters(content), without_half_characters(reasoning or "")
        text = join_reasoning(reasoning or None, content)
        if reasoning and not content and finish_reason == "length":
            text = text.rpartition(f"\n{THINK_CLOSE}")[0]  # cut off while it reasoned, the block is open
        if reasoning and request.prefix is not None:
            if THINK_OPEN not in request.prefix or THINK_CLOSE in request.prefix:
                raise self._errors.unusable(
                    "the server began to reason anew instead of going on from the response's beginning",
                    response,
                    blames_row=True,
                )
            rest = text.removeprefix(f"{THINK_OPEN}\n{reasoning.strip()}")
            text = f"{reasoning}{rest}"  # the block was open; the next word may need the space before it
        usage = _mapping(found.get("usage"))
        ids, logprobs, written = _tokens(choice, content, usage.get("completion_tokens"))
        if request.logprobs is not None and logprobs is None:
            raise self._errors.unusable(
                "the answer holds no log-probabilities, though they were asked for", response
            )
        if ids and ids[-1] in self._end_ids:
            ids.pop()
            logprobs = None if logprobs is None else logprobs[: len(ids)]
        return Answer(
            response=text,
            finish_reason=finish_reason,
            prompt_token_ids=_whole_numbers(found.get("prompt_token_ids")),
            response_token_ids=ids,
            logprobs=logprobs,
            token_bytes=None if logprobs is None else bytes_of_tokens(written[: len(logprobs)], text),
            tokenizer=None if ids is None else self._tokenizer_hash,
            prompt_tokens=_whole_number(usage.get("prompt_tokens")),
            response_tokens=_whole_number(usage.get("completion_tokens")),
        )

    def _choice(self, response: "httpx2.Response", found: Mapping[str, Any]) -> Mapping[str, Any]:
        choices = found.get("choices")
        if not isinstance(choices, list) or not choices:
            raise self._errors.unusable("the answer holds no choices", response)
        return _mapping(choices[0])

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def check_server(settings: OpenAIModel) -> str | None:
    """Ask a server for its list of models; a note where the model is not in it.

    Raises EngineError when the key is missing or refused, or the server cannot be reached.
    """
    listed = [str(one.get("id")) for one in _listed_models(settings)]
    if not listed or settings.model in listed:
        return None
    return f"{settings.base_url} does not list {settings.model!r}; it lists {', '.join(listed[:5])}"


def server_context_tokens(settings: OpenAIModel) -> int | None:
    """Tokens of prompt and response together that a server takes, where its list of models says so (vLLM).

    Raises EngineError as `check_server` does.
    """
    for one in _listed_models(settings):
        if one.get("id") == settings.model:
            return _whole_number(one.get("max_model_len"))
    return None


def _listed_models(settings: OpenAIModel) -> list[Mapping[str, Any]]:
    import httpx2

    errors = _errors(settings)
    try:
        with httpx2.Client(**_connection(settings, errors.key), timeout=_CHECK_TIMEOUT_S) as client:
            response = client.get("/models")
    except httpx2.RequestError as error:
        raise errors.unreachable(error) from error
    if response.status_code in (401, 403):
        failure = errors.refusal(response)
        assert isinstance(failure, EngineError)
        raise failure
    try:
        return [_mapping(one) for one in _mapping(response.json()).get("data", [])]
    except (ValueError, TypeError):
        return []


def _errors(settings: OpenAIModel) -> ServerErrors:
    return ServerErrors(settings.base_url, settings.model, settings.api_key_env, settings.api_key())


def _connection(settings: OpenAIModel, key: SecretStr | None) -> dict[str, Any]:
    host = urlsplit(settings.base_url).hostname or ""
    return {
        "base_url": settings.base_url,
        "headers": {} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"},
        "trust_env": host != "localhost" and not host.startswith("127."),  # no proxy leads to this machine
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _whole_number(value: Any) -> int | None:
    return value if type(value) is int else None


def _whole_numbers(value: Any) -> list[int] | None:
    return value if isinstance(value, list) and value and all(type(one) is int for one in value) else None


def _tokens(
    choice: Mapping[str, Any], content: str, sampled: Any
) -> tuple[list[int] | None, list[float] | None, list[bytes]]:
    """Token ids where the server gives them (vLLM's token_ids, llama.cpp's ids), log-probabilities, bytes.

    llama.cpp's entries leave out tokens that end inside a character: they are all ids only where they are as
    many as the tokens `sampled`.
    """
    ids = _whole_numbers(choice.get("token_ids"))
    entries = _mapping(choice.get("logprobs")).get("content")
    if not isinstance(entries, list):
        return ids, None, []
    entries = [_mapping(one) for one in entries]
    logprobs = [one.get("logprob") for one in entries]
    if not all(isinstance(one, int | float) for one in logprobs):
        return ids, None, []
    if ids is None and len(entries) == sampled:
        ids = _whole_numbers([one.get("id") for one in entries])
    written = [_written(one) for one in entries]
    if ids is not None:
        return ids, logprobs if len(ids) == len(logprobs) else None, written
    if written and not content.encode().endswith(written[-1]):
        logprobs.pop()  # the end-of-turn token, which is no part of the text
    return None, logprobs, written


def _written(entry: Mapping[str, Any]) -> bytes:
    """The bytes of a log-probability's token; its text stands for them where the server gives none."""
    found = entry.get("bytes")
    if isinstance(found, list) and all(type(one) is int and 0 <= one < 256 for one in found):
        return bytes(found)
    return without_half_characters(str(entry.get("token", ""))).encode()
