"""The openai engine: any server with OpenAI's chat completions, over HTTP."""

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from potstill.core.errors import EngineError
from potstill.core.settings import Settings, execution
from potstill.data.chat import Renderer
from potstill.models import TransformersModel, load_tokenizer
from potstill.teachers.completions import ASK_IDS, OWN_KEYS, Completions, mapping, whole_number
from potstill.teachers.pace import Failure, GivenUp, Pace
from potstill.teachers.probes import PROBE_TEMPERATURE, Reported, check_prompt_logprobs, known_here, reported
from potstill.teachers.protocol import Answer, Capabilities, Request, RequestError
from potstill.teachers.server_errors import MayPass, ServerErrors

if TYPE_CHECKING:
    import httpx2

__all__ = ["OpenAIModel", "OpenAITeacher", "Price", "check_server", "server_context_tokens"]

_CONNECT_TIMEOUT_S = 15.0
_CHECK_TIMEOUT_S = 5.0
_LONGEST_BACKOFF_S = 60.0
_REFUSALS_A_RETRY = 4  # a refusal costs nothing and says little about the request


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
        if parts.query or parts.fragment:
            raise ValueError(
                "an address has no `?` or `#` here, since it is written into files; name a key's variable in "
                "api_key_env, and put other settings into extra_body"
            )
        return value.rstrip("/").removesuffix("/chat/completions")

    @field_validator("extra_body")
    @classmethod
    def _check_extra(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(OWN_KEYS & value.keys()):
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
        served = settings.tokenizer
        self._completions = Completions(
            self._errors,
            settings.extra_body,
            None if served is None else Renderer(load_tokenizer(TransformersModel(path=served))),
        )
        self._asks_ids = served is not None
        self._say = say or (lambda message: None)
        # What is asked once, before the first request that depends on it.
        self._temperature_check: asyncio.Task[None] | None = None
        self._repetition_check: asyncio.Task[bool] | None = None
        self.identity = settings.known_as()
        self.capabilities = Capabilities(
            "messages",
            token_ids=served is not None,
            logprobs=None,
            full_logits=False,
            deterministic=False,
            logprob_temperature=settings.logprob_temperature,
        )
        self.sampling = dict(settings.extra_body)
        self.renderer = None
        # A pool goes through all of its connections twice a request, so each client is to hold one alone.
        self._clients: list[httpx2.AsyncClient] = []
        self._idle: list[httpx2.AsyncClient] = []
        self._tls = httpx2.create_ssl_context(trust_env=_trusts_environment(settings))
        # Put together once: to join a path to the base costs as much as to build the rest of a request.
        self._chat_url, self._completions_url = (
            httpx2.URL(f"{settings.base_url}{path}") for path in ("/chat/completions", "/completions")
        )

    @property
    def concurrency(self) -> int:
        """How many requests the server takes at once, by what is known so far; some more while it is down."""
        return self._pace.wanted

    async def answer(self, request: Request) -> Answer:
        """The server's first choice.

        Raises RequestError for a request that failed or has used up its tries, another EngineError where no
        request can succeed, the server has not answered any for `patience_s`, or its log-probabilities are at
        another temperature than the model's settings say.
        """
        if request.logprobs is not None and request.temperature not in (0.0, 1.0):
            if self._temperature_check is None:
                self._temperature_check = asyncio.create_task(self._check_temperature(request.temperature))
            await asyncio.shield(self._temperature_check)
        body = self._completions.chat_body(request, with_ids=self._asks_ids)
        repeats = False
        if request.prefix is not None:
            if self._repetition_check is None:
                self._repetition_check = asyncio.create_task(self._repeats_beginnings())
            repeats = await asyncio.shield(self._repetition_check)
        try:
            response, found = await self._post(self._chat_url, body)
        except RequestError as error:
            asked = {name for name in ASK_IDS if name in body} - self._settings.extra_body.keys()
            if error.status not in (400, 422) or not any(name in error.what for name in asked):
                raise
            self._asks_ids = False  # a server that takes no parameter it does not know
            body = {name: value for name, value in body.items() if name not in asked}
            response, found = await self._post(self._chat_url, body)
        return self._completions.answer(response, found, request, repeats=repeats)

    async def reported_temperature(self) -> Reported | None:
        """At what temperature its log-probabilities of sampled tokens are; None where it cannot be told.

        Asks twice for one token.
        """
        found = []
        for temperature in (1.0, PROBE_TEMPERATURE):
            try:
                body = self._completions.first_token_body(temperature)
                _, answered = await self._post(self._chat_url, body)
            except RequestError:
                return None
            found.append(self._completions.first_token(answered))
        return reported(*found)

    async def _check_temperature(self, sampled_at: float) -> None:
        """Raise EngineError where `logprob_temperature` says otherwise than the server does."""
        stated, kind = self._settings.logprob_temperature, await self.reported_temperature()
        if kind is None:
            return
        found = 1.0 if kind == "at 1" else sampled_at
        if stated is None:
            self._say(
                f"{self.identity}: its log-probabilities are {kind}; the model's `logprob_temperature` can "
                "say so"
            )
        elif stated != found:
            raise EngineError(
                f"logprob_temperature is {stated:g}, but the server's log-probabilities are {kind}",
                where=self.identity,
                expected=f"logprob_temperature: {found:g} with responses sampled at {sampled_at:g}",
                mend="state that, or leave it out where nothing depends on it; vLLM gives those of "
                "temperature 1 with --logprobs-mode raw_logprobs, SGLang with "
                "SGLANG_RETURN_ORIGINAL_LOGPROB=1",
            )

    async def _repeats_beginnings(self) -> bool:
        """Whether a continued response holds its beginning again, by one request for one token."""
        try:
            response, found = await self._post(self._chat_url, self._completions.continuation_body())
            return self._completions.repeats(response, found)
        except RequestError:
            return False  # the request itself will say why

    async def check_prompt_logprobs(self, k: int, context_tokens: int | None) -> None:
        """Raise EngineError unless `prompt_logprobs` of a known text are what they should be.

        The text is asked for twice, with one between that begins alike. Where the server's model is called by
        the folder that it lies in here, and is small, its own log-probabilities are computed and compared.
        """
        ids = self._completions.known_text()[:context_tokens]
        await check_prompt_logprobs(
            lambda ids: self.prompt_logprobs(ids, k),
            ids,
            where=self._settings.base_url,
            expected=lambda: _known_here(self._settings, ids),
        )

    async def prompt_logprobs(self, token_ids: Sequence[int], k: int) -> list[dict[int, float]]:
        """Of each token but the first, log p at T = 1 of the k likeliest ids in its place and of its own.

        Asks /completions for vLLM's `prompt_logprobs`, by token ids; there are k or k + 1 of them.
        Raises RequestError for an answer without them, and as `answer` does.
        """
        body = self._completions.prompt_logprobs_body(token_ids, k)
        response, found = await self._post(self._completions_url, body)
        return self._completions.prompt_logprobs(response, found, token_ids, k)

    async def _post(
        self, url: "httpx2.URL", body: dict[str, Any]
    ) -> "tuple[httpx2.Response, Mapping[str, Any]]":
        """The answer and its JSON, however many tries they take."""
        tries: Counter[Failure] = Counter()
        while True:
            try:
                async with self._pace.turn(again=bool(tries)) as turn:
                    try:
                        answered = await self._ask(url, body)
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

    async def _ask(
        self, url: "httpx2.URL", body: dict[str, Any]
    ) -> "tuple[httpx2.Response, Mapping[str, Any]]":
        import httpx2

        # The last one used comes first, so that few requests at once keep few connections open.
        client = self._idle.pop() if self._idle else self._connect()
        try:
            async with _time_limit(self._settings.timeout_s):
                response = await client.post(url, json=body)
        except TimeoutError:
            raise MayPass(self._errors.late(self._settings.timeout_s), "slow") from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            if self._reached:
                raise MayPass(self._errors.unanswered(error)) from error
            raise self._errors.unreachable(error) from error
        except httpx2.RequestError as error:
            raise MayPass(self._errors.unanswered(error)) from error
        finally:
            self._idle.append(client)
        self._reached = True
        if response.status_code != 200:
            raise self._errors.refusal(response)
        try:
            found = mapping(response.json())
        except (ValueError, RecursionError):
            unusable = self._errors.unusable("the answer is not JSON", response)
            # From a server that never gave any it is the wrong address.
            raise (MayPass(unusable) if self._understood else unusable) from None
        self._understood = True
        return response, found

    def _connect(self) -> "httpx2.AsyncClient":
        import httpx2

        client = httpx2.AsyncClient(
            **_connection(self._settings, self._errors.key),
            verify=self._tls,
            timeout=httpx2.Timeout(None, connect=_CONNECT_TIMEOUT_S),
        )
        self._clients.append(client)
        return client

    async def close(self) -> None:
        """Close the connections; requests under way are given up."""
        checks = [one for one in (self._temperature_check, self._repetition_check) if one is not None]
        for one in checks:
            one.cancel()
        await asyncio.gather(*checks, return_exceptions=True)
        for client in self._clients:
            await client.aclose()
        self._clients.clear()
        self._idle.clear()


@asynccontextmanager
async def _time_limit(seconds: float) -> AsyncIterator[None]:
    """TimeoutError after so long; by as much later as this process stood still when the time was up.

    An answer that arrived meanwhile is paid for, and is read then.
    """
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds

    def end() -> None:
        now = loop.time()
        limit.reschedule(now + min(now - due, seconds))

    async with asyncio.timeout(None) as limit:
        timer = loop.call_at(due, end)
        try:
            yield
        finally:
            timer.cancel()


def _known_here(settings: OpenAIModel, token_ids: Sequence[int]) -> list[float] | None:
    """What the served model's weights give to each token but the first, where they lie here and are few."""
    if settings.tokenizer != settings.model or not Path(settings.model).is_dir():
        return None
    return known_here(TransformersModel(path=settings.model), token_ids)


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
            return whole_number(one.get("max_model_len"))
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
        return [mapping(one) for one in mapping(response.json()).get("data", [])]
    except (ValueError, TypeError):
        return []


def _errors(settings: OpenAIModel) -> ServerErrors:
    return ServerErrors(settings.base_url, settings.model, settings.api_key_env, settings.api_key())


def _connection(settings: OpenAIModel, key: SecretStr | None) -> dict[str, Any]:
    return {
        "base_url": settings.base_url,
        "headers": {} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"},
        "trust_env": _trusts_environment(settings),
    }


def _trusts_environment(settings: OpenAIModel) -> bool:
    host = urlsplit(settings.base_url).hostname or ""
    return host != "localhost" and not host.startswith("127.")  # no proxy leads to this machine
