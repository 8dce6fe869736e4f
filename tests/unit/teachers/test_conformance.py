"""What the engines openai and vllm make of each kind of server, beside the same model in this process."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import EngineError
from potstill.models import LoadedModel
from potstill.teachers import Answer, OpenAIModel, OpenAITeacher, Request, RequestError, VllmModel
from potstill.teachers.vllm import VllmTeacher

from ...served import (
    CONDUCTS,
    CONTEXT_TOKENS,
    OTHER_NAME,
    VLLM_PYTHON,
    VLLM_SMALL,
    Conduct,
    Engine,
    llama_cpp,
    sglang_answer,
    shaped,
    transformers_serve,
    vllm_answer,
    vllm_environment,
    vllm_serve,
    write_served_model,
)
from ..models.test_embedded import to_gguf

QUESTION = [{"role": "user", "content": "What is 12 + 7?"}]
# llama.cpp keeps keys and values in half precision.
NEAR_NATS = 0.05
# One head as wide as vLLM's kernels for CPUs take at least.
SHAPE: dict[str, Any] = {"tie_word_embeddings": False, "num_attention_heads": 1, "num_key_value_heads": 1}
_NEEDS_VLLM = [
    pytest.mark.slow,
    pytest.mark.skipif(VLLM_PYTHON is None, reason="POTSTILL_VLLM_PYTHON names no interpreter with vLLM"),
]


@dataclass(frozen=True)
class Served:
    """A server, what is known of its kind, and its model here; or vLLM without one, opened for all tests."""

    conduct: Conduct
    engine: Engine
    settings: OpenAIModel | VllmModel
    vllm: VllmTeacher | None = None

    @property
    def prompt_ids(self) -> list[int]:
        """The question as the model reads it."""
        return self.engine.renderer.prompt_ids(QUESTION)

    def ask(self, *requests: Request, **changes: Any) -> list[Answer | BaseException]:
        """The answers one after the other, or the errors in their place."""

        async def use(teacher: OpenAITeacher | VllmTeacher) -> list[Answer | BaseException]:
            found: list[Answer | BaseException] = []
            for request in requests:
                begun = self.engine.tokens(request.prefix or "")
                ids = [*self.engine.renderer.prompt_ids(request.messages), *begun]
                asked = replace(request, prompt_token_ids=ids)
                found += await asyncio.gather(teacher.answer(asked), return_exceptions=True)
            return found

        answered: list[Answer | BaseException] = self.use(use, **changes)
        return answered

    def answers(self, *requests: Request, **changes: Any) -> list[Answer]:
        """The answers, of which none may be an error."""
        found = self.ask(*requests, **changes)
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return [one for one in found if isinstance(one, Answer)]

    def use(self, use: Callable[[Any], Coroutine[Any, Any, Any]], **changes: Any) -> Any:
        """What is made of the teacher; one that asks a server is closed behind it."""

        async def run() -> Any:
            if self.vllm is not None:
                return await use(self.vllm)
            assert isinstance(self.settings, OpenAIModel)
            teacher = OpenAITeacher(self.settings.model_copy(update=changes), backoff_s=0.001)
            try:
                return await use(teacher)
            finally:
                await teacher.close()

        return asyncio.run(run())

    def only_servers(self) -> None:
        """Leave a test out that is about what a recipe states of a server."""
        if self.vllm is not None:
            pytest.skip("no server")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> tuple[Path, Engine]:
    """The model that every server has, and the folder that it lies in."""
    from transformers import AutoModelForCausalLM

    from ...conftest import _build

    folder = tmp_path_factory.mktemp("served") / "tiny"
    write_served_model(folder, _build("llama", **SHAPE), tiny_tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, Engine(LoadedModel(model, tiny_tokenizer, "served"))


@pytest.fixture(
    scope="module",
    params=[
        "llama.cpp",
        pytest.param("transformers", marks=pytest.mark.slow),
        "vLLM's shapes",
        pytest.param("vLLM's server", marks=_NEEDS_VLLM),
        pytest.param("vLLM", marks=_NEEDS_VLLM),
        "SGLang's shapes",
    ],
)
def served(request: pytest.FixtureRequest, engine: tuple[Path, Engine]) -> Iterator[Served]:
    """A server of each kind in turn, SGLang's and where it is not installed vLLM's by their shapes."""
    folder, here = engine
    kind = request.param.partition("'")[0]
    if request.param == "vLLM":
        with opened_vllm(folder) as (settings, teacher):
            yield Served(CONDUCTS[kind], here, settings, teacher)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVED_KEY", "sk-served")
        if request.param == "llama.cpp":
            path = folder.parent / "tiny.gguf"
            to_gguf(path, here.loaded.model, here.loaded.tokenizer, pre="gpt-2")
            running = llama_cpp(folder, path)
        elif request.param == "transformers":
            pytest.importorskip("fastapi")
            running = transformers_serve(folder)
        elif request.param == "vLLM's server":
            running = vllm_serve(folder)
        else:
            shape = vllm_answer if kind == "vLLM" else sglang_answer
            running = shaped(shape, here, str(folder))
        with running as (base_url, name):
            settings = OpenAIModel(
                engine="openai",
                base_url=base_url,
                model=name,
                api_key_env="SERVED_KEY",
                tokenizer=str(folder),
                max_retries=0,
                concurrency=1,
            )
            yield Served(CONDUCTS[kind], here, settings)


@contextmanager
def opened_vllm(folder: Path) -> Iterator[tuple[VllmModel, VllmTeacher]]:
    """vLLM without a server, as `cache` opens it; one for all tests, since it takes its time to load."""
    settings = VllmModel(engine="vllm", path=str(folder), dtype="float32", **VLLM_SMALL)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vllm_environment().items():
            patch.setenv(name, value)
        teacher = VllmTeacher(settings, scoring=True)
    try:
        yield settings, teacher
    finally:
        asyncio.run(teacher.close())


def test_a_greedy_answer_is_the_models_own_and_counted(served: Served) -> None:
    expected = served.engine.answer(served.prompt_ids, max_new_tokens=12)
    [answer] = served.answers(Request(QUESTION, temperature=0.0, max_new_tokens=12))
    assert answer.response == expected.response
    assert answer.finish_reason == "length"
    assert (answer.prompt_tokens, answer.response_tokens) == (len(served.prompt_ids), 12)


def test_several_samples_are_drawn_and_a_seed_draws_the_same_where_it_is_kept(served: Served) -> None:
    requests = [Request(QUESTION, temperature=1.5, max_new_tokens=12, seed=seed) for seed in range(4)]
    first, again = served.answers(*requests), served.answers(*requests)
    assert len({answer.response for answer in first}) == 4
    same = [one.response == other.response for one, other in zip(first, again, strict=True)]
    assert same == [served.conduct.keeps_seeds] * 4


def test_a_response_ends_before_the_end_of_turn(served: Served) -> None:
    logprobs = None if served.conduct.reports is None else 1
    requests = [
        Request(QUESTION, temperature=1.0, max_new_tokens=200, seed=seed, logprobs=logprobs)
        for seed in range(4)
    ]
    ended = [answer for answer in served.answers(*requests) if answer.finish_reason == "stop"]
    assert ended, "the model comes to an end after some tens of tokens"
    for answer in ended:
        assert "<|im_end|>" not in answer.response
        assert answer.response_tokens is not None
        if served.conduct.gives_ids:
            assert len(answer.response_token_ids or []) == answer.response_tokens - 1
        if logprobs is not None:
            assert len(answer.logprobs or []) == answer.response_tokens - 1


def test_log_probabilities_are_the_models_at_the_temperature_that_the_kind_reports(served: Served) -> None:
    requests = [
        Request(QUESTION, temperature=0.5, max_new_tokens=12, seed=seed, logprobs=1) for seed in range(3)
    ]
    if served.conduct.reports is None:
        [failure, *_] = served.ask(*requests)
        assert isinstance(failure, RequestError)
        assert "no log-probabilities, though they were asked for" in str(failure)
        return
    temperature = 1.0 if served.conduct.reports == "at 1" else 0.5
    for answer in served.answers(*requests):
        ids = answer.response_token_ids
        if served.conduct.gives_ids:
            assert answer.tokenizer == served.engine.renderer.tokenizer_hash
        else:  # they are placed in the text instead
            assert ids is None
            assert sum(answer.token_bytes or []) == len(answer.response.encode())
            ids = served.engine.tokens(answer.response)
            if len(ids) != len(answer.logprobs or []):
                continue  # the text can be made of other tokens than those that were drawn
        expected_TV = served.engine.log_probs(served.prompt_ids, ids or [], temperature)
        expected = expected_TV[range(len(expected_TV)), ids].tolist()
        assert answer.logprobs == pytest.approx(expected, abs=NEAR_NATS)


def test_the_reported_temperature_is_found_out(served: Served) -> None:
    served.only_servers()
    assert served.use(lambda teacher: teacher.reported_temperature()) == served.conduct.reports


def test_a_recipe_that_declares_another_temperature_is_refused(served: Served) -> None:
    served.only_servers()
    if served.conduct.reports is None:
        pytest.skip("it gives no log-probabilities")
    request = Request(QUESTION, temperature=0.5, max_new_tokens=2, logprobs=1)
    right, wrong = (1.0, 0.5) if served.conduct.reports == "at 1" else (0.5, 1.0)
    assert len(served.answers(request, request, logprob_temperature=right)) == 2
    [refused] = served.ask(request, logprob_temperature=wrong)
    assert isinstance(refused, EngineError)
    assert not isinstance(refused, RequestError)
    assert f"logprob_temperature is {wrong:g}, but the server's log-probabilities are" in str(refused)
    assert f"logprob_temperature: {right:g}" in str(refused)


def test_given_tokens_are_scored_as_the_model_scores_them(served: Served) -> None:
    ids = [*served.prompt_ids, 40, 50, 60]

    async def score(teacher: OpenAITeacher | VllmTeacher) -> list[dict[int, float]]:
        await teacher.check_prompt_logprobs(5, CONTEXT_TOKENS - 1)
        return await teacher.prompt_logprobs(ids, 5)

    if not served.conduct.scores_prompts:
        with pytest.raises(EngineError, match=r"vLLM|prompt_logprobs"):
            served.use(score)
        return
    expected_TV = served.engine.log_probs(ids[:1], ids[1:], 1.0)
    for found, expected_V, id_ in zip(served.use(score), expected_TV, ids[1:], strict=True):
        assert {*expected_V.topk(5).indices.tolist(), id_} == found.keys()
        assert found == pytest.approx({one: expected_V[one].item() for one in found}, abs=NEAR_NATS)


def test_another_model_than_the_one_that_lies_here_is_found_out(served: Served, tiny_llama: Any) -> None:
    served.only_servers()
    if not served.conduct.scores_prompts:
        pytest.skip("it scores no given tokens")
    assert isinstance(served.settings, OpenAIModel)
    folder = Path(served.settings.model).with_name(OTHER_NAME)
    tiny_llama.save_pretrained(folder)
    served.engine.loaded.tokenizer.save_pretrained(folder)
    other = {"model": str(folder), "tokenizer": str(folder)}
    with pytest.raises(EngineError, match="nats a token from those that the same weights give here"):
        served.use(lambda teacher: teacher.check_prompt_logprobs(5, None), **other)


def test_the_beginning_of_a_response_is_continued(served: Served) -> None:
    beginning = "First 12"
    begun = [*served.prompt_ids, *served.engine.tokens(beginning)]
    expected = served.engine.answer(begun, max_new_tokens=12)
    [found] = served.ask(Request(QUESTION, prefix=beginning, temperature=0.0, max_new_tokens=12))
    if served.conduct.continues:
        assert isinstance(found, Answer)
        assert found.response == expected.response
    else:
        assert isinstance(found, RequestError)
        assert "continue_final_message" in str(found)


def test_a_prompt_past_the_context_is_refused_as_its_rows_fault(served: Served) -> None:
    long = [{"role": "user", "content": "What is 12 + 7? " * 200}]
    [found] = served.ask(Request(long, temperature=0.0, max_new_tokens=2))
    if served.conduct.refuses_long:
        assert isinstance(found, RequestError)
        assert (found.status, found.blames_row) == (None if served.vllm else 400, True)
        assert str(CONTEXT_TOKENS) in found.what
    else:
        assert isinstance(found, Answer)


def test_a_parameter_that_makes_no_sense_fails_the_request_with_the_servers_reason(served: Served) -> None:
    nonsense = {"stop": {"no": "text"}, "response_format": {"type": "nonsense"}}
    [found] = served.ask(Request(QUESTION, temperature=-1.0, max_new_tokens=2), extra_body=nonsense)
    assert isinstance(found, RequestError)
    if served.vllm is not None:
        assert found.what.startswith("vLLM refused: temperature must be non-negative")
        return
    assert found.status in (400, 422, 500)
    assert found.what.startswith(f"HTTP {found.status}: ")
    assert len(found.what) > len("HTTP 400: ")
