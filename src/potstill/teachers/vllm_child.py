"""vLLM in a process of its own: requests come by standard input, answers leave by standard output.

It runs in whichever interpreter has vLLM, and so imports nothing of potstill: vLLM asks for an older
transformers than potstill does, and the two need not lie in one environment.

The first line of JSON has vLLM's EngineArgs and how many ids the tokenizer has: {"arguments", "vocabulary"};
it is answered by what was opened. Each line behind it is a request: {"id", "prompt", "sampling"}, the last
vLLM's SamplingParams. An answer is two lengths of 4 bytes, a JSON object and what `_packed` makes of
log-probabilities.
"""

import json
import os
import queue
import signal
import struct
import sys
import threading
import traceback
from array import array
from collections.abc import Mapping
from operator import sub
from typing import IO, Any

__all__ = ["main"]

_Requests = queue.SimpleQueue[dict[str, Any]]
_NEVER = -100.0  # to the logits of ids that only pad the vocabulary


def main() -> None:
    """Answer until standard input ends."""
    # What vLLM and its libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: _Requests = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    try:
        _serve(requests.get(), requests, answers)
    except Exception as error:  # whatever it is, whoever asks is told
        traceback.print_exc()
        _tell(answers, {"error": f"{type(error).__name__}: {error}", "missing": _is_missing(error)})
        _end()


def _is_missing(error: Exception) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == "vllm"


def _listen(requests: _Requests) -> None:
    """Take requests; when they end, so does whoever asked, and this process with all that it started."""
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    _end()


def _end() -> None:
    """End this process and all that it started, which are in its group."""
    os.killpg(0, signal.SIGKILL)


def _serve(opening: Mapping[str, Any], requests: _Requests, answers: IO[bytes]) -> None:
    import vllm
    from vllm import EngineArgs, LLMEngine, SamplingParams

    engine = LLMEngine.from_engine_args(EngineArgs(**opening["arguments"]))
    found = engine.model_config
    _tell(answers, {"version": vllm.__version__, "context_tokens": found.max_model_len})
    padding = dict.fromkeys(range(opening["vocabulary"], found.get_vocab_size()), _NEVER)
    while True:
        while not requests.empty() or not engine.has_unfinished_requests():
            request = requests.get()
            try:
                sampling = SamplingParams(**request["sampling"], logit_bias=padding or None)
                engine.add_request(request["id"], {"prompt_token_ids": request["prompt"]}, sampling)
            except Exception as error:  # of kinds that vLLM's versions do not agree on
                _tell(answers, {"id": request["id"], "refused": str(error)})
        for output in engine.step():
            if output.finished:
                response = output.outputs[0]
                answer = {
                    "id": output.request_id,
                    "ids": list(response.token_ids),
                    "finish_reason": response.finish_reason,
                }
                kept = response.logprobs if output.prompt_logprobs is None else output.prompt_logprobs
                _tell(answers, answer, b"" if kept is None else _packed(kept))


def _packed(kept: Any) -> bytes:
    """Of vLLM's FlatLogprobs: how many places, how many ids each has, the ids, their log-probabilities.

    Each is a number of 4 bytes. Nothing predicts a prompt's first token, whose place has none.
    """
    counts = array("i", map(sub, kept.end_indices, kept.start_indices))
    numbers = (array("i", [len(counts)]), counts, array("i", kept.token_ids), array("f", kept.logprobs))
    return b"".join(one.tobytes() for one in numbers)


def _tell(answers: IO[bytes], answer: Mapping[str, Any], packed: bytes = b"") -> None:
    text = json.dumps(answer).encode()
    answers.write(struct.pack("=II", len(text), len(packed)) + text + packed)
    answers.flush()


if __name__ == "__main__":
    main()
