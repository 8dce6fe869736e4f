import math

import pytest

from potstill.evaluate.rows import AnswerRow, TraceRow
from potstill.evaluate.summary import ModelRows, differences, figures


def _answers(right: list[bool], *, ends: str = "stop", tokens: int = 10) -> list[AnswerRow]:
    return [
        AnswerRow(f"r{n}", f"p{n}", "[]", "text", ends, 5, tokens + n, {"correct": one, "well_formed": True})
        for n, one in enumerate(right)
    ]


def _traces(kl: list[float], *, cross_entropy: float = 2.0, agreed: int = 3) -> list[TraceRow]:
    return [TraceRow(f"r{n}", f"p{n}", 10, 10 * cross_entropy, 10 * one, agreed) for n, one in enumerate(kl)]


BASE = ModelRows(
    traces=_traces([4.0, 5.0, 6.0], cross_entropy=3.0, agreed=1),
    answers={"sums": _answers([False, False, True, False], ends="length")},
    decoding_seconds=2.0,
)
STUDENT = ModelRows(
    traces=_traces([1.0, 1.0, 4.0], cross_entropy=1.0, agreed=5),
    answers={"sums": _answers([True, True, True, False])},
    decoding_seconds=0.5,
)


def test_a_models_figures_are_those_of_its_rows() -> None:
    found = figures(STUDENT, seed=1)
    held_out, task = found["held_out"], found["tasks"]["sums"]
    assert (held_out["rows"], held_out["supervised_tokens"]) == (3, 30)
    assert held_out["kl_nats_per_token"]["value"] == pytest.approx(2.0)
    assert held_out["top1_agreement"]["value"] == pytest.approx(0.5)
    assert held_out["perplexity"]["value"] == pytest.approx(math.e)
    assert task["prompts"] == 4
    assert task["verdicts"]["correct"]["value"] == 0.75
    assert task["verdicts"]["correct"]["high"] < 1
    assert task["mean_response_tokens"]["value"] == 11.5
    assert task["finish_reasons"] == {"stop": 4}
    assert found["speed"]["decoding_tokens_per_s"] == 46 / 0.5


def test_a_difference_is_the_model_less_the_baseline() -> None:
    gap = differences({"base": BASE, "student": STUDENT}, "base", same_tokens=["base", "student"], seed=1)
    assert list(gap) == ["student"]
    held_out = gap["student"]["held_out"]
    assert held_out["kl_nats_per_token"]["value"] == pytest.approx(-3.0)
    assert -4.0 <= held_out["kl_nats_per_token"]["low"] <= held_out["kl_nats_per_token"]["high"] <= -2.0
    assert held_out["top1_agreement"]["value"] == pytest.approx(0.4)
    assert held_out["perplexity"]["value"] == pytest.approx(math.exp(-2))
    verdicts = gap["student"]["tasks"]["sums"]["verdicts"]
    assert verdicts["correct"]["value"] == 0.5
    assert verdicts["correct"]["mcnemar_p"] == 0.5
    assert verdicts["well_formed"]["value"] == 0.0


def test_models_with_other_tokens_are_compared_on_tasks_alone() -> None:
    gap = differences({"base": BASE, "student": STUDENT}, "base", same_tokens=["base"], seed=1)
    assert list(gap["student"]) == ["tasks"]


def test_without_kl_on_both_sides_only_perplexities_are_compared() -> None:
    bare = ModelRows(traces=[TraceRow(f"r{n}", f"p{n}", 10, 20.0) for n in range(3)])
    student = ModelRows(traces=STUDENT.traces)
    gap = differences({"base": bare, "student": student}, "base", same_tokens=["base", "student"], seed=1)
    assert list(gap["student"]["held_out"]) == ["perplexity"]
    assert set(figures(bare, seed=1)["held_out"]) == {"rows", "supervised_tokens", "perplexity"}


def test_a_verdict_that_some_answers_lack_is_no_figure() -> None:
    answers = [
        *_answers([True, True]),
        AnswerRow("r9", "p9", "[]", "text", "stop", 5, 9, {"well_formed": True}),
    ]
    assert list(figures(ModelRows(answers={"sums": answers}), seed=1)["tasks"]["sums"]["verdicts"]) == [
        "well_formed"
    ]


def test_hopeless_perplexity_stays_a_number() -> None:
    lost = ModelRows(traces=_traces([1.0, 1.0], cross_entropy=900.0))
    assert math.isfinite(figures(lost, seed=1)["held_out"]["perplexity"]["value"])


def test_answers_that_nothing_is_there_to_compare_with_take_no_part_in_scores() -> None:
    def answers(*scores: float | None) -> ModelRows:
        rows = [
            AnswerRow(
                f"r{n}", f"p{n}", "[]", "text", "stop", 5, 10, {}, {} if one is None else {"rougeL": one}
            )
            for n, one in enumerate(scores)
        ]
        return ModelRows(answers={"held": rows})

    base, student = answers(None, 0.5, 0.9), answers(None, 0.6, 1.0)
    assert figures(student, seed=1)["tasks"]["held"]["scores"]["rougeL"]["value"] == pytest.approx(0.8)
    gap = differences({"base": base, "student": student}, "base", same_tokens=[], seed=1)
    assert gap["student"]["tasks"]["held"]["scores"]["rougeL"]["value"] == pytest.approx(0.1)


def test_scores_have_means_with_intervals_and_paired_differences() -> None:
    def answers(*scores: float) -> ModelRows:
        rows = [
            AnswerRow(f"r{n}", f"p{n}", "[]", "text", "stop", 5, 10, {}, {"rougeL": one})
            for n, one in enumerate(scores)
        ]
        return ModelRows(answers={"held": rows})

    base, student = answers(0.1, 0.5, 0.9, 0.3), answers(0.2, 0.6, 1.0, 0.4)
    score = figures(student, seed=1)["tasks"]["held"]["scores"]["rougeL"]
    assert score["value"] == pytest.approx(0.55)
    assert score["low"] < 0.5 < score["high"]
    gap = differences({"base": base, "student": student}, "base", same_tokens=[], seed=1)
    assert gap["student"]["tasks"]["held"]["scores"]["rougeL"] == pytest.approx(
        {"value": 0.1, "low": 0.1, "high": 0.1}
    )
