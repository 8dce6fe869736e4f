"""The generate step: prompts go to a teacher, its answers come back as traces."""

import asyncio
import itertools
import json
import math
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from potstill.core.errors import DataError, EngineError
from potstill.core.events import Progress
from potstill.core.hashing import derive_seed, hash_json
from potstill.core.records import RECORDS_FILE, Record, count_records, read_records, write_records
from potstill.core.settings import ModelRef, Settings, execution
from potstill.core.step import StepContext, StepResult
from potstill.data.chat import THINK_OPEN, split_reasoning
from potstill.data.sources import Data, prompts, read
from potstill.teachers import Answer, Request, RequestError, Teacher, open_teacher
from potstill.teachers.request_store import RequestStore, open_request_store

__all__ = ["FAILURES_FILE", "GenerateSettings", "run"]

FAILURES_FILE = "failures.jsonl"
_PROMPTS_FILE = "prompts.parquet"
_STOP_POLL_S = 0.2
_FAILURES_IN_A_ROW = 20
_REASONS_SHOWN = 3


class GenerateSettings(Settings):
    """Settings of the generate step."""

    kind: ClassVar[str] = "generate"
    schema_version: ClassVar[int] = 1

    do: Literal["generate"] = "generate"
    model: ModelRef = Field(description="who answers")
    data: Data = Field(description="the prompts; responses that they come with are left out")
    samples: int = Field(default=1, ge=1, description="responses a prompt")
    temperature: float = Field(default=1.0, ge=0, description="0 takes the likeliest token")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the likeliest tokens of this share"
    )
    max_new_tokens: int = Field(default=1024, ge=1, description="tokens a response, reasoning included")
    logprobs: int | None = Field(
        default=None, ge=1, description="1 keeps each sampled token's log-probability"
    )
    limit: int | None = Field(default=None, ge=1, description="ask at most this many prompts")
    held_out: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the prompts kept from training, chosen by the prompt's hash",
    )
    max_failed_share: float = Field(default=0.0, ge=0, le=1, description="share of requests that may fail")
    concurrency: int | None = execution(
        None, ge=1, description="requests in flight; the engine knows a good number"
    )


def run(settings: GenerateSettings, context: StepContext) -> StepResult:
    """Ask a teacher every prompt and write its answers as traces.

    An answer is kept in the request store as it arrives and is never asked for again, whatever happens to
    this run or to the recipe around it. Raises EngineError when more than `max_failed_share` of the requests
    failed, when the engine is out of reach or refuses, and when failures do not end; Interrupted when the run
    is to stop.
    """
    model = context.model(settings.model)
    prompts_path = context.scratch / _PROMPTS_FILE
    if not prompts_path.exists():
        write_records(prompts_path, _prompts(settings, context))
    if count_records(prompts_path) == 0:
        raise DataError(
            "no row is a prompt",
            expected="rows with a question or messages",
            mend="make prompts with a `template`",
        )
    return asyncio.run(_generate(settings, context, model, prompts_path))


def _prompts(settings: GenerateSettings, context: StepContext) -> Iterator[Record]:
    for prompt in itertools.islice(prompts(read(settings.data, context)), settings.limit):
        share = derive_seed(context.seed, "held_out", prompt.prompt_id) / 2**63
        prompt.held_out = prompt.held_out or share < settings.held_out
        yield prompt


async def _generate(
    settings: GenerateSettings, context: StepContext, model: Settings, prompts_path: Path
) -> StepResult:
    teacher = open_teacher(model, say=context.say)
    try:
        if (settings.logprobs or 0) > (offered := teacher.capabilities.logprobs):
            raise EngineError(
                f"the engine gives {offered} log-probabilities a token, not {settings.logprobs}",
                where=f"model {settings.model}",
                expected="1 (the sampled token's)" if offered else "none",
                mend="set `logprobs: 1`" if offered else "leave `logprobs` out",
            )
        known_as = [getattr(model, "engine", None), teacher.identity]
        with open_request_store(context.cache_folder, known_as) as store:
            plan = _Plan(settings, context, teacher, prompts_path)
            asking = _Asking(plan, context, store)
            try:
                await asking.ask(settings.concurrency or teacher.concurrency)
            finally:
                asking.close()
            asking.check_failures(settings.max_failed_share)
            return _seal(plan, context, teacher, store, asking)
    finally:
        await teacher.close()


@dataclass(frozen=True, slots=True)
class _Planned:
    """One request of the plan: which prompt, which sample of it, and the key its answer is kept under."""

    prompt: Record
    sample: int
    sampling: dict[str, Any]
    key: str


class _Plan:
    """Every request of the step in order; read anew each time, so that nothing of it stays in memory."""

    def __init__(
        self, settings: GenerateSettings, context: StepContext, teacher: Teacher, prompts_path: Path
    ) -> None:
        self.settings, self.context, self.teacher = settings, context, teacher
        self.prompts_path = prompts_path
        self.prompts = count_records(prompts_path)
        self.total = self.prompts * settings.samples

    def __iter__(self) -> Iterator[_Planned]:
        for prompt in read_records(self.prompts_path):
            for sample in range(self.settings.samples):
                self.context.check_stop()
                sampling = self._sampling(prompt, sample)
                yield _Planned(prompt, sample, sampling, self._key(prompt, sample, sampling))

    def _sampling(self, prompt: Record, sample: int) -> dict[str, Any]:
        """All that shapes an answer beside the prompt; the record carries it."""
        settings, teacher = self.settings, self.teacher
        if teacher.capabilities.takes == "record":
            return {}
        sampling: dict[str, Any] = {
            **teacher.sampling,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_new_tokens": settings.max_new_tokens,
        }
        if settings.temperature > 0:
            sampling["seed"] = self.context.derive_seed("sample", prompt.prompt_id, sample)
        if teacher.renderer is not None:
            sampling["template"] = teacher.renderer.template_hash
        if settings.logprobs is not None:
            sampling["logprob_temperature"] = teacher.capabilities.logprob_temperature
        return sampling

    def _key(self, prompt: Record, sample: int, sampling: dict[str, Any]) -> str:
        content: dict[str, Any] = {
            "prompt": prompt.prompt_id,
            "messages": prompt.messages,
            "sample": sample,
            "sampling": sampling,
            "logprobs": self.settings.logprobs,
        }
        if self.teacher.renderer is not None:
            content["tokenizer"] = self.teacher.renderer.tokenizer_hash
        if self.teacher.capabilities.takes == "record":
            content["problem"] = [prompt.reference, prompt.task, prompt.meta]
        return hash_json(content)

    def request(self, planned: _Planned) -> Request:
        """What the engine is asked. Raises DataError when the chat template refuses the prompt."""
        settings, teacher, prompt = self.settings, self.teacher, planned.prompt
        renderer = teacher.renderer
        return Request(
            messages=prompt.messages,
            prompt_token_ids=None if renderer is None else renderer.prompt_ids(prompt.messages),
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            seed=planned.sampling.get("seed", 0),
            logprobs=settings.logprobs,
            record=prompt if teacher.capabilities.takes == "record" else None,
        )


class _Asking:
    """Asks what the request store does not hold yet, a bounded number at a time."""

    def __init__(self, plan: _Plan, context: StepContext, store: RequestStore) -> None:
        self.plan, self.context, self.store = plan, context, store
        self.where = f"model {plan.settings.model}"
        self.reused = self.answered = self.failed = self.tokens = 0
        self.failures_path = context.folder / FAILURES_FILE
        self._failures = self.failures_path.open("w", encoding="utf-8", newline="\n")
        self._reasons: Counter[str] = Counter()
        self._in_a_row = 0
        self._under_way: dict[asyncio.Task[Answer], _Planned] = {}
        self._arrived: deque[asyncio.Task[Answer]] = deque()
        self._arrival = asyncio.Event()

    def close(self) -> None:
        """Close the list of failures; without any it is removed."""
        self._failures.close()
        if not self.failed:
            self.failures_path.unlink()

    async def ask(self, concurrency: int) -> None:
        """Ask until every request is answered or has failed, always `concurrency` of them under way."""
        missing = sum(planned.key not in self.store for planned in self.plan)
        self.reused = self.plan.total - missing
        kept = f", {self.reused:,} of them answered already" if self.reused else ""
        self.context.say(f"{self.plan.total:,} requests to {self.plan.settings.model}{kept}")
        self.context.event(
            "requests",
            model=self.plan.teacher.identity,
            total=self.plan.total,
            reused=self.reused,
            concurrency=concurrency,
        )
        if not missing:
            return
        requests = (planned for planned in self.plan if planned.key not in self.store)
        with self.context.progress("answers", missing, "answers") as progress:
            try:
                while True:
                    for planned in itertools.islice(requests, concurrency - len(self._under_way)):
                        self._start(planned)
                    if not self._under_way:
                        return
                    await self._next_arrivals(progress)
            finally:
                await self._give_up()

    def _start(self, planned: _Planned) -> None:
        task = asyncio.create_task(self._answer(planned))
        self._under_way[task] = planned
        task.add_done_callback(self._note_arrival)

    async def _answer(self, planned: _Planned) -> Answer:
        return await self.plan.teacher.answer(self.plan.request(planned))

    def _note_arrival(self, task: asyncio.Task[Answer]) -> None:
        self._arrived.append(task)
        self._arrival.set()

    async def _next_arrivals(self, progress: Progress) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._arrival.wait(), _STOP_POLL_S)
        self._arrival.clear()
        while self._arrived:
            self._settle(self._arrived.popleft())
            progress.advance(1, tokens=self.tokens, failed=self.failed)
        self.context.check_stop()

    def _settle(self, task: asyncio.Task[Answer]) -> None:
        """Keep an answer, or note why there is none; errors that no other request can escape go on."""
        planned = self._under_way.pop(task)
        try:
            answer = task.result()
        except (RequestError, DataError) as error:
            self._fail(planned, error)
        else:
            self.store.put(planned.key, answer)
            self.answered, self._in_a_row = self.answered + 1, 0
            self.tokens += _tokens(answer) or 0

    def _fail(self, planned: _Planned, error: RequestError | DataError) -> None:
        self.failed += 1
        status = error.status if isinstance(error, RequestError) else None
        row = {
            "prompt_id": planned.prompt.prompt_id,
            "sample": planned.sample,
            "reason": error.what,
            "status": status,
        }
        self._failures.write(json.dumps(row, ensure_ascii=False) + "\n")
        if error.what in self._reasons or len(self._reasons) < _REASONS_SHOWN:
            self._reasons[error.what] += 1
        blames_row = isinstance(error, DataError) or error.blames_row
        # Rows at fault say nothing about the engine, unless there has been no other row yet.
        if not blames_row or not (self.reused or self.answered):
            self._in_a_row += 1
        if self._in_a_row >= _FAILURES_IN_A_ROW:
            raise EngineError(
                f"{self._in_a_row} requests in a row failed, the last with: {error.what}",
                where=self.where,
                expected=error.expected,
                mend=f"{error.mend or 'see ' + str(self.failures_path)}. {self._kept()}",
            )

    def _kept(self) -> str:
        return (
            f"{self.reused + self.answered:,} answers are kept; the next run asks only what is missing "
            f"(failures: {self.failures_path})"
        )

    async def _give_up(self) -> None:
        """Cancel what is under way; answers that have arrived all the same are kept."""
        await asyncio.sleep(0)  # lets a task go on whose answer is there already
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        for task, planned in self._under_way.items():
            if not task.cancelled() and task.exception() is None:
                self.store.put(planned.key, task.result())
        self._under_way.clear()

    def check_failures(self, max_failed_share: float) -> None:
        """Raise EngineError when more requests failed than may."""
        if self.failed <= max_failed_share * self.plan.total and self.failed < self.plan.total:
            return
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in self._reasons.most_common())
        raise EngineError(
            f"{self.failed:,} of {self.plan.total:,} requests failed: {reasons}",
            where=self.where,
            expected=f"at most {max_failed_share:.3g} of them (max_failed_share), and an answer at all",
            mend=f"run again to retry, or allow more with `max_failed_share`. {self._kept()}",
        )


def _seal(
    plan: _Plan, context: StepContext, teacher: Teacher, store: RequestStore, asking: _Asking
) -> StepResult:
    """Write the traces from the request store, in the plan's order."""
    figures = _Figures()

    def traces() -> Iterator[Record]:
        for planned in plan:
            answer = store.get(planned.key)
            if answer is not None:
                trace = _trace(planned, answer, teacher)
                figures.count(trace, answer)
                yield trace

    written = write_records(context.folder / RECORDS_FILE, traces())
    return StepResult(
        counts={
            "prompts": plan.prompts,
            "records": written,
            "held_out": figures.held_out,
            "failed": asking.failed,
            "reused": asking.reused,
        },
        metrics=figures.metrics(),
        tokenizer=figures.tokenizer,
        model_identity=teacher.identity,
        tokens=figures.tokens,
    )


def _trace(planned: _Planned, answer: Answer, teacher: Teacher) -> Record:
    prompt = planned.prompt
    text, renderer = answer.response, teacher.renderer
    if renderer is not None and renderer.opens_reasoning(prompt.messages):
        text = f"{THINK_OPEN}{text}"
    reasoning, final = split_reasoning(text)
    return Record(
        prompt_id=prompt.prompt_id,
        messages=prompt.messages,
        held_out=prompt.held_out,
        response=answer.response,
        reasoning=reasoning,
        answer=final,
        finish_reason=answer.finish_reason,
        sample=planned.sample,
        reference=prompt.reference,
        task=prompt.task,
        prompt_token_ids=answer.prompt_token_ids,
        response_token_ids=answer.response_token_ids,
        logprobs=answer.logprobs,
        tokenizer=answer.tokenizer,
        model=teacher.identity,
        sampling=planned.sampling,
        meta=prompt.meta,
    )


def _tokens(answer: Answer) -> int | None:
    if answer.response_tokens is not None:
        return answer.response_tokens
    return None if answer.response_token_ids is None else len(answer.response_token_ids)


@dataclass
class _Figures:
    """What is reported of the traces, counted while they are written."""

    records: int = 0
    held_out: int = 0
    tokens: int = 0
    counted: int = 0
    logprobs: int = 0
    unknown_logprobs: int = 0
    logprob_sum: float = 0.0
    reasoned: int = 0
    tokenizer: str | None = None
    finish_reasons: Counter[str] = field(default_factory=Counter)

    def count(self, trace: Record, answer: Answer) -> None:
        """Take one trace in."""
        self.records += 1
        self.held_out += trace.held_out
        self.reasoned += trace.reasoning is not None
        self.finish_reasons[answer.finish_reason] += 1
        self.tokenizer = answer.tokenizer
        if (tokens := _tokens(answer)) is not None:
            self.tokens, self.counted = self.tokens + tokens, self.counted + 1
        known = [logprob for logprob in answer.logprobs or () if not math.isnan(logprob)]
        self.logprobs += len(known)
        self.logprob_sum += math.fsum(known)
        self.unknown_logprobs += len(answer.logprobs or ()) - len(known)

    def metrics(self) -> dict[str, Any]:
        """Tokens a response, log-probability a token in nats, how responses ended, how many reasoned."""
        metrics: dict[str, Any] = {
            "finish_reasons": dict(sorted(self.finish_reasons.items())),
            "reasoning_share": self.reasoned / self.records,
        }
        if self.counted:
            metrics["mean_response_tokens"] = self.tokens / self.counted
        if self.logprobs:
            metrics["mean_logprob"] = self.logprob_sum / self.logprobs
            metrics["unknown_logprobs"] = self.unknown_logprobs
        return metrics
