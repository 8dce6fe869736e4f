"""The openai engine: any server with OpenAI's chat completions, over HTTP."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from potstill.core.errors import EngineError
from potstill.core.settings import Settings, execution
from potstill.data.chat import THINK_CLOSE, Renderer
from potstill.models import TransformersModel, load_tokenizer
from potstill.teachers.protocol import Answer, Capabilities, Request, RequestError
from potstill.teachers.responses import join_reasoning
from potstill.teachers.server_errors import MayPass, ServerErrors

if TYPE_CHECKING:
    import httpx
    import tenacity

__all__ = ["OpenAIModel", "OpenAITeacher", "check_server", "server_context_tokens"]

_OWN_KEYS = frozenset(
    {"model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed"}
    | {"logprobs", "top_logprobs", "n", "stream"}
)
_CONNECT_TIMEOUT_S = 15.0
_CHECK_TIMEOUT_S = 5.0
_LONGEST_BACKOFF_S = 60.0
_SEEDS = 2**31  # what every server takes
_FINISHED: dict[str, Literal["stop", "length"]] = {"stop": "stop", "eos": "stop", "end_turn": "stop"}
_FINISHED |= {"length": "length", "max_tokens": "length"}


class OpenAIModel(Settings):
    """A model behind an OpenAI-compatible server.

    `base_url` ends before /chat/completions. The key is read from the environment variable that `api_key_env`
    names. `identity` states what the model is known by, so that its answers stay valid when the address
    changes; otherwise that is name and address. `extra_body` goes with every request: {top_k: -1} where a
    server has a default of its own, reasoning_effort, return_token_ids. `tokenizer` (a folder or hub id)
    makes the token ids that a server returns usable in training. `logprob_temperature` is the temperature
    that its log-probabilities are at, where known.
    """

    engine: Literal["openai"]
    base_url: str = execution(...)
    model: str = execution(..., min_length=1)
    api_key_env: str | None = execution(None)
    identity: str | None = None
    tokenizer: str | None = None
    extra_body: dict[str, Any] = Field(default={})
    logprob_temperature: float | None = Field(default=None, ge=0)
    timeout_s: float = execution(600.0, gt=0)
    max_retries: int = execution(6, ge=0)
    concurrency: int = execution(16, ge=1)

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
        return SecretStr(key)


class OpenAITeacher:
    """Asks /chat/completions for one response a request; tries again what may pass, after jittered waits."""

    def __init__(self, settings: OpenAIModel, *, backoff_s: float = 1.0) -> None:
        import httpx

        self._settings, self._backoff_s = settings, backoff_s
        self._errors = _errors(settings)
        self._reached = False
        self._tokenizer_hash: str | None = None
        self._end_ids: frozenset[int] = frozenset()
        if settings.tokenizer is not None:
            renderer = Renderer(load_tokenizer(TransformersModel(path=settings.tokenizer)))
            self._tokenizer_hash = renderer.tokenizer_hash
            self._end_ids = frozenset({*renderer.end_of_turn_ids, renderer.tokenizer.eos_token_id} - {None})
        self.identity = settings.known_as()
        self.capabilities = Capabilities(
            "messages",
            token_ids=self._tokenizer_hash is not None,
            logprobs=1,
            full_logits=False,
            deterministic=False,
            logprob_temperature=settings.logprob_temperature,
        )
        self.concurrency = settings.concurrency
        self.sampling = dict(settings.extra_body)
        self.renderer = None
        self._client = httpx.AsyncClient(
            **_connection(settings, self._errors.key),
            timeout=httpx.Timeout(settings.timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def answer(self, request: Request) -> Answer:
        """The server's first choice."""
        return self._answer(await self._post("/chat/completions", self._body(request)), request)

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
        response = await self._post("/completions", body)
        choice, _ = self._choice(response)
        entries = choice.get("prompt_logprobs")
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

    async def _post(self, path: str, body: dict[str, Any]) -> "httpx.Response":
        import tenacity

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._settings.max_retries + 1),
            wait=self._wait_s,
            retry=tenacity.retry_if_exception_type(MayPass),
            sleep=asyncio.sleep,
            reraise=True,
        )
        try:
            return await retrying(self._ask, path, body)
        except MayPass as last:
            raise last.error from None

    def _wait_s(self, state: "tenacity.RetryCallState") -> float:
        import tenacity

        wait_s = tenacity.wait_random_exponential(multiplier=self._backoff_s, max=_LONGEST_BACKOFF_S)(state)
        failure = state.outcome.exception() if state.outcome is not None else None
        asked_s = failure.retry_after_s if isinstance(failure, MayPass) else None
        # The jitter goes on top, so that those told to wait equally long do not all come back at once.
        return wait_s if asked_s is None else asked_s + min(wait_s, asked_s)

    async def _ask(self, path: str, body: dict[str, Any]) -> "httpx.Response":
        import httpx

        try:
            response = await self._client.post(path, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if self._reached:
                raise MayPass(self._errors.unanswered(error)) from error
            raise self._errors.unreachable(error) from error
        except httpx.RequestError as error:
            raise MayPass(self._errors.unanswered(error)) from error
        self._reached = True
        if response.status_code != 200:
            raise self._errors.refusal(response)
        return response

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
        return (
            body if request.logprobs is None else {**body, "logprobs": True, "top_logprobs": request.logprobs}
        )

    def _answer(self, response: "httpx.Response", request: Request) -> Answer:
        choice, found = self._choice(response)
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
        text = join_reasoning(reasoning or None, content)
        if reasoning and not content and finish_reason == "length":
            text = text.rpartition(f"\n{THINK_CLOSE}")[0]  # cut off while it reasoned, the block is open
        usage = _mapping(found.get("usage"))
        ids, logprobs = _tokens(choice, content, usage.get("completion_tokens"))
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
            tokenizer=None if ids is None else self._tokenizer_hash,
            prompt_tokens=_whole_number(usage.get("prompt_tokens")),
            response_tokens=_whole_number(usage.get("completion_tokens")),
        )

    def _choice(self, response: "httpx.Response") -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        try:
            found = _mapping(response.json())
        except ValueError:
            raise self._errors.unusable("the answer is not JSON", response) from None
        choices = found.get("choices")
        if not isinstance(choices, list) or not choices:
            raise self._errors.unusable("the answer holds no choices", response)
        return _mapping(choices[0]), found

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
    import httpx

    errors = _errors(settings)
    try:
        with httpx.Client(**_connection(settings, errors.key), timeout=_CHECK_TIMEOUT_S) as client:
            response = client.get("/models")
    except httpx.RequestError as error:
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
) -> tuple[list[int] | None, list[float] | None]:
    """Token ids where the server gives them (vLLM's token_ids, llama.cpp's ids), and log-probabilities.

    llama.cpp's entries leave out tokens that end inside a character: they are all ids only where they are as
    many as the tokens `sampled`.
    """
    ids = _whole_numbers(choice.get("token_ids"))
    entries = _mapping(choice.get("logprobs")).get("content")
    if not isinstance(entries, list):
        return ids, None
    entries = [_mapping(one) for one in entries]
    logprobs = [one.get("logprob") for one in entries]
    if not all(isinstance(one, int | float) for one in logprobs):
        return ids, None
    if ids is None and len(entries) == sampled:
        ids = _whole_numbers([one.get("id") for one in entries])
    if ids is not None:
        return ids, logprobs if len(ids) == len(logprobs) else None
    if entries and not content.endswith(str(entries[-1].get("token"))):
        logprobs.pop()  # the end-of-turn token, which is no part of the text
    return None, logprobs
