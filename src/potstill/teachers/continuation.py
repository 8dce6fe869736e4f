"""Mixed policy: another model's response is cut off, and a teacher writes the rest."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from pydantic import Field, field_validator

from potstill.core.errors import DataError, EngineError
from potstill.core.hashing import derive_seed
from potstill.core.records import Record
from potstill.core.settings import Settings
from potstill.data.chat import THINK_OPEN, Renderer
from potstill.data.responses import response_text
from potstill.teachers.openai import OpenAIModel
from potstill.teachers.solver import SolverModel

__all__ = ["ContinueSettings", "beginnings", "check_continues", "cut_response"]

_THINK_TAG = re.compile(r"</?think>")
_BROKEN_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class ContinueSettings(Settings):
    """Cut the responses of `data` off, and let the model write the rest (DASD's mixed policy).

    They are a student's own, made by a generate step whose `max_new_tokens` is about 1.5 times the teacher's
    length, so that what is still unfinished there has gone astray.
    """

    only: Literal["unfinished", "all"] = Field(
        "unfinished", description="responses that ended at their token limit, or all of them"
    )
    cut: list[float] = Field(
        [0.5, 1.0],
        min_length=2,
        max_length=2,
        description="what share of a response stays: drawn between the two, a response at a time",
    )

    @field_validator("cut")
    @classmethod
    def _check_cut(cls, cut: list[float]) -> list[float]:
        if not 0 <= cut[0] <= cut[1] <= 1 or cut[1] == 0:
            raise ValueError("two shares between 0 and 1, the smaller first, such as [0.5, 1.0]")
        return cut


def check_continues(model: Settings, where: str) -> None:
    """Raise EngineError unless a model's engine can go on from the beginning of a response."""
    if isinstance(model, SolverModel):
        raise EngineError("a solver writes whole responses and continues none", where=where)
    if isinstance(model, OpenAIModel) and not model.continue_final_message:
        raise EngineError(
            "the server is not known to continue a response: most begin a new one instead, and say nothing",
            where=where,
            expected="a server that takes `continue_final_message`, such as vLLM or SGLang",
            mend="set `continue_final_message: true` on the model if it does, or run the model in process",
        )


def beginnings(
    records: Iterable[Record], settings: ContinueSettings, renderer: Renderer | None, seed: int
) -> Iterator[Record]:
    """The beginnings of responses that are to be continued, each cut at a place drawn by its record's id."""
    low, high = settings.cut
    for record in records:
        if settings.only == "unfinished" and record.finish_reason != "length":
            continue
        share = low + (high - low) * derive_seed(seed, "cut", record.id) / 2**63
        if (beginning := cut_response(record, share, renderer)) is not None:
            yield beginning


def cut_response(record: Record, share: float, renderer: Renderer | None) -> Record | None:
    """A record's first share, as an unfinished response; None where nothing would stay of it.

    Where `renderer` would use the record's own token ids they are cut, at the end of a character; otherwise
    the text is, ahead of white space and never inside a think tag, with the block opened once for the
    template. A finished response loses at least its end. Raises DataError for a record without messages.
    """
    if not record.messages:
        raise DataError(
            "plain text has no response that a model could continue",
            where=f"record {record.id}",
            expected="traces of a generate step",
        )
    unfinished = record.finish_reason == "length"
    ids = record.response_token_ids
    if renderer is not None and ids and renderer.owns(record):
        return _cut_ids(record, min(round(share * len(ids)), len(ids) - (not unfinished)), renderer)
    text = record.response or ""
    if record.reasoning is not None and THINK_OPEN not in text:
        text = f"{THINK_OPEN}\n{text}"  # the student's template had opened the block
    text = text[: _place(text, min(round(share * len(text)), len(text) - (not unfinished)))].rstrip()
    if renderer is not None:
        with suppress(DataError):  # of a template that refuses the conversation: the request will say so
            text = renderer.opened_once(record.messages, text)
    return _beginning(record, text, None) if text.strip() else None


def _cut_ids(record: Record, kept: int, renderer: Renderer) -> Record | None:
    ids, response = record.response_token_ids or [], record.response or ""
    while kept > 0:
        text = response_text(renderer.tokenizer, record.prompt_token_ids or [], ids[:kept])
        if response.startswith(text) and not text.endswith(_BROKEN_CHARACTER):
            return _beginning(record, text, ids[:kept])
        kept -= 1
    return None


def _place(text: str, at: int) -> int:
    """The nearest place behind `at` where no word and no tag is cut; `at` itself where no space follows."""
    for tag in _THINK_TAG.finditer(text):
        if tag.start() < at < tag.end():
            return tag.end()
    return next((place for place in range(at, len(text)) if text[place].isspace()), at)


def _beginning(record: Record, text: str, ids: list[int] | None) -> Record:
    return replace(
        record,
        id="",
        response=text,
        reasoning=None,
        answer=None,
        finish_reason="length",
        prompt_token_ids=None if ids is None else record.prompt_token_ids,
        response_token_ids=ids,
        tokenizer=None if ids is None else record.tokenizer,
        logprobs=None,
        alternatives=None,
        prefix_characters=0,
        prefix_tokens=0,
        verdicts={},
        scores={},
    )
