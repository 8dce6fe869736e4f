"""Multiple choice by likelihood: the option whose letter or text a model finds likeliest."""

import json
import math
import string
from collections.abc import Callable, Sequence
from typing import Literal

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.batches import micro_batches
from potstill.data.chat import THINK_CLOSE, Rendered, Renderer, check_prompt_length
from potstill.data.multiple_choice import answer_announcement, choice_listing, is_russian
from potstill.evaluate.rows import SCORED, AnswerRow
from potstill.models import LoadedModel
from potstill.scoring import token_logprobs
from potstill.teachers.transformers import context_tokens

__all__ = ["check_choices", "score_choices"]

Normalise = Literal["none", "token", "byte"]


def check_choices(records: Sequence[Record], *, where: str) -> None:
    """Raise DataError unless every row has options and says which is right."""
    for number, record in enumerate(records, start=1):
        options = record.meta.get("choices") or []
        if record.task != "choice" or record.reference not in [*string.ascii_uppercase[: len(options)]]:
            raise DataError(
                "a row has no options to choose from",
                where=f"{where}, prompt {number}",
                expected="multiple choice: question, choices and answer",
                mend="leave `choose_by` out where answers are written",
            )


def score_choices(
    model: LoadedModel,
    renderer: Renderer,
    records: Sequence[Record],
    *,
    by: Literal["letter", "text"],
    normalise: Normalise,
    max_tokens: int,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[AnswerRow]:
    """The likeliest option of each row, with its verdict and the probability of the right one.

    By letter, each option's letter is scored behind the row's prompt and "Answer: " (in Russian "Ответ: ");
    by text, each option's text behind the question without its list of options. Log-probabilities are summed
    over the option's own tokens, the end of the turn left out. `normalise` divides those of texts by their
    tokens or bytes. A think block that the chat template opens is closed first, empty. Of equal options the
    first is taken. Raises DataError for a row that does not fit the model's context.
    """
    options = [[str(choice) for choice in record.meta["choices"]] for record in records]
    rows: list[Rendered] = []
    limit = context_tokens(model)
    for number, (record, texts) in enumerate(zip(records, options, strict=True), start=1):
        for place in range(len(texts)):
            rendered = renderer.render(_option(record, texts, place, by, renderer), mask_prefix=True)
            if limit is not None:
                check_prompt_length(len(rendered.ids) - 1, limit, row_number=number)
            rows.append(rendered)
    logprobs = [0.0] * len(rows)
    for batch in micro_batches([len(row.ids) for row in rows], range(len(rows)), max_tokens):
        for number, values in zip(batch, token_logprobs(model, [rows[one] for one in batch]), strict=True):
            logprobs[number] = float(values.sum())
        on_batch(len(batch))
    found, start = [], 0
    for record, texts in zip(records, options, strict=True):
        end = start + len(texts)
        lengths = [
            _length(text, row, normalise if by == "text" else "none")
            for text, row in zip(texts, rows[start:end], strict=True)
        ]
        prompt_tokens = rows[start].mask.index(1)
        found.append(_answer(record, texts, logprobs[start:end], lengths, prompt_tokens))
        start = end
    return found


def _option(
    record: Record, texts: list[str], place: int, by: Literal["letter", "text"], renderer: Renderer
) -> Record:
    """The row's prompt with one option as its response, cut off before the end of the turn."""
    messages, russian = record.messages, is_russian(record.messages[-1]["content"])
    announcement = answer_announcement(russian=russian)
    text = string.ascii_uppercase[place]
    if by == "text":
        before, _, behind = messages[-1]["content"].rpartition(choice_listing(texts, russian=russian))
        messages = [*messages[:-1], {**messages[-1], "content": before + behind}]
        text, announcement = texts[place], ""
    if renderer.opens_reasoning(messages):
        announcement = f"\n{THINK_CLOSE}\n\n{announcement}"
    return Record(
        prompt_id=record.prompt_id,
        messages=messages,
        response=announcement + text,
        finish_reason="length",
        prefix_characters=len(announcement),
    )


def _length(text: str, row: Rendered, normalise: Normalise) -> int:
    if normalise == "none":
        return 1
    return (
        row.supervised_tokens if normalise == "token" else max(1, len(text.encode("utf-8", "surrogatepass")))
    )


def _answer(
    record: Record, texts: list[str], logprobs: list[float], lengths: list[int], prompt_tokens: int
) -> AnswerRow:
    scores = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
    best = scores.index(max(scores))
    shares = [math.exp(score - scores[best]) for score in scores]
    right = string.ascii_uppercase.index(record.reference or "")
    return AnswerRow(
        record_id=record.id,
        prompt_id=record.prompt_id,
        prompt=json.dumps(record.messages, ensure_ascii=False),
        response=f"{string.ascii_uppercase[best]}. {texts[best]}",
        finish_reason=SCORED,
        prompt_tokens=prompt_tokens,
        response_tokens=0,
        verdicts={"correct": best == right},
        scores={"reference_probability": shares[right] / sum(shares)},
        choice_logprobs=logprobs,
    )
