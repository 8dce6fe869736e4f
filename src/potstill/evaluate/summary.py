"""From rows to figures: each model's with a 95 % interval, and the paired differences to the baseline."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from potstill.evaluate.intervals import (
    Estimate,
    bootstrap_ratio,
    bootstrap_ratio_difference,
    clustered_share,
    clustered_share_difference,
    independent_share_difference,
    mcnemar_exact,
    paired_share_difference,
    pass_at_k,
)
from potstill.evaluate.rows import SCORED, AnswerRow, TraceRow

__all__ = ["ModelRows", "TaskRows", "differences", "figures", "verdict_differences"]


@dataclass
class TaskRows:
    """One model on one task, its samples of a prompt one after the other; traces on a set for forgetting.

    `seconds` is what decoding the answers took, where all of them were decoded for this evaluation. `groups`
    are values by prompt id, such as categories.
    """

    answers: list[AnswerRow] = field(default_factory=list)
    traces: list[TraceRow] = field(default_factory=list)
    seconds: float | None = None
    groups: dict[str, str] = field(default_factory=dict)

    @property
    def by_group(self) -> "dict[str, TaskRows]":
        """The answers of each group that has verdicts on right and wrong, by its value."""
        found = {value: TaskRows() for value in sorted(set(self.groups.values()))}
        for answer in self.answers:
            if answer.prompt_id in self.groups:
                found[self.groups[answer.prompt_id]].answers.append(answer)
        return {value: rows for value, rows in found.items() if rows.answers and "correct" in _verdicts(rows)}

    @property
    def by_prompt(self) -> list[list[AnswerRow]]:
        """The answers of each prompt."""
        found: dict[str, list[AnswerRow]] = {}
        for answer in self.answers:
            found.setdefault(answer.prompt_id, []).append(answer)
        return [*found.values()]

    @property
    def samples(self) -> int:
        """Answers a prompt."""
        return max(len(answers) for answers in self.by_prompt)


@dataclass
class ModelRows:
    """All that was measured of one model; every model's rows are of the same prompts, in the same order.

    What cannot be measured of a model has no rows: held-out traces, a task whose options are scored.
    """

    traces: list[TraceRow] = field(default_factory=list)
    tasks: dict[str, TaskRows] = field(default_factory=dict)
    forgetting: dict[str, TaskRows] = field(default_factory=dict)


def figures(rows: ModelRows, *, pass_at: Sequence[int] | None = None, seed: int) -> dict[str, Any]:
    """One model's figures: `held_out`, `tasks`, `forgetting` and `speed`, where there are rows for them.

    `pass_at` are the k of pass@k; by default the number of samples where there are several.
    """
    found: dict[str, Any] = {}
    if rows.traces:
        found["held_out"] = _trace_figures(rows.traces, seed)
    for kind, tasks in (("tasks", rows.tasks), ("forgetting", rows.forgetting)):
        if tasks:
            found[kind] = {name: _task_figures(task, pass_at, seed) for name, task in tasks.items()}
    timed = [task for task in (*rows.tasks.values(), *rows.forgetting.values()) if task.seconds]
    if timed:
        tokens = sum(answer.response_tokens or 0 for task in timed for answer in task.answers)
        found["speed"] = {"decoding_tokens_per_s": tokens / sum(task.seconds or 0.0 for task in timed)}
    return found


def _trace_figures(traces: Sequence[TraceRow], seed: int) -> dict[str, Any]:
    clusters = [trace.prompt_id for trace in traces]
    columns = _columns(traces)
    tokens = columns["supervised_tokens"]

    def ratio(name: str, highest: float = math.inf) -> Estimate:
        return bootstrap_ratio(columns[name], tokens, clusters, seed=seed, within=(0.0, highest), pseudo=1)

    found: dict[str, Any] = {"rows": len(traces), "supervised_tokens": int(sum(tokens))}
    if "kl_nats" in columns:
        found["kl_nats_per_token"] = ratio("kl_nats").as_dict()
        found["top1_agreement"] = ratio("agreed_tokens", 1.0).as_dict()
    # The exponential keeps order, so the ends of the interval are the exponentials of the mean's.
    found["perplexity"] = _exp(ratio("cross_entropy_nats")).as_dict()
    return found


def _columns(traces: Sequence[TraceRow]) -> dict[str, list[float]]:
    names = ("supervised_tokens", "cross_entropy_nats", "kl_nats", "agreed_tokens")
    columns = {name: [getattr(trace, name) for trace in traces] for name in names}
    return {name: values for name, values in columns.items() if None not in values}


def _exp(estimate: Estimate) -> Estimate:
    ends = (estimate.value, estimate.low, estimate.high)
    return Estimate(*(end if end == math.inf else math.exp(min(end, 700.0)) for end in ends))


def _task_figures(task: TaskRows, pass_at: Sequence[int] | None, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if task.traces:
        found["given"] = _trace_figures(task.traces, seed)
    if not task.answers:
        return found
    answers, samples = task.answers, task.samples
    found |= {
        "prompts": len(task.by_prompt),
        "samples": samples,
        "verdicts": {
            name: clustered_share([*values.values()], samples=samples).as_dict()
            for name, values in _verdicts(task).items()
        },
        "pass_at": {
            str(k): clustered_share([*values.values()], samples=samples).as_dict()
            for k, values in _passes(task, pass_at).items()
        },
        "scores": {
            name: bootstrap_ratio(values, [1] * len(values), clusters, seed=seed, within=(0, 1)).as_dict()
            for name, (values, clusters) in _scores(task).items()
        },
    }
    if groups := task.by_group:
        right = {value: [*_verdicts(rows)["correct"].values()] for value, rows in groups.items()}
        found["groups"] = {
            value: {"prompts": len(of_group), "correct": clustered_share(of_group, samples=samples).as_dict()}
            for value, of_group in right.items()
        }
    if (given_form := _right_if_well_formed(task)) is not None:
        found["right_if_well_formed"] = given_form.as_dict()
    for name, values in _counts(task).items():
        clusters = [answer.prompt_id for answer in answers]
        mean = bootstrap_ratio(values, [1] * len(values), clusters, seed=seed, within=(0, math.inf))
        found[f"mean_{name}"] = mean.as_dict()
    if any(answer.finish_reason != SCORED for answer in answers):
        found["finish_reasons"] = dict(sorted(Counter(answer.finish_reason for answer in answers).items()))
    if task.seconds:
        found["seconds_per_response"] = task.seconds / len(answers)
    return found


_ByPrompt = dict[str, float]


def _verdicts(task: TaskRows) -> dict[str, _ByPrompt]:
    """By a verdict's name, as a share of the answers of each prompt that has it on all of them.

    Whether an answer is right is not known of a question that came without one, and of the others it is.
    """
    found: dict[str, _ByPrompt] = {}
    for answers in task.by_prompt:
        for name in answers[0].verdicts:
            if all(name in one.verdicts for one in answers):
                share = sum(one.verdicts[name] for one in answers) / len(answers)
                found.setdefault(name, {})[answers[0].prompt_id] = share
    return found


def _passes(task: TaskRows, pass_at: Sequence[int] | None) -> dict[int, _ByPrompt]:
    """The estimate of pass@k of each prompt that is judged, by k; none where there is one sample a prompt."""
    samples, right = task.samples, _verdicts(task).get("correct")
    if samples == 1 or right is None:
        return {}
    wanted = [samples] if pass_at is None else [k for k in pass_at if k <= samples]
    return {
        k: {prompt: pass_at_k(samples, round(share * samples), k) for prompt, share in right.items()}
        for k in sorted({*wanted})
    }


def _right_if_well_formed(task: TaskRows) -> Estimate | None:
    """The share of right answers among those with well-formed reasoning; None where there are none.

    Samples of one prompt count as one answer, so that the interval is never too narrow.
    """
    formed = [
        answer
        for answer in task.answers
        if answer.verdicts.get("well_formed") and "correct" in answer.verdicts
    ]
    if not formed:
        return None
    prompts: dict[str, list[bool]] = {}
    for answer in formed:
        prompts.setdefault(answer.prompt_id, []).append(answer.verdicts["correct"])
    return clustered_share([sum(right) / len(right) for right in prompts.values()], samples=1)


def _scores(task: TaskRows) -> dict[str, tuple[list[float], list[str]]]:
    """The scores by name, with the prompts of the answers that have them, the same ones of every model."""
    names = dict.fromkeys(name for answer in task.answers for name in answer.scores)
    return {
        name: (
            [answer.scores[name] for answer in task.answers if name in answer.scores],
            [answer.prompt_id for answer in task.answers if name in answer.scores],
        )
        for name in names
    }


def _counts(task: TaskRows) -> dict[str, list[float]]:
    """Lengths by name, where every answer has them: response_tokens, reasoning_steps, reasoning_words."""
    written = [answer for answer in task.answers if answer.finish_reason != SCORED]
    found: dict[str, list[float]] = {}
    if not written:
        return found
    tokens = [answer.response_tokens for answer in written]
    if None not in tokens:
        found["response_tokens"] = [float(one or 0) for one in tokens]
    for name in written[0].counts:
        if all(name in answer.counts for answer in written):
            found[name] = [float(answer.counts[name]) for answer in written]
    return found


def differences(
    rows: Mapping[str, ModelRows],
    baseline: str,
    *,
    same_tokens: Sequence[str],
    pass_at: Sequence[int] | None = None,
    seed: int,
) -> dict[str, Any]:
    """Each model's differences to the baseline, paired on the same prompts; shaped as `figures`.

    KL, agreement and shares are subtracted, perplexities divided. `same_tokens` are the models whose token
    ids are the baseline's: others spread a trace over other tokens, and per-token figures cannot be compared.
    What one of the two lacks is left out.
    """
    base = rows[baseline]
    found: dict[str, Any] = {}
    for role, model in rows.items():
        if role == baseline:
            continue
        one: dict[str, Any] = {}
        comparable = role in same_tokens
        if base.traces and model.traces and comparable:
            one["held_out"] = _trace_differences(base.traces, model.traces, seed)
        for kind in ("tasks", "forgetting"):
            first, second = getattr(base, kind), getattr(model, kind)
            gaps = {
                name: _task_differences(first[name], task, pass_at=pass_at, same_tokens=comparable, seed=seed)
                for name, task in second.items()
                if name in first
            }
            if gaps:
                one[kind] = gaps
        found[role] = one
    return found


def _trace_differences(base: Sequence[TraceRow], model: Sequence[TraceRow], seed: int) -> dict[str, Any]:
    clusters = [trace.prompt_id for trace in base]
    first, second = _columns(base), _columns(model)

    def difference(name: str, highest: float = math.inf) -> Estimate:
        return bootstrap_ratio_difference(
            (first[name], first["supervised_tokens"]),
            (second[name], second["supervised_tokens"]),
            clusters,
            seed=seed,
            within=(0.0, highest),
            pseudo=1,
        )

    found = {"perplexity": _exp(difference("cross_entropy_nats")).as_dict()}
    if "kl_nats" in first and "kl_nats" in second:
        found["kl_nats_per_token"] = difference("kl_nats").as_dict()
        found["top1_agreement"] = difference("agreed_tokens", 1.0).as_dict()
    return found


def _task_differences(
    base: TaskRows, model: TaskRows, *, pass_at: Sequence[int] | None, same_tokens: bool, seed: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if base.traces and model.traces and same_tokens:
        found["given"] = _trace_differences(base.traces, model.traces, seed)
    if not base.answers or not model.answers:
        return found
    samples = model.samples
    found["verdicts"] = verdict_differences(base, model)
    groups, others_groups = base.by_group, model.by_group
    if both := [value for value in groups if value in others_groups]:
        found["groups"] = {
            value: {
                "correct": _share_difference(
                    _verdicts(groups[value])["correct"], _verdicts(others_groups[value])["correct"], samples
                )
            }
            for value in both
        }
    passes, others = _passes(base, pass_at), _passes(model, pass_at)
    found["pass_at"] = {
        str(k): clustered_share_difference(*_common(first, others[k]), samples=samples).as_dict()
        for k, first in passes.items()
        if k in others
    }
    scores, other_scores = _scores(base), _scores(model)
    found["scores"] = {
        name: _mean_difference(values, other_scores[name][0], clusters, seed, highest=1.0)
        for name, (values, clusters) in scores.items()
        if name in other_scores and other_scores[name][1] == clusters
    }
    one, two = _right_if_well_formed(base), _right_if_well_formed(model)
    if one is not None and two is not None:
        found["right_if_well_formed"] = independent_share_difference(one, two).as_dict()
    counts, other_counts = _counts(base), _counts(model)
    clusters = [answer.prompt_id for answer in base.answers]
    for name, values in counts.items():
        if name in other_counts:
            found[f"mean_{name}"] = _mean_difference(values, other_counts[name], clusters, seed)
    return found


def verdict_differences(base: TaskRows, model: TaskRows) -> dict[str, dict[str, float]]:
    """By a verdict's name the second's share less the first's, paired on the prompts that both have it of."""
    firsts, seconds = _verdicts(base), _verdicts(model)
    return {
        name: _share_difference(first, seconds[name], model.samples)
        for name, first in firsts.items()
        if first.keys() & seconds.get(name, {}).keys()
    }


def _common(first: _ByPrompt, second: _ByPrompt) -> tuple[list[float], list[float]]:
    """Both models' values of the prompts that both have."""
    common = [prompt for prompt in first if prompt in second]
    return [first[prompt] for prompt in common], [second[prompt] for prompt in common]


def _share_difference(first: _ByPrompt, second: _ByPrompt, samples: int) -> dict[str, float]:
    ours, theirs = _common(first, second)
    if samples > 1:
        return clustered_share_difference(ours, theirs, samples=samples).as_dict()
    right = [value == 1 for value in ours], [value == 1 for value in theirs]
    return {**paired_share_difference(*right).as_dict(), "mcnemar_p": mcnemar_exact(*right)}


def _mean_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[str],
    seed: int,
    highest: float = math.inf,
) -> dict[str, float]:
    ones = [1] * len(clusters)
    return bootstrap_ratio_difference(
        (first, ones), (second, ones), clusters, seed=seed, within=(0.0, highest)
    ).as_dict()
