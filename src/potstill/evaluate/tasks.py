"""What models are evaluated on: held-out traces, tasks, and sets that show what was forgotten."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.core.step import StepContext
from potstill.data.chat import split_reasoning
from potstill.data.sources import Data, prompts, read
from potstill.evaluate.choices import check_choices
from potstill.evaluate.harness import check_harness
from potstill.evaluate.rouge import check_rouge
from potstill.evaluate.settings import EvaluateSettings, TaskSettings
from potstill.verifiers import check_verifiable

__all__ = ["TaskData", "read_tasks", "read_traces"]


@dataclass
class TaskData:
    """One task's prompts; for forgetting the rows' own responses as well.

    `references` are the responses that the rows come with, by prompt id, for ROUGE. `reasons` says whether
    one of them holds reasoning.
    """

    name: str
    settings: TaskSettings
    forgetting: bool
    prompts: list[Record] = field(default_factory=list)
    traces: list[Record] = field(default_factory=list)
    references: dict[str, list[str]] = field(default_factory=dict)
    reasons: bool = False

    @property
    def unchecked(self) -> int:
        """How many prompts have no answer that can be checked, so that nobody knows which answer is right."""
        if self.settings.verifier is not None or not self.settings.generates:
            return 0
        return sum(record.task is None for record in self.prompts)

    def groups(self, by: str | None) -> dict[str, str]:
        """The value of a column by prompt id, for the prompts that have it."""
        return (
            {} if by is None else {one.prompt_id: str(one.meta[by]) for one in self.prompts if by in one.meta}
        )

    @property
    def described(self) -> dict[str, Any]:
        """What a reader of the figures needs to know of the task."""
        found: dict[str, Any] = {"prompts": len(self.prompts), "choose_by": self.settings.choose_by}
        if self.unchecked:
            found["unchecked"] = self.unchecked
        if self.settings.choose_by == "text":
            found["normalise"] = self.settings.normalise
        options = [
            len(record.meta.get("choices") or ()) for record in self.prompts if record.task == "choice"
        ]
        if options and len(options) == len(self.prompts) and all(options):
            found["chance"] = sum(1 / count for count in options) / len(options)
        return found


def read_traces(data: Data | None, settings: EvaluateSettings, context: StepContext) -> list[Record]:
    """The held-out traces. DataError where rows have no responses."""
    if data is None:
        return []
    traces = list(islice((record for record in read(data, context) if record.response), settings.limit))
    if not traces:
        raise DataError(
            "these rows have no responses to measure models on",
            where="data",
            expected="traces, such as the held_out view of a generate step",
            mend="name a step that makes traces; prompts alone belong under tasks",
        )
    return traces


def read_tasks(settings: EvaluateSettings, context: StepContext) -> dict[str, TaskData]:
    """Tasks and sets for forgetting by name.

    Raises DataError, before any model is loaded, for rows that hold no prompt and for what cannot be judged.
    """
    if settings.rouge:
        check_rouge()
    if settings.lm_eval is not None:
        check_harness()
    tasks: dict[str, TaskData] = {}
    for name, one in settings.all_tasks.items():
        limit = one.limit or settings.limit
        task = TaskData(name, one, forgetting=name in settings.forgetting)
        if task.forgetting:
            _read_forgetting(task, limit, context)
        else:
            _read_task(task, limit, context, compared=settings.compares)
        where = f"{'forgetting' if task.forgetting else 'tasks'}.{name}"
        if one.generates:
            check_verifiable(task.prompts, one.verifier, where=where)
            if task.unchecked:
                context.say(_said_of_unchecked(task))
        else:
            check_choices(task.prompts, where=where)
        tasks[name] = task
    if settings.by is not None and not any(task.groups(settings.by) for task in tasks.values()):
        columns = {name for task in tasks.values() for one in task.prompts for name in one.meta}
        raise DataError(
            f"no prompt has the column {settings.by!r}",
            where="by",
            expected=f"one of {', '.join(sorted(columns))}"
            if columns
            else "a column beside question and answer, and the rows of the tasks have none",
            mend="name such a column, or give the tasks' sources `labels`",
        )
    if settings.compares and not any(task.references for task in tasks.values()):
        raise DataError(
            "the rows of no task have responses that answers could be compared with",
            where="tasks",
            expected="traces, such as {name: traces:held_out}",
            mend="name such a task, or leave rouge and bertscore out",
        )
    return tasks


def _read_task(task: TaskData, limit: int | None, context: StepContext, *, compared: bool) -> None:
    def noted() -> Iterator[Record]:
        for record in read(task.settings.data, context):
            task.reasons = task.reasons or record.reasoning is not None
            if compared and (text := _final_answer(record)):
                task.references.setdefault(record.prompt_id, []).append(text)
            yield record

    # A prompt's references may stand in any row.
    rows = iter([*noted()]) if compared else noted()
    task.prompts = list(islice(prompts(rows), limit))
    if not task.prompts:
        raise DataError(
            "no row is a prompt",
            where=f"tasks.{task.name}",
            expected="rows with a question or messages",
            mend="plain text has no place under tasks; under forgetting its perplexity is measured",
        )
    bare = sum(record.prompt_id not in task.references for record in task.prompts)
    if compared and bare:
        context.say(f"{task.name}: {bare:,} of {len(task.prompts):,} prompts have no answer to compare with")


def _said_of_unchecked(task: TaskData) -> str:
    count, of = task.unchecked, len(task.prompts)
    then = "right answers are counted on the others" if count < of else "right answers cannot be counted"
    return f"{task.name}: {count:,} of {of:,} questions have no answer that can be checked; {then}"


def _final_answer(record: Record) -> str:
    """The answer of a row's response; empty where it was cut off before one."""
    return split_reasoning(record.response or "")[1] if record.answer is None else record.answer


def _read_forgetting(task: TaskData, limit: int | None, context: StepContext) -> None:
    """Of each row what it allows: an answer where it has a verifier, perplexity where it has a response."""
    rows = list(read(task.settings.data, context))
    task.prompts = list(islice(prompts(record for record in rows if record.task is not None), limit))
    # The response of a multiple-choice row is its letter, written out for training.
    given = (record for record in rows if record.response and record.task != "choice")
    task.traces = list(islice(given, limit))
    task.reasons = any(record.reasoning is not None for record in task.traces)
    if not task.prompts and not task.traces:
        raise DataError(
            "nothing tells what was forgotten: these rows have no responses, and no verifier",
            where=f"forgetting.{task.name}",
            expected="traces, or questions with a gold answer",
            mend="name rows that models can be measured on, or leave this set out",
        )
