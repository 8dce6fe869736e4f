"""The figures of an evaluation as rows of measures by models, and what they allow a reader to conclude."""

from dataclasses import dataclass, field
from typing import Any, Literal

from potstill.core.store import Manifest
from potstill.report.view import RunView, StepView

__all__ = [
    "Better",
    "Conclusion",
    "Figure",
    "Measure",
    "Results",
    "Verdict",
    "conclusion",
    "format_figure",
    "format_interval",
    "results_of",
]

Verdict = Literal["better", "worse", "unclear"]
Aspect = Literal["closeness", "traces", "task", "other"]
Better = Literal["lower", "higher", "neither"]
Unit = Literal["nats", "share", "score", "perplexity", "tokens", "tokens/s"]


@dataclass(frozen=True)
class Figure:
    """A value with the ends of its 95 % interval, None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measure:
    """One row of the table: a figure a model, and each model's paired difference to the baseline.

    The difference of a perplexity is the ratio of the two; all others are subtracted.
    """

    label: str
    unit: Unit
    better: Better
    values: dict[str, Figure]
    differences: dict[str, Figure] = field(default_factory=dict)
    aspect: Aspect = "other"
    task: str | None = None
    explanation: str = ""

    def verdict(self, role: str) -> Verdict | None:
        """Whether a model is better than the baseline: only where the interval leaves out "no difference"."""
        difference = self.differences.get(role)
        if (
            difference is None
            or difference.low is None
            or difference.high is None
            or self.better == "neither"
        ):
            return None
        nothing = 1.0 if self.unit == "perplexity" else 0.0
        if difference.low <= nothing <= difference.high:
            return "unclear"
        return "better" if (difference.value < nothing) == (self.better == "lower") else "worse"


@dataclass(frozen=True)
class Results:
    """One evaluate step's table; `student` is the model that the conclusion speaks of, if any."""

    step: str
    roles: list[str]
    baseline: str | None
    student: str | None
    teachers: list[str]
    measures: list[Measure]
    models: dict[str, dict[str, Any]]
    prompts: dict[str, int]
    notes: list[str]

    @property
    def judged(self) -> str:
        """The model that stands for its run beside other runs: the student, else the last one."""
        return self.student or self.roles[-1]

    @property
    def compared(self) -> list[str]:
        """The models that have a difference to the baseline, in order."""
        return [role for role in self.roles if any(role in measure.differences for measure in self.measures)]


def results_of(run: RunView) -> list[Results]:
    """The table of each finished evaluate step, in order."""
    return [_results(step, step.manifest) for step in run.steps_of("evaluate") if step.manifest is not None]


def _figure(value: Any) -> Figure | None:
    if isinstance(value, int | float):
        return Figure(float(value))
    if isinstance(value, dict) and isinstance(value.get("value"), int | float):
        return Figure(value["value"], value.get("low"), value.get("high"))
    return None


def _dig(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


@dataclass(frozen=True)
class _Row:
    """A measure before it has values; `path` leads to it in a model's metrics."""

    path: tuple[str, ...]
    label: str
    unit: Unit
    better: Better
    aspect: Aspect = "other"
    task: str | None = None
    explanation: str = ""


_KL = _Row(
    ("held_out", "kl_nats_per_token"),
    "KL to the teacher",
    "nats",
    "lower",
    "closeness",
    explanation="mean over supervised tokens of held-out traces; 0 is the same distribution",
)
_AGREEMENT = _Row(
    ("held_out", "top1_agreement"),
    "Top-1 agreement",
    "share",
    "higher",
    "closeness",
    explanation="share of supervised tokens where the teacher ranks the same token first",
)
_PERPLEXITY = _Row(
    ("held_out", "perplexity"),
    "Perplexity",
    "perplexity",
    "lower",
    "traces",
    explanation="exp of the mean cross-entropy per supervised token of held-out traces",
)
_SPEED = _Row(
    ("speed", "decoding_tokens_per_s"),
    "Decoding speed",
    "tokens/s",
    "neither",
    explanation="on this machine, batched",
)


def _task_rows(task: str, verdicts: list[str], scores: list[str]) -> list[_Row]:
    """Right answers first, then form, then the other verdicts, likeness, and the length of responses."""
    labels = {"correct": "right answers", "well_formed": "well-formed"}
    rows = []
    for name in sorted(verdicts, key=lambda name: (name != "correct", name != "well_formed", name)):
        label = f"{task}, {labels.get(name, name.replace('_', ' '))}"
        aspect: Aspect = "task" if name == "correct" else "other"
        rows.append(_Row(("tasks", task, "verdicts", name), label, "share", "higher", aspect, task))
    for name in scores:
        label = f"{task}, {name.replace('rouge', 'ROUGE-')}"
        explanation = "words shared with the responses given in the data: 0 none, 1 all"
        rows.append(
            _Row(("tasks", task, "scores", name), label, "score", "higher", "other", task, explanation)
        )
    length = _Row(
        ("tasks", task, "mean_response_tokens"), f"{task}, response length", "tokens", "neither", task=task
    )
    return [*rows, length]


def _results(step: StepView, manifest: Manifest) -> Results:
    metrics = manifest.metrics
    models: dict[str, dict[str, Any]] = metrics.get("models", {})
    roles = list(models)
    baseline = metrics.get("baseline") if metrics.get("baseline") in models else None
    teachers = [role for role in roles if models[role].get("is_teacher") or role == "teacher"]
    students = [role for role in roles if role != baseline and role not in teachers]
    tasks = list(dict.fromkeys(task for model in models.values() for task in model.get("tasks", {})))
    rows = [_KL, _AGREEMENT, _PERPLEXITY]
    for task in tasks:
        verdicts, scores = (
            list(
                dict.fromkeys(
                    name for model in models.values() for name in _dig(model, "tasks", task, kind) or {}
                )
            )
            for kind in ("verdicts", "scores")
        )
        rows += _task_rows(task, verdicts, scores)
    measures = [_measure(row, models, metrics.get("differences", {})) for row in [*rows, _SPEED]]
    refusals = {role: _dig(model, "held_out", "kl_refused") for role, model in models.items()}
    return Results(
        step=step.name,
        roles=roles,
        baseline=baseline,
        student="student" if "student" in students else (students[-1] if students else None),
        teachers=teachers,
        measures=[measure for measure in measures if measure.values and not _says_nothing(measure)],
        models=models,
        prompts={
            task: max(_dig(model, "tasks", task, "prompts") or 0 for model in models.values())
            for task in tasks
        },
        notes=[f"{role}: {refusal}" for role, refusal in refusals.items() if refusal],
    )


def _measure(row: _Row, models: dict[str, Any], differences: dict[str, Any]) -> Measure:
    def figures(of: dict[str, Any]) -> dict[str, Figure]:
        found = {role: _figure(_dig(of.get(role), *row.path)) for role in models}
        return {role: figure for role, figure in found.items() if figure is not None}

    return Measure(
        label=row.label,
        unit=row.unit,
        better=row.better,
        values=figures(models),
        differences=figures(differences),
        aspect=row.aspect,
        task=row.task,
        explanation=row.explanation,
    )


def _says_nothing(measure: Measure) -> bool:
    """Well-formed reasoning, where no model reasons at all."""
    return measure.label.endswith("well-formed") and not any(
        figure.value for figure in measure.values.values()
    )


def format_figure(value: float, unit: str, *, difference: bool = False, ascii_only: bool = False) -> str:
    """A number with as many digits as it deserves; a difference carries its sign (or is a factor)."""
    if unit == "share":
        text = f"{value * 100:+.1f}" if difference else f"{value * 100:.1f} %"
    elif unit == "perplexity":
        times = "x" if ascii_only else "×"
        text = f"{times}{_significant(value)}" if difference else _significant(value)
    elif unit == "score":
        text = f"{value:+.3f}" if difference else f"{value:.3f}"
    elif unit == "nats":
        text = f"{value:{'+' if difference else ''}.{3 if abs(value) < 0.1 else 2}f}"
    else:
        text = f"{value:+,.0f}" if difference else f"{value:,.0f}"
    return text if ascii_only else text.replace("-", "−")


def format_interval(figure: Figure, unit: str, *, difference: bool = False, ascii_only: bool = False) -> str:
    """The interval's two ends, without the unit; empty where there is none."""
    if figure.low is None or figure.high is None:
        return ""
    ends = [
        format_figure(end, unit, difference=difference, ascii_only=ascii_only).removesuffix(" %")
        for end in (figure.low, figure.high)
    ]
    return f"{ends[0]} to {ends[1]}"


def _significant(value: float) -> str:
    if value >= 10_000:
        return f"{value:.1e}"
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


_PHRASES: dict[tuple[Aspect, Verdict], str] = {
    ("closeness", "better"): "closer to its teacher than {base}",
    ("closeness", "worse"): "further from its teacher than {base}",
    ("closeness", "unclear"): "not clearly closer to its teacher than {base}",
    ("traces", "better"): "better at predicting the held-out traces than {base}",
    ("traces", "worse"): "worse at predicting the held-out traces than {base}",
    ("traces", "unclear"): "not clearly better at predicting the held-out traces than {base}",
    ("task", "better"): "right more often",
    ("task", "worse"): "right less often",
    ("task", "unclear"): "not clearly right more often",
}


@dataclass(frozen=True)
class Conclusion:
    """The headline, and the figures that carry it."""

    headline: str
    verdict: Verdict
    evidence: list[Measure]


def conclusion(results: Results) -> Conclusion | None:
    """Is the student truly better than the baseline? None where the evaluation compares no such pair.

    Several tasks count as better only when none is worse and at least one is better.
    """
    student, base = results.student, results.baseline
    if student is None or base is None:
        return None
    judged = [
        (one, verdict)
        for one in results.measures
        if (verdict := one.verdict(student)) and one.aspect != "other"
    ]
    tasks = [(one, verdict) for one, verdict in judged if one.aspect == "task"]
    # KL where it could be measured, else agreement, else perplexity.
    traces = [(one, verdict) for one, verdict in judged if one.aspect != "task"][:1]
    verdicts: dict[Aspect, Verdict] = {one.aspect: verdict for one, verdict in traces}
    if tasks:
        verdicts["task"] = _joint([verdict for _, verdict in tasks])
    if not verdicts:
        return None
    parts = [_PHRASES[aspect, verdict] for aspect, verdict in verdicts.items()]
    found = set(verdicts.values())
    joint = " and " if len(found) == 1 else ", but " if "better" in found else ", and "
    other = "the base" if base == "base" else base
    sentence = joint.join(parts).format(base=other)
    if not traces:
        sentence += f" than {other}"
    if len(tasks) > 1:
        better = sum(verdict == "better" for _, verdict in tasks)
        sentence += f" (clearly so on {better} of {len(tasks)} tasks)"
    evidence = [one for one, _ in traces + tasks]
    subject = "The student" if student == "student" else student
    return Conclusion(f"{subject} is {sentence}.", _joint(list(verdicts.values())), evidence)


def _joint(verdicts: list[Verdict]) -> Verdict:
    found = set(verdicts) - {"unclear"}
    return found.pop() if len(found) == 1 else "unclear"
