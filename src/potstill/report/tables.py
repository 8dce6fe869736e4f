"""The rows that evaluate steps keep, read for figures that no single step has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.core.errors import StoreError
from potstill.evaluate.rows import SCORES_FILE, answer_row
from potstill.evaluate.summary import ModelRows, TaskRows, differences, figures, verdict_differences
from potstill.report.view import StepView

__all__ = ["across_tasks", "pooled_metrics", "read_table"]

# Of answers that are counted: nearly all of a table's bytes are in the others.
_COUNTED = (
    *("model", "task", "record_id", "prompt_id", "sample", "finish_reason"),
    *("prompt_tokens", "response_tokens", "verdicts", "scores", "counts"),
)
_UNREAD = {"prompt": "", "response": "", "choice_logprobs": None, "note": None}


def read_table(
    step: StepView, file: str, columns: Sequence[str], model: str | None = None
) -> list[dict[str, Any]]:
    """Columns of a table's rows, all or one model's; none where it is gone.

    Raises StoreError where it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = (step.folder or Path()) / file
    if not path.is_file():
        return []
    filters = None if model is None else [("model", "=", model)]
    try:
        found: list[dict[str, Any]] = pq.read_table(path, columns=[*columns], filters=filters).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreError(
            f"cannot be read ({error})",
            where=str(path),
            expected=f"the table as the step {step.name!r} has written it",
            mend=f"make the step again: --force {step.name}",
        ) from error
    return found


def _answers(step: StepView) -> dict[str, dict[str, TaskRows]]:
    """The answers to a step's tasks by model and task, without their texts.

    Those to sets for forgetting are left out.
    """
    models = step.manifest.metrics.get("models", {}) if step.manifest is not None else {}
    found: dict[str, dict[str, TaskRows]] = {}
    for row in read_table(step, SCORES_FILE, _COUNTED):
        if row["task"] in models.get(row["model"], {}).get("tasks", {}):
            rows = found.setdefault(row["model"], {}).setdefault(row["task"], TaskRows())
            rows.answers.append(answer_row(_UNREAD | row))
    return found


def pooled_metrics(parts: Sequence[StepView]) -> dict[str, Any] | None:
    """The metrics of evaluate steps of one `each` as those of one, the values being groups.

    Of a task and a model that all parts have, every part's own model of that role answers for its prompts.
    None where parts share prompts, so that they are no parts of a whole, or where their rows are gone.
    """
    metrics = [part.manifest.metrics for part in parts if part.manifest is not None]
    answers = [_answers(part) for part in parts]
    roles = [role for role in answers[0] if all(role in one for one in answers)]
    baseline = metrics[0].get("baseline")
    if baseline not in roles:
        return None
    tasks = [
        task
        for task in answers[0][baseline]
        if all(task in one[role] for one in answers for role in roles)
        and _are_apart([one[baseline][task] for one in answers])
    ]
    if not tasks:
        return None
    rows = {
        role: ModelRows(tasks={task: _joined(parts, [one[role][task] for one in answers]) for task in tasks})
        for role in roles
    }
    models = metrics[0]["models"]
    stated = [part.manifest.settings.get("pass_at") for part in parts if part.manifest is not None]
    pass_at = stated[0] if all(one == stated[0] for one in stated) else None
    return {
        "baseline": baseline,
        "models": {
            role: {
                "reference": models[role].get("reference", ""),
                "is_teacher": models[role].get("is_teacher", False),
                **figures(rows[role], pass_at=pass_at, seed=0),
            }
            for role in roles
        },
        "differences": differences(rows, baseline, same_tokens=(), seed=0),
        "tasks": {
            task: _described([one.get("tasks", {}).get(task, {}) for one in metrics]) for task in tasks
        },
    }


def _are_apart(parts: Sequence[TaskRows]) -> bool:
    prompts = [{answer.prompt_id for answer in part.answers} for part in parts]
    return len(set().union(*prompts)) == sum(map(len, prompts))


def _joined(parts: Sequence[StepView], rows: Sequence[TaskRows]) -> TaskRows:
    """The rows of all parts, each prompt in the group of its part's value."""
    values = [part.name.partition("[")[2].removesuffix("]") for part in parts]
    return TaskRows(
        answers=[answer for one in rows for answer in one.answers],
        groups={
            answer.prompt_id: value for value, one in zip(values, rows, strict=True) for answer in one.answers
        },
    )


def _described(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What holds of a task in all parts, and the sums of what is counted."""
    first, *others = parts
    found = {key: value for key, value in first.items() if all(one.get(key) == value for one in others)}
    sums = {key: sum(one.get(key, 0) for one in parts) for key in ("prompts", "unchecked")}
    return {**found, **{key: value for key, value in sums.items() if value}}


def across_tasks(step: StepView, baseline: str) -> list[tuple[list[str], dict[tuple[str, str], Any]]]:
    """Tasks that ask the same questions in other words, with passages or without, say, against each other.

    Of each such set its tasks in order, and the difference in right answers of each model on each of them to
    the baseline on the first, by model and task.
    """
    answers = _answers(step)
    sets: dict[frozenset[str], list[str]] = {}
    for task, rows in answers.get(baseline, {}).items():
        if any("correct" in one.verdicts for one in rows.answers):
            sets.setdefault(frozenset(one.prompt_id for one in rows.answers), []).append(task)
    found = []
    for tasks in sets.values():
        base = answers[baseline][tasks[0]]
        gaps = {
            (role, task): gap["correct"]
            for role, of_role in answers.items()
            for task in tasks
            if (role, task) != (baseline, tasks[0]) and task in of_role
            if "correct" in (gap := verdict_differences(base, of_role[task]))
        }
        if len(tasks) > 1 and gaps:
            found.append((tasks, gaps))
    return found
