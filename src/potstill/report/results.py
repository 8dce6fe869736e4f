"""The figures of an evaluation as rows of measures by models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from potstill.core.store import Manifest
from potstill.report.tables import pooled_metrics
from potstill.report.view import RunView, StepView

__all__ = [
    "CHANCE_OF_ERROR",
    "Aspect",
    "Better",
    "Figure",
    "Measure",
    "Results",
    "Verdict",
    "clear_among",
    "format_figure",
    "format_interval",
    "p_value_of",
    "results_of",
]

Verdict = Literal["better", "worse", "unclear"]
Aspect = Literal["closeness", "traces", "task", "other", "reasoning", "forgetting", "group"]
Better = Literal["lower", "higher", "neither"]
Unit = Literal["nats", "share", "score", "perplexity", "tokens", "tokens/s", "seconds", "steps", "words"]
_UNITS_OF_LABELS = ("nats", "tokens", "tokens/s", "seconds", "steps", "words")
_Z_95 = 1.959963984540054
CHANCE_OF_ERROR = 0.05
_MANY_CUT_OFF = 0.1
_MANY_COMPARISONS = 4


@dataclass(frozen=True)
class Figure:
    """A value with the ends of its 95 % interval, None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measure:
    """One row of the table: a figure a model, and each model's paired difference to the baseline.

    The difference of a perplexity is the ratio of the two; all others are subtracted. `row_value` says where
    a row has its part in the figure: among an answer's verdicts or scores, or as a held-out trace, and under
    which name. `prompts` is how many the figure is of, where it is of a task's.
    """

    label: str
    unit: Unit
    better: Better
    values: dict[str, Figure]
    differences: dict[str, Figure] = field(default_factory=dict)
    aspect: Aspect = "other"
    task: str | None = None
    explanation: str = ""
    row_value: tuple[str, str] | None = None
    prompts: int | None = None

    @property
    def unit_of_label(self) -> str:
        """The unit, where it is said beside the label and not beside the figure."""
        return self.unit if self.unit in _UNITS_OF_LABELS else ""

    @property
    def heading(self) -> str:
        """Label and unit."""
        return f"{self.label}, {self.unit_of_label}" if self.unit_of_label else self.label

    def p_value(self, role: str) -> float:
        """The chance of such a difference where there is none, by its interval's half on that side."""
        gap = self.differences[role]
        assert gap.low is not None
        assert gap.high is not None
        value, low, high = gap.value, gap.low, gap.high
        if self.unit == "perplexity":
            value, low, high = (math.log(max(end, 1e-300)) for end in (value, low, high))
        return p_value_of(value, low, high)

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
        # An interval without width knows nothing of how sure it is.
        if difference.low <= nothing <= difference.high or difference.low == difference.high:
            return "unclear"
        return "better" if (difference.value < nothing) == (self.better == "lower") else "worse"


@dataclass(frozen=True)
class Results:
    """One evaluate step's table; `student` is the model that the conclusion speaks of, if any.

    `parts` are the steps that a table is of which pools those of one `each`.
    """

    step: str
    roles: list[str]
    baseline: str | None
    students: list[str]
    student: str | None
    teachers: list[str]
    measures: list[Measure]
    models: dict[str, dict[str, Any]]
    prompts: dict[str, int]
    notes: list[str]
    parts: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What heads the table, where a run has several."""
        return f"{self.step}, all together" if self.parts else self.step

    @property
    def judged(self) -> list[str]:
        """The models that may stand for their run beside other runs, the likeliest one first."""
        last_first = self.students[::-1] or self.roles[::-1]
        return sorted(last_first, key=lambda role: role != self.student)

    def of(self, *aspects: Aspect) -> list[Measure]:
        """The measures of some aspects, in order."""
        return [measure for measure in self.measures if measure.aspect in aspects]

    @property
    def main(self) -> list[Measure]:
        """All measures but those of reasoning, forgetting and groups, which have tables of their own."""
        return self.of("closeness", "traces", "task", "other")

    @property
    def comparisons(self) -> int:
        """How many differences are judged to be better, worse or neither."""
        return sum(one.verdict(role) is not None for one in self.measures for role in self.roles)

    @property
    def caution(self) -> str:
        """What the number of comparisons means; empty where there are few."""
        if self.comparisons < _MANY_COMPARISONS:
            return ""
        expected = self.comparisons * CHANCE_OF_ERROR
        return (
            f"{self.comparisons} differences are judged, each at 95 %: if none were real, "
            f"about {expected:.1g} would look clear by chance."
        )

    @property
    def compared(self) -> list[str]:
        """The models that have a difference to the baseline, in order."""
        return [role for role in self.roles if any(role in measure.differences for measure in self.measures)]


def p_value_of(value: float, low: float, high: float) -> float:
    """The chance of such a difference where there is none, by its 95 % interval's half on that side."""
    half = value - low if value > 0 else high - value
    return math.erfc(abs(value) / half * _Z_95 / math.sqrt(2)) if half > 0 else 1.0


def clear_among(findings: Sequence[tuple[bool, float]]) -> list[bool]:
    """Which of several differences are clear among so many (Holm 1979).

    `findings` are whether each is clear by itself, and its p-value. One alone is judged by its interval,
    which may not be a normal distribution's.
    """
    clear = [False] * len(findings)
    order = sorted(range(len(findings)), key=lambda number: findings[number][1])
    for rank, number in enumerate(order):
        by_itself, p_value = findings[number]
        if not by_itself or (len(findings) > 1 and p_value > CHANCE_OF_ERROR / (len(findings) - rank)):
            break
        clear[number] = True
    return clear


def results_of(run: RunView) -> list[Results]:
    """The table of each finished evaluate step, in order; behind those of one `each` that of all together."""
    steps = run.steps_of("evaluate")
    whole = {base: pooled for base in {_base(step) for step in steps} if (pooled := _pooled(run, base))}
    found = []
    for number, step in enumerate(steps):
        assert step.manifest is not None
        found.append(_results(step, step.manifest))
        if _base(step) in whole and _base(step) not in map(_base, steps[number + 1 :]):
            found.append(whole[_base(step)])
    return found


def _base(step: StepView) -> str:
    """The name under which the recipe has a step, without a value of `each`."""
    return step.name.partition("[")[0]


def _pooled(run: RunView, base: str) -> Results | None:
    """The table of all steps of one `each` together; None for one step, and where they are not all made."""
    parts = [step for step in run.steps if step.kind == "evaluate" and _base(step) == base]
    manifests = [part.manifest for part in parts if part.manifest is not None]
    if len(parts) < 2 or len(manifests) < len(parts) or (metrics := pooled_metrics(parts)) is None:
        return None
    whole = replace(parts[0], name=base)
    results = _results(whole, manifests[0].model_copy(update={"metrics": metrics}))
    return replace(results, parts=[part.name for part in parts])


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


_VERDICTS: dict[str, tuple[str, Aspect, str]] = {
    "correct": ("right answers", "task", ""),
    "handed_in": ("handed in", "other", "answers that came to their end before the limit of new tokens"),
    "reasons": (
        "with reasoning",
        "reasoning",
        "a think block with a step in it, or two steps or more before the answer",
    ),
    "well_formed": ("well-formed", "reasoning", "one think block, then an answer"),
    "judged": ("judged at all", "other", "the verifier neither failed nor took too long"),
    "has_object": ("with a JSON object", "other", ""),
    "has_code": ("with code", "other", ""),
}
_BY_STATES = "likeness to the responses given in the data, by a model's hidden states"
_SCORES: dict[str, tuple[str, Better, Aspect, str]] = {
    "reference_probability": ("probability of the right choice", "higher", "other", "among the options"),
    "reasoning_quality": (
        "quality of form",
        "higher",
        "reasoning",
        "0 to 1 by form, steps and length, less what is repeated; not by whether it is right",
    ),
    "repetition": ("repetition", "lower", "reasoning", "share of 8-grams that were there before"),
    "fields": ("right fields", "higher", "other", "share of an answer's fields"),
    "score": ("verifier's score", "higher", "other", ""),
    **{
        f"bertscore_{kind.lower()}": (f"BERTScore {kind}", "higher", "other", _BY_STATES)
        for kind in ("precision", "recall", "F1")
    },
}
_JUDGE: dict[str, tuple[str, Better, str]] = {
    "win_rate": (
        "preferred by the judge",
        "higher",
        "to the answer of the model that others are compared with; both orders, a tie counts half",
    ),
    "order_agreement": ("judge agrees with itself", "neither", "prompts where both orders say the same"),
    "first_preferred": (
        "judge prefers the first",
        "neither",
        "of its preferences, those for the answer shown first; 50 % without a bias",
    ),
}
_LIKENESS = "words shared with the responses given in the data: 0 none, 1 all"
_HIDDEN = frozenset({"tagged"})


def _task_rows(kind: str, task: str, found: dict[str, list[str]], about: dict[str, Any]) -> list[_Row]:
    """A task's rows: right answers, pass@k, other verdicts and scores, lengths; then those of reasoning."""
    path, forgotten = (kind, task), kind == "forgetting"
    rows = []
    for name in sorted(found["verdicts"], key=lambda name: (*_rank(name, _VERDICTS), name)):
        label, aspect, explanation = _VERDICTS.get(name, (name.replace("_", " "), "other", ""))
        if name == "correct":
            explanation = _how_judged(about)
        if name not in _HIDDEN:
            better: Better = "neither" if name == "judged" else "higher"
            rows.append(_Row((*path, "verdicts", name), label, "share", better, aspect, task, explanation))
    rows += [
        _Row((*path, "groups", value, "correct"), f"{value}, right answers", "share", "higher", "group", task)
        for value in found["groups"]
    ]
    for k in sorted(found["pass_at"], key=int):
        if k == "1":
            continue  # the mean over all samples, which stands above
        explanation = f"the chance that one of {k} answers is right"
        rows.append(_Row((*path, "pass_at", k), f"pass@{k}", "share", "higher", "other", task, explanation))
    for name in found["scores"]:
        label, better, aspect, explanation = _SCORES.get(
            name, (name.replace("rouge", "ROUGE-"), "higher", "other", _LIKENESS)
        )
        rows.append(_Row((*path, "scores", name), label, "score", better, aspect, task, explanation))
    for name, (label, better, explanation) in _JUDGE.items():
        rows.append(_Row((*path, "judge", name), label, "share", better, "other", task, explanation))
    for name in found["benchmark"]:
        better = "higher" if about["higher_is_better"].get(name, True) else "lower"
        rows.append(_Row((*path, "benchmark", name), name, "score", better, "other", task))
    rows += [
        _Row(
            (*path, "right_if_well_formed"), "right where well-formed", "share", "higher", "reasoning", task
        ),
        _Row((*path, "mean_reasoning_steps"), "reasoning", "steps", "neither", "reasoning", task),
        _Row((*path, "mean_reasoning_words"), "reasoning", "words", "neither", "reasoning", task),
        _Row((*path, "mean_response_tokens"), "response length", "tokens", "neither", "other", task),
        _Row(
            (*path, "seconds_per_response"),
            "time a response",
            "seconds",
            "neither",
            "other",
            task,
            "on this machine, of all answers' decoding together",
        ),
        _Row(
            (*path, "given", "perplexity"),
            "perplexity",
            "perplexity",
            "lower",
            "traces",
            task,
            "of the responses that the data comes with",
        ),
    ]
    if forgotten:
        # Whether old abilities are kept, and not how their answers look.
        rows = [replace(row, aspect="forgetting") for row in rows if row.aspect in ("task", "traces")]
    return [replace(row, label=f"{task}, {row.label}") for row in rows]


def _rank(name: str, known: dict[str, Any]) -> tuple[int]:
    return ([*known].index(name) if name in known else len(known),)


def _how_judged(about: dict[str, Any]) -> str:
    """How a task's answers come about, where that is not the usual way."""
    said = []
    if (samples := about.get("samples", 1)) > 1:
        said.append(f"mean over {samples} samples a prompt at temperature {about['temperature']:g}")
    if about.get("choose_by") == "letter":
        said.append("the likeliest letter")
    if about.get("choose_by") == "text":
        divided = {"none": "", "token": " a token", "byte": " a byte"}[about.get("normalise", "none")]
        said.append(f"the option of the likeliest text{divided}")
    if unchecked := about.get("unchecked"):
        said.append(f"{unchecked:,} of {about['prompts']:,} questions have no answer that can be checked")
    if about.get("chance"):
        said.append(f"by guessing {about['chance'] * 100:.0f} %")
    return "; ".join(said)


def _results(step: StepView, manifest: Manifest) -> Results:
    metrics = manifest.metrics
    models: dict[str, dict[str, Any]] = metrics.get("models", {})
    roles = list(models)
    baseline = metrics.get("baseline") if metrics.get("baseline") in models else None
    teachers = [role for role in roles if models[role].get("is_teacher") or role == "teacher"]
    students = [role for role in roles if role != baseline and role not in teachers]
    rows = [_KL, _AGREEMENT, _PERPLEXITY]
    prompts: dict[str, int] = {}
    silent: set[str] = set()
    for kind in ("tasks", "forgetting"):
        for task in dict.fromkeys(task for model in models.values() for task in model.get(kind, {})):
            found = {
                part: [
                    *dict.fromkeys(
                        name for model in models.values() for name in _dig(model, kind, task, part) or {}
                    )
                ]
                for part in ("verdicts", "scores", "pass_at", "benchmark", "groups")
            }
            about = {
                **(_dig(metrics, "tasks", task) or {}),
                "higher_is_better": {
                    name: better
                    for model in models.values()
                    for name, better in (_dig(model, kind, task, "higher_is_better") or {}).items()
                },
            }
            rows += _task_rows(kind, task, found, about)
            prompts[task] = max(
                _dig(model, kind, task, "prompts") or _dig(model, kind, task, "given", "rows") or 0
                for model in models.values()
            )
            if not any(_shows_reasoning(_dig(model, kind, task)) for model in models.values()):
                silent.add(task)
    measures = [_measure(row, models, metrics.get("differences", {}), prompts) for row in [*rows, _SPEED]]
    notes = [
        f"{role}: {refusal}"
        for role, model in models.items()
        if (refusal := _dig(model, "held_out", "kl_refused"))
    ]
    notes += [
        f"{role}, {task}: {refusal}"
        for role, model in models.items()
        for task, refusal in (model.get("not_measured") or {}).items()
    ]
    notes += [
        f"{task}: no question has an answer that can be checked, so that right answers are not counted"
        for task, about in (metrics.get("tasks") or {}).items()
        if about.get("unchecked") and about["unchecked"] == about["prompts"]
    ]
    notes += _cut_off(models)
    return Results(
        step=step.name,
        roles=roles,
        baseline=baseline,
        students=students,
        student="student" if "student" in students else (students[-1] if students else None),
        teachers=teachers,
        measures=[
            one
            for one in measures
            if one.values and not (one.aspect == "reasoning" and (one.task or "") in silent)
        ],
        models=models,
        prompts=prompts,
        notes=notes,
    )


def _cut_off(models: dict[str, dict[str, Any]]) -> list[str]:
    """Where so many answers were cut off that the figures tell of the limit of new tokens."""
    found = []
    for role, model in models.items():
        for kind in ("tasks", "forgetting"):
            for task, figures in model.get(kind, {}).items():
                endings = figures.get("finish_reasons") or {}
                cut, answers = endings.get("length", 0), sum(endings.values())
                if cut > _MANY_CUT_OFF * answers:
                    found.append(f"{role}, {task}: {cut:,} of {answers:,}")
    return [f"Cut off, and an unfinished answer is rarely right: {'; '.join(found)}."] if found else []


def _shows_reasoning(task: Any) -> bool:
    """Whether any answer of a model to a task has a think block."""
    return any(_dig(task, "verdicts", name, "value") for name in ("tagged", "well_formed"))


def _measure(
    row: _Row, models: dict[str, Any], differences: dict[str, Any], prompts: dict[str, int]
) -> Measure:
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
        row_value=_row_value(row.path),
        prompts=max(_dig(model, *row.path[:-1], "prompts") or 0 for model in models.values())
        if row.aspect == "group"
        else prompts.get(row.task or ""),
    )


def _row_value(path: tuple[str, ...]) -> tuple[str, str] | None:
    if path[0] == "held_out":
        return path[0], path[1]
    return (path[2], path[3]) if len(path) == 4 else None


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
        digits = {"seconds": 2 if abs(value) < 1 else 1, "steps": 1}.get(unit, 0)
        text = f"{value:{'+' if difference else ''},.{digits}f}"
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
