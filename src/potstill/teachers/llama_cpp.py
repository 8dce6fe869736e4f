"""The llama_cpp engine: llama.cpp's server inside this process, on loopback, with continuous batching."""

import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from potstill.core.alternatives import Alternatives
from potstill.core.environment import usable_cores
from potstill.core.errors import DataError, EngineError, ModelError
from potstill.core.settings import Settings, execution
from potstill.data.chat import Renderer, check_prompt_length
from potstill.data.responses import response_text
from potstill.models import (
    EMBEDDED,
    TransformersModel,
    fetch_embedded,
    find_source,
    identity,
    load_tokenizer,
    token_bytes,
)
from potstill.teachers.protocol import Answer, Capabilities, Request, RequestError

if TYPE_CHECKING:
    import httpx2
    import xllamacpp

__all__ = ["LlamaCppModel", "LlamaCppTeacher"]

_SILENT = -1
_CONNECT_TIMEOUT_S = 10.0
# White space, digits and a non-ASCII letter: where two readings of one GGUF tokenizer part ways.
_PROBE = "What is 12 + 345?\n\n1. It's a naïve  sum:\n   the answer."
# llama.cpp reads a seed as 32 bits and takes the highest for "random".
_SEEDS = 2**31
# llama.cpp's own defaults (top_k 40, top_p 0.95, min_p 0.05) would sample from another distribution than
# asked.
_NEUTRAL: dict[str, float] = {
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
}


class LlamaCppModel(Settings):
    """A GGUF model run by llama.cpp in this process.

    `model` is an embedded model's name or a .gguf file. Each of the `slots` requests under way has
    `context_tokens` for prompt and response together; `threads` defaults to the cores that this process may
    use. With one slot the same request always has the same answer; with more, the batch it happens to share
    changes the last bits.
    """

    engine: Literal["llama_cpp"]
    model: str = execution(..., min_length=1)
    context_tokens: int = Field(4096, ge=32)
    slots: int = execution(8, ge=1)
    threads: int | None = execution(None, ge=1)

    @field_validator("model")
    @classmethod
    def _resolve(cls, value: str, info: ValidationInfo) -> str:
        return TransformersModel.model_validate({"path": value}, context=info.context).path

    def content(self) -> dict[str, str]:
        """The GGUF file's hash; it holds the tokenizer and the chat template too."""
        self.check()
        return {"identity": identity(self.as_transformers())}

    def as_transformers(self) -> TransformersModel:
        """The same weights for transformers, and where the tokenizer comes from."""
        return TransformersModel(path=self.model)

    def check(self) -> None:
        """Raise ModelError unless `model` names an embedded model or a GGUF file that is there."""
        source = find_source(self.model)
        if source.kind not in ("embedded", "gguf"):
            raise ModelError(
                "llama.cpp runs GGUF files only",
                where=self.model,
                expected=f"a .gguf file, or an embedded model: {', '.join(EMBEDDED)}",
                mend="leave `engine: llama_cpp` out and give this as `path`, or convert the model to GGUF",
            )
        if source.kind == "gguf":
            with Path(source.name).open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise ModelError("is not a GGUF file (its first bytes are not 'GGUF')", where=source.name)


class LlamaCppTeacher:
    """Asks llama.cpp's native completion endpoint, token ids in and token ids out."""

    def __init__(self, settings: LlamaCppModel, *, say: Callable[[str], None] | None = None) -> None:
        import httpx2

        settings.check()
        path = fetch_embedded(settings.model, say=say) if settings.model in EMBEDDED else Path(settings.model)
        key = secrets.token_hex(16)
        self._server: xllamacpp.Server | None = _start(path, settings, key)
        self.renderer = Renderer(load_tokenizer(settings.as_transformers(), say=say))
        self.identity = identity(settings.as_transformers())
        self.capabilities = Capabilities(
            "token_ids",
            token_ids=True,
            logprobs=len(self.renderer.tokenizer),
            full_logits=False,
            deterministic=settings.slots == 1,
            logprob_temperature=1.0,
        )
        # Two more than are decoded keep the slots busy while answers travel.
        self.concurrency = settings.slots + 2
        self.sampling: dict[str, Any] = {"context_tokens": settings.context_tokens}
        self._reuse_prefixes = settings.slots > 1
        self._written_bytes = _written_bytes(self.renderer.tokenizer)
        connection: dict[str, Any] = {
            "base_url": self._server.listening_address,
            "headers": {"Authorization": f"Bearer {key}"},
            "timeout": httpx2.Timeout(None, connect=_CONNECT_TIMEOUT_S),
            "trust_env": False,
        }
        with httpx2.Client(**connection) as client:
            properties = _checked(client.get("/props"))
            self._context_tokens = int(properties["default_generation_settings"]["n_ctx"])
            body = {"content": _PROBE, "add_special": False, "parse_special": True}
            own_ids = _checked(client.post("/tokenize", json=body))["tokens"]
        if own_ids != self.renderer.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:
            raise ModelError(
                "llama.cpp and transformers split text differently with this file's tokenizer",
                where=str(path),
                expected="one tokenizer for both, since prompts are given as token ids",
                mend="give the model's Hugging Face folder or hub id as `path`, without `engine: llama_cpp`",
            )
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.AsyncClient(**connection, limits=limits)

    async def answer(self, request: Request) -> Answer:
        """The response to the request's token ids; log-probabilities are those of temperature 1."""
        import httpx2

        ids = request.prompt_token_ids
        assert ids is not None, "the llama_cpp engine is asked with token ids"
        try:
            check_prompt_length(len(ids), self._context_tokens)
        except DataError as error:
            mend = "raise `context_tokens`, shorten the prompt or its template, or filter such rows out"
            raise RequestError(error.what, blames_row=True, expected=error.expected, mend=mend) from error
        body = {
            **_NEUTRAL,
            "prompt": ids,
            "n_predict": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed % _SEEDS,
            "n_probs": request.logprobs or 0,
            "return_tokens": True,
            "cache_prompt": self._reuse_prefixes,
        }
        try:
            response = await self._client.post("/completion", json=body)
        except httpx2.HTTPError as error:
            raise EngineError(
                f"llama.cpp's server no longer answers ({type(error).__name__}: {error})",
                where="llama_cpp engine",
                mend="run again; answers are kept. If memory ran out, lower `slots` or `context_tokens`",
            ) from error
        return self._answer(request, _checked(response))

    def _answer(self, request: Request, found: dict[str, Any]) -> Answer:
        prompt_ids = request.prompt_token_ids or []
        ids: list[int] = found["tokens"]
        ended = found["stop_type"] == "eos"
        logprobs = alternatives = None
        if request.logprobs is not None:
            entries = _aligned(ids, found.get("completion_probabilities", []), self._written_bytes)
            logprobs = [math.nan if one is None else float(one["logprob"]) for one in entries]
            if request.logprobs > 1:
                alternatives = Alternatives.of(map(_likeliest, entries), as_ids=True)
        kept = len(ids) - ended  # llama.cpp returns the end-of-turn token as the last of them
        return Answer(
            response=response_text(self.renderer.tokenizer, prompt_ids, ids[:kept]),
            finish_reason="stop" if ended else "length",
            prompt_token_ids=prompt_ids,
            response_token_ids=ids[:kept],
            logprobs=None if logprobs is None else logprobs[:kept],
            alternatives=alternatives,
            tokenizer=self.renderer.tokenizer_hash,
            prompt_tokens=len(prompt_ids),
            response_tokens=len(ids),
        )

    async def close(self) -> None:
        """Stop the server and free the weights."""
        await self._client.aclose()
        self._server = None


def _aligned(
    ids: list[int], entries: list[dict[str, Any]], bytes_of: list[bytes]
) -> list[dict[str, Any] | None]:
    """An entry a token: None where llama.cpp gives none, as the token's text ends inside a character."""
    aligned: list[dict[str, Any] | None] = []
    end = b""
    following = iter(entries)
    for token in ids:
        end = (end + (bytes_of[token] if token < len(bytes_of) else b""))[-4:]
        if _ends_inside_character(end):
            aligned.append(None)
            continue
        entry = next(following, None)
        if entry is None or entry["id"] != token:
            raise RequestError("llama.cpp's log-probabilities do not belong to the tokens that it sampled")
        aligned.append(entry)
    return aligned


def _likeliest(entry: dict[str, Any] | None) -> list[tuple[int, float]]:
    found = () if entry is None else entry["top_logprobs"]
    return [(one["id"], -math.inf if one["logprob"] is None else one["logprob"]) for one in found]


def _ends_inside_character(text: bytes) -> bool:
    """Whether llama.cpp takes UTF-8 to be cut off: a first byte stands too near the end for its character."""
    return any(
        (byte >> 5 == 0b110 and behind < 2)
        or (byte >> 4 == 0b1110 and behind < 3)
        or (byte >> 3 == 0b11110 and behind < 4)
        for behind, byte in enumerate(reversed(text[-4:]), start=1)
    )


def _written_bytes(tokenizer: Any) -> list[bytes]:
    """What llama.cpp writes for each id: a token's bytes, nothing for a special token."""
    written = token_bytes(tokenizer)
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            written[index] = b""
    return written


def _start(path: Path, settings: LlamaCppModel, key: str) -> "xllamacpp.Server":
    try:
        import xllamacpp
    except ImportError as error:
        raise EngineError(
            f"xllamacpp cannot be imported ({error})",
            where="llama_cpp engine",
            mend="python -m pip install xllamacpp, or give the model as `path`, without `engine: llama_cpp`",
        ) from error
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_parallel = settings.slots
    parameters.n_ctx = settings.context_tokens * settings.slots
    for cores in (parameters.cpuparams, parameters.cpuparams_batch):
        cores.n_threads = settings.threads or usable_cores()
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.api_keys = [key]
    parameters.verbosity = _SILENT
    parameters.warmup = parameters.ui = parameters.fit_params = False
    parameters.cache_ram_mib = 0
    try:
        return xllamacpp.Server(parameters)
    except RuntimeError as error:
        raise ModelError(
            "llama.cpp cannot load it",
            where=str(path),
            expected="a whole GGUF file that llama.cpp knows, and memory for its weights and contexts",
            mend="fetch the file again, or lower `slots` or `context_tokens` if memory is short",
        ) from error


def _checked(response: "httpx2.Response") -> dict[str, Any]:
    found: dict[str, Any] = response.json()
    if response.status_code == 200:
        return found
    reason = found.get("error", {}).get("message", "no reason given")
    raise RequestError(
        f"llama.cpp refused: {reason}", status=response.status_code, blames_row=response.status_code == 400
    )
