"""An environment with a stand-in for vLLM, which tells by its answers what it was asked."""

import sys
import venv
from pathlib import Path

STUB = """
import os, signal, subprocess, sys
from types import SimpleNamespace

__version__ = "0"


class EngineArgs(SimpleNamespace):
    pass


class SamplingParams:
    def __init__(
        self, *, temperature, max_tokens, top_p=1.0, seed=None, stop_token_ids=(), logprobs=None,
        prompt_logprobs=None, logit_bias=None, flat_logprobs=False, detokenize=True,
    ):
        assert flat_logprobs and not detokenize
        self.max_tokens, self.stop_token_ids, self.logit_bias = max_tokens, stop_token_ids, logit_bias or {}
        self.logprobs, self.prompt_logprobs = logprobs, prompt_logprobs


def flat(places):
    ends = [sum(map(len, places[: number + 1])) for number in range(len(places))]
    return SimpleNamespace(
        start_indices=[0, *ends][:-1],
        end_indices=ends,
        token_ids=[id_ for place in places for id_ in place],
        logprobs=[logprob for place in places for logprob in place.values()],
    )


class LLMEngine:
    @classmethod
    def from_engine_args(cls, args):
        engine = cls()
        engine.args, engine.under_way, engine.begun = args, [], False
        engine.model_config = SimpleNamespace(max_model_len=512, get_vocab_size=lambda: args.vocabulary)
        if hasattr(args, "family"):
            subprocess.Popen(["sleep", "600"], stdout=open(args.family, "w"))
        print("loading")
        os.write(1, b"weights")
        if args.conduct == "does not load":
            raise ValueError("no such quantization")
        return engine

    def has_unfinished_requests(self):
        return bool(self.under_way)

    def add_request(self, request_id, prompt, sampling):
        ids = prompt["prompt_token_ids"]
        if max(ids) >= self.args.vocabulary:
            raise ValueError(f"Token id {max(ids)} is out of vocabulary")
        self.under_way.append((request_id, ids, sampling))

    def step(self):
        print("a step")
        if self.args.conduct == "fails":
            raise RuntimeError("out of memory")
        if self.args.conduct == "dies":
            print("a kernel gave up", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.args.conduct == "hangs":
            signal.pause()
        self.begun = self.begun or len(self.under_way) >= self.args.together
        if not self.begun:
            return []
        request_id, prompt, sampling = self.under_way.pop()
        likeliest = max(set(range(self.args.vocabulary)) - set(sampling.logit_bias))
        ids = [likeliest, *reversed(prompt)]
        stopped = len(ids) < sampling.max_tokens
        ids = [*ids, sampling.stop_token_ids[0]] if stopped else ids[: sampling.max_tokens]
        places = [{id_: -0.5 * number} for number, id_ in enumerate(ids)]
        asked = sampling.prompt_logprobs
        scored = [{**{other: -1.0 - other for other in range(asked or 0)}, id_: -9.0} for id_ in prompt[1:]]
        response = SimpleNamespace(
            token_ids=tuple(ids),
            finish_reason="stop" if stopped else "length",
            logprobs=None if sampling.logprobs is None else flat(places),
        )
        return [
            SimpleNamespace(
                request_id=request_id,
                finished=True,
                outputs=[response],
                prompt_logprobs=None if asked is None else flat([{}, *scored]),
            )
        ]
"""
"""Stands for vLLM: what it answers tells which request it answers, the newest first, `together` at once.

A response is the likeliest id that it may give and the prompt backwards. A place of a prompt has the first
ids, at -1, -2 and so on, and its own, at -9. What it prints goes where the answers go, if nobody prevents it.
"""


def stub_environment(folder: Path) -> str:
    """The interpreter of an environment that has nothing but the stub."""
    venv.create(folder, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    package = folder / "lib" / version / "site-packages" / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text(STUB)
    return str(folder / "bin" / "python")
