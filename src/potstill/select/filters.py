"""Filters of traces: what each drops, with a reason for the row; in constant memory but for hashes."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.core.settings import Settings
from potstill.core.step import StepContext
from potstill.data.chat import THINK_OPEN, split_reasoning, tag_reasoning
from potstill.data.source_settings import Data
from potstill.verifiers.settings import Verifier

__all__ = ["ContaminationSettings", "Dropped", "FilterSettings", "filter_records"]

_SHOWN_CHARACTERS = 80


class ContaminationSettings(Settings):
    """Settings of the filter against prompts of an evaluation set."""

    data: Data = Field(description="the evaluation set; its prompts count")
    ngram: int = Field(default=13, ge=1, description="so many successive words in common are too many")


class FilterSettings(Settings):
    """Settings of the filters of traces; each is off until it is set."""

    min_tokens: int | None = Field(
        default=None, ge=1, description="tokens a response, where its tokens are known"
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="tokens a response, where its tokens are known"
    )
    min_characters: int | None = Field(default=None, ge=1, description="characters a response")
    max_characters: int | None = Field(default=None, ge=1, description="characters a response")
    finished: bool = Field(default=False, description="drop responses cut off at the token limit")
    reasoning: Literal["present", "well_formed"] | None = Field(
        default=None,
        description="drop responses without a think block; well_formed: or not one block, then an answer",
    )
    answer: bool = Field(default=False, description="drop responses with nothing behind the think block")
    max_repetition: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="drop responses that repeat a greater share of their n-grams, in all or at their end",
    )
    repetition_ngram: int = Field(default=8, ge=1, description="words and marks of such an n-gram")
    languages: list[str] = Field(
        default=[], description="drop responses in other languages than these (ISO 639-1: en, ru)"
    )
    other_languages: list[str] = Field(
        default=[], description="what responses may be in instead; without any, all that the detector knows"
    )
    verified: bool | Verifier = Field(
        default=False,
        description="drop responses that are not right by the task's verifier, or by the one given here",
    )
    contamination: ContaminationSettings | None = Field(
        default=None, description="drop rows whose prompt stands in an evaluation set"
    )
    exact_duplicates: bool = Field(
        default=False, description="drop rows with an earlier row's prompt and response, white space apart"
    )
    near_duplicates: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="drop rows whose prompt and response have this Jaccard similarity to an earlier row's",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for unit in ("tokens", "characters"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{unit} ({least:,}) is above max_{unit} ({most:,}): no row could stay")
        if self.other_languages and not self.languages:
            raise ValueError("other_languages has a meaning only with languages, which says what to keep")
        if both := sorted({*self.languages} & {*self.other_languages}):
            raise ValueError(f"{', '.join(both)} cannot be among both languages and other_languages")
        return self

    def content(self) -> Any:
        """Versions of the libraries whose results decide, once the languages are known to be detectable."""
        versions = {}
        if self.languages:
            from potstill.select.language import check_languages

            check_languages([*self.languages, *self.other_languages])
            versions["py3langid"] = metadata.version("py3langid")
        if self.near_duplicates is not None:
            versions["rensa"] = metadata.version("rensa")
        return versions or None


class Dropped(NamedTuple):
    """Which filter drops a row, and why, in words."""

    filter: str
    reason: str


_Check = Callable[[Record], str | None]


def filter_records(
    records: Iterable[Record], settings: FilterSettings, context: StepContext
) -> Iterator[tuple[Record, Dropped | None]]:
    """Every record in order, with the first filter that drops it and its reason, or None when it stays.

    Cheap filters come first, those for duplicates last, so that a dropped row never makes another one a
    duplicate. Streams: what is kept in memory are hashes for duplicates and of the evaluation set. At the end
    it says and records as an event how many rows each filter dropped. Raises RecipeError for unknown
    languages, DataError for a row without a response where a filter reads it, for an evaluation set that
    cannot be read, and when `verified` or a number of tokens is asked for and no row could be judged by it.
    """
    checks = _checks(settings, context)
    return _filtered(records, checks, context) if checks else ((record, None) for record in records)


def _filtered(
    records: Iterable[Record], checks: list[tuple[str, _Check]], context: StepContext
) -> Iterator[tuple[Record, Dropped | None]]:
    rows = 0
    reached, dropped, unjudged = Counter[str](), Counter[str](), Counter[str]()
    examples: dict[str, str] = {}
    for record in records:
        context.check_stop()
        rows += 1
        verdict: Dropped | None = None
        for name, check in checks:
            reached[name] += 1
            try:
                reason = check(record)
            except _UnjudgedError as error:
                unjudged[name] += 1
                examples.setdefault(name, f"record {record.id}: {error}")
                reason = str(error) if error.drops else None
            if reason is not None:
                verdict = Dropped(name, reason)
                dropped[name] += 1
                break
        yield record, verdict
    for name, count in unjudged.items():
        if count == reached[name]:
            raise DataError(
                f"none of {count:,} rows could be judged",
                where=f"filter {name}",
                expected="rows that the filter can judge",
                mend=f"leave the filter out; the first is {examples[name]}",
            )
        context.say(f"{name}: {count:,} rows could not be judged, the first is {examples[name]}")
    parts = ", ".join(f"{name} {dropped[name]:,}" for name, _ in checks)
    context.say(f"filters dropped {dropped.total():,} of {rows:,} rows: {parts}")
    context.event("filters", rows=rows, dropped={name: dropped[name] for name, _ in checks})


class _UnjudgedError(Exception):
    """A filter lacks what it would judge a row by; `drops` says whether the row goes for that reason."""

    def __init__(self, reason: str, *, drops: bool = False) -> None:
        super().__init__(reason)
        self.drops = drops


def _checks(settings: FilterSettings, context: StepContext) -> list[tuple[str, _Check]]:
    """The filters that are set, by their keys, in the order of their cost."""
    makers: dict[str, Callable[[Any], _Check]] = {
        "finished": lambda _: _finished,
        "min_tokens": lambda least: _length(_tokens, "tokens", least, sys.maxsize),
        "max_tokens": lambda most: _length(_tokens, "tokens", 0, most),
        "min_characters": lambda least: _length(_characters, "characters", least, sys.maxsize),
        "max_characters": lambda most: _length(_characters, "characters", 0, most),
        "reasoning": lambda wanted: _well_formed if wanted == "well_formed" else _reasoned,
        "answer": lambda _: _answered,
        "max_repetition": lambda most: _repetition(most, settings.repetition_ngram),
        "languages": lambda wanted: _languages(wanted, settings.other_languages),
        "contamination": lambda evaluation: _contamination(evaluation, context),
        "verified": lambda verifier: _verified if verifier is True else _verified_by(verifier),
        "exact_duplicates": lambda _: _exact_duplicates(),
        "near_duplicates": lambda least: _near_duplicates(least, context.derive_seed("near_duplicates")),
    }
    return [(name, make(setting)) for name, make in makers.items() if (setting := getattr(settings, name))]


def _response(record: Record) -> str:
    if record.response is None:
        raise DataError(
            "a prompt without a response cannot be filtered by its response",
            where=f"record {record.id}",
            expected="traces: rows with a response",
            mend="generate responses first",
        )
    return record.response


def _parts(record: Record) -> tuple[str, str]:
    """The reasoning and the answer of a response, as its maker parted them where known."""
    if record.answer is not None:
        return record.reasoning or "", record.answer
    reasoning, answer = split_reasoning(_response(record))
    return reasoning or "", answer


def _opened(record: Record) -> str:
    """The response with its think block opened, also where the chat template has opened it."""
    text = tag_reasoning(_response(record))
    return f"{THINK_OPEN}{text}" if _parts(record)[0] and THINK_OPEN not in text else text


def _tokens(record: Record) -> int:
    known = record.response_token_ids if record.response_token_ids is not None else record.logprobs
    if known is None:
        raise _UnjudgedError("the number of its tokens is not known")
    return len(known)


def _characters(record: Record) -> int:
    return len(_response(record))


def _length(size: Callable[[Record], int], unit: str, least: int, most: int) -> _Check:
    def check(record: Record) -> str | None:
        found = size(record)
        if found < least:
            return f"{found:,} {unit}, fewer than {least:,}"
        return f"{found:,} {unit}, more than {most:,}" if found > most else None

    return check


def _finished(record: Record) -> str | None:
    cut_off = record.finish_reason == "length"
    return "cut off at the token limit (finish_reason: length)" if cut_off else None


def _reasoned(record: Record) -> str | None:
    return None if _parts(record)[0].strip() else "no think block, or an empty one"


def _well_formed(record: Record) -> str | None:
    from potstill.verifiers import is_well_formed

    if is_well_formed(_opened(record)):
        return None
    return _reasoned(record) or _answered(record) or "not one think block at the beginning, then an answer"


def _answered(record: Record) -> str | None:
    return None if _parts(record)[1].strip() else "no answer behind the think block"


def _repetition(most: float, ngram: int) -> _Check:
    from potstill.select.repetition import repeated_share

    def check(record: Record) -> str | None:
        if (share := repeated_share(_response(record), ngram)) <= most:
            return None
        return f"{share:.0%} of its {ngram}-grams, in all or at its end, repeat others; {most:.0%} may"

    return check


def _languages(wanted: list[str], others: list[str]) -> _Check:
    from potstill.select.language import LanguageDetector

    detector = LanguageDetector(wanted, others)

    def check(record: Record) -> str | None:
        _response(record)
        for part, text in zip(("reasoning", "answer"), _parts(record), strict=True):
            if (foreign := detector.foreign(text)) is not None:
                language, confidence = foreign
                expected = " or ".join(wanted)
                return f"the {part} is in {language!r} (confidence {confidence:.2f}), not in {expected}"
        return None

    return check


def _contamination(settings: ContaminationSettings, context: StepContext) -> _Check:
    from potstill.data.sources import read
    from potstill.select.contamination import EvaluationText

    evaluation = EvaluationText(read(settings.data, context), settings.ngram)

    def check(record: Record) -> str | None:
        if (found := evaluation.shared(record)) is None:
            return None
        row, text = found
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
        return f"shares text with the evaluation set's record {row}: {shown!r}"

    return check


def _verified(record: Record) -> str | None:
    from potstill.data.tasks import TASK_PREFIX
    from potstill.verifiers import verify

    correct = record.verdicts.get("correct")
    if correct is None:
        if record.task is None:
            raise _UnjudgedError("it has no task, so nothing can verify its answer", drops=True)
        if record.reference is None and not record.task.startswith(TASK_PREFIX):
            raise _UnjudgedError("it has no gold answer to compare with", drops=True)
        correct = verify(record, _opened(record))["correct"]
    return None if correct else f"the answer is not right by the verifier of {record.task!r}"


def _verified_by(verifier: Verifier) -> _Check:
    from potstill.verifiers import judge

    def check(record: Record) -> str | None:
        found = judge(record, _opened(record), verifier)
        if found.verdicts["correct"]:
            return None
        return found.note or "the answer is not right by the filter's verifier"

    return check


def _exact_duplicates() -> _Check:
    from potstill.select.duplicates import ExactDuplicates

    duplicates = ExactDuplicates()

    def check(record: Record) -> str | None:
        _response(record)
        earlier = duplicates.earlier(record)
        return None if earlier is None else f"the same prompt and response as record {earlier}"

    return check


def _near_duplicates(threshold: float, seed: int) -> _Check:
    from potstill.select.duplicates import NearDuplicates

    duplicates = NearDuplicates(threshold, seed)

    def check(record: Record) -> str | None:
        _response(record)
        if (found := duplicates.earlier(record)) is None:
            return None
        earlier, jaccard = found
        return f"near duplicate of record {earlier}, Jaccard {jaccard:.2f}"

    return check
