"""The `evaluate` step: models in turn over the same traces and prompts; finished parts outlive a kill."""

import dataclasses
import functools
import json
import os
import platform
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from potstill.core.errors import DataError, ModelError
from potstill.core.hashing import hash_json
from potstill.core.records import Record
from potstill.core.settings import ModelRef
from potstill.core.step import StepContext, StepResult
from potstill.core.store import write_atomically
from potstill.data.chat import Renderer, fit, split_reasoning
from potstill.data.sources import Data, prompts, read
from potstill.evaluate.answers import answer_prompts
from potstill.evaluate.rouge import check_rouge
from potstill.evaluate.rows import (
    HELD_OUT_FILE,
    SAMPLES_FILE,
    SCORES_FILE,
    AnswerRow,
    TraceRow,
    write_answers,
    write_traces,
)
from potstill.evaluate.settings import EvaluateSettings
from potstill.evaluate.summary import ModelRows, differences, figures
from potstill.evaluate.traces import compare_on_traces
from potstill.models import (
    LoadedModel,
    TransformersModel,
    check_same_vocabulary,
    identity,
    load,
    load_tokenizer,
    tokenizer_hash,
)
from potstill.scoring import micro_batch_tokens
from potstill.teachers.transformers import context_tokens

__all__ = ["evaluate"]

_HELD_OUT = "held_out"


class _Subject:
    """One model under evaluation, loaded when something has to be measured and not before."""

    def __init__(self, name: str, reference: ModelRef, settings: TransformersModel) -> None:
        self.name, self.reference, self.settings = name, reference, settings
        self.tokenizer = load_tokenizer(settings)
        self.renderer = Renderer(self.tokenizer)
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
        self.identity = identity(settings)

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        """The model itself."""
        return load(self.settings)

    def is_same_model(self, other: "_Subject") -> bool:
        """Whether two names stand for the same weights in the same precision."""
        return (self.identity, self.settings.quantize) == (other.identity, other.settings.quantize)


@dataclasses.dataclass
class _Evaluation:
    """What all models are measured on, and where finished parts lie."""

    settings: EvaluateSettings
    context: StepContext
    traces: list[Record]
    tasks: dict[str, list[Record]]
    references: dict[str, dict[str, list[str]]]
    teacher: _Subject | None
    device: str = ""

    @property
    def samples(self) -> list[Record]:
        """The first held-out prompts, whose answers are shown."""
        return list(islice(prompts(self.traces), self.settings.samples_shown))

    def kept(self, subject: _Subject, part: str, make: Callable[[], Any]) -> Any:
        """What an earlier attempt left of a part (JSON), else what `make` gives, kept for the next one."""
        path = self.context.scratch / f"{hash_json([subject.name, part])[:24]}.json"
        if not path.is_file():
            write_atomically(path, json.dumps(make(), ensure_ascii=False))
        return json.loads(path.read_text(encoding="utf-8"))


def evaluate(settings: EvaluateSettings, context: StepContext) -> StepResult:
    """Carry out an evaluate step."""
    subjects = [
        _Subject(name, reference, _model_settings(reference, settings, context))
        for name, reference in settings.roles.items()
    ]
    teacher = None
    if settings.teacher is not None:
        named = _Subject("teacher", settings.teacher, _model_settings(settings.teacher, settings, context))
        # The same weights are not loaded twice.
        teacher = next((one for one in subjects if one.is_same_model(named)), named)
    if settings.rouge:
        check_rouge()
    tasks, references = _read_tasks(settings, context)
    traces = _read_traces(settings.data, settings, context)
    work = _Evaluation(settings, context, traces, tasks, references, teacher)
    rows: dict[str, ModelRows] = {}
    shown: dict[str, list[AnswerRow]] = {}
    described: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        refusal = _refusal(subject, teacher) if work.traces else None
        if refusal is not None:
            context.say(f"{subject.name}: {refusal}")
        rows[subject.name] = _measure(subject, work, with_teacher=refusal is None)
        shown[subject.name] = _answers(subject, work, _HELD_OUT, work.samples)[0]
        described[subject.name] = {
            "reference": str(subject.reference),
            "identity": subject.identity,
            "is_teacher": teacher is not None and subject.is_same_model(teacher),
            **figures(rows[subject.name], seed=context.derive_seed("bootstrap")),
        }
        if refusal is not None:
            described[subject.name][_HELD_OUT]["kl_refused"] = refusal
        if subject is not teacher:
            subject.__dict__.pop("loaded", None)
    return _write(settings, work, subjects, rows, shown, described)


def _model_settings(
    reference: ModelRef, settings: EvaluateSettings, context: StepContext
) -> TransformersModel:
    found = context.model(reference)
    if not isinstance(found, TransformersModel):
        raise ModelError(
            f"{reference} is a model of engine {getattr(found, 'engine', type(found).__name__)}",
            where=f"step {context.name}",
            expected="models that transformers loads, because whole distributions are compared",
            mend="declare the same weights with a path (a folder, hub id or .gguf file), and name that",
        )
    return found if settings.device is None else found.model_copy(update={"device": settings.device})


def _read_traces(data: Data | None, settings: EvaluateSettings, context: StepContext) -> list[Record]:
    if data is None:
        return []
    traces = list(islice((record for record in read(data, context) if record.response), settings.limit))
    if not traces:
        raise DataError(
            "these rows have no responses to measure models on",
            where=f"step {context.name}, data",
            expected="traces, such as the held_out view of a generate step",
            mend="name a step that makes traces; prompts alone belong under tasks",
        )
    return traces


def _read_tasks(
    settings: EvaluateSettings, context: StepContext
) -> tuple[dict[str, list[Record]], dict[str, dict[str, list[str]]]]:
    """The prompts of each task, and for ROUGE the answers that their rows come with, by prompt id."""
    tasks: dict[str, list[Record]] = {}
    references: dict[str, dict[str, list[str]]] = {name: {} for name in settings.tasks}
    for name, data in settings.tasks.items():
        rows = read(data, context)
        if settings.rouge:
            rows = iter(known := list(rows))
            for record in known:
                if text := _reference(record):
                    references[name].setdefault(record.prompt_id, []).append(text)
        tasks[name] = list(islice(prompts(rows), settings.limit))
        bare = sum(record.prompt_id not in references[name] for record in tasks[name])
        if settings.rouge and bare:
            context.say(
                f"{name}: {bare:,} of {len(tasks[name]):,} prompts have no answer to compare by ROUGE"
            )
    if settings.rouge and not any(references.values()):
        raise DataError(
            "the rows of no task have responses that answers could be compared with",
            where=f"step {context.name}, tasks",
            expected="traces, such as {name: traces:held_out}",
            mend="name such a task, or leave rouge out",
        )
    return tasks, references


def _reference(record: Record) -> str:
    """The answer of a row's response; empty where it was cut off before one."""
    return split_reasoning(record.response or "")[1] if record.answer is None else record.answer


def _refusal(subject: _Subject, teacher: _Subject | None) -> str | None:
    """Why KL and agreement cannot be measured, or None where they can (or were not asked for)."""
    if teacher is None or subject.is_same_model(teacher) or subject.tokenizer_hash == teacher.tokenizer_hash:
        return None
    try:
        check_same_vocabulary(
            teacher.tokenizer, subject.tokenizer, names=(str(teacher.reference), subject.name)
        )
    except ModelError as error:
        return f"no KL and no agreement: {error.what}"
    return None


def _measure(subject: _Subject, work: _Evaluation, *, with_teacher: bool) -> ModelRows:
    rows = ModelRows()
    if work.traces:
        kept = work.kept(subject, "traces", lambda: _trace_rows(subject, work, with_teacher=with_teacher))
        rows.traces = [TraceRow(**row) for row in kept]
    for task, records in work.tasks.items():
        rows.answers[task], seconds = _answers(subject, work, task, records)
        rows.decoding_seconds += seconds
    return rows


def _trace_rows(subject: _Subject, work: _Evaluation, *, with_teacher: bool) -> list[dict[str, Any]]:
    context, model = work.context, subject.loaded
    teacher = work.teacher if with_teacher else None
    if teacher is not None and subject.is_same_model(teacher):
        teacher = None
    lengths = [context_tokens(one.loaded) for one in (subject, teacher) if one is not None]
    length = min((one for one in lengths if one is not None), default=2**31)
    rendered = [
        fit(subject.renderer.render(record, row_number=number), length, row_number=number)
        for number, record in enumerate(work.traces, start=1)
    ]
    with context.progress(f"{subject.name}: held-out traces", total=len(rendered)) as progress:

        def on_batch(rows: int) -> None:
            progress.advance(rows)
            context.check_stop()

        found = compare_on_traces(
            model,
            teacher.loaded if teacher is not None else None,
            rendered,
            max_tokens=work.settings.max_tokens or micro_batch_tokens(model.model.device),
            on_batch=on_batch,
        )
    return [
        {"record_id": record.id, "prompt_id": record.prompt_id, **dataclasses.asdict(one)}
        for record, one in zip(work.traces, found, strict=True)
    ]


def _answers(
    subject: _Subject, work: _Evaluation, task: str, records: list[Record]
) -> tuple[list[AnswerRow], float]:
    """A model's answers to the prompts of a task, with verdicts, and the seconds that decoding took."""

    def make() -> dict[str, Any]:
        answers, seconds = answer_prompts(
            subject.loaded,
            subject.renderer,
            records,
            work.references.get(task, {}),
            settings=work.settings,
            context=work.context,
            description=f"{subject.name}: {task}",
        )
        return {"answers": [dataclasses.asdict(one) for one in answers], "seconds": seconds}

    if not records:
        return [], 0.0
    kept = work.kept(subject, f"answers {task}" if task != _HELD_OUT else "samples", make)
    return [AnswerRow(**one) for one in kept["answers"]], kept["seconds"]


def _write(
    settings: EvaluateSettings,
    work: _Evaluation,
    subjects: list[_Subject],
    rows: dict[str, ModelRows],
    shown: dict[str, list[AnswerRow]],
    described: dict[str, dict[str, Any]],
) -> StepResult:
    context, baseline = work.context, settings.baseline
    assert baseline is not None  # filled when the settings were read
    write_answers(context.folder / SCORES_FILE, {role: one.answers for role, one in rows.items()})
    if work.traces:
        write_traces(context.folder / HELD_OUT_FILE, {role: one.traces for role, one in rows.items()})
    write_atomically(
        context.folder / SAMPLES_FILE, json.dumps(_samples(work, rows, shown), ensure_ascii=False, indent=1)
    )
    base = next(one for one in subjects if one.name == baseline)
    gaps = differences(
        {role: one for role, one in rows.items() if role == baseline or not described[role]["is_teacher"]},
        baseline,
        same_tokens=[one.name for one in subjects if one.tokenizer_hash == base.tokenizer_hash],
        seed=context.derive_seed("bootstrap"),
    )
    decoded = [answer for one in rows.values() for answers in one.answers.values() for answer in answers]
    decoded += [answer for answers in shown.values() for answer in answers]
    return StepResult(
        counts={
            "models": len(subjects),
            "held_out_rows": len(work.traces),
            "task_prompts": sum(map(len, work.tasks.values())),
        },
        metrics={
            "baseline": baseline,
            "teacher": None if settings.teacher is None else str(settings.teacher),
            "models": described,
            "differences": gaps,
            "machine": _machine(),
        },
        tokens=sum(answer.response_tokens for answer in decoded),
    )


def _samples(
    work: _Evaluation, rows: dict[str, ModelRows], shown: dict[str, list[AnswerRow]]
) -> list[dict[str, Any]]:
    """The first prompts of the held-out traces and of each task, with every model's answer."""
    first_traces: dict[str, Record] = {}
    for record in work.traces:
        first_traces.setdefault(record.prompt_id, record)
    parts = [(_HELD_OUT, work.samples, shown)]
    for task, records in work.tasks.items():
        parts.append(
            (
                task,
                records[: work.settings.samples_shown],
                {role: one.answers[task] for role, one in rows.items()},
            )
        )
    samples = []
    for source, records, answers in parts:
        for number, record in enumerate(records):
            trace = first_traces.get(record.prompt_id) if source == _HELD_OUT else None
            samples.append(
                {
                    "source": source,
                    "record_id": record.id,
                    "messages": record.messages,
                    "reference": record.reference,
                    "trace": None if trace is None else trace.response,
                    "answers": {
                        role: {
                            key: getattr(given[number], key)
                            for key in ("response", "finish_reason", "response_tokens", "verdicts", "scores")
                        }
                        for role, given in answers.items()
                    },
                }
            )
    return samples


def _machine() -> dict[str, Any]:
    """What the figures of speed were measured on."""
    machine: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
