"""The generate step: prompts go to a teacher, its answers come back as traces."""

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from potstill.core.errors import BudgetError, DataError, EngineError
from potstill.core.hashing import derive_seed, hash_json
from potstill.core.records import RECORDS_FILE, Record, count_records, read_records, write_records
from potstill.core.settings import ModelRef, Settings, execution
from potstill.core.step import StepContext, StepResult
from potstill.data.chat import Renderer, split_reasoning
from potstill.data.responses import bytes_of_tokens
from potstill.data.sources import Data, label_names, prompts, read
from potstill.teachers import Answer, Request, Teacher, open_teacher
from potstill.teachers.asking import Asking
from potstill.teachers.budget import Budget
from potstill.teachers.continuation import ContinueSettings, beginnings, check_continues
from potstill.teachers.replicated import ReplicatedTeacher, is_replicated
from potstill.teachers.request_store import RequestStore, open_request_store
from potstill.verifiers import Verifier, check_verifiable, judge

__all__ = ["GenerateSettings", "PlannedAnswer", "PromptPlan", "check_budget", "run"]

_PROMPTS_FILE = "prompts.parquet"


class GenerateSettings(Settings):
    """Settings of the generate step."""

    kind: ClassVar[str] = "generate"
    schema_version: ClassVar[int] = 3

    do: Literal["generate"] = "generate"
    model: ModelRef = Field(description="who answers")
    data: Data = Field(description="the prompts; responses that they come with are left out")
    continue_: ContinueSettings | None = Field(
        default=None,
        alias="continue",
        description="keep the beginnings of the responses that data comes with, and let the model go on",
    )
    samples: int = Field(default=1, ge=1, description="responses a prompt")
    temperature: float = Field(default=1.0, ge=0, description="0 takes the likeliest token")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the likeliest tokens of this share"
    )
    max_new_tokens: int = Field(
        default=1024, ge=1, description="tokens that the model writes for a response, reasoning included"
    )
    logprobs: int | None = Field(
        default=None,
        ge=1,
        description="1 keeps each sampled token's log-probability, k those of the k likeliest tokens as well",
    )
    limit: int | None = Field(default=None, ge=1, description="ask at most this many prompts")
    held_out: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the prompts kept from training, chosen by the prompt's hash",
    )
    verifier: Verifier | None = Field(
        default=None,
        description="judges each response; traces keep its verdicts, for `verified` to select by",
    )
    max_failed_share: float = Field(default=0.0, ge=0, le=1, description="share of requests that may fail")
    concurrency: int | None = execution(
        None, ge=1, description="requests in flight, to a server at most; the engine knows a good number"
    )
    max_cost: float | None = execution(
        None, gt=0, description="dollars that the step may spend over all its runs; the model needs a `price`"
    )
    max_tokens: int | None = execution(
        None, ge=1, description="tokens, prompts included, that the step may buy over all its runs"
    )


def run(settings: GenerateSettings, context: StepContext) -> StepResult:
    """Ask a teacher every prompt and write its answers as traces.

    An answer is kept in the request store as it arrives and is never asked for again, whatever happens to
    this run or to the recipe around it. Raises EngineError when more than `max_failed_share` of the requests
    failed, when the engine is out of reach or refuses, and when failures do not end; BudgetError when
    `max_cost` or `max_tokens` is used up; Interrupted when the run is to stop.
    """
    model = context.model(settings.model)
    check_budget(settings, model)
    prompts_path = None
    if settings.continue_ is None:
        prompts_path = _write_prompts(prompts(read(settings.data, context)), settings, context)
    else:
        check_continues(model, f"model {settings.model}")
    return asyncio.run(_generate(settings, context, model, prompts_path))


def check_budget(settings: GenerateSettings, model: Settings | None) -> None:
    """Raise BudgetError where a cost is bounded that cannot be known."""
    if settings.max_cost is not None and getattr(model, "price", None) is None:
        raise BudgetError(
            "max_cost bounds what answers cost, and their price is unknown",
            where=f"model {settings.model}",
            expected="price: {input: ..., output: ...}, in dollars a million tokens",
            mend="add the price to the model, or bound the step by max_tokens",
        )


def _write_prompts(found: Iterator[Record], settings: GenerateSettings, context: StepContext) -> Path:
    """Keep what will be asked, once: prompts, or the beginnings of responses that are to be continued.

    Raises DataError where there are none, and for one that the verifier cannot judge.
    """
    path = context.scratch / _PROMPTS_FILE

    def wanted() -> Iterator[Record]:
        for prompt in itertools.islice(found, settings.limit):
            share = derive_seed(context.seed, "held_out", prompt.prompt_id) / 2**63
            prompt.held_out = prompt.held_out or share < settings.held_out
            yield prompt

    if not path.exists():
        write_records(path, wanted())
    if count := count_records(path):
        if settings.held_out and not any(record.held_out for record in read_records(path)):
            context.say(
                f"none of the {count:,} prompts is held out (held_out: {settings.held_out:g}): what reads "
                f"{context.name}:held_out will find nothing; a higher share holds some out"
            )
        if settings.verifier is not None:
            check_verifiable(read_records(path), settings.verifier, where="data")
        return path
    if settings.continue_ is not None:
        raise DataError(
            "no response is there to be continued",
            expected="traces that were cut off at their max_new_tokens (finish_reason length)",
            mend="give the rollouts fewer tokens, or set `continue: {only: all}`",
        )
    raise DataError(
        "no row is a prompt",
        expected="rows with a question or messages",
        mend="make prompts with a `template`",
    )


async def _generate(
    settings: GenerateSettings, context: StepContext, model: Settings, prompts_path: Path | None
) -> StepResult:
    teacher: Teacher
    if context.replicas is not None and is_replicated(model):
        teacher = await ReplicatedTeacher.open(model, context.replicas, concurrency=settings.concurrency)
    else:
        teacher = open_teacher(model, concurrency=settings.concurrency, say=context.say)
    try:
        if prompts_path is None:  # where a response is cut depends on the teacher's tokenizer
            assert settings.continue_ is not None
            rollouts = read(settings.data, context)
            found = beginnings(rollouts, settings.continue_, teacher.renderer, context.seed)
            prompts_path = _write_prompts(found, settings, context)
        offered = teacher.capabilities.logprobs
        if offered is not None and (settings.logprobs or 0) > offered:
            raise EngineError(
                f"the engine gives {offered:,} log-probabilities a token, not {settings.logprobs:,}",
                where=f"model {settings.model}",
                expected=f"at most {offered:,}" if offered else "none",
                mend="lower `logprobs`" if offered else "leave `logprobs` out",
            )
        known_as = [getattr(model, "engine", None), teacher.identity]
        with open_request_store(context.cache_folder, known_as) as store:
            plan = PromptPlan(settings, context, teacher, prompts_path)
            budget = Budget(
                store.bought(context.folder.name),
                price=getattr(model, "price", None),
                max_cost=settings.max_cost,
                max_tokens=settings.max_tokens,
            )
            asking = Asking(plan, teacher, store, budget, context, model=settings.model)
            await asking.ask()
            asking.check_failures(settings.max_failed_share)
            return _seal(plan, context, teacher, store, asking)
    finally:
        await teacher.close()


@dataclass(frozen=True, slots=True)
class PlannedAnswer:
    """One request of the plan: which prompt, which sample of it, and the key its answer is kept under."""

    prompt: Record
    sample: int
    sampling: dict[str, Any]
    key: str


class PromptPlan:
    """Every request of the step in order; read anew each time, so that nothing of it stays in memory."""

    def __init__(
        self, settings: GenerateSettings, context: StepContext, teacher: Teacher, prompts_path: Path
    ) -> None:
        self.settings, self.context, self.teacher = settings, context, teacher
        self.prompts_path = prompts_path
        self.prompts = count_records(prompts_path)
        self.total = self.prompts * settings.samples

    def __iter__(self) -> Iterator[PlannedAnswer]:
        """The requests, in order."""
        for prompt in read_records(self.prompts_path):
            for sample in range(self.settings.samples):
                # Of several rollouts of a prompt each has samples of its own.
                sample += prompt.sample * self.settings.samples
                self.context.check_stop()
                sampling = self._sampling(prompt, sample)
                yield PlannedAnswer(prompt, sample, sampling, self._key(prompt, sample, sampling))

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
            row = prompt.prompt_id if settings.continue_ is None else prompt.id
            sampling["seed"] = self.context.derive_seed("sample", row, sample)
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
        if self.settings.continue_ is not None:
            content["prefix"] = [prompt.response, prompt.response_token_ids]
        if self.teacher.renderer is not None:
            content["tokenizer"] = self.teacher.renderer.tokenizer_hash
        if self.teacher.capabilities.takes == "record":
            content["problem"] = [prompt.reference, prompt.task, prompt.meta]
        return hash_json(content)

    def request(self, planned: PlannedAnswer) -> Request:
        """What the engine is asked. Raises DataError when the chat template refuses the prompt."""
        settings, teacher, prompt = self.settings, self.teacher, planned.prompt
        renderer, prompt_ids = teacher.renderer, None
        if renderer is not None:
            prompt_ids = (
                renderer.render(prompt).ids if prompt.response else renderer.prompt_ids(prompt.messages)
            )
        return Request(
            messages=prompt.messages,
            prompt_token_ids=prompt_ids,
            prefix=prompt.response,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            seed=planned.sampling.get("seed", 0),
            logprobs=settings.logprobs,
            record=prompt if teacher.capabilities.takes == "record" else None,
        )


def _seal(
    plan: PromptPlan,
    context: StepContext,
    teacher: Teacher,
    store: RequestStore,
    asking: Asking[PlannedAnswer],
) -> StepResult:
    """Write the traces from the request store, in the plan's order."""
    labels = label_names(plan.settings.data, context)
    figures, groups = _Figures(), _Groups(labels)

    def traces() -> Iterator[Record]:
        for planned in plan:
            answer = store.get(planned.key)
            if answer is not None:
                trace = _trace(planned, answer, teacher)
                if plan.settings.verifier is not None:
                    _judge(trace, plan.settings.verifier, teacher)
                figures.count(trace, answer)
                if labels:
                    groups.count(trace, _is_right(trace, plan.settings.verifier, teacher))
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
        metrics=figures.metrics()
        | groups.metrics()
        | ({} if asking.budget.price is None else {"bought": asking.budget.totals()}),
        extra={"labels": labels},
        tokenizer=figures.tokenizer,
        model_identity=teacher.identity,
        tokens=figures.tokens,
    )


def _trace(planned: PlannedAnswer, answer: Answer, teacher: Teacher) -> Record:
    prompt, renderer = planned.prompt, teacher.renderer
    prompt_ids, ids, logprobs = answer.prompt_token_ids, answer.response_token_ids, answer.logprobs
    alternatives, prefix, prefix_tokens = answer.alternatives, prompt.response or "", 0
    if prefix:
        if renderer is not None and prompt_ids is not None and ids is not None:
            prefix_tokens = renderer.render(prompt).supervised_tokens
            prompt_ids, ids = prompt_ids[:-prefix_tokens], [*prompt_ids[-prefix_tokens:], *ids]
        else:
            prompt_ids = ids = None  # what tokens a server makes of the prefix is not known
        if logprobs is not None:
            unknown = max(1, prefix_tokens)
            logprobs = [math.nan] * unknown + logprobs
            alternatives = None if alternatives is None else alternatives.behind(unknown)
    response = text = prefix + answer.response
    if renderer is not None:
        text = renderer.read_response(prompt.messages, response)
    reasoning, final = split_reasoning(text)
    return Record(
        prompt_id=prompt.prompt_id,
        messages=prompt.messages,
        held_out=prompt.held_out,
        response=response,
        reasoning=reasoning,
        answer=final,
        finish_reason=answer.finish_reason,
        sample=planned.sample,
        reference=prompt.reference,
        task=prompt.task,
        prompt_token_ids=prompt_ids,
        response_token_ids=ids,
        logprobs=logprobs,
        token_bytes=_token_bytes(response, prefix, ids, answer, renderer),
        alternatives=alternatives,
        prefix_characters=len(prefix),
        prefix_tokens=prefix_tokens,
        tokenizer=None if ids is None else answer.tokenizer,
        model=teacher.identity,
        sampling={**planned.sampling, **({"prefix_model": prompt.model} if prefix else {})},
        meta=prompt.meta,
    )


def _judge(trace: Record, verifier: Verifier, teacher: Teacher) -> None:
    found = judge(trace, _read_response(trace, teacher), verifier)
    trace.verdicts, trace.scores = found.verdicts, found.scores


def _is_right(trace: Record, verifier: Verifier | None, teacher: Teacher) -> bool | None:
    """Whether a response is right, by the step's verifier or else the row's own; None where none can tell."""
    if verifier is not None:
        return trace.verdicts.get("correct")
    try:
        return judge(trace, _read_response(trace, teacher)).verdicts.get("correct")
    except DataError:  # of rows that are not to be selected or evaluated, that is no error
        return None


def _read_response(trace: Record, teacher: Teacher) -> str:
    assert trace.response is not None
    renderer = teacher.renderer
    return trace.response if renderer is None else renderer.read_response(trace.messages, trace.response)


def _token_bytes(
    response: str, prefix: str, ids: list[int] | None, answer: Answer, renderer: Renderer | None
) -> list[int] | None:
    if renderer is not None and answer.logprobs is not None and ids is not None:
        return bytes_of_tokens(renderer.bytes_of(ids), response)
    if not prefix or answer.token_bytes is None:
        return answer.token_bytes
    return [len(prefix.encode("utf-8", "surrogatepass")), *answer.token_bytes]


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
    verdicts: Counter[str] = field(default_factory=Counter)

    def count(self, trace: Record, answer: Answer) -> None:
        """Take one trace in."""
        self.records += 1
        self.held_out += trace.held_out
        self.reasoned += trace.reasoning is not None
        self.finish_reasons[answer.finish_reason] += 1
        self.verdicts.update({name: int(verdict) for name, verdict in trace.verdicts.items()})
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
        if self.verdicts:
            metrics["verdicts"] = {name: count / self.records for name, count in self.verdicts.items()}
        if self.counted:
            metrics["mean_response_tokens"] = self.tokens / self.counted
        if self.logprobs:
            metrics["mean_logprob"] = self.logprob_sum / self.logprobs
            metrics["unknown_logprobs"] = self.unknown_logprobs
        return metrics


@dataclass
class _Groups:
    """How many traces each value of a label has, and how many of those that can be judged are right."""

    labels: list[str]
    found: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)

    def count(self, trace: Record, right: bool | None) -> None:
        """Take one trace in, under each label that it has."""
        for label in self.labels:
            if label in trace.meta:
                group = self.found.setdefault(label, {}).setdefault(str(trace.meta[label]), Counter())
                group.update(traces=1, judged=right is not None, right=bool(right))

    def metrics(self) -> dict[str, Any]:
        """The counts by label and value; nothing where no trace has a label."""
        found = {
            label: {value: dict(count) for value, count in sorted(values.items())}
            for label, values in self.found.items()
        }
        return {"groups": found} if found else {}
