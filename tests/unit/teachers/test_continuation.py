"""Where a response is cut so that a teacher can go on from it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from potstill.core.errors import DataError, EngineError
from potstill.core.records import Record
from potstill.data.chat import Renderer, split_reasoning
from potstill.models import TransformersModel
from potstill.teachers import LlamaCppModel, OpenAIModel, SolverModel
from potstill.teachers.continuation import ContinueSettings, beginnings, check_continues, cut_response

QUESTION = [{"role": "user", "content": "What is 12 + 7?"}]
TEXT = "First 12 + 7 = 19, then 19 - 30 = -11. The answer is -11, et voilà: naïve 東京."


def rollout(response: str = TEXT, **fields: Any) -> Record:
    reasoning, answer = split_reasoning(response)
    found = Record("p", QUESTION, response=response, reasoning=reasoning, answer=answer, model="student")
    return replace(found, finish_reason="length", **fields)


@pytest.fixture
def renderer(tiny_tokenizer: Any) -> Renderer:
    return Renderer(tiny_tokenizer)


@pytest.fixture
def with_ids(renderer: Renderer) -> Callable[..., Record]:
    """A rollout whose ids are the renderer's own."""

    def build(response: str = TEXT, **fields: Any) -> Record:
        ids = renderer.tokenizer(response, add_special_tokens=False)["input_ids"]
        return rollout(
            response,
            prompt_token_ids=renderer.prompt_ids(QUESTION),
            response_token_ids=ids,
            tokenizer=renderer.tokenizer_hash,
            sampling={"template": renderer.template_hash},
            **fields,
        )

    return build


@pytest.mark.parametrize("share", [0.0, 0.31, 0.5, 0.74, 0.86, 0.93, 1.0])
def test_own_ids_are_cut_as_they_are_and_never_inside_a_character(
    renderer: Renderer, with_ids: Callable[..., Record], share: float
) -> None:
    whole = with_ids()
    found = cut_response(whole, share, renderer)
    if share == 0:
        assert found is None
        return
    assert found is not None
    kept = found.response_token_ids or []
    assert kept == (whole.response_token_ids or [])[: len(kept)]
    assert TEXT.startswith(found.response or "-")
    assert round(share * len(whole.response_token_ids or [])) - 3 <= len(kept)
    assert renderer.tokenizer.decode(kept) == found.response
    assert renderer.render(found).ids == [*renderer.prompt_ids(QUESTION), *kept]
    assert (found.logprobs, found.finish_reason) == (None, "length")


def test_a_character_of_several_tokens_is_dropped_whole(
    renderer: Renderer, with_ids: Callable[..., Record]
) -> None:
    whole = with_ids("so 東")
    ids = whole.response_token_ids or []
    assert len(renderer.tokenizer("東", add_special_tokens=False)["input_ids"]) == 3
    for missing in (1, 2):
        found = cut_response(whole, 1 - missing / len(ids), renderer)
        assert found is not None
        assert found.response == "so "
    # A rollout that itself ended inside the character.
    found = cut_response(
        replace(whole, response="so \N{REPLACEMENT CHARACTER}", response_token_ids=ids[:-1]), 1, renderer
    )
    assert found is not None
    assert found.response == "so "


@pytest.mark.parametrize(
    "foreign",
    [{"tokenizer": "another"}, {"sampling": {"template": "another"}}, {"response_token_ids": None}],
    ids=["tokenizer", "template", "no ids"],
)
def test_other_ids_are_left_aside_and_the_text_is_cut_between_words(
    renderer: Renderer, with_ids: Callable[..., Record], foreign: dict[str, Any]
) -> None:
    found = cut_response(replace(with_ids(), **foreign), 0.5, renderer)
    assert found is not None
    assert (found.response_token_ids, found.tokenizer) == (None, None)
    kept = found.response or ""
    assert TEXT.startswith(kept)
    assert TEXT[len(kept)] == " "
    assert len(TEXT) // 2 <= len(kept) < len(TEXT) / 2 + 10


@given(share=st.floats(0, 1), text=st.text(min_size=1, max_size=60), finished=st.booleans())
def test_what_stays_of_a_text_is_its_beginning_and_no_blank(share: float, text: str, finished: bool) -> None:
    record = replace(rollout(text), reasoning=None, finish_reason="stop" if finished else "length")
    found = cut_response(record, share, None)
    if found is not None:
        assert text.startswith(found.response or "")
        assert (found.response or "").strip()
        assert not (finished and found.response == text)


@pytest.mark.parametrize(
    "text", ["<think>\nseven and twelve\n</think>\n\n19", "<think>seven</think>nineteen"]
)
@pytest.mark.parametrize("share", [at / 40 for at in range(1, 41)])
def test_a_think_tag_is_never_cut_in_two(text: str, share: float) -> None:
    found = cut_response(rollout(text), share, None)
    assert found is not None
    kept = found.response or ""
    tail = kept.rpartition("<")[2] if "<" in kept else "think>"
    assert ">" in tail, kept


def test_a_block_that_the_students_template_opened_is_opened_in_the_text() -> None:
    record = replace(rollout("seven and twelve make"), reasoning="seven and twelve make", answer="")
    found = cut_response(record, 0.6, None)
    assert found is not None
    assert (found.response or "").startswith("<think>\nseven")


def test_a_block_that_the_teachers_template_opens_is_not_opened_twice(tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    renderer = Renderer(tokenizer)
    found = cut_response(rollout("<think>\nseven and twelve make nineteen"), 0.7, renderer)
    assert found is not None
    assert "<think>" not in (found.response or "<think>")
    assert renderer.tokenizer.decode(renderer.render(found).ids).count("<think>") == 1


def test_the_place_is_drawn_by_the_record_and_the_seed() -> None:
    settings = ContinueSettings(only="all")
    records = [rollout(TEXT, id=f"r{number}") for number in range(40)]

    def cuts(seed: int, order: int = 1) -> dict[int, str | None]:
        found = beginnings(records[::order], settings, None, seed)
        return {len(one.response or ""): one.response for one in found}

    assert cuts(1) == cuts(1)
    assert cuts(1) == cuts(1, order=-1)
    assert cuts(1) != cuts(2)
    assert len(cuts(1)) > 5
    assert min(cuts(1)) >= len(TEXT) / 2


def test_only_what_is_unfinished_is_continued_unless_all_is_asked_for() -> None:
    records = [rollout(), replace(rollout(), finish_reason="stop"), replace(rollout(), finish_reason=None)]
    assert len([*beginnings(records, ContinueSettings(), None, 1)]) == 1
    found = [*beginnings(records, ContinueSettings(only="all", cut=[1.0, 1.0]), None, 1)]
    assert len(found) == 3
    assert [one.response == TEXT for one in found] == [True, False, False]


def test_plain_text_cannot_be_continued() -> None:
    with pytest.raises(DataError, match="plain text has no response"):
        cut_response(replace(rollout(), messages=[]), 0.5, None)


@pytest.mark.parametrize("cut", [[0.5], [0.9, 0.1], [-0.1, 1.0], [0.5, 1.1], [0.0, 0.0]])
def test_shares_that_mean_nothing_are_refused(cut: list[float]) -> None:
    with pytest.raises(ValidationError, match="cut"):
        ContinueSettings(cut=cut)


def test_engines_that_cannot_go_on_are_refused_by_name() -> None:
    server = OpenAIModel(engine="openai", base_url="http://127.0.0.1:9/v1", model="big")
    with pytest.raises(EngineError, match="begin a new one instead"):
        check_continues(server, "model big")
    with pytest.raises(EngineError, match="continues none"):
        check_continues(SolverModel(engine="solver", function="m:f"), "model solver")
    check_continues(server.model_copy(update={"continue_final_message": True}), "model big")
    check_continues(LlamaCppModel(engine="llama_cpp", model="smollm2-135m-instruct"), "model small")
    check_continues(TransformersModel(path="smollm2-135m-instruct"), "model small")
