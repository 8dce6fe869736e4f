"""The `select` step: read, filter, score, choose, write; what one stage has done outlives a kill."""

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, closing

import numpy as np

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.core.settings import ModelRef
from potstill.core.step import StepContext, StepResult
from potstill.models import transformers_model
from potstill.select.candidates import ARMS, Candidate, Candidates
from potstill.select.figures import arm, histogram, warnings
from potstill.select.pool import MISSING, Chosen, Pool, logprob_temperature
from potstill.select.rules import keep_at_random, keep_best, keep_of_like_length
from potstill.select.scores import (
    LocalScores,
    ModelScores,
    ReplicatedScores,
    ServedScores,
    TokenScores,
    probability,
    sentence_class,
    sentence_probabilities,
    stored_scores,
    without_unknown,
)
from potstill.select.sentences import sentences
from potstill.select.settings import SelectSettings
from potstill.teachers import OpenAIModel, VllmModel, check_gives_logprobs

__all__ = ["select"]

_SCORED_FILE = "scored.sqlite"
_UNPLACED = "nobody knows which bytes of the response its tokens stand for"
_MEND_UNPLACED = (
    "generate again with `logprobs: 1`, which notes the bytes, name a `teacher` that scores them, or take "
    "`level: response`"
)


def select(settings: SelectSettings, context: StepContext) -> StepResult:
    """Carry out a select step. Raises DataError where no row can be chosen from, or the rule keeps none."""
    pool = Pool(settings, context)
    if settings.rule == "none":
        return pool.write()
    with ExitStack() as stack:
        scorers = {
            role: stack.enter_context(closing(_open(role, reference, settings, context)))
            for role, reference in settings.models.items()
        }
        tokens = sum(_fill(role, scorer, pool) for role, scorer in scorers.items())
        path, seed = context.scratch / _SCORED_FILE, context.derive_seed("control")
        candidates = stack.enter_context(Candidates(path, seed))
        _Scoring(settings, scorers).add(pool, candidates)
        return pool.write(_choose(settings, context, candidates, pool), tokens=tokens)


def _open(role: str, reference: ModelRef, settings: SelectSettings, context: StepContext) -> ModelScores:
    model = context.model(reference)
    check_gives_logprobs(model, f"the {role} {reference}")
    if isinstance(model, OpenAIModel | VllmModel):
        return ServedScores(model, context, role, settings.max_failed_share)
    model = transformers_model(context, reference, device=settings.device)
    if context.replicas is not None:
        return ReplicatedScores(model, context, settings.max_tokens, context.replicas)
    return LocalScores(model, context, settings.max_tokens)


def _fill(role: str, scorer: ModelScores, pool: Pool) -> int:
    """Let a model score the rows that it has to; returns their tokens."""
    needed = pool.temperatures.total() - (pool.temperatures[1.0] if role == "teacher" else 0)
    rows = (one for one in pool.candidates() if role != "teacher" or logprob_temperature(one[1]) != 1.0)
    if not needed:
        return 0
    with pool.context.progress(f"scoring: {role}", total=needed) as progress:
        return scorer.fill(rows, progress.advance)


class _Scoring:
    """What rows are ranked by, or why they cannot be."""

    def __init__(self, settings: SelectSettings, scorers: Mapping[str, ModelScores]) -> None:
        self._settings, self._scorers = settings, scorers

    def add(self, pool: Pool, candidates: Candidates) -> None:
        """Add a pool's rows to the candidates; DataError where none can be scored."""
        for number, record in pool.candidates():
            found = self._tokens(number, record)
            scores = found if isinstance(found, str) else self._scores(record, found)
            if isinstance(scores, str) or isinstance(found, str):
                candidates.leave_out(number, str(scores))
                continue
            candidates.add(
                Candidate(
                    number,
                    record.id,
                    record.prompt_id,
                    len(found["student"].logprobs),
                    self._score(scores),
                    scores["divergence"],
                ),
                scores,
            )
        candidates.flush()
        if not candidates.count():
            reasons = candidates.most_common_reasons(3)
            raise DataError(
                "no row can be scored: " + "; ".join(f"{count:,} x {reason}" for reason, count in reasons),
                where=str(self._settings.data),
                expected="traces that are not held out, which student and teacher can both score",
                mend=_MEND_UNPLACED if any(_UNPLACED in reason for reason, _ in reasons) else None,
            )

    def _tokens(self, number: int, record: Record) -> dict[str, TokenScores] | str:
        """What each model gives to the response's tokens, by role, or why it gives nothing."""
        with_bytes = self._settings.level == "sentence"
        found: dict[str, TokenScores] = {}
        for role in ("teacher", "student", "distilled"):
            scorer = self._scorers.get(role)
            scores: TokenScores | str
            if role == "teacher" and (scorer is None or logprob_temperature(record) == 1.0):
                scores = stored_scores(record, (scorer or self._scorers["student"]).renderer)
            elif scorer is None:
                continue
            else:
                scores = scorer.of(number, record, with_bytes=with_bytes)
            if isinstance(scores, str):
                return f"{role}: {scores}"
            if with_bytes and scores.token_bytes is None:
                return f"{role}: {_UNPLACED}"
            if role == "teacher" and scores.token_bytes is not None:
                # Servers that give no log p of the reasoning: no model is compared on what only some know.
                with_bytes = with_bytes or bool(np.isnan(scores.logprobs).any())
            found[role] = scores
        if with_bytes:
            teacher = found["teacher"]
            try:
                found = {role: without_unknown(scores, teacher) for role, scores in found.items()}
            except DataError as error:
                return error.what
        return found

    def _scores(self, record: Record, tokens: Mapping[str, TokenScores]) -> dict[str, float] | str:
        whole = {role: probability(one.logprobs) for role, one in tokens.items()}
        for role, value in whole.items():
            if math.isnan(value):
                return f"{role}: the log-probability of none of its tokens is known"
        scores = {f"{role}_probability": value for role, value in whole.items()}
        scores["divergence"] = whole["teacher"] - whole["student"]
        if self._settings.level == "response":
            return scores
        spans = sentences(record.response or "")
        try:
            by_role = {role: sentence_probabilities(one, spans) for role, one in tokens.items()}
        except DataError as error:
            return error.what
        classes: Counter[str] = Counter()
        for place in range(len(spans)):
            of = {role: float(values[place]) for role, values in by_role.items()}
            if not any(map(math.isnan, of.values())):
                classes[
                    sentence_class(
                        of["teacher"],
                        of["student"],
                        of.get("distilled"),
                        alpha=self._settings.alpha,
                        beta=self._settings.beta,
                    )
                ] += 1
        if not classes:
            return "no sentence has tokens of all models"
        scores["sentences"] = float(classes.total())
        names = ("teacher", "student", "shared", *(["boosted"] if "distilled" in tokens else []))
        return scores | {f"{name}_sentences": float(classes[name]) for name in names}

    def _score(self, scores: Mapping[str, float]) -> float:
        if self._settings.level == "response":
            return scores["divergence"]
        share = 1.0 if self._settings.measure == "count" else scores["sentences"]
        return scores["teacher_sentences"] / share


def _choose(settings: SelectSettings, context: StepContext, candidates: Candidates, pool: Pool) -> Chosen:
    keep = settings.keep
    assert keep is not None
    keep_best(candidates, keep)
    if not candidates.count("rule"):
        _, highest = candidates.extremes("score")
        raise DataError(
            f"no row reaches the threshold of {keep.threshold:g}; the highest score is {highest:.4g}",
            expected="a threshold that some rows reach",
            mend="lower it, or keep a share of the rows: `keep: {top: 0.6}`",
        )
    keep_at_random(candidates, keep)
    keep_of_like_length(candidates, keep)
    lowest = min(candidates.values("score", "rule"))
    found = [*_temperature_warnings(settings, pool), *warnings(settings, candidates)]
    for warning in found:
        context.say(f"warning: {warning}")
        context.event("warning", message=warning)
    least, most = candidates.extremes("divergence")
    metrics = {
        "score": "divergence" if settings.level == "response" else f"{settings.measure} of teacher sentences",
        "kept_by": settings.control or "rule",
        # Of each prompt the best stay: there is no score from which on rows do.
        "effective_threshold": lowest if keep.per_prompt is None else None,
        "divergence": {
            "mean": math.fsum(candidates.values("divergence")) / candidates.count(),
            "low": least,
            "high": most,
        },
        "arms": {name: arm(candidates, name) for name in ARMS},
        "histogram": histogram(candidates),
        "warnings": found,
    }
    if settings.control is not None:
        reason = f"not drawn by the control ({settings.control})"
    elif keep.per_prompt is not None:
        reason = f"not among the best {keep.per_prompt} of its prompt"
    else:
        reason = f"below {lowest:.4g}, the lowest score that is kept"
    return Chosen(candidates, settings.control or "rule", reason, metrics)


def _temperature_warnings(settings: SelectSettings, pool: Pool) -> list[str]:
    """What log-probabilities at another temperature than 1 mean, where they are used as they are."""
    if settings.teacher is not None:
        return []
    others = {one: count for one, count in pool.temperatures.items() if one not in (1.0, MISSING)}
    if not others:
        return []
    named = " and ".join(
        "a temperature that nobody states" if one is None else f"temperature {one:g}" for one in others
    )
    return [
        (
            f"{sum(others.values()):,} traces have log-probabilities at {named}, which are not log p at "
            "temperature 1: below 1 the teacher looks surer than it is, above it less sure, and every "
            "divergence shifts with it. Shares (`top`, `per_prompt`) within one temperature suffer less than "
            "thresholds and sentence classes. Name a `teacher` to score them at 1 (a model that runs here "
            "or on a vLLM server), or state the server's `logprob_temperature` on its model where it is "
            "known (vLLM's default is 1)"
        )
    ]
