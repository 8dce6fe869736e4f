"""Figures of judge, benchmarks, BERTScore and verifiers in the tables of a report."""

from types import SimpleNamespace
from typing import Any, cast

from potstill.report.results import Measure, Results, _results


def share(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def results() -> Results:
    task = {"prompts": 4, "verdicts": {"correct": share(0.5), "judged": share(0.9)}, "scores": {}}
    task["scores"] = {"fields": share(0.5), "bertscore_f1": share(0.8)}
    judged = {"win_rate": share(0.7), "order_agreement": share(0.8), "first_preferred": share(0.6)}
    benchmark = {
        "prompts": 9,
        "benchmark": {"acc": share(0.4), "word_perplexity": share(20.0)},
        "higher_is_better": {"acc": True, "word_perplexity": False},
    }
    models = {
        "base": {"tasks": {"sums": task, "lm_eval:arc": benchmark}},
        "student": {"tasks": {"sums": {**task, "judge": judged}, "lm_eval:arc": benchmark}},
    }
    gaps = {
        "sums": {"judge": {"win_rate": share(0.2)}},
        "lm_eval:arc": {"benchmark": {"acc": share(0.3), "word_perplexity": share(5.0)}},
    }
    metrics: dict[str, Any] = {
        "baseline": "base",
        "models": models,
        "differences": {"student": {"tasks": gaps}},
    }
    step: Any = SimpleNamespace(name="evaluation")
    return _results(step, cast(Any, SimpleNamespace(metrics=metrics)))


def measure(label: str) -> Measure:
    return next(one for one in results().measures if one.label == label)


def test_the_judges_preference_is_compared_with_a_half_and_its_bias_stands_beside_it() -> None:
    preferred = measure("sums, preferred by the judge")
    assert list(preferred.values) == ["student"]
    assert preferred.verdict("student") == "better"
    assert measure("sums, judge agrees with itself").verdict("student") is None
    assert measure("sums, judge prefers the first").values["student"].value == 0.6


def test_a_benchmark_is_better_in_the_direction_that_it_says() -> None:
    assert measure("lm_eval:arc, acc").verdict("student") == "better"
    assert measure("lm_eval:arc, word_perplexity").verdict("student") == "worse"
    assert results().prompts["lm_eval:arc"] == 9


def test_verifiers_and_likeness_have_labels_of_their_own() -> None:
    labels = {one.label for one in results().measures}
    assert {"sums, judged at all", "sums, right fields", "sums, BERTScore F1"} <= labels
