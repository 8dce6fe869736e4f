"""Step-by-step distillation: a trace as two tasks, its label and its rationale, for an encoder-decoder.

Hsieh et al. 2023: the same question is asked twice, with a prefix that says what is wanted, and the loss is
share * L_label + (1 - share) * L_rationale, each the mean over the tokens of its task.
"""

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.core.errors import DataError, TrainingError
from potstill.core.records import Record
from potstill.data.chat import Renderer, fit, split_reasoning
from potstill.models import decoder_start_token
from potstill.train.rows import Rows, TrainingData

__all__ = ["ask_for_labels", "rows_of_tasks"]

_LABEL, _RATIONALE = "[label] ", "[rationale] "


def ask_for_labels(tokenizer: Any) -> None:
    """Make the chat template ask for the label, as the student then is asked wherever it serves.

    Raises TrainingError for the tokenizer of a decoder-only model.
    """
    if decoder_start_token(tokenizer) is None:
        raise TrainingError(
            "label_weight makes two tasks of a trace, which is a way to train encoder-decoders",
            expected="a student of the T5 family",
            mend="leave label_weight out: a decoder-only student learns reasoning and answer as one response",
        )
    tokenizer.chat_template = _LABEL + str(tokenizer.chat_template).removeprefix(_LABEL)


def rows_of_tasks(
    records: Iterable[Record],
    renderer: Renderer,
    max_length: int,
    label_weight: float,
    folder: Path | None = None,
) -> TrainingData:
    """Two rows a trace, one behind the other: its answer behind the label's prefix, its reasoning.

    The renderer is that of labels. A trace without reasoning or without an answer, or whose prompt fills
    `max_length`, is left out whole.
    """
    shares = label_weight, 1 - label_weight
    rows = TrainingData(Rows(shares, folder), Rows(shares, folder))
    asks_for_rationale = copy.deepcopy(renderer.tokenizer)
    template = str(asks_for_rationale.chat_template).removeprefix(_LABEL)
    asks_for_rationale.chat_template = _RATIONALE + template
    renderers = renderer, Renderer(asks_for_rationale)
    for number, record in enumerate(records, start=1):
        reasoning, answer = record.reasoning, record.answer
        if reasoning is None:
            reasoning, answer = split_reasoning(record.response or "")
        if not (reasoning or "").strip() or not (answer or "").strip() or record.finish_reason == "length":
            rows.left_out.append(
                DataError(
                    "label_weight needs reasoning and an answer, and the trace has not both",
                    where=f"row {number} (record {record.id})",
                    expected="a response that thinks in a think block and then answers",
                    mend="name a teacher that reasons, or leave label_weight out",
                )
            )
            continue
        pair = [
            one.render(_said(record, text or ""), row_number=number)
            for one, text in zip(renderers, (answer, reasoning), strict=True)
        ]
        try:
            for one in pair:
                fit(one, max_length, row_number=number)
        except DataError as error:
            rows.left_out.append(error)
            continue
        for one in pair:
            rows.add(
                one,
                record.id,
                held_out=record.held_out,
                max_length=max_length,
                row_number=number,
                source=number,
            )
    return rows


def _said(record: Record, text: str) -> Record:
    """The record as if this text were all of its response."""
    return replace(
        record,
        response=text.strip(),
        reasoning=None,
        answer=None,
        prompt_token_ids=None,
        response_token_ids=None,
        prefix_characters=0,
        prefix_tokens=0,
    )
