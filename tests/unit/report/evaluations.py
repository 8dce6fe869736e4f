"""Evaluate steps as they are sealed, out of which answers are right."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.core.store import Manifest
from potstill.evaluate.rows import SCORES_FILE, AnswerRow, write_answers
from potstill.evaluate.summary import ModelRows, TaskRows, differences, figures
from potstill.report import RunView, StepView

Right = Mapping[str, Sequence[bool]]
"""By a model's role whether each of its answers is right."""


def step(
    name: str, kind: str, needs: Sequence[str] = (), *, folder: Path | None = None, **fields: Any
) -> StepView:
    """A sealed step of a second, without files."""
    given: dict[str, Any] = {"seconds": 1.0, "tokens": 0, "metrics": {}, **fields}
    manifest = Manifest(
        kind=kind, fingerprint="0", content="0", settings={"do": kind}, seed=1, files={}, versions={}, **given
    )
    return StepView(name, kind, [*needs], given["seconds"], False, manifest, folder)


def answers(right: Sequence[bool], prompts: str = "p") -> list[AnswerRow]:
    """An answer a prompt; prompts are numbered behind a word that tells one set from another."""
    return [
        AnswerRow(f"{prompts}{n}", f"{prompts}{n}", "[]", "text", "stop", 5, 10, {"correct": one})
        for n, one in enumerate(right)
    ]


def evaluation(
    folder: Path,
    name: str,
    tasks: Mapping[str, tuple[str, Right]],
    *,
    needs: Sequence[str] = (),
    references: Mapping[str, str] | None = None,
) -> StepView:
    """An evaluate step; `tasks` are by name the word of their prompts and the models, the baseline first."""
    roles = [*next(iter(tasks.values()))[1]]
    rows = {
        role: ModelRows(
            tasks={task: TaskRows(answers(right[role], prompts)) for task, (prompts, right) in tasks.items()}
        )
        for role in roles
    }
    folder.mkdir(parents=True)
    write_answers(
        folder / SCORES_FILE,
        {role: {task: one.answers for task, one in model.tasks.items()} for role, model in rows.items()},
    )
    models = {
        role: {"reference": (references or {}).get(role, role), **figures(one, seed=0)}
        for role, one in rows.items()
    }
    metrics = {
        "baseline": roles[0],
        "models": models,
        "differences": differences(rows, roles[0], same_tokens=(), seed=0),
        "tasks": {task: {"prompts": len(right[roles[0]])} for task, (_, right) in tasks.items()},
    }
    return step(name, "evaluate", needs, folder=folder, metrics=metrics)


def run(name: str, steps: Sequence[StepView], *, seed: int = 1) -> RunView:
    """A run of these steps."""
    return RunView(name, f"name: {name}\nseed: {seed}\n", [*steps])


def with_metrics_of(run: RunView, kind: str, **metrics: Any) -> RunView:
    """The run with further metrics of each step of a kind."""
    steps = [with_metrics(one, **metrics) if one.kind == kind else one for one in run.steps]
    return dataclasses.replace(run, steps=steps)


def with_metrics(one: StepView, **metrics: Any) -> StepView:
    """The step with further metrics."""
    assert one.manifest is not None
    return dataclasses.replace(
        one, manifest=one.manifest.model_copy(update={"metrics": {**one.manifest.metrics, **metrics}})
    )
