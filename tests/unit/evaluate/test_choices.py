import copy
import dataclasses
import math
from typing import Any

import pytest
import torch

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.chat import Renderer
from potstill.data.shapes import parse_row
from potstill.evaluate.choices import check_choices, score_choices
from potstill.models import LoadedModel, TransformersModel, load

ROWS = [
    {"question": "How many apples are left?", "choices": ["two", "eleven of them"], "answer": 0},
    {"question": "What is 12 + 7?", "choices": ["19", "1", "the", "30 and 11"], "answer": "A"},
    {
        "question": "Which is a word?",
        "choices": ["of", "and and and the answer"],
        "answer": "and and and the answer",
    },
]


@pytest.fixture
def model(shared_model_folder: Any) -> LoadedModel:
    return load(TransformersModel(path=str(shared_model_folder), device="cpu", dtype="float32"))


@pytest.fixture
def records() -> list[Record]:
    found = [parse_row(row, "multiple_choice") for row in ROWS]
    return [
        Record(f"p{n}", one.messages, reference=one.reference, task=one.task, meta=one.meta)
        for n, one in enumerate(found)
    ]


def _score(model: LoadedModel, records: list[Record], **options: Any) -> Any:
    given = {"by": "text", "normalise": "none", "max_tokens": 200, **options}
    return score_choices(model, Renderer(model.tokenizer), records, **given)


def _naive(model: LoadedModel, prompt: str, before: str, text: str) -> tuple[float, int]:
    """The summed log-probability of a text behind a prompt, token by token in float64, and its tokens."""
    tokenizer = model.tokenizer
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(rendered + before + text, add_special_tokens=False)["input_ids"]
    known = tokenizer(rendered + before, add_special_tokens=False)["input_ids"]
    start = next((n for n, (a, b) in enumerate(zip(ids, known, strict=False)) if a != b), len(known))
    total = 0.0
    for end in range(start, len(ids)):
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids[:end]]), use_cache=False).logits[0, -1]
        total += float(logits[: model.vocabulary_size].double().log_softmax(-1)[ids[end]])
    return total, len(ids) - start


def test_an_options_score_is_the_log_probability_of_its_text_behind_the_question(
    model: LoadedModel, records: list[Record]
) -> None:
    for row, given in zip(_score(model, records), ROWS, strict=True):
        expected = [_naive(model, given["question"], "", text)[0] for text in given["choices"]]
        assert row.choice_logprobs == pytest.approx(expected, abs=1e-4)


def test_a_letters_score_is_its_log_probability_behind_the_list_of_options_and_answer(
    model: LoadedModel, records: list[Record]
) -> None:
    rows = _score(model, records, by="letter", normalise="byte")
    for row, record in zip(rows, records, strict=True):
        asked = record.messages[-1]["content"]
        expected = [
            _naive(model, asked, "Answer: ", letter)[0] for letter in "ABCD"[: len(record.meta["choices"])]
        ]
        assert row.choice_logprobs == pytest.approx(expected, abs=1e-4)
        best = expected.index(max(expected))
        assert row.response == f"{'ABCD'[best]}. {record.meta['choices'][best]}"
        assert row.verdicts == {"correct": "ABCD"[best] == record.reference}


@pytest.mark.parametrize("normalise", ["none", "token", "byte"])
def test_texts_are_compared_by_their_whole_probability_or_by_that_a_token_or_byte(
    model: LoadedModel, records: list[Record], normalise: Any
) -> None:
    for row, given in zip(_score(model, records, normalise=normalise), ROWS, strict=True):
        scores = []
        for text in given["choices"]:
            logprob, tokens = _naive(model, given["question"], "", text)
            scores.append(logprob / {"none": 1, "token": tokens, "byte": len(text.encode())}[normalise])
        best = scores.index(max(scores))
        assert row.response.endswith(given["choices"][best])
        right = given["choices"].index(given["answer"]) if given["answer"] in given["choices"] else 0
        total = sum(map(math.exp, scores))
        assert row.scores["reference_probability"] == pytest.approx(math.exp(scores[right]) / total, abs=1e-4)


def test_a_russian_prompt_is_scored_behind_its_own_form_of_the_answer(model: LoadedModel) -> None:
    example = parse_row(
        {"question": "Что длиннее?", "choices": ["Волга", "Дон"], "answer": 0}, "multiple_choice"
    )
    record = Record("p", example.messages, reference="A", task="choice", meta=example.meta)
    asked = example.messages[0]["content"]
    [letters] = _score(model, [record], by="letter")
    for letter, found in zip("AB", letters.choice_logprobs, strict=True):
        assert found == pytest.approx(_naive(model, asked, "Ответ: ", letter)[0], abs=1e-3)
    [texts] = _score(model, [record], by="text")
    for text, found in zip(("Волга", "Дон"), texts.choice_logprobs, strict=True):
        assert found == pytest.approx(_naive(model, "Что длиннее?", "", text)[0], abs=1e-3)


def test_normalisation_decides_which_option_is_taken(model: LoadedModel, records: list[Record]) -> None:
    whole, each = (_score(model, records, normalise=one) for one in ("none", "byte"))
    assert [row.choice_logprobs for row in whole] == [row.choice_logprobs for row in each]
    assert [row.response for row in whole] != [row.response for row in each]


def test_batches_change_nothing(model: LoadedModel, records: list[Record]) -> None:
    together, alone = _score(model, records, max_tokens=5000), _score(model, records, max_tokens=1)
    for one, other in zip(together, alone, strict=True):
        assert one.choice_logprobs == pytest.approx(other.choice_logprobs, abs=1e-5)
        assert one.verdicts == other.verdicts


def test_a_prompt_made_by_a_template_is_asked_as_it_is(model: LoadedModel, records: list[Record]) -> None:
    records[0].messages[-1]["content"] = "Say two or eleven."
    expected = [_naive(model, "Say two or eleven.", "", text)[0] for text in ROWS[0]["choices"]]
    assert _score(model, records[:1])[0].choice_logprobs == pytest.approx(expected, abs=1e-4)


def test_options_that_stand_within_a_prompt_are_left_out_of_it(
    model: LoadedModel, records: list[Record]
) -> None:
    around = [
        dataclasses.replace(
            one,
            messages=[{"role": "user", "content": f"the is 1\n\n{one.messages[-1]['content']}\n\nthe end"}],
        )
        for one in records
    ]
    for row, given in zip(_score(model, around), ROWS, strict=True):
        asked = f"the is 1\n\n{given['question']}\n\nthe end"
        expected = [_naive(model, asked, "", text)[0] for text in given["choices"]]
        assert row.choice_logprobs == pytest.approx(expected, abs=1e-4)


def test_a_think_block_that_the_template_opens_is_closed_before_an_option(
    model: LoadedModel, records: list[Record]
) -> None:
    template = str(model.tokenizer.chat_template)
    opened = template.replace("assistant\\n", "assistant\\n<think>\\n").replace(
        "assistant\n'", "assistant\n<think>\n'"
    )
    assert opened != template

    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = opened
    thinking = dataclasses.replace(model, tokenizer=tokenizer)
    row = _score(thinking, records[:1])[0]
    expected = [
        _naive(thinking, ROWS[0]["question"], "\n</think>\n\n", text)[0] for text in ROWS[0]["choices"]
    ]
    assert row.choice_logprobs == pytest.approx(expected, abs=1e-4)


def test_a_row_longer_than_the_context_is_named(model: LoadedModel, records: list[Record]) -> None:
    records[1].messages[-1]["content"] = "word " * 600
    with pytest.raises(DataError, match="row 2"):
        _score(model, records)


def test_rows_without_options_are_refused_with_their_place() -> None:
    record = Record("p", [{"role": "user", "content": "What is 1 + 1?"}], reference="2", task="math")
    with pytest.raises(DataError, match="no options to choose from") as caught:
        check_choices([record], where="step exam, tasks.sums")
    assert "tasks.sums, prompt 1" in str(caught.value)
