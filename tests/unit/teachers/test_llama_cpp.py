import asyncio
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from potstill.core.errors import EngineError, ModelError
from potstill.core.settings import meaning
from potstill.models import TransformersModel, convert_gguf
from potstill.teachers import (
    Answer,
    LlamaCppModel,
    OpenAIModel,
    Request,
    RequestError,
    check_teacher,
    open_teacher,
)
from potstill.teachers.llama_cpp import LlamaCppTeacher, _aligned

from ..models.test_embedded import to_gguf

CONTEXT_TOKENS = 256  # llama.cpp makes no smaller one
QUESTIONS = [f"What is {number} + {number}?" for number in range(6)]


@pytest.fixture
def gguf_path(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    path = tmp_path / "tiny.gguf"
    to_gguf(path, tiny_llama, tiny_tokenizer, pre="gpt-2")
    return path


@pytest.fixture
def settings(gguf_path: Path) -> LlamaCppModel:
    return LlamaCppModel(
        engine="llama_cpp", model=str(gguf_path), context_tokens=CONTEXT_TOKENS, slots=4, threads=1
    )


def with_teacher(settings: LlamaCppModel, use: Callable[[LlamaCppTeacher], Any]) -> Any:
    async def run() -> Any:
        teacher = LlamaCppTeacher(settings)
        try:
            return await use(teacher)
        finally:
            await teacher.close()

    return asyncio.run(run())


def ask(settings: LlamaCppModel, questions: list[str], **request: Any) -> list[Answer]:
    async def use(teacher: LlamaCppTeacher) -> list[Answer]:
        prompts = [teacher.renderer.prompt_ids([{"role": "user", "content": one}]) for one in questions]
        return await asyncio.gather(
            *(teacher.answer(Request([], ids, seed=number, **request)) for number, ids in enumerate(prompts))
        )

    found: list[Answer] = with_teacher(settings, use)
    return found


def test_logprobs_are_the_models_own_at_temperature_one_whatever_the_sampling(settings, tiny_llama):
    answers = ask(settings, QUESTIONS, temperature=1.7, top_p=0.8, max_new_tokens=12, logprobs=1)
    for answer in answers:
        prompt, ids = answer.prompt_token_ids or [], answer.response_token_ids or []
        logits = tiny_llama(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(ids)), ids]
        logprobs = torch.tensor(answer.logprobs)
        assert logprobs.shape == expected.shape
        known = ~logprobs.isnan()  # llama.cpp gives none for a token that ends inside a character
        assert known.any()
        assert torch.allclose(logprobs[known], expected[known], atol=0.02)


def test_alternatives_are_the_models_likeliest_ids_at_temperature_one(settings, tiny_llama):
    answers = ask(settings, QUESTIONS[:3], temperature=1.7, top_p=0.8, max_new_tokens=12, logprobs=5)
    known = 0
    for answer in answers:
        prompt, ids = answer.prompt_token_ids or [], answer.response_token_ids or []
        logits = tiny_llama(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 :]
        log_probs = logits.log_softmax(-1)
        assert len(answer.alternatives or []) == answer.response_tokens
        for place, logprob in enumerate(answer.logprobs or []):
            found = list(answer.alternatives or [])[place]
            assert bool(found) != math.isnan(logprob)  # none inside a character
            known += bool(found)
            if found:
                values = log_probs[place, [id_ for id_, _ in found]].tolist()
                assert [one for _, one in found] == pytest.approx(values, abs=0.02)
                assert values == pytest.approx(log_probs[place].topk(5).values.tolist(), abs=0.02)
    assert known


def test_tokens_inside_a_character_have_no_logprob():
    bytes_of = [b"a", b"\xf0\x9f", b"\x98", b"\x80", b"\xe4\xbd\xa0", b"\x80", b"", b"\xec"]
    entries = [{"id": index, "logprob": -float(number)} for number, index in enumerate([0, 3, 4, 5, 6, 8, 0])]
    aligned = _aligned([0, 1, 2, 3, 4, 5, 6, 8, 7, 0, 0, 1], entries, bytes_of)
    logprobs = [None if one is None else one["logprob"] for one in aligned]
    assert logprobs == [0, None, None, -1, -2, -3, -4, -5, None, None, -6, None]
    with pytest.raises(RequestError, match="do not belong"):
        _aligned([0, 0], [{"id": 0, "logprob": 0.0}, {"id": 1, "logprob": 0.0}], bytes_of)


def test_greedy_responses_are_those_of_the_same_weights_in_transformers(settings, tiny_llama, gguf_path):
    [answer] = ask(settings, QUESTIONS[:1], temperature=0.0, max_new_tokens=16)
    ids = torch.tensor([answer.prompt_token_ids])
    for token in answer.response_token_ids or []:
        likeliest = tiny_llama(ids, use_cache=False).logits[0, -1].argmax()
        assert token == likeliest
        ids = torch.cat([ids, likeliest.reshape(1, 1)], dim=1)


def rigged(model: Any, favourite: int, probability: float) -> Any:
    """The model with every next token `favourite` by that probability, the others alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        others = model.config.vocab_size - 1
        model.model.norm.weight.fill_(1.0)
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = (
            1.0  # every token's hidden state is this one direction, of length sqrt(H) after the norm
        )
        gap = math.log(probability / (1 - probability) * others)
        embedding[favourite, 0] = 1.0 + gap / math.sqrt(model.config.hidden_size)
    return model


def test_the_end_of_turn_is_not_part_of_the_response(tmp_path, tiny_llama, tiny_tokenizer):
    path = tmp_path / "stops.gguf"
    to_gguf(path, rigged(tiny_llama, 2, 0.6), tiny_tokenizer, pre="gpt-2")
    settings = LlamaCppModel(engine="llama_cpp", model=str(path), context_tokens=256, slots=2, threads=1)
    answers = ask(settings, QUESTIONS, temperature=1.0, max_new_tokens=30, logprobs=1)
    assert {answer.finish_reason for answer in answers} == {"stop"}
    for answer in answers:
        ids = answer.response_token_ids or []
        assert 2 not in ids
        assert len(answer.logprobs or []) == len(ids)
        assert answer.response_tokens == len(ids) + 1
        assert "<|im_end|>" not in answer.response


def test_no_hidden_filter_narrows_the_distribution(tmp_path, tiny_llama, tiny_tokenizer):
    path = tmp_path / "flat.gguf"
    to_gguf(path, rigged(tiny_llama, 5, 0.5), tiny_tokenizer, pre="gpt-2")
    settings = LlamaCppModel(engine="llama_cpp", model=str(path), context_tokens=256, slots=4, threads=1)
    answers = ask(settings, QUESTIONS, temperature=1.0, max_new_tokens=100)
    drawn = Counter(token for answer in answers for token in answer.response_token_ids or [])
    # llama.cpp's own min_p of 0.05 would leave nothing but token 5, its top_k of 40 at most 40 others.
    assert 0.4 < drawn[5] / drawn.total() < 0.6
    assert len(drawn) > 100


def test_one_slot_gives_the_same_answer_whatever_was_asked_before(settings):
    alone = settings.model_copy(update={"slots": 1})
    sampling: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 12, "logprobs": 1}

    async def use(teacher: LlamaCppTeacher) -> list[Answer]:
        assert teacher.capabilities.deterministic
        ids = teacher.renderer.prompt_ids([{"role": "user", "content": QUESTIONS[0]}])
        other = teacher.renderer.prompt_ids([{"role": "user", "content": "What is 1?"}])
        first = await teacher.answer(Request([], ids, seed=5, **sampling))
        await teacher.answer(Request([], other, seed=6, **sampling))
        again = await teacher.answer(Request([], ids, seed=5, **sampling))
        different = await teacher.answer(Request([], ids, seed=6, **sampling))
        return [first, again, different]

    first, again, different = with_teacher(alone, use)
    assert first == again
    assert first.response_token_ids != different.response_token_ids


def test_large_seeds_stay_apart_and_never_mean_random(settings):
    async def use(teacher: LlamaCppTeacher) -> list[Answer]:
        ids = teacher.renderer.prompt_ids([{"role": "user", "content": QUESTIONS[0]}])
        seeds = [2**62 + 1, 2**62 + 2, 2**32 - 1, 2**32 - 1]
        return [await teacher.answer(Request([], ids, seed=seed, max_new_tokens=12)) for seed in seeds]

    one, other, highest, again = with_teacher(settings.model_copy(update={"slots": 1}), use)
    assert one.response_token_ids != other.response_token_ids
    assert highest == again


def test_a_response_ends_with_the_context_and_a_prompt_past_it_is_refused(settings, tiny_tokenizer):
    async def use(teacher: LlamaCppTeacher) -> Answer:
        long = [5] * (CONTEXT_TOKENS - 4)
        answer = await teacher.answer(Request([], long, temperature=0.0, max_new_tokens=50))
        with pytest.raises(RequestError, match="256 tokens, but the context holds 256") as caught:
            await teacher.answer(Request([], [5] * CONTEXT_TOKENS))
        assert caught.value.blames_row
        assert "context_tokens" in str(caught.value)
        return answer

    answer = with_teacher(settings, use)
    assert answer.finish_reason == "length"
    assert 0 < len(answer.response_token_ids or []) <= 5


def test_its_server_answers_nobody_else(settings):
    import httpx2

    async def use(teacher: LlamaCppTeacher) -> httpx2.Response:
        assert teacher._server is not None
        assert teacher._server.listening_address.startswith("http://127.0.0.1:")
        async with httpx2.AsyncClient(trust_env=False) as client:
            return await client.post(f"{teacher._server.listening_address}/completion", json={"prompt": [1]})

    assert with_teacher(settings, use).status_code == 401


def test_it_is_silent(settings, capfd):
    ask(settings, QUESTIONS[:1], max_new_tokens=4)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_cannot_be_loaded_says_so(settings, tmp_path, gguf_path, capfd):
    (tmp_path / "cut.gguf").write_bytes(gguf_path.read_bytes()[:20_000])
    with pytest.raises(ModelError, match=r"cut\.gguf: llama\.cpp cannot load it"):
        open_teacher(settings.model_copy(update={"model": str(tmp_path / "cut.gguf")}))
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        open_teacher(settings.model_copy(update={"model": str(tmp_path / "other.gguf")}))
    with pytest.raises(ModelError, match="no such model"):
        open_teacher(settings.model_copy(update={"model": str(tmp_path / "gone.gguf")}))
    assert capfd.readouterr() == ("", "")


def test_a_model_folder_is_no_gguf_file(tiny_model_folder):
    problem, _ = check_teacher(LlamaCppModel(engine="llama_cpp", model=str(tiny_model_folder)))
    assert "llama.cpp runs GGUF files only" in (problem or "")


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(tmp_path, tiny_llama, tiny_tokenizer):
    path = tmp_path / "apart.gguf"
    to_gguf(path, tiny_llama, tiny_tokenizer, pre="gpt-2")
    settings = LlamaCppModel(engine="llama_cpp", model=str(path), context_tokens=256, slots=1, threads=1)
    with_teacher(settings, lambda teacher: asyncio.sleep(0))
    folder = convert_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="split text differently"):
        open_teacher(settings)


def test_the_fingerprint_knows_the_file_and_the_context_and_not_how_it_is_run(settings, gguf_path, tmp_path):
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(gguf_path.read_bytes())
    plain = meaning(settings)
    assert plain == meaning(settings.model_copy(update={"slots": 1, "threads": 2, "model": str(moved)}))
    assert plain != meaning(settings.model_copy(update={"context_tokens": 512}))
    moved.write_bytes(gguf_path.read_bytes() + b"\0")
    assert plain != meaning(settings.model_copy(update={"model": str(moved)}))
    assert plain["content"] == {"identity": TransformersModel(path=str(gguf_path)).content()["identity"]}


def ask_both_ways(settings: LlamaCppModel, monkeypatch: Any, logprobs: int = 1) -> tuple[Answer, Answer]:
    """One greedy answer of the native engine, and the openai engine's from the same server."""
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    sampling: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 8, "logprobs": logprobs}

    async def use(teacher: LlamaCppTeacher) -> tuple[Answer, Answer]:
        assert teacher._server is not None
        monkeypatch.setenv("LLAMA_KEY", teacher._client.headers["Authorization"].removeprefix("Bearer "))
        own = await teacher.answer(Request(messages, teacher.renderer.prompt_ids(messages), **sampling))
        remote = open_teacher(
            OpenAIModel(
                engine="openai",
                base_url=f"{teacher._server.listening_address}/v1",
                model="tiny",
                api_key_env="LLAMA_KEY",
                tokenizer=settings.model,
            )
        )
        try:
            return own, await remote.answer(Request(messages, **sampling))
        finally:
            await remote.close()

    found: tuple[Answer, Answer] = with_teacher(settings, use)
    return found


def test_the_openai_engine_gets_the_same_from_llama_cpps_own_server(
    tmp_path, tiny_llama, tiny_tokenizer, monkeypatch
):
    path = tmp_path / "letters.gguf"
    letter = tiny_tokenizer("x", add_special_tokens=False).input_ids[0]
    to_gguf(path, rigged(tiny_llama, letter, 0.9), tiny_tokenizer, pre="gpt-2")
    settings = LlamaCppModel(engine="llama_cpp", model=str(path), context_tokens=256, slots=2, threads=1)
    own, remote = ask_both_ways(settings, monkeypatch)
    assert remote.response == own.response == "x" * 8
    assert remote.response_token_ids == own.response_token_ids == [letter] * 8
    assert remote.logprobs == pytest.approx(own.logprobs, abs=1e-3)
    assert remote.logprobs == pytest.approx([math.log(0.9)] * 8, abs=0.05)
    assert remote.finish_reason == own.finish_reason == "length"
    assert remote.tokenizer == own.tokenizer
    assert (remote.prompt_tokens, remote.response_tokens) == (own.prompt_tokens, own.response_tokens)


def test_the_openai_engine_gets_the_same_alternatives_from_llama_cpps_own_server(
    tmp_path, tiny_llama, tiny_tokenizer, monkeypatch
):
    path = tmp_path / "letters.gguf"
    letter = tiny_tokenizer("x", add_special_tokens=False).input_ids[0]
    to_gguf(path, rigged(tiny_llama, letter, 0.9), tiny_tokenizer, pre="gpt-2")
    settings = LlamaCppModel(engine="llama_cpp", model=str(path), context_tokens=256, slots=2, threads=1)
    own, remote = ask_both_ways(settings, monkeypatch, logprobs=4)
    assert len(own.alternatives or []) == len(remote.alternatives or []) == 8
    for found, wanted in zip(remote.alternatives or [], own.alternatives or [], strict=True):
        assert len(found) == len(wanted) == 4
        assert found[0] == wanted[0] == (letter, pytest.approx(math.log(0.9), abs=0.05))
        # All others are alike, so that any three of them may be the likeliest.
        assert [one for _, one in found] == pytest.approx([one for _, one in wanted], abs=1e-3)


def test_a_wrong_key_to_llama_cpps_server_ends_the_work(settings, monkeypatch):
    monkeypatch.setenv("LLAMA_KEY", "wrong")

    async def use(teacher: LlamaCppTeacher) -> None:
        assert teacher._server is not None
        address = f"{teacher._server.listening_address}/v1"
        remote = open_teacher(
            OpenAIModel(engine="openai", base_url=address, model="tiny", api_key_env="LLAMA_KEY")
        )
        with pytest.raises(EngineError, match="refuses the key"):
            await remote.answer(Request([{"role": "user", "content": "hello"}]))
        await remote.close()

    with_teacher(settings, use)
