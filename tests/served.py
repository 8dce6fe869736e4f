"""One tiny model behind every kind of server: llama.cpp's, transformers', vLLM's, and the shapes of SGLang's.

Shapes: T tokens, V vocabulary.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.data.chat import Renderer
from potstill.teachers.probes import Reported

from .servers import Body, Reply, prompt_logprobs, running_server

if TYPE_CHECKING:
    import torch

    from potstill.models import LoadedModel
    from potstill.teachers import Answer

CONTEXT_TOKENS = 512
VLLM_PYTHON = os.environ.get("POTSTILL_VLLM_PYTHON")
"""The interpreter of an environment with vLLM; what needs one is left out where it is not stated."""
OTHER_NAME = "other"
"""What servers that tell models apart call the served one as well."""
_START_S = 600.0


@dataclass(frozen=True)
class Conduct:
    """What a server does with what it is asked for, where it is not what most do."""

    keeps_seeds: bool = True
    reports: Reported | None = "at 1"
    gives_ids: bool = True
    scores_prompts: bool = False
    continues: bool = True
    refuses_long: bool = True


CONDUCTS = {
    "llama.cpp": Conduct(),
    # Version 5.23: it refuses fields that it does not know, leaves log-probabilities out without a word, and
    # goes on past the model's context.
    "transformers": Conduct(reports=None, gives_ids=False, continues=False, refuses_long=False),
    "vLLM": Conduct(scores_prompts=True),
    "SGLang": Conduct(keeps_seeds=False, reports="at the sampling temperature", gives_ids=False),
}


def write_served_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Make a tiny Llama with a head of its own write printable text that comes to an end, and save it.

    Its responses are the same text whoever decodes their tokens, and its logits far enough apart for any
    precision.
    """
    import torch

    from potstill.models import token_bytes

    written = token_bytes(tokenizer)
    with torch.no_grad():
        # The first channel is the same for all tokens, so that the head's first column is a bias.
        model.get_input_embeddings().weight[:, 0] = 30.0
        head_VH = model.get_output_embeddings().weight
        head_VH *= 10
        head_VH[:, 0] = -20.0
        for id_, text in enumerate(written):
            if id_ not in tokenizer.added_tokens_decoder and text.isascii() and text.decode().isprintable():
                head_VH[id_, 0] = 0.0
        head_VH[tokenizer.eos_token_id] = 0.0
        head_VH[tokenizer.eos_token_id, 0] = 1.4
    # transformers' server takes these for what a request cannot say: without do_sample it never draws.
    model.generation_config.update(do_sample=True, top_k=0, top_p=1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Engine:
    """The served model in this process, for what a server should have answered."""

    def __init__(self, loaded: "LoadedModel") -> None:
        self.loaded, self.renderer = loaded, Renderer(loaded.tokenizer)

    def answer(self, prompt_ids: Sequence[int], **sampling: Any) -> "Answer":
        """One response; `sampling` is `max_new_tokens`, and `temperature` with `seeds` or neither."""
        from potstill.teachers.transformers import generate_batch

        [found] = generate_batch(self.loaded, self.renderer, [prompt_ids], **sampling)
        return found

    def tokens(self, text: str) -> list[int]:
        """Its ids, none added."""
        ids: list[int] = self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def log_probs(self, prompt_ids: Sequence[int], ids: Sequence[int], temperature: float) -> "torch.Tensor":
        """[T, V]: log-probabilities in the place of each of `ids`."""
        import torch

        with torch.no_grad():
            all_ids = torch.tensor([[*prompt_ids, *ids]])
            logits_TV = self.loaded.model(input_ids=all_ids, use_cache=False).logits[0]
        known_TV = logits_TV[len(prompt_ids) - 1 : -1, : self.loaded.vocabulary_size]
        return (known_TV / temperature).log_softmax(-1)


@contextmanager
def llama_cpp(folder: Path, gguf_path: Path) -> Iterator[tuple[str, str]]:
    """llama.cpp's own server, and what the model is called there."""
    from potstill.teachers.llama_cpp import LlamaCppModel, _start

    settings = LlamaCppModel.model_construct(
        model=str(gguf_path), context_tokens=CONTEXT_TOKENS, slots=1, threads=1
    )
    server = _start(gguf_path, settings, os.environ["SERVED_KEY"])
    yield f"{server.listening_address}/v1", "tiny"


@contextmanager
def transformers_serve(folder: Path) -> Iterator[tuple[str, str]]:
    """`transformers serve`, which loads the model that a request names."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    options = ["--port", str(port), "--device", "cpu", "--dtype", "float32", "--log-level", "error"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "hub")}
    process = subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _await(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def vllm_serve(folder: Path) -> Iterator[tuple[str, str]]:
    """vLLM's own server, which calls the model by its folder and by another one beside it.

    It is started by its module: `vllm serve` does not know what distributions for CPUs are called.
    """
    assert VLLM_PYTHON is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    scoring = ["--no-enable-prefix-caching", "--max-num-seqs", "4", "--gpu-memory-utilization", "0.05"]
    names = ["--served-model-name", str(folder), str(folder.with_name(OTHER_NAME))]
    # Its engine is a process of its own.
    process = subprocess.Popen(
        [*command, *options, *scoring, *names],
        env=vllm_environment() | {"VLLM_API_KEY": os.environ["SERVED_KEY"]},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _await(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


VLLM_SMALL: dict[str, Any] = {
    "python": VLLM_PYTHON,
    "memory_share": 0.05,
    "slots": 4,
    "engine_arguments": {"enforce_eager": True},
}
"""Settings of a tiny model that vLLM runs: little memory, and nothing compiled."""


def vllm_environment() -> dict[str, str]:
    """This one's, for a vLLM that keeps to one thread and sends nothing."""
    ours = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**kept, **ours, **one_process}


def _await(address: str, process: "subprocess.Popen[bytes]") -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended as it started"
        try:
            with opener.open(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(address)


@contextmanager
def shaped(answer: Callable[[Engine, Body], Reply], engine: Engine, name: str) -> Iterator[tuple[str, str]]:
    """A server that answers in another's shapes."""
    with running_server() as server:
        server.always = partial(answer, engine)
        yield server.base_url, name


def vllm_answer(engine: Engine, body: Body) -> Reply:
    """As vLLM answers, by its main branch at commit 002032e (vllm/entrypoints/openai, 2026).

    ChatCompletionResponse and -Request in chat_completion/protocol.py, the log-probabilities that
    --logprobs-mode raw_logprobs (its default) gives, and its error bodies.
    """

    def refuse(message: str, kind: str = "BadRequestError", status: int = 400) -> Reply:
        return Reply(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    if "model" not in body:
        listed = {"id": "tiny", "object": "model", "owned_by": "vllm", "max_model_len": CONTEXT_TOKENS}
        return Reply(body={"object": "list", "data": [listed]})
    if not isinstance(body.get("stop", []), str | list):
        return refuse("1 validation error: {'type': 'string_type', 'loc': ('body', 'stop', 'str')}")
    if "prompt" in body:
        if body["prompt_logprobs"] > 20:
            asked = f"Requested prompt logprobs of {body['prompt_logprobs']}"
            return refuse(f"{asked}, which is greater than max allowed: 20")
        return Reply(body=prompt_logprobs(engine.loaded, body))
    prompt_ids = _prompt_ids(engine, body)
    if len(prompt_ids) >= CONTEXT_TOKENS:
        return refuse(
            f"This model's maximum context length is {CONTEXT_TOKENS} tokens. However, your request has "
            f"{len(prompt_ids)} input tokens. Please reduce the length of the input messages."
        )
    answer, ids = _answered(engine, body, prompt_ids, seed=body["seed"])
    choice: dict[str, Any] = {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": answer.response,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        },
        "logprobs": _chat_logprobs(engine, body, prompt_ids, ids, temperature=1.0),
        "finish_reason": answer.finish_reason,
        "stop_reason": None,
        "token_ids": ids if body.get("return_token_ids") else None,
        "routed_experts": None,
    }
    found = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "tiny"}
    usage = {**_usage(prompt_ids, ids), "prompt_tokens_details": None}
    more = {"prompt_logprobs": None, "prompt_token_ids": prompt_ids if body.get("return_token_ids") else None}
    return Reply(body={**found, "choices": [choice], "usage": usage, **more})


def sglang_answer(engine: Engine, body: Body) -> Reply:
    """As SGLang answers, by its main branch at commits 9b116df and 012bcb5 (srt/entrypoints/openai, 2026).

    ChatCompletionResponse in protocol.py, errors in serving_base.py; log-probabilities are at the sampling
    temperature unless SGLANG_RETURN_ORIGINAL_LOGPROB is set (srt/layers/sampler.py), and a seed decides
    nothing without --enable-deterministic-inference.
    """

    def refuse(message: str) -> Reply:
        return Reply(
            400,
            {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400},
        )

    if "model" not in body:
        return Reply(body={"object": "list", "data": [{"id": "tiny", "object": "model", "root": "tiny"}]})
    if not isinstance(body.get("stop", []), str | list):
        return refuse("1 validation error for ChatCompletionRequest: stop.str Input should be a valid string")
    if "prompt" in body:  # prompt_logprobs is no field of its completions
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "matched_stop": None}
        return Reply(body={"object": "text_completion", "choices": [choice]})
    prompt_ids = _prompt_ids(engine, body)
    if len(prompt_ids) >= CONTEXT_TOKENS:
        return refuse(
            f"The input ({len(prompt_ids)} tokens) is longer than the model's context length "
            f"({CONTEXT_TOKENS} tokens)."
        )
    answer, ids = _answered(engine, body, prompt_ids, seed=time.monotonic_ns())
    choice = {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": answer.response,
            "reasoning_content": None,
            "tool_calls": None,
        },
        "logprobs": _chat_logprobs(engine, body, prompt_ids, ids, temperature=body["temperature"] or 1.0),
        "finish_reason": answer.finish_reason,
        "matched_stop": ids[-1] if answer.finish_reason == "stop" else None,
    }
    found = {"id": "1", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice]}
    return Reply(body={**found, "usage": _usage(prompt_ids, ids), "metadata": {"weight_version": "default"}})


def _prompt_ids(engine: Engine, body: Body) -> list[int]:
    messages = body["messages"]
    if not body.get("continue_final_message"):
        return engine.renderer.prompt_ids(messages)
    begun = engine.renderer.tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    return [*engine.renderer.prompt_ids(messages[:-1]), *begun]


def _answered(engine: Engine, body: Body, prompt_ids: list[int], *, seed: int) -> "tuple[Answer, list[int]]":
    """The response, and its token ids with the end of turn."""
    sampling = {"temperature": body["temperature"], "top_p": body["top_p"], "seeds": [seed]}
    answer = engine.answer(prompt_ids, max_new_tokens=body["max_tokens"], **sampling)
    end = [engine.loaded.tokenizer.eos_token_id] if answer.finish_reason == "stop" else []
    return answer, [*(answer.response_token_ids or []), *end]


def _usage(prompt_ids: list[int], ids: list[int]) -> dict[str, int]:
    return {
        "prompt_tokens": len(prompt_ids),
        "total_tokens": len(prompt_ids) + len(ids),
        "completion_tokens": len(ids),
    }


def _chat_logprobs(
    engine: Engine, body: Body, prompt_ids: list[int], ids: list[int], *, temperature: float
) -> dict[str, Any] | None:
    if not body.get("logprobs"):
        return None
    log_probs_TV = engine.log_probs(prompt_ids, ids, temperature)

    def named(id_: int, logprob: float) -> dict[str, Any]:
        text = engine.loaded.tokenizer.decode([id_])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = []
    for log_probs_V, id_ in zip(log_probs_TV, ids, strict=True):
        likeliest = log_probs_V.topk(body["top_logprobs"]).indices.tolist()
        top = [named(one, log_probs_V[one].item()) for one in likeliest]
        content.append({**named(id_, log_probs_V[id_].item()), "top_logprobs": top})
    return {"content": content}
