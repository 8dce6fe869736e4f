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
    mcnemar_exact,
    paired_share_difference,
    wilson_interval,
)
from potstill.evaluate.rows import AnswerRow, TraceRow

__all__ = ["ModelRows", "differences", "figures"]


@dataclass
class ModelRows:
    """All that was measured of one model; every model's rows are of the same prompts, in the same order."""

    traces: list[TraceRow] = field(default_factory=list)
    answers: dict[str, list[AnswerRow]] = field(default_factory=dict)
    decoding_seconds: float = 0.0


def figures(rows: ModelRows, *, seed: int) -> dict[str, Any]:
    """One model's figures: `held_out`, `tasks` and `speed`, where there are rows for them."""
    found: dict[str, Any] = {}
    if rows.traces:
        found["held_out"] = _trace_figures(rows.traces, seed)
    if rows.answers:
        found["tasks"] = {task: _answer_figures(answers, seed) for task, answers in rows.answers.items()}
    if rows.decoding_seconds > 0:
        tokens = sum(answer.response_tokens for answers in rows.answers.values() for answer in answers)
        found["speed"] = {"decoding_tokens_per_s": tokens / rows.decoding_seconds}
    return found


def _trace_figures(traces: Sequence[TraceRow], seed: int) -> dict[str, Any]:
    clusters = [trace.prompt_id for trace in traces]
    columns = _columns(traces)
    tokens = columns["supervised_tokens"]

    def ratio(name: str) -> Estimate:
        return bootstrap_ratio(columns[name], tokens, clusters, seed=seed)

    found: dict[str, Any] = {"rows": len(traces), "supervised_tokens": int(sum(tokens))}
    if "kl_nats" in columns:
        found["kl_nats_per_token"] = ratio("kl_nats").as_dict()
        found["top1_agreement"] = ratio("agreed_tokens").as_dict()
    # The exponential keeps order, so the ends of the interval are the exponentials of the mean's.
    found["perplexity"] = _exp(ratio("cross_entropy_nats")).as_dict()
    return found


def _columns(traces: Sequence[TraceRow]) -> dict[str, list[float]]:
    names = ("supervised_tokens", "cross_entropy_nats", "kl_nats", "agreed_tokens")
    columns = {name: [getattr(trace, name) for trace in traces] for name in names}
    return {name: values for name, values in columns.items() if None not in values}


def _exp(estimate: Estimate) -> Estimate:
    return Estimate(*(math.exp(min(end, 700.0)) for end in (estimate.value, estimate.low, estimate.high)))


def _answer_figures(answers: Sequence[AnswerRow], seed: int) -> dict[str, Any]:
    clusters = [answer.prompt_id for answer in answers]
    lengths = bootstrap_ratio(
        [answer.response_tokens for answer in answers],
        [1] * len(answers),
        clusters,
        seed=seed,
    )
    return {
        "prompts": len(answers),
        "scores": {
            name: bootstrap_ratio(scores, [1] * len(scores), _scored(answers), seed=seed).as_dict()
            for name, scores in _scores(answers).items()
        },
        "verdicts": {
            name: wilson_interval(sum(verdicts), len(verdicts)).as_dict()
            for name, verdicts in _verdicts(answers).items()
        },
        "mean_response_tokens": lengths.as_dict(),
        "finish_reasons": dict(sorted(Counter(answer.finish_reason for answer in answers).items())),
    }


def _verdicts(answers: Sequence[AnswerRow]) -> dict[str, list[bool]]:
    """The verdicts that every answer has, by name."""
    names = [name for name in answers[0].verdicts if all(name in answer.verdicts for answer in answers)]
    return {name: [answer.verdicts[name] for answer in answers] for name in names}


def _scores(answers: Sequence[AnswerRow]) -> dict[str, list[float]]:
    """The scores by name, of the answers that there is something to compare with."""
    scored = [answer.scores for answer in answers if answer.scores]
    return {name: [scores[name] for scores in scored] for name in scored[0]} if scored else {}


def _scored(answers: Sequence[AnswerRow]) -> list[str]:
    """The prompts of these answers, the same ones of every model."""
    return [answer.prompt_id for answer in answers if answer.scores]


def differences(
    rows: Mapping[str, ModelRows], baseline: str, *, same_tokens: Sequence[str], seed: int
) -> dict[str, Any]:
    """Each model's differences to the baseline, paired on the same prompts; shaped as `figures`.

    KL, agreement and shares are subtracted, perplexities divided. `same_tokens` are the models whose token
    ids are the baseline's: others spread a trace over other tokens, and per-token figures cannot be compared.
    """
    base = rows[baseline]
    found: dict[str, Any] = {}
    for role, model in rows.items():
        if role == baseline:
            continue
        one: dict[str, Any] = {}
        if model.traces and role in same_tokens:
            one["held_out"] = _trace_differences(base.traces, model.traces, seed)
        if model.answers:
            one["tasks"] = {
                task: {
                    "verdicts": _verdict_differences(base.answers[task], answers),
                    "scores": _score_differences(base.answers[task], answers, seed),
                }
                for task, answers in model.answers.items()
            }
        found[role] = one
    return found


def _trace_differences(base: Sequence[TraceRow], model: Sequence[TraceRow], seed: int) -> dict[str, Any]:
    clusters = [trace.prompt_id for trace in base]
    first, second = _columns(base), _columns(model)

    def difference(name: str) -> Estimate:
        return bootstrap_ratio_difference(
            (first[name], first["supervised_tokens"]),
            (second[name], second["supervised_tokens"]),
            clusters,
            seed=seed,
        )

    found = {"perplexity": _exp(difference("cross_entropy_nats")).as_dict()}
    if "kl_nats" in first and "kl_nats" in second:
        found["kl_nats_per_token"] = difference("kl_nats").as_dict()
        found["top1_agreement"] = difference("agreed_tokens").as_dict()
    return found


def _score_differences(
    base: Sequence[AnswerRow], model: Sequence[AnswerRow], seed: int
) -> dict[str, dict[str, float]]:
    clusters, first, second = _scored(base), _scores(base), _scores(model)
    ones = [1] * len(clusters)
    return {
        name: bootstrap_ratio_difference(
            (first[name], ones), (second[name], ones), clusters, seed=seed
        ).as_dict()
        for name in first
        if name in second
    }


def _verdict_differences(base: Sequence[AnswerRow], model: Sequence[AnswerRow]) -> dict[str, Any]:
    first, second = _verdicts(base), _verdicts(model)
    return {
        name: {
            **paired_share_difference(first[name], second[name]).as_dict(),
            "mcnemar_p": mcnemar_exact(first[name], second[name]),
        }
        for name in first
        if name in second
    }
