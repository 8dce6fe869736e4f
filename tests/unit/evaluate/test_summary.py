import math
from dataclasses import replace
from typing import Any

import pytest

from potstill.evaluate.intervals import wilson_interval
from potstill.evaluate.rows import SCORED, AnswerRow, TraceRow
from potstill.evaluate.summary import ModelRows, TaskRows, differences, figures


def _answers(right: list[bool], *, ends: str = "stop", tokens: int = 10) -> list[AnswerRow]:
    return [
        AnswerRow(f"r{n}", f"p{n}", "[]", "text", ends, 5, tokens + n, {"correct": one, "well_formed": True})
        for n, one in enumerate(right)
    ]


def _traces(kl: list[float], *, cross_entropy: float = 2.0, agreed: int = 3) -> list[TraceRow]:
    return [TraceRow(f"r{n}", f"p{n}", 10, 10 * cross_entropy, 10 * one, agreed) for n, one in enumerate(kl)]


BASE = ModelRows(
    traces=_traces([4.0, 5.0, 6.0], cross_entropy=3.0, agreed=1),
    tasks={"sums": TaskRows(_answers([False, False, True, False], ends="length"), seconds=2.0)},
)
STUDENT = ModelRows(
    traces=_traces([1.0, 1.0, 4.0], cross_entropy=1.0, agreed=5),
    tasks={"sums": TaskRows(_answers([True, True, True, False]), seconds=0.5)},
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
    assert task["seconds_per_response"] == 0.5 / 4


def test_a_difference_is_the_model_less_the_baseline() -> None:
    gap = differences({"base": BASE, "student": STUDENT}, "base", same_tokens=["base", "student"], seed=1)
    assert list(gap) == ["student"]
    held_out = gap["student"]["held_out"]
    assert held_out["kl_nats_per_token"]["value"] == pytest.approx(-3.0)
    # Of two prompts, -4 and -2 apart: the interval is wider than what was seen, and still on one side of 0.
    assert -7.0 <= held_out["kl_nats_per_token"]["low"] <= -4.0
    assert -2.0 <= held_out["kl_nats_per_token"]["high"] < 0.0
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


def test_right_answers_are_counted_where_they_are_known() -> None:
    def model(*right: bool) -> ModelRows:
        unknown = AnswerRow("r9", "p9", "[]", "text", "stop", 5, 9, {"well_formed": True})
        return ModelRows(tasks={"sums": TaskRows([unknown, *_answers([*right])])})

    base, student = model(False, True, False), model(True, True, False)
    found = figures(student, seed=1)["tasks"]["sums"]
    assert found["prompts"] == 4
    assert found["verdicts"]["correct"] == wilson_interval(2, 3).as_dict()
    assert found["verdicts"]["well_formed"]["value"] == 1
    assert found["right_if_well_formed"]["value"] == pytest.approx(2 / 3)
    gap = differences({"base": base, "student": student}, "base", same_tokens=[], seed=1)
    right = gap["student"]["tasks"]["sums"]["verdicts"]["correct"]
    assert right["value"] == pytest.approx(1 / 3)


def test_pass_at_k_is_told_of_the_questions_whose_answers_are_known() -> None:
    task = _sampled("++", "+-")
    unknown = [replace(one, prompt_id="p9", verdicts={}) for one in task.answers[:2]]
    found = figures(ModelRows(tasks={"sums": TaskRows([*unknown, *task.answers])}), pass_at=[1], seed=1)
    assert found["tasks"]["sums"]["pass_at"]["1"]["value"] == 0.75


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
        return ModelRows(tasks={"held": TaskRows(rows)})

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
        return ModelRows(tasks={"held": TaskRows(rows)})

    base, student = answers(0.1, 0.5, 0.9, 0.3), answers(0.2, 0.6, 1.0, 0.4)
    score = figures(student, seed=1)["tasks"]["held"]["scores"]["rougeL"]
    assert score["value"] == pytest.approx(0.55)
    assert score["low"] < 0.5 < score["high"]
    gap = differences({"base": base, "student": student}, "base", same_tokens=[], seed=1)
    found = gap["student"]["tasks"]["held"]["scores"]["rougeL"]
    assert found["value"] == pytest.approx(0.1)
    # Four equal gaps are no certainty.
    assert -1 <= found["low"] < 0
    assert 0.1 < found["high"] <= 1


def _sampled(*right: str, **fields: Any) -> TaskRows:
    """A task's rows, one word a prompt: a + for a right sample, a - for a wrong one."""
    return TaskRows(
        [
            AnswerRow(
                f"r{n}", f"p{n}", "[]", "text", "stop", 5, 10, {"correct": mark == "+"}, sample=k, **fields
            )
            for n, marks in enumerate(right)
            for k, mark in enumerate(marks)
        ]
    )


def test_of_several_samples_the_mean_and_pass_at_k_are_told_by_prompt() -> None:
    rows = ModelRows(tasks={"sums": _sampled("++++", "+---", "----")})
    found = figures(rows, pass_at=[1, 2, 4], seed=1)["tasks"]["sums"]
    assert (found["prompts"], found["samples"]) == (3, 4)
    assert found["verdicts"]["correct"]["value"] == pytest.approx(5 / 12)
    assert {k: one["value"] for k, one in found["pass_at"].items()} == pytest.approx(
        {"1": 5 / 12, "2": (1 + 0.5) / 3, "4": 2 / 3}
    )
    assert list(figures(rows, seed=1)["tasks"]["sums"]["pass_at"]) == ["4"]
    assert figures(rows, pass_at=[8], seed=1)["tasks"]["sums"]["pass_at"] == {}


def test_differences_of_several_samples_are_paired_by_prompt_and_have_no_mcnemar_p() -> None:
    base = ModelRows(tasks={"sums": _sampled("--", "+-", "--", "++")})
    student = ModelRows(tasks={"sums": _sampled("+-", "++", "--", "++")})
    gap = differences({"base": base, "student": student}, "base", same_tokens=[], seed=1)
    task = gap["student"]["tasks"]["sums"]
    assert task["verdicts"]["correct"]["value"] == pytest.approx(0.25)
    assert set(task["verdicts"]["correct"]) == {"value", "low", "high"}
    assert task["pass_at"]["2"]["value"] == pytest.approx(0.25)


def test_right_answers_where_reasoning_is_well_formed_are_a_share_of_those_alone() -> None:
    def rows(*marks: tuple[bool, bool]) -> ModelRows:
        answers = [
            AnswerRow(f"r{n}", f"p{n}", "[]", "", "stop", 5, 9, {"correct": right, "well_formed": formed})
            for n, (right, formed) in enumerate(marks)
        ]
        return ModelRows(tasks={"sums": TaskRows(answers)})

    base = rows((True, False), (True, True), (False, True), (False, False))
    student = rows((True, True), (True, True), (False, True), (False, False))
    none = rows((True, False), (True, False), (True, False), (True, False))
    assert figures(base, seed=1)["tasks"]["sums"]["right_if_well_formed"]["value"] == 0.5
    assert "right_if_well_formed" not in figures(none, seed=1)["tasks"]["sums"]
    gap = differences({"base": base, "student": student, "none": none}, "base", same_tokens=[], seed=1)
    found = gap["student"]["tasks"]["sums"]["right_if_well_formed"]
    assert found["value"] == pytest.approx(2 / 3 - 1 / 2)
    assert found["low"] < -0.3
    assert found["high"] > 0.5, "two and three answers prove nothing"
    assert "right_if_well_formed" not in gap["none"]["tasks"]["sums"]


def test_what_was_scored_has_no_length_and_no_ending() -> None:
    rows = [
        AnswerRow("r", "p", "[]", "A. yes", SCORED, 5, 0, {"correct": True}, choice_logprobs=[-1.0, -2.0])
    ]
    found = figures(ModelRows(tasks={"quiz": TaskRows(rows)}), seed=1)["tasks"]["quiz"]
    assert found["verdicts"]["correct"]["value"] == 1
    assert {"mean_response_tokens", "finish_reasons", "seconds_per_response"}.isdisjoint(found)


def test_a_server_that_counts_no_tokens_has_no_length() -> None:
    rows = [AnswerRow("r", "p", "[]", "yes", "stop", None, None, {"correct": True})]
    unknown = ModelRows(tasks={"quiz": TaskRows(rows)})
    assert "mean_response_tokens" not in figures(unknown, seed=1)["tasks"]["quiz"]
    known = ModelRows(tasks={"quiz": TaskRows(_answers([True])[:1])})
    gap = differences({"base": known, "student": unknown}, "base", same_tokens=[], seed=1)
    assert "mean_response_tokens" not in gap["student"]["tasks"]["quiz"]


def test_lengths_have_paired_differences() -> None:
    gap = differences({"base": BASE, "student": STUDENT}, "base", same_tokens=[], seed=1)
    assert gap["student"]["tasks"]["sums"]["mean_response_tokens"] == {"value": 0.0}
    base, student = ({"sums": TaskRows(_answers([True] * 4, tokens=one))} for one in (10, 20))
    student["sums"].answers[0] = replace(student["sums"].answers[0], response_tokens=22)
    gap = differences(
        {"base": ModelRows(tasks=base), "student": ModelRows(tasks=student)}, "base", same_tokens=[], seed=1
    )
    found = gap["student"]["tasks"]["sums"]["mean_response_tokens"]
    assert found["low"] < found["value"] == 10.5 < found["high"]


def test_sets_for_forgetting_have_perplexity_and_answers_of_their_own() -> None:
    def rows(right: list[bool], cross_entropy: float) -> ModelRows:
        traces = _traces([0.0] * 3, cross_entropy=cross_entropy)
        return ModelRows(forgetting={"old": TaskRows(_answers(right), traces)})

    base, student = rows([True] * 9, 1.0), rows([True] * 3 + [False] * 6, 2.0)
    found = figures(student, seed=1)
    assert "tasks" not in found
    assert found["forgetting"]["old"]["given"]["perplexity"]["value"] == pytest.approx(math.e**2)
    gap = differences({"base": base, "student": student}, "base", same_tokens=["base", "student"], seed=1)
    old = gap["student"]["forgetting"]["old"]
    assert old["given"]["perplexity"]["value"] == pytest.approx(math.e)
    assert old["verdicts"]["correct"]["value"] == pytest.approx(-2 / 3)
    other = differences({"base": base, "student": student}, "base", same_tokens=["base"], seed=1)
    assert "given" not in other["student"]["forgetting"]["old"]


def test_a_task_that_only_one_of_two_models_was_measured_on_has_no_difference() -> None:
    gap = differences({"base": BASE, "student": ModelRows()}, "base", same_tokens=["student"], seed=1)
    assert gap == {"student": {}}


class TestGroups:
    GROUPS = {"p0": "math", "p1": "math", "p2": "words"}  # noqa: RUF012  # the last prompt has no category

    def rows(self, right: list[bool]) -> ModelRows:
        return ModelRows(tasks={"sums": TaskRows(_answers(right), groups=self.GROUPS)})

    def test_right_answers_of_each_group_are_those_of_its_prompts(self) -> None:
        found = figures(self.rows([True, False, True, True]), seed=1)["tasks"]["sums"]["groups"]
        assert {value: (one["prompts"], one["correct"]["value"]) for value, one in found.items()} == {
            "math": (2, 0.5),
            "words": (1, 1.0),
        }
        alone = figures(ModelRows(tasks={"sums": TaskRows(_answers([True, False]))}), seed=1)
        assert found["math"]["correct"] == alone["tasks"]["sums"]["verdicts"]["correct"]

    def test_groups_are_compared_prompt_by_prompt(self) -> None:
        models = {"base": self.rows([False, False, True, False]), "student": self.rows([True] * 4)}
        gap = differences(models, "base", same_tokens=[*models], seed=1)["student"]["tasks"]["sums"]
        assert {value: one["correct"]["value"] for value, one in gap["groups"].items()} == {
            "math": 1.0,
            "words": 0.0,
        }
        assert gap["groups"]["math"]["correct"]["mcnemar_p"] == 0.5

    def test_without_groups_there_are_none(self) -> None:
        assert "groups" not in figures(STUDENT, seed=1)["tasks"]["sums"]
