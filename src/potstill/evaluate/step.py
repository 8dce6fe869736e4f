"""The `evaluate` step: models in turn over the same traces and prompts; finished parts outlive a kill."""

import dataclasses
import itertools
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from potstill.core.checked_json import DamagedJsonError, checked_json, read_checked_json
from potstill.core.errors import DataError, ModelError
from potstill.core.hashing import hash_json
from potstill.core.records import Record
from potstill.core.settings import ModelRef
from potstill.core.step import StepContext, StepResult
from potstill.core.store import write_atomically
from potstill.data.chat import fit
from potstill.data.sources import prompts
from potstill.evaluate.answers import judge_answers
from potstill.evaluate.choices import score_choices
from potstill.evaluate.rows import (
    FORGETTING_FILE,
    HELD_OUT_FILE,
    SAMPLES_FILE,
    SCORES_FILE,
    AnswerRow,
    TraceRow,
    write_answers,
    write_forgetting,
    write_traces,
)
from potstill.evaluate.scorers import Scorers
from potstill.evaluate.settings import Decoding, EvaluateSettings
from potstill.evaluate.subjects import LocalSubject, ServedSubject, Subject, open_subject
from potstill.evaluate.summary import ModelRows, TaskRows, differences, figures
from potstill.evaluate.tasks import TaskData, read_tasks, read_traces
from potstill.models import SharedWeights, check_same_vocabulary
from potstill.scoring import compare_on_traces, micro_batch_tokens
from potstill.teachers.transformers import context_tokens

__all__ = ["evaluate"]

_HELD_OUT = "held_out"


@dataclasses.dataclass
class _Evaluation:
    """What all models are measured on, and where finished parts lie."""

    settings: EvaluateSettings
    context: StepContext
    traces: list[Record]
    tasks: dict[str, TaskData]
    teacher: LocalSubject | None
    reasons: bool

    @property
    def samples(self) -> list[Record]:
        """The first held-out prompts, whose answers are shown."""
        return list(itertools.islice(prompts(self.traces), self.settings.samples_shown))

    @property
    def answered(self) -> dict[str, list[str]]:
        """The record ids of each task whose answers are decoded as those are that are only shown."""
        shown = self.decoding(None)
        return {
            name: [record.id for record in task.prompts]
            for name, task in self.tasks.items()
            if task.settings.generates and dataclasses.replace(self.decoding(task), samples=1) == shown
        }

    def decoding(self, task: TaskData | None) -> Decoding:
        """How answers are decoded; without a task, those that are only shown."""
        return self.settings.decoding(None if task is None else task.settings, reasons=self.reasons)

    def kept(self, owner: str, part: str, make: Callable[[], Any]) -> Any:
        """What an earlier attempt left of a part (JSON), else what `make` gives, kept for the next one."""
        path = self.context.scratch / f"{hash_json([owner, part])[:24]}.json"
        if path.is_file():
            try:
                return read_checked_json(path.read_bytes())["kept"]
            except (DamagedJsonError, KeyError) as error:
                self.context.say(f"{path.name} is damaged ({error}): {part} of {owner} is made again")
        write_atomically(path, checked_json({"kept": make()}))
        return read_checked_json(path.read_bytes())["kept"]


def evaluate(settings: EvaluateSettings, context: StepContext) -> StepResult:
    """Carry out an evaluate step."""
    shared = SharedWeights()
    subjects = [
        open_subject(name, reference, settings, context, shared) for name, reference in settings.roles.items()
    ]
    teacher = _teacher(settings.teacher, subjects, settings, context, shared)
    tasks = read_tasks(settings, context)
    traces = read_traces(settings.data, settings, context)
    reasons = _reasons(subjects, traces, tasks)
    work = _Evaluation(settings, context, traces, tasks, teacher, reasons)
    if reasons and settings.max_new_tokens is None:
        context.say(f"answers may reason, and have {work.decoding(None).max_new_tokens:,} tokens for it")
    rows: dict[str, ModelRows] = {}
    shown: dict[str, list[AnswerRow]] = {}
    not_measured: dict[str, dict[str, str]] = {}
    scorers = Scorers(settings, context, tasks, work.kept)
    for subject, following in itertools.zip_longest(subjects, subjects[1:]):
        try:
            refusals = not_measured[subject.name] = _refusals(subject, work)
            for part, refusal in refusals.items():
                context.say(f"{subject.name}{', ' + part if part else ''}: {refusal}")
            rows[subject.name] = _measure(subject, work)
            shown[subject.name] = _shown(subject, work, rows[subject.name])
            scorers.run_benchmarks(subject)
        finally:
            if subject is not teacher:
                subject.close()
        # A base that the next one needs as well is not read again; all else makes room for it.
        shared.keep(one.settings for one in (teacher, following) if isinstance(one, LocalSubject))
        _say_cut_off(subject, work, rows[subject.name])
        scorers.say_unjudged(subject.name, rows[subject.name])
    if teacher is not None:
        teacher.close()
        shared.keep(())
    scorers.compare_with_references(rows)
    described: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        refusals = not_measured[subject.name]
        described[subject.name] = {
            "reference": str(subject.reference),
            "identity": subject.identity,
            "is_teacher": teacher is not None and subject.is_same_model(teacher),
            **figures(rows[subject.name], pass_at=settings.pass_at, seed=context.derive_seed("bootstrap")),
        }
        if (no_kl := refusals.pop("", None)) is not None:
            described[subject.name].setdefault("held_out", {})["kl_refused"] = no_kl
        if refusals:
            described[subject.name]["not_measured"] = refusals
    return _write(work, scorers, subjects, rows, shown, described)


def _teacher(
    reference: ModelRef | None,
    subjects: Sequence[Subject],
    settings: EvaluateSettings,
    context: StepContext,
    shared: SharedWeights,
) -> LocalSubject | None:
    """The model that distributions are compared with; the same weights are not loaded twice."""
    if reference is None:
        return None
    named = next((one for one in subjects if one.reference == reference), None)
    named = named or open_subject("teacher", reference, settings, context, shared)
    if isinstance(named, ServedSubject):
        raise ModelError(
            f"{reference} is a model of engine {named.engine}",
            where="teacher",
            expected="a model that transformers loads, because whole distributions are compared",
            mend="declare the same weights with a path (a folder, hub id or .gguf file), and name that",
        )
    same = (one for one in subjects if isinstance(one, LocalSubject) and one.is_same_model(named))
    return next(same, named)


def _reasons(subjects: Sequence[Subject], traces: Sequence[Record], tasks: dict[str, TaskData]) -> bool:
    """Whether answers may hold reasoning: by a model's chat template, or by the traces that are given."""
    if any(trace.reasoning is not None for trace in traces) or any(task.reasons for task in tasks.values()):
        return True
    asked = [*traces[:1], *(record for task in tasks.values() for record in task.prompts[:1])]
    local = [subject for subject in subjects if isinstance(subject, LocalSubject)]
    return any(subject.thinks(record) for subject in local for record in asked if record.messages)


def _refusals(subject: Subject, work: _Evaluation) -> dict[str, str]:
    """What cannot be measured of a model, and why, by the task's name; held-out traces have none."""
    found: dict[str, str] = {}
    if isinstance(subject, ServedSubject):
        engine = f"the {subject.engine} engine gives no probabilities of a given text"
        if work.traces:
            found[""] = f"no KL and no perplexity: {engine}"
        for name, task in work.tasks.items():
            if task.prompts and not task.settings.generates:
                found[name] = f"no choice by {task.settings.choose_by}: {engine}"
            elif task.traces:
                found[name] = f"no perplexity: {engine}"
    elif work.traces and (refusal := _other_vocabulary(subject, work.teacher)) is not None:
        found[""] = refusal
    return found


def _other_vocabulary(subject: LocalSubject, teacher: LocalSubject | None) -> str | None:
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


def _measure(subject: Subject, work: _Evaluation) -> ModelRows:
    rows = ModelRows()
    if isinstance(subject, LocalSubject):
        teacher = work.teacher if _other_vocabulary(subject, work.teacher) is None else None
        rows.traces = _traces(subject, work, "held-out traces", work.traces, teacher)
    for name, task in work.tasks.items():
        try:
            found = _measure_task(subject, work, task)
        except DataError as error:
            where = ", ".join(filter(None, (subject.name, name, error.where)))
            raise DataError(error.what, where=where, expected=error.expected, mend=error.mend) from error
        if found.answers or found.traces:
            (rows.forgetting if task.forgetting else rows.tasks)[name] = found
    return rows


def _measure_task(subject: Subject, work: _Evaluation, task: TaskData) -> TaskRows:
    found = TaskRows(groups=task.groups(work.settings.by))
    if task.settings.generates:
        found.answers, found.seconds = _answers(subject, work, task, task.prompts)
    elif isinstance(subject, LocalSubject):
        found.answers = _choices(subject, work, task)
    if isinstance(subject, LocalSubject):
        found.traces = _traces(subject, work, f"{task.name}, given responses", task.traces, None)
    return found


def _traces(
    subject: LocalSubject,
    work: _Evaluation,
    part: str,
    traces: Sequence[Record],
    teacher: LocalSubject | None,
) -> list[TraceRow]:
    """A model on given responses: cross-entropy, and with a teacher KL and agreement."""

    def make() -> list[dict[str, Any]]:
        context, model = work.context, subject.loaded
        other = None if teacher is None or subject.is_same_model(teacher) else teacher
        lengths = [context_tokens(one.loaded) for one in (subject, other) if one is not None]
        length = min((one for one in lengths if one is not None), default=2**31)
        rendered = [
            fit(subject.renderer.render(record, row_number=number), length, row_number=number)
            for number, record in enumerate(traces, start=1)
        ]
        with context.progress(f"{subject.name}: {part}", total=len(rendered)) as progress:

            def on_batch(rows: int) -> None:
                progress.advance(rows)
                context.check_stop()

            found = compare_on_traces(
                model,
                other.loaded if other is not None else None,
                rendered,
                max_tokens=work.settings.max_tokens or micro_batch_tokens(model.model.device),
                on_batch=on_batch,
            )
        return [
            {"record_id": record.id, "prompt_id": record.prompt_id, **dataclasses.asdict(one)}
            for record, one in zip(traces, found, strict=True)
        ]

    if not traces:
        return []
    return [TraceRow(**row) for row in work.kept(subject.name, part, make)]


def _answers(
    subject: Subject, work: _Evaluation, task: TaskData | None, records: list[Record]
) -> tuple[list[AnswerRow], float | None]:
    """A model's answers to prompts, with verdicts, and the seconds that decoding took."""
    name = _HELD_OUT if task is None else task.name

    def make() -> dict[str, Any]:
        decoded = subject.decode(records, work.decoding(task), description=f"{subject.name}: {name}")
        answers = judge_answers(
            records,
            decoded.answers,
            read_response=subject.read_response,
            references=task.references if task is not None and work.settings.rouge else {},
            verifier=None if task is None else task.settings.verifier,
        )
        return {"answers": [dataclasses.asdict(one) for one in answers], "seconds": decoded.seconds}

    if not records:
        return [], None
    kept = work.kept(subject.name, "samples" if task is None else f"answers {name}", make)
    return [AnswerRow(**one) for one in kept["answers"]], kept["seconds"]


def _shown(subject: Subject, work: _Evaluation, rows: ModelRows) -> list[AnswerRow]:
    """Answers to the held-out prompts that are shown: a task's where it has them, the others decoded.

    By the record and not by the prompt's identity, which rows with and without passages share.
    """
    tasks = {**rows.tasks, **rows.forgetting}
    known = {
        row.record_id: row
        for name in work.answered
        for row in (tasks[name].answers if name in tasks else ())
        if row.sample == 0
    }
    missing = [record for record in work.samples if record.id not in known]
    known |= {row.record_id: row for row in _answers(subject, work, None, missing)[0]}
    return [known[record.id] for record in work.samples]


def _choices(subject: LocalSubject, work: _Evaluation, task: TaskData) -> list[AnswerRow]:
    """The options that a model finds likeliest."""
    by = task.settings.choose_by
    assert by != "generation"

    def make() -> list[dict[str, Any]]:
        context, model = work.context, subject.loaded
        options = sum(len(record.meta["choices"]) for record in task.prompts)
        with context.progress(f"{subject.name}: {task.name}", total=options, unit="options") as progress:

            def on_batch(rows: int) -> None:
                progress.advance(rows)
                context.check_stop()

            found = score_choices(
                model,
                subject.renderer,
                task.prompts,
                by=by,
                normalise=task.settings.normalise,
                max_tokens=work.settings.max_tokens or micro_batch_tokens(model.model.device),
                on_batch=on_batch,
            )
        return [dataclasses.asdict(one) for one in found]

    if not task.prompts:
        return []
    return [AnswerRow(**one) for one in work.kept(subject.name, f"choices {task.name}", make)]


def _say_cut_off(subject: Subject, work: _Evaluation, rows: ModelRows) -> None:
    for name, task in {**rows.tasks, **rows.forgetting}.items():
        cut = sum(answer.finish_reason == "length" for answer in task.answers)
        if cut:
            longest = work.decoding(work.tasks[name]).max_new_tokens
            work.context.say(
                f"{subject.name}: {cut:,} of {len(task.answers):,} answers to {name} were cut off at "
                f"max_new_tokens ({longest:,}) or at the end of the context"
            )


def _write(
    work: _Evaluation,
    scorers: Scorers,
    subjects: list[Subject],
    rows: dict[str, ModelRows],
    shown: dict[str, list[AnswerRow]],
    described: dict[str, dict[str, Any]],
) -> StepResult:
    settings, context, baseline = work.settings, work.context, work.settings.baseline
    assert baseline is not None  # filled when the settings were read
    answers = {
        role: {name: task.answers for name, task in {**one.tasks, **one.forgetting}.items()}
        for role, one in rows.items()
    }
    write_answers(context.folder / SCORES_FILE, answers)
    if work.traces:
        write_traces(context.folder / HELD_OUT_FILE, {role: one.traces for role, one in rows.items()})
    if any(task.traces for task in work.tasks.values()):
        write_forgetting(
            context.folder / FORGETTING_FILE,
            {
                role: {name: task.traces for name, task in one.forgetting.items()}
                for role, one in rows.items()
            },
        )
    write_atomically(
        context.folder / SAMPLES_FILE,
        json.dumps(_samples(work, answers, shown), ensure_ascii=False, indent=1),
    )
    base = next(one for one in subjects if one.name == baseline)
    gaps = differences(
        {role: one for role, one in rows.items() if role == baseline or not described[role]["is_teacher"]},
        baseline,
        same_tokens=[one.name for one in subjects if one.tokenizer_hash == base.tokenizer_hash],
        pass_at=settings.pass_at,
        seed=context.derive_seed("bootstrap"),
    )
    compared = [role for role in gaps if role in answers]
    judge = scorers.judge({role: answers[role] for role in (baseline, *compared)})
    rating_items = scorers.write_rating_sheet(answers)
    scorers.add_figures(described, gaps)
    decoded = [answer for tasks in answers.values() for given in tasks.values() for answer in given]
    known = {record_id for record_ids in work.answered.values() for record_id in record_ids}
    decoded += [answer for given in shown.values() for answer in given if answer.record_id not in known]
    return StepResult(
        counts={
            "models": len(subjects),
            "held_out_rows": len(work.traces),
            "task_prompts": sum(len(task.prompts) for task in work.tasks.values()),
            **({} if rating_items is None else {"rating_items": rating_items}),
        },
        metrics={
            "baseline": baseline,
            "teacher": None if settings.teacher is None else str(settings.teacher),
            "models": described,
            "differences": gaps,
            "tasks": {
                name: {
                    **task.described,
                    **(dataclasses.asdict(work.decoding(task)) if task.settings.generates else {}),
                }
                for name, task in work.tasks.items()
            },
            **({} if judge is None else {"judge": judge}),
            "machine": _machine(),
        },
        tokens=sum(answer.response_tokens or 0 for answer in decoded),
    )


def _samples(
    work: _Evaluation, answers: dict[str, dict[str, list[AnswerRow]]], shown: dict[str, list[AnswerRow]]
) -> list[dict[str, Any]]:
    """The first prompts of the held-out traces and of each task, with every model's first answer.

    One that both have, with the same answers, stands among the held-out traces.
    """
    first_traces: dict[str, Record] = {}
    for record in work.traces:
        first_traces.setdefault(record.prompt_id, record)
    parts = [(_HELD_OUT, work.samples, shown)]
    for name, task in work.tasks.items():
        of_task = {role: tasks[name] for role, tasks in answers.items() if tasks.get(name)}
        there = {one.id for one in work.samples} if name in work.answered else set()
        first = task.prompts[: work.settings.samples_shown]
        parts.append((name, [one for one in first if one.id not in there], of_task))
    samples = []
    for number_of_part, (source, records, given) in enumerate(parts):
        answered = {
            role: {row.prompt_id: row for row in rows if row.sample == 0} for role, rows in given.items()
        }
        for record in records:
            trace = first_traces.get(record.prompt_id) if number_of_part == 0 else None
            samples.append(
                {
                    "source": source,
                    "record_id": record.id,
                    "messages": record.messages,
                    "reference": record.reference,
                    "trace": None if trace is None else trace.response,
                    "answers": {
                        role: {
                            key: getattr(rows[record.prompt_id], key)
                            for key in ("response", "finish_reason", "response_tokens", "verdicts", "scores")
                        }
                        for role, rows in answered.items()
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
