"""The vllm engine: vLLM in a process of its own, token ids in, token ids and log-probabilities out.

Shapes: T tokens of a text.
"""

import asyncio
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from potstill.core.alternatives import Alternatives
from potstill.core.errors import DataError, EngineError, ModelError
from potstill.core.settings import Settings, execution
from potstill.data.chat import Renderer, check_prompt_length
from potstill.data.responses import response_text
from potstill.models import TransformersModel, find_source, identity, load_tokenizer, vocabulary_size
from potstill.teachers.probes import (
    KNOWN_TEXT,
    PROBE_QUESTION,
    PROBE_TEMPERATURE,
    check_prompt_logprobs,
    known_here,
    reported,
)
from potstill.teachers.protocol import Answer, Capabilities, Request, RequestError

__all__ = ["VllmModel", "VllmTeacher", "check_scoring", "check_vllm", "scored_tokens"]

_CHILD = Path(__file__).with_name("vllm_child.py")
_WHERE = "vllm engine"
_SEEDS = 2**31
_PROBED_IDS = 5
_SHOWN_LINES = 3
# What a prompt's log-probabilities take while a batch is scored: a token's logits as the model computes them,
# in float32 as log-probabilities, and where they are above the token's own.
_SCORING_BYTES, _BYTES_A_LOGIT = 2**30, 2 + 4 + 1
_LEAST_SCORED_TOKENS, _MOST_SCORED_TOKENS = 64, 8192
_OWN_ARGUMENTS = frozenset(
    {"model", "revision", "tokenizer", "skip_tokenizer_init", "trust_remote_code", "dtype", "max_model_len"}
    | {"max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "enable_prefix_caching"}
    | {"max_logprobs", "logprobs_mode", "tensor_parallel_size", "gpu_memory_utilization", "disable_log_stats"}
)


class VllmModel(Settings):
    """A model that vLLM runs on this machine.

    `path` is a model folder, an embedded model's name, a .gguf file or a hub id (`organisation/name`, with
    `@revision` where one is meant). `identity` states what the model is known by, in place of a hash of its
    weights. `engine_arguments` are passed on to vLLM: {quantization: fp8}, {kv_cache_dtype: fp8}.
    """

    engine: Literal["vllm"]
    path: str = execution(..., min_length=1)
    identity: str | None = None
    context_tokens: int | None = Field(
        None, ge=32, description="prompt and response together; by default what the model was made for"
    )
    engine_arguments: dict[str, Any] = Field(default={})
    python: str | None = execution(
        None,
        min_length=1,
        description="the interpreter of the environment that vLLM is installed in; by default this one",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = execution("bfloat16")
    tensor_parallel_size: int | None = execution(
        None, ge=1, description="GPUs that share a copy; by default 1, on Ray the `gpus_per_replica`"
    )
    memory_share: float = execution(
        0.9,
        gt=0,
        le=1,
        description="of the memory of a GPU, or of what a copy on Ray has of one, for weights, activations, "
        "keys and values",
    )
    slots: int = execution(256, ge=1, description="requests under way")

    @field_validator("path")
    @classmethod
    def _resolve(cls, value: str, info: ValidationInfo) -> str:
        return TransformersModel.model_validate({"path": value}, context=info.context).path

    @field_validator("engine_arguments")
    @classmethod
    def _check_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_OWN_ARGUMENTS & value.keys()):
            raise ValueError(f"{taken[0]} is set by potstill; where it is a choice the model has a setting")
        return value

    def content(self) -> dict[str, str]:
        """What the model is known by."""
        return {"identity": self.known_as()}

    def known_as(self) -> str:
        """The stated identity, else that of the weights."""
        return identity(self.as_transformers())

    def as_transformers(self) -> TransformersModel:
        """The same weights for transformers, and where the tokenizer comes from."""
        return TransformersModel(path=self.path, identity=self.identity)

    def check(self) -> None:
        """Raise ModelError for an adapter, which vLLM is to have in the weights of its base."""
        if find_source(self.path).kind == "adapter":
            raise ModelError(
                "the vllm engine runs whole models, and this is an adapter",
                where=self.path,
                mend="make a model of both with a `merge` step, or leave `engine: vllm` out",
            )


def check_vllm(settings: VllmModel) -> None:
    """Raise ModelError or EngineError where vLLM cannot take the model, or is not installed."""
    settings.check()
    settings.known_as()
    python = settings.python or sys.executable
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    try:
        is_there = subprocess.run([python, "-I", "-c", code], check=False).returncode == 0
    except OSError as error:
        raise _no_interpreter(python, error) from error
    if not is_there:
        raise _not_installed(python)


def scored_tokens(vocabulary: int) -> int:
    """Prompt tokens that vLLM may score at once: floor(2^30 bytes / (7 bytes x vocabulary)), 64 to 8,192.

    vLLM keeps no memory free for them: its default of 8,192 tokens takes 8 GiB with 152,000 ids.
    """
    fitting = _SCORING_BYTES // (_BYTES_A_LOGIT * vocabulary)
    return max(_LEAST_SCORED_TOKENS, min(fitting, _MOST_SCORED_TOKENS))


def _engine_arguments(settings: VllmModel, vocabulary: int, *, scoring: bool) -> dict[str, Any]:
    """The EngineArgs of vLLM."""
    source = find_source(settings.path)
    arguments: dict[str, Any] = {
        **settings.engine_arguments,
        "model": source.name if source.kind == "hub" else str(source.folder),
        # Requests hold token ids, and so do answers.
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "trust_remote_code": False,
        "dtype": settings.dtype,
        "max_num_seqs": settings.slots,
        # What is asked is bounded by who asks.
        "max_logprobs": vocabulary,
        "logprobs_mode": "raw_logprobs",
        "tensor_parallel_size": settings.tensor_parallel_size or 1,
        "gpu_memory_utilization": settings.memory_share,
        # With it log-probabilities of a prompt can depend on what was asked before.
        "enable_prefix_caching": not scoring,
    }
    if source.revision is not None:
        arguments["revision"] = source.revision
    if settings.context_tokens is not None:
        arguments["max_model_len"] = settings.context_tokens
    if scoring:
        at_once = scored_tokens(vocabulary)
        arguments |= {"max_num_batched_tokens": at_once, "max_num_seqs": min(settings.slots, at_once)}
        arguments["enable_chunked_prefill"] = True  # for prompts of more tokens than that
    return arguments


async def check_scoring(
    ask: Callable[[Sequence[int], int], Awaitable[list[dict[int, float]]]],
    settings: VllmModel,
    renderer: Renderer,
    k: int,
    context_tokens: int | None,
) -> None:
    """Raise EngineError unless what `ask` says of a known text is what it should be.

    Where the model is small and lies here its own log-probabilities are computed and compared.
    """
    ids = renderer.tokenizer(KNOWN_TEXT, add_special_tokens=False)["input_ids"][:context_tokens]
    here = None if find_source(settings.path).kind == "hub" else settings.as_transformers()
    await check_prompt_logprobs(
        lambda ids: ask(ids, k),
        ids,
        where=_WHERE,
        expected=lambda: None if here is None else known_here(here, ids),
    )


class VllmTeacher:
    """Hands requests to vLLM as they come, which decodes them together.

    Log-probabilities are at temperature 1. With `scoring` it gives those of given tokens instead of answers.
    """

    def __init__(
        self, settings: VllmModel, *, scoring: bool = False, say: Callable[[str], None] | None = None
    ) -> None:
        settings.check()
        self._settings = settings
        self.renderer = Renderer(load_tokenizer(settings.as_transformers(), say=say))
        self.identity = settings.known_as()
        vocabulary = vocabulary_size(self.renderer.tokenizer)
        self.capabilities = Capabilities(
            "token_ids",
            token_ids=True,
            logprobs=vocabulary,
            full_logits=False,
            deterministic=False,
            logprob_temperature=1.0,
        )
        # Two more than are decoded keep the slots busy while answers travel.
        self.concurrency = settings.slots + 2
        self.sampling: dict[str, Any] = dict(settings.engine_arguments)
        if settings.context_tokens is not None:
            self.sampling["context_tokens"] = settings.context_tokens
        self._stop_ids = sorted(
            {*self.renderer.end_of_turn_ids, self.renderer.tokenizer.eos_token_id} - {None}
        )
        self._temperature_check: asyncio.Task[None] | None = None
        python = settings.python or sys.executable
        if say is not None:
            say(f"vLLM loads {settings.path}")
        arguments = _engine_arguments(settings, vocabulary, scoring=scoring)
        self._child = _Child(python, {"arguments": arguments, "vocabulary": vocabulary})
        self.context_tokens: int = self._child.opened["context_tokens"]

    async def answer(self, request: Request) -> Answer:
        """The response to the request's token ids.

        Raises EngineError as well where vLLM's log-probabilities are at the sampling temperature.
        """
        if request.logprobs is not None and request.temperature not in (0.0, 1.0):
            if self._temperature_check is None:
                self._temperature_check = asyncio.create_task(self._check_temperature())
            await asyncio.shield(self._temperature_check)
        prompt_ids = request.prompt_token_ids
        assert prompt_ids is not None, "the vllm engine is asked with token ids"
        try:
            check_prompt_length(len(prompt_ids), self.context_tokens)
        except DataError as error:
            raise RequestError(
                error.what, blames_row=True, expected=error.expected, mend=error.mend
            ) from error
        found = await self._child.ask(
            prompt_ids,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed % _SEEDS,
            max_tokens=request.max_new_tokens,
            stop_token_ids=self._stop_ids,
            # The token's own comes on top of those that are asked for.
            logprobs=0 if request.logprobs == 1 else request.logprobs,
        )
        return self._answer(request, prompt_ids, found)

    def _answer(self, request: Request, prompt_ids: list[int], found: "_Found") -> Answer:
        if found.finish_reason not in ("stop", "length"):
            raise RequestError(f"vLLM ended the response by {found.finish_reason!r}", where=_WHERE)
        ended = found.finish_reason == "stop"
        ids = found.ids[: len(found.ids) - ended]  # vLLM's last id is what the response ended by
        logprobs = alternatives = None
        if request.logprobs is not None:
            if len(found.places) != len(found.ids):
                raise RequestError(
                    f"vLLM gave {len(found.places)} log-probabilities for {len(found.ids)} tokens",
                    where=_WHERE,
                )
            logprobs = [place[id_] for place, id_ in zip(found.places, ids, strict=False)]
            if request.logprobs > 1:
                likeliest = (
                    sorted(place.items(), key=lambda one: -one[1])[: request.logprobs]
                    for place in found.places
                )
                alternatives = Alternatives.of(likeliest, as_ids=True)
        return Answer(
            response=response_text(self.renderer.tokenizer, prompt_ids, ids),
            finish_reason="stop" if ended else "length",
            prompt_token_ids=prompt_ids,
            response_token_ids=ids,
            logprobs=logprobs,
            alternatives=alternatives,
            tokenizer=self.renderer.tokenizer_hash,
            prompt_tokens=len(prompt_ids),
            response_tokens=len(found.ids),
        )

    async def _check_temperature(self) -> None:
        """Raise EngineError where log-probabilities of sampled tokens change with the temperature."""
        prompt_ids = self.renderer.prompt_ids([{"role": "user", "content": PROBE_QUESTION}])
        places = []
        for temperature in (1.0, PROBE_TEMPERATURE):
            found = await self._child.ask(
                prompt_ids, temperature=temperature, seed=0, max_tokens=1, logprobs=_PROBED_IDS
            )
            places.append({str(id_): one for id_, one in found.places[0].items()})
        if reported(*places) == "at the sampling temperature":
            raise EngineError(
                "vLLM's log-probabilities are at the sampling temperature",
                where=_WHERE,
                expected="those of temperature 1, which it is asked for by logprobs_mode: raw_logprobs",
                mend="take another version of vLLM, or leave `logprobs` out",
            )

    async def prompt_logprobs(self, token_ids: Sequence[int], k: int) -> list[dict[int, float]]:
        """Of each token but the first, log p at T = 1 of the k likeliest ids in its place and of its own."""
        found = await self._child.ask([*token_ids], temperature=0.0, max_tokens=1, prompt_logprobs=k)
        places = found.places[1:]
        if len(places) != len(token_ids) - 1 or any(
            len(place) < k or id_ not in place for place, id_ in zip(places, token_ids[1:], strict=True)
        ):
            raise RequestError(f"vLLM gave fewer than {k} ids for a token of the prompt", where=_WHERE)
        return places

    async def check_prompt_logprobs(self, k: int, context_tokens: int | None) -> None:
        """Raise EngineError unless the log-probabilities of a known text are what they should be."""
        await check_scoring(self.prompt_logprobs, self._settings, self.renderer, k, context_tokens)

    async def close(self) -> None:
        """End vLLM; requests under way are given up."""
        if self._temperature_check is not None and not self._temperature_check.done():
            self._temperature_check.cancel()
            await asyncio.gather(self._temperature_check, return_exceptions=True)
        await asyncio.to_thread(self._child.close)


@dataclass(frozen=True, slots=True)
class _Found:
    """An answer of vLLM's: all ids that it sampled, and of each place ids with their log-probabilities."""

    ids: list[int]
    finish_reason: str
    places: list[dict[int, float]]


class _Child:
    """The process that vLLM runs in. It ends with this one, however this one ends.

    Raises EngineError where it does not start; `opened` is what it says of itself.
    """

    def __init__(self, python: str, opening: Mapping[str, Any]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        try:
            self._process = subprocess.Popen(
                [python, "-I", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=_environment(),
                start_new_session=True,  # it ends all that it started by the group that it leads
            )
        except OSError as error:
            self._log.close()
            raise _no_interpreter(python, error) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._waiting: dict[str, Future[_Found]] = {}
        self._ended: EngineError | None = None
        self._end = threading.Lock()  # a request waits before the end, or is told of it
        self._asked = 0
        self._closing = False
        try:
            with suppress(BrokenPipeError):  # what it said last says why
                self._write(opening)
            opened = self._read()
            if opened is None or "error" in opened[0]:
                told = {} if opened is None else opened[0]
                raise _not_installed(python) if told.get("missing") else self._failure(told.get("error"))
        except BaseException:
            self.close()
            raise
        self.opened: dict[str, Any] = opened[0]
        self._reader = threading.Thread(target=self._take_answers, daemon=True)
        self._reader.start()

    async def ask(self, prompt_ids: Sequence[int], **sampling: Any) -> _Found:
        """What vLLM makes of a prompt.

        Raises RequestError where it refuses, EngineError where it has ended.
        """
        self._asked += 1
        number, future = str(self._asked), Future[_Found]()
        with self._end:
            if self._ended is not None:
                raise self._ended
            self._waiting[number] = future
        asked = {"flat_logprobs": True, "detokenize": False, **sampling}
        with suppress(BrokenPipeError):  # who reads its answers says why
            self._write({"id": number, "prompt": list(prompt_ids), "sampling": asked})
        return await asyncio.wrap_future(future)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._requests.write(json.dumps(line).encode() + b"\n")
        self._requests.flush()

    def _read(self) -> tuple[dict[str, Any], bytes] | None:
        """The next answer; None where the process has ended."""
        lengths = self._answers.read(8)
        if len(lengths) < 8:
            return None
        text_bytes, packed_bytes = struct.unpack("=II", lengths)
        text, packed = self._answers.read(text_bytes), self._answers.read(packed_bytes)
        if len(text) < text_bytes or len(packed) < packed_bytes:
            return None
        return json.loads(text), packed

    def _take_answers(self) -> None:
        reason: str | None = "its answer could not be read"
        try:
            while (read := self._read()) is not None and "error" not in read[0]:
                told, packed = read
                places = _unpacked(packed)
                future = self._waiting.pop(told["id"])
                if not future.set_running_or_notify_cancel():  # its asker has gone; from here on it stays
                    continue
                if "refused" in told:
                    future.set_exception(
                        RequestError(f"vLLM refused: {told['refused']}", where=_WHERE, blames_row=True)
                    )
                else:
                    future.set_result(_Found(told["ids"], told["finish_reason"], places))
            reason = None if read is None else read[0]["error"]
        finally:
            self._fail_all(self._failure(reason))

    def _fail_all(self, error: EngineError) -> None:
        with self._end:
            self._ended = error
        for future in self._waiting.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _failure(self, reason: str | None) -> EngineError:
        if self._closing:
            return EngineError("closed while it answered", where=_WHERE)
        if reason is None:
            reason = f"its process ended; the last that it said: {_last_lines(self._log) or 'nothing'}"
        return EngineError(
            f"vLLM failed: {reason}",
            where=_WHERE,
            mend="if memory ran out lower `slots`, `context_tokens` or `memory_share`; answers are kept",
        )

    def close(self) -> None:
        """End it, with all processes that it started."""
        self._closing = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()
        self._log.close()


def _environment() -> dict[str, str]:
    """This one's, with one process for a vLLM on one GPU, and no statistics sent."""
    default = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    return {**default, **os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def _unpacked(packed: bytes) -> list[dict[int, float]]:
    """Each place's ids and log-probabilities, as `vllm_child` packs them."""
    if not packed:
        return []
    (places,) = struct.unpack_from("=i", packed)
    counts = array("i", packed[4 : 4 * (places + 1)])
    total = sum(counts)
    ids = array("i", packed[4 * (places + 1) : 4 * (places + 1 + total)])
    logprobs = array("f", packed[4 * (places + 1 + total) :])
    found, start = [], 0
    for count in counts:
        end = start + count
        found.append(dict(zip(ids[start:end], logprobs[start:end], strict=True)))
        start = end
    return found


def _last_lines(log: IO[bytes]) -> str:
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - 4096))
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-_SHOWN_LINES:])


def _no_interpreter(python: str, error: OSError) -> EngineError:
    return EngineError(
        f"the interpreter {python} cannot be run ({error.strerror or error})",
        where=_WHERE,
        expected="`python` of the environment that vLLM is installed in",
        mend="set the model's `python` to it, such as /opt/vllm/bin/python",
    )


def _not_installed(python: str) -> EngineError:
    return EngineError(
        f"vLLM is not installed for {python}",
        where=_WHERE,
        expected="an environment of its own, since vLLM and potstill ask for other releases of transformers",
        mend="python -m venv /opt/vllm && /opt/vllm/bin/pip install vllm, then set the model's `python` to "
        "/opt/vllm/bin/python; or leave `engine: vllm` out",
    )
