"""A model's answers to prompts, decoded in batches and judged."""

import json
import time
from collections.abc import Mapping, Sequence

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.core.step import StepContext
from potstill.data.chat import THINK_OPEN, Renderer, split_reasoning
from potstill.evaluate.rouge import rouge
from potstill.evaluate.rows import AnswerRow
from potstill.evaluate.settings import EvaluateSettings
from potstill.models import LoadedModel
from potstill.teachers.protocol import Answer
from potstill.teachers.transformers import generate_batch
from potstill.verifiers import verify

__all__ = ["answer_prompts"]


def answer_prompts(
    model: LoadedModel,
    renderer: Renderer,
    records: Sequence[Record],
    references: Mapping[str, Sequence[str]],
    *,
    settings: EvaluateSettings,
    context: StepContext,
    description: str,
) -> tuple[list[AnswerRow], float]:
    """One answer a prompt with its verdicts, in the prompts' order, and the seconds that decoding took.

    `references` are texts by prompt id that answers are compared with by ROUGE, reasoning left aside.
    Prompts of like length are decoded together. Sampling draws by seeds made from the prompt's id, the same
    for every model. Raises DataError for a prompt that does not fit the model's context.
    """
    prompts_ids = [renderer.prompt_ids(record.messages) for record in records]
    order = sorted(range(len(records)), key=lambda number: len(prompts_ids[number]), reverse=True)
    found: dict[int, Answer] = {}
    seconds = 0.0
    with context.progress(description, total=len(records), unit="prompts") as progress:
        for start in range(0, len(order), settings.batch):
            batch = order[start : start + settings.batch]
            started = time.monotonic()
            answers = generate_batch(
                model,
                renderer,
                [prompts_ids[number] for number in batch],
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seeds=[context.derive_seed("answer", records[number].prompt_id) for number in batch],
                stop=context.stop,
            )
            seconds += time.monotonic() - started
            context.check_stop()
            found.update(zip(batch, answers, strict=True))
            progress.advance(len(batch))
    rows = [
        _row(
            record, renderer, prompts_ids[number], found[number], number, references.get(record.prompt_id, ())
        )
        for number, record in enumerate(records)
    ]
    return rows, seconds


def _row(
    record: Record,
    renderer: Renderer,
    prompt_ids: list[int],
    answer: Answer,
    number: int,
    references: Sequence[str],
) -> AnswerRow:
    opened = THINK_OPEN if renderer.opens_reasoning(record.messages) else ""
    try:
        verdicts = verify(record, opened + answer.response)
    except DataError as error:
        raise DataError(
            error.what, where=f"prompt {number + 1}, {error.where}", expected=error.expected
        ) from error
    return AnswerRow(
        record_id=record.id,
        prompt_id=record.prompt_id,
        prompt=json.dumps(record.messages, ensure_ascii=False),
        response=answer.response,
        finish_reason=answer.finish_reason,
        prompt_tokens=len(prompt_ids),
        response_tokens=answer.response_tokens or 0,
        verdicts=verdicts,
        scores=rouge(split_reasoning(opened + answer.response)[1], references) if references else {},
    )
