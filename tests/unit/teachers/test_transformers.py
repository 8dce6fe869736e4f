import asyncio
import copy
import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import DataError, EngineError
from potstill.data.chat import Renderer
from potstill.models import LoadedModel, TransformersModel
from potstill.teachers import Answer, Request, RequestError, open_teacher
from potstill.teachers.transformers import TransformersTeacher, generate_batch

PROMPTS = [[5, 17], [9, 200, 31, 88, 7, 120, 64], [42], [11, 250, 13]]


@pytest.fixture
def loaded(tiny_llama: Any, tiny_tokenizer: Any) -> LoadedModel:
    return LoadedModel(tiny_llama, tiny_tokenizer, "tiny")


@pytest.fixture
def renderer(tiny_tokenizer: Any) -> Renderer:
    return Renderer(tiny_tokenizer)


def logits_after(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


def test_a_left_padded_batch_gives_what_each_row_gives_alone(
    tiny_model, tiny_family, tiny_tokenizer, renderer
):
    loaded = LoadedModel(tiny_model, tiny_tokenizer, "tiny")
    together = generate_batch(loaded, renderer, PROMPTS, max_new_tokens=8)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        [alone] = generate_batch(loaded, renderer, [prompt], max_new_tokens=8)
        assert answer.response_token_ids == alone.response_token_ids
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_alternatives_are_the_likeliest_ids_of_each_place_and_of_the_end_of_turns(
    loaded, renderer, tiny_llama
):
    answers = generate_batch(
        loaded, renderer, PROMPTS, max_new_tokens=6, temperature=1.5, seeds=[1, 2, 3, 4], top_logprobs=4
    )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = answer.response_token_ids or []
        assert answer.alternatives is not None
        assert (
            len(answer.alternatives) == answer.response_tokens == len(ids) + (answer.finish_reason == "stop")
        )
        for place, found in enumerate(answer.alternatives):
            known = logits_after(tiny_llama, [*prompt, *ids[:place]])[: len(loaded.tokenizer)].log_softmax(-1)
            wanted = known.topk(4)
            assert [id_ for id_, _ in found] == wanted.indices.tolist()
            assert [one for _, one in found] == pytest.approx(wanted.values.tolist(), abs=1e-4)
    without = generate_batch(loaded, renderer, PROMPTS, max_new_tokens=6, temperature=1.5, seeds=[1, 2, 3, 4])
    assert [one.response_token_ids for one in without] == [one.response_token_ids for one in answers]
    assert all(one.alternatives is None for one in without)


def test_the_place_where_a_response_ended_has_alternatives_as_well(loaded, renderer, tiny_llama):
    [probe] = generate_batch(loaded, renderer, [PROMPTS[0]], max_new_tokens=3)
    assert probe.response_token_ids is not None
    end = probe.response_token_ids[-1]
    tiny_llama.generation_config.eos_token_id = end
    [answer] = generate_batch(loaded, renderer, [PROMPTS[0]], max_new_tokens=6, top_logprobs=2)
    assert answer.finish_reason == "stop"
    assert answer.alternatives is not None
    places = [*answer.alternatives]
    assert len(places) == len(answer.response_token_ids or []) + 1
    assert places[-1][0][0] == end


def test_greedy_takes_the_likeliest_token_of_the_tokenizers_own_vocabulary(loaded, renderer, tiny_llama):
    with torch.no_grad():
        tiny_llama.get_input_embeddings().weight[len(loaded.tokenizer) :] *= 100  # the padding rows shout
    for prompt, answer in zip(
        PROMPTS, generate_batch(loaded, renderer, PROMPTS, max_new_tokens=6), strict=True
    ):
        ids = list(prompt)
        for token, logprob in zip(answer.response_token_ids or [], answer.logprobs or [], strict=True):
            known = logits_after(tiny_llama, ids)[: len(loaded.tokenizer)]
            assert token == int(known.argmax())
            assert logprob == pytest.approx(float(known.log_softmax(-1)[token]), abs=1e-4)
            ids.append(token)


def test_a_row_draws_by_its_own_seed_whatever_stands_beside_it(loaded, renderer):
    sampling: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0}
    seeds = [3, 2**62 + 5, 7, 3]
    together = generate_batch(loaded, renderer, PROMPTS, seeds=seeds, **sampling)
    backwards = generate_batch(loaded, renderer, PROMPTS[::-1], seeds=seeds[::-1], **sampling)
    assert [one.response_token_ids for one in together] == [one.response_token_ids for one in backwards[::-1]]
    [alone] = generate_batch(loaded, renderer, [PROMPTS[1]], seeds=[seeds[1]], **sampling)
    assert alone.response_token_ids == together[1].response_token_ids
    [other] = generate_batch(loaded, renderer, [PROMPTS[1]], seeds=[4], **sampling)
    assert other.response_token_ids != alone.response_token_ids


def drawn_first_tokens(loaded: LoadedModel, renderer: Renderer, rows: int, **sampling: Any) -> Counter[int]:
    answers = generate_batch(
        loaded, renderer, [PROMPTS[0]] * rows, max_new_tokens=1, seeds=list(range(rows)), **sampling
    )
    return Counter((one.response_token_ids or [2])[0] for one in answers)


def test_samples_follow_the_tempered_distribution(loaded, renderer, tiny_llama):
    rows, temperature = 3000, 0.7
    expected = (logits_after(tiny_llama, PROMPTS[0])[: len(loaded.tokenizer)] / temperature).softmax(-1)
    drawn = drawn_first_tokens(loaded, renderer, rows, temperature=temperature)
    for token in expected.topk(5).indices.tolist():
        share = float(expected[token])
        assert drawn[token] / rows == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / rows))


def test_top_p_keeps_the_smallest_set_that_reaches_it(loaded, renderer, tiny_llama):
    probabilities, ids = (
        logits_after(tiny_llama, PROMPTS[0])[: len(loaded.tokenizer)].softmax(-1).sort(descending=True)
    )
    nucleus = int((probabilities.cumsum(0) < 0.3).sum()) + 1
    drawn = drawn_first_tokens(loaded, renderer, 500, temperature=1.0, top_p=0.3)
    assert nucleus > 1
    assert set(drawn) <= set(ids[:nucleus].tolist())
    assert len(drawn) > 1


def test_the_models_own_generation_config_changes_nothing_and_is_left_alone(loaded, renderer, tiny_llama):
    plain = generate_batch(loaded, renderer, PROMPTS, max_new_tokens=8)
    config = tiny_llama.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.max_length = 5.0, 1, 3
    before = copy.deepcopy(config.to_dict())
    assert generate_batch(loaded, renderer, PROMPTS, max_new_tokens=8) == plain
    assert tiny_llama.generation_config is config
    assert config.to_dict() == before


def test_a_response_ends_before_the_end_of_turn_and_other_rows_go_on(loaded, renderer, tiny_llama):
    [probe] = generate_batch(loaded, renderer, [PROMPTS[0]], max_new_tokens=3)
    third = (probe.response_token_ids or [])[2]
    tiny_llama.generation_config.eos_token_id = [third]
    stopped, going_on = generate_batch(loaded, renderer, PROMPTS[:2], max_new_tokens=6)
    assert third not in (probe.response_token_ids or [])[:2]
    assert stopped.response_token_ids == (probe.response_token_ids or [])[:2]
    assert (stopped.finish_reason, stopped.response_tokens, len(stopped.logprobs or [])) == ("stop", 3, 2)
    assert (going_on.finish_reason, going_on.response_tokens) == ("length", 6)


def test_a_row_near_the_end_of_the_context_is_cut_there_and_the_others_are_not(
    build_tiny_model, tiny_tokenizer, renderer
):
    model = build_tiny_model("gpt2", n_positions=16)
    loaded = LoadedModel(model, tiny_tokenizer, "tiny")
    near, far = generate_batch(loaded, renderer, [[5] * 12, [7] * 3], max_new_tokens=8)
    assert (len(near.response_token_ids or []), near.finish_reason) == (4, "length")
    assert len(far.response_token_ids or []) == 8
    with pytest.raises(DataError, match="the prompt has 16 tokens, but the context holds 16"):
        generate_batch(loaded, renderer, [[7] * 3, [5] * 16], max_new_tokens=8)


def test_the_head_is_given_states_without_gaps(loaded, renderer):
    """With gaps, torch copies the head's weight for every row."""
    shapes = []

    def note(head, states, logits):
        assert states[0].is_contiguous()
        shapes.append(tuple(states[0].shape[:2]))

    handle = loaded.model.get_output_embeddings().register_forward_hook(note)
    generate_batch(loaded, renderer, PROMPTS, max_new_tokens=2)
    handle.remove()
    assert shapes == [(len(PROMPTS), 1)] * 2


def test_a_stop_ends_decoding_at_once(loaded, renderer):
    stop = threading.Event()
    stop.set()
    answers = generate_batch(loaded, renderer, PROMPTS, max_new_tokens=400, stop=stop)
    assert max(len(one.response_token_ids or []) for one in answers) < 5


def test_sampling_without_seeds_is_refused(loaded, renderer):
    with pytest.raises(ValueError, match="one seed a prompt"):
        generate_batch(loaded, renderer, PROMPTS, max_new_tokens=2, temperature=0.5)


@pytest.fixture
def settings(tiny_model_folder: Path) -> TransformersModel:
    return TransformersModel(path=str(tiny_model_folder), device="cpu", dtype="float32")


def test_requests_that_arrive_together_are_decoded_in_one_batch(settings, monkeypatch):
    batches: list[int] = []
    decode = TransformersTeacher._decode
    monkeypatch.setattr(
        TransformersTeacher,
        "_decode",
        lambda self, requests: batches.append(len(requests)) or decode(self, requests),
    )

    async def run() -> tuple[list[Answer], Answer]:
        teacher = open_teacher(settings)
        try:
            requests = [Request([], ids, temperature=0.0, max_new_tokens=6) for ids in PROMPTS]
            together = await asyncio.gather(*map(teacher.answer, requests))
            return together, await teacher.answer(
                Request([], PROMPTS[0], temperature=0.9, seed=1, max_new_tokens=3, logprobs=1)
            )
        finally:
            await teacher.close()

    together, last = asyncio.run(run())
    assert batches == [4, 1]
    assert all(one.logprobs is None for one in together)
    assert len(last.logprobs or []) == len(last.response_token_ids or [])


def test_requests_that_do_not_fit_into_memory_together_are_decoded_in_pieces(settings, loaded, monkeypatch):
    tried: list[int] = []
    decode = TransformersTeacher._decode

    def small_memory(self: TransformersTeacher, requests: Any) -> list[Answer]:
        tried.append(len(requests))
        if len(requests) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, requests)

    monkeypatch.setattr(TransformersTeacher, "_decode", small_memory)

    async def run() -> list[Answer]:
        teacher = TransformersTeacher(settings, say=said.append)
        try:
            requests = [Request([], ids, temperature=0.0, max_new_tokens=4) for ids in PROMPTS]
            return await asyncio.gather(*map(teacher.answer, requests))
        finally:
            await teacher.close()

    most, said = 2, list[str]()
    answers = asyncio.run(run())
    assert [len(one.response_token_ids or []) for one in answers] == [4] * 4
    assert tried == [4, 2, 2]
    assert said == ["out of memory: batches are decoded in 2 pieces from here on"]
    most = 0
    with pytest.raises(
        EngineError, match=r"an answer of up to \d+ tokens, prompt included, does not fit into memory"
    ):
        asyncio.run(run())


def test_requests_of_different_sampling_are_kept_apart(settings, loaded, renderer):
    async def run() -> list[Answer]:
        teacher = open_teacher(settings)
        try:
            return await asyncio.gather(
                *(
                    teacher.answer(
                        Request([], PROMPTS[1], temperature=temperature, seed=4, max_new_tokens=length)
                    )
                    for temperature in (0.0, 1.0)
                    for length in (3, 6)
                )
            )
        finally:
            await teacher.close()

    greedy_short, greedy, sampled_short, sampled = (
        one.response_token_ids or [] for one in asyncio.run(run())
    )
    assert (len(greedy_short), len(sampled_short)) == (3, 3)
    assert greedy[:3] == greedy_short
    assert sampled[:3] == sampled_short
    assert greedy != sampled


def test_a_prompt_past_the_context_fails_alone(settings):
    async def run() -> list[Any]:
        teacher = open_teacher(settings)
        try:
            requests = [
                Request([], ids, temperature=0.0, max_new_tokens=2) for ids in (PROMPTS[0], [5] * 600)
            ]
            return await asyncio.gather(*map(teacher.answer, requests), return_exceptions=True)
        finally:
            await teacher.close()

    answer, failure = asyncio.run(run())
    assert isinstance(answer, Answer)
    assert isinstance(failure, RequestError)
    assert failure.blames_row
    assert "600 tokens, but the context holds 512" in str(failure)


def test_a_batch_that_breaks_ends_the_work_for_all_of_it(settings, monkeypatch):
    def out_of_memory(self: Any, requests: Any) -> Any:
        raise RuntimeError("not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(TransformersTeacher, "_decode", out_of_memory)

    async def run() -> list[Any]:
        teacher = open_teacher(settings)
        try:
            requests = [Request([], ids) for ids in PROMPTS]
            return await asyncio.gather(*map(teacher.answer, requests), return_exceptions=True)
        finally:
            await teacher.close()

    for failure in asyncio.run(run()):
        assert isinstance(failure, EngineError)
        assert not isinstance(failure, RequestError)
        assert "not enough memory" in str(failure)


def test_closing_gives_up_what_is_under_way(settings):
    async def run() -> float:
        teacher = open_teacher(settings)
        waiting = asyncio.create_task(
            teacher.answer(Request([], PROMPTS[0], max_new_tokens=400, temperature=0.0))
        )
        await asyncio.sleep(0.05)  # long enough for its batch to begin
        waiting.cancel()
        await teacher.close()
        return len(asyncio.all_tasks())

    assert asyncio.run(run()) == 1
