"""Answers judged: each with its verdicts, its likeness to given responses, and the form of its reasoning."""

import json
from collections.abc import Callable, Mapping, Sequence

from potstill.core.records import Record
from potstill.data.chat import split_reasoning
from potstill.evaluate.reasoning import read_reasoning
from potstill.evaluate.rouge import rouge
from potstill.evaluate.rows import FAILED, AnswerRow
from potstill.teachers import Answer
from potstill.verifiers import Verifier, judge

__all__ = ["judge_answers"]

_NO_ANSWER = Answer(response="", finish_reason="length")


def judge_answers(
    records: Sequence[Record],
    answers: Sequence[Answer | None],
    *,
    read_response: Callable[[Record, str], str],
    references: Mapping[str, Sequence[str]],
    verifier: Verifier | None = None,
) -> list[AnswerRow]:
    """A row an answer; `answers` are as many a prompt as there are samples, in the prompts' order.

    None is an answer that failed, and counts as empty. `references` are texts by prompt id that answers are
    compared with by ROUGE, reasoning left aside. `read_response` brings a response's reasoning into a
    think block. `verifier` judges in the place of the rows' own.
    """
    samples = len(answers) // len(records)
    return [
        _row(
            record,
            answers[number * samples + sample],
            sample,
            read_response,
            references.get(record.prompt_id, ()),
            verifier,
        )
        for number, record in enumerate(records)
        for sample in range(samples)
    ]


def _row(
    record: Record,
    given: Answer | None,
    sample: int,
    read_response: Callable[[Record, str], str],
    references: Sequence[str],
    verifier: Verifier | None,
) -> AnswerRow:
    answer = given or _NO_ANSWER
    text = read_response(record, answer.response) if given is not None else ""
    reasoning = read_reasoning(text)
    final = split_reasoning(text)[1]
    judged = judge(record, text, verifier)
    return AnswerRow(
        record_id=record.id,
        prompt_id=record.prompt_id,
        prompt=json.dumps(record.messages, ensure_ascii=False),
        response=answer.response,
        finish_reason=FAILED if given is None else answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        response_tokens=0 if given is None else answer.response_tokens,
        verdicts={
            **judged.verdicts,
            "handed_in": answer.finish_reason == "stop" and bool(final.strip()),
            "reasons": reasoning.present,
            "tagged": reasoning.tagged,
        },
        scores={
            **judged.scores,
            "reasoning_quality": reasoning.quality,
            "repetition": reasoning.repetition,
            **(rouge(final, references) if references else {}),
        },
        counts={"reasoning_steps": reasoning.steps, "reasoning_words": reasoning.words},
        sample=sample,
        note=judged.note,
    )
