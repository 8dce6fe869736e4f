from collections.abc import Callable
from typing import Any

import pytest

from potstill.report import RunView, StepView, terminal_table
from potstill.report.conclusion import conclusion
from potstill.report.results import Figure, Measure, format_figure, format_interval, results_of

RunBuilder = Callable[..., RunView]


def _metrics(run: RunView) -> Any:
    manifest = run.steps[-1].manifest
    assert manifest is not None
    return manifest.metrics


def _set(run: RunView, *, kl: tuple[float, float, float], right: tuple[float, float, float]) -> None:
    gaps = _metrics(run)["differences"]["student"]
    gaps["held_out"]["kl_nats_per_token"] = dict(zip(("value", "low", "high"), kl, strict=True))
    gaps["tasks"]["chain_sum"]["verdicts"]["correct"] = dict(
        zip(("value", "low", "high"), right, strict=True)
    )


CLOSER = "The student is closer to its teacher than the base"
BETTER_KL, WORSE_KL, NO_KL = (-5.0, -5.5, -4.5), (0.5, 0.2, 0.8), (-0.1, -0.3, 0.1)
BETTER, WORSE, UNCLEAR = (0.7, 0.6, 0.8), (-0.2, -0.3, -0.1), (0.03, -0.02, 0.08)


@pytest.mark.parametrize(
    ("kl", "right", "headline", "verdict"),
    [
        (BETTER_KL, BETTER, f"{CLOSER} and right more often.", "better"),
        (BETTER_KL, UNCLEAR, f"{CLOSER}, but not clearly right more often.", "better"),
        (BETTER_KL, WORSE, f"{CLOSER}, but right less often.", "unclear"),
        (
            WORSE_KL,
            WORSE,
            "The student is further from its teacher than the base and right less often.",
            "worse",
        ),
        (
            WORSE_KL,
            UNCLEAR,
            "The student is further from its teacher than the base, and not clearly right more often.",
            "worse",
        ),
        (
            NO_KL,
            UNCLEAR,
            (
                "The student is not clearly closer to its teacher than the base and not clearly right "
                "more often."
            ),
            "unclear",
        ),
    ],
)
def test_the_headline_says_better_only_where_the_interval_leaves_out_no_difference(
    build_run: RunBuilder, kl: Any, right: Any, headline: str, verdict: str
) -> None:
    run = build_run()
    _set(run, kl=kl, right=right)
    found = conclusion(results_of(run)[0])
    assert found is not None
    assert (found.headline, found.verdict) == (headline, verdict)


def test_an_interval_that_ends_at_no_difference_is_not_a_difference() -> None:
    def verdict(low: float, high: float, **fields: Any) -> str | None:
        values = {"a": Figure(1.0), "b": Figure(1.0)}
        given: dict[str, Any] = {"label": "x", "unit": "nats", "better": "lower", **fields}
        return Measure(
            values=values, differences={"b": Figure((low + high) / 2, low, high)}, **given
        ).verdict("b")

    assert verdict(-1.0, 0.0) == "unclear"
    assert verdict(-1.0, -0.01) == "better"
    assert verdict(-1.0, -0.01, better="higher") == "worse"
    assert verdict(0.5, 0.9, unit="perplexity") == "better"
    assert verdict(0.9, 1.1, unit="perplexity") == "unclear"
    assert verdict(1.1, 1.2, unit="perplexity") == "worse"
    assert verdict(1.1, 1.2, better="neither") is None


def test_without_kl_the_headline_rests_on_perplexity_and_without_traces_on_tasks(
    build_run: RunBuilder,
) -> None:
    run = build_run()
    gaps = _metrics(run)["differences"]["student"]
    del gaps["held_out"]["kl_nats_per_token"], gaps["held_out"]["top1_agreement"]
    found = conclusion(results_of(run)[0])
    assert found is not None
    assert found.headline.startswith(
        "The student is better at predicting the held-out traces than the base, but"
    )
    del gaps["held_out"]
    gaps["tasks"]["chain_sum"]["verdicts"]["correct"] = {"value": 0.7, "low": 0.6, "high": 0.8}
    found = conclusion(results_of(run)[0])
    assert found is not None
    assert found.headline == "The student is right more often than the base."


def test_several_tasks_are_counted(build_run: RunBuilder) -> None:
    run = build_run()
    _set(run, kl=BETTER_KL, right=BETTER)
    metrics = _metrics(run)
    for model in metrics["models"].values():
        model["tasks"]["other"] = model["tasks"]["chain_sum"]
    metrics["differences"]["student"]["tasks"]["other"] = {
        "verdicts": {"correct": {"value": 0.0, "low": -0.1, "high": 0.1}}
    }
    found = conclusion(results_of(run)[0])
    assert found is not None
    assert found.headline.endswith("right more often (clearly so on 1 of 2 tasks).")


def test_a_lone_model_gets_no_conclusion(build_run: RunBuilder) -> None:
    run = build_run()
    metrics = _metrics(run)
    metrics["models"] = {"base": metrics["models"]["base"]}
    metrics["differences"] = {}
    assert conclusion(results_of(run)[0]) is None


def test_well_formed_reasoning_is_left_out_where_no_model_reasons(build_run: RunBuilder) -> None:
    run = build_run()
    labels = [measure.label for measure in results_of(run)[0].measures]
    assert "chain_sum, well-formed" in labels
    for model in _metrics(run)["models"].values():
        model["tasks"]["chain_sum"]["verdicts"]["well_formed"] = {"value": 0.0, "low": 0.0, "high": 0.04}
    assert "chain_sum, well-formed" not in [measure.label for measure in results_of(run)[0].measures]


@pytest.mark.parametrize(
    ("value", "unit", "plain", "difference"),
    [
        (0.55, "share", "55.0 %", "+55.0"),
        (-0.021, "share", "−2.1 %", "−2.1"),
        (1.3123, "nats", "1.31", "+1.31"),
        (0.0423, "nats", "0.042", "+0.042"),
        (5.912, "perplexity", "5.91", "×5.91"),
        (0.00321, "perplexity", "0.0032", "×0.0032"),
        (12345.6, "perplexity", "1.2e+04", "×1.2e+04"),
        (1843.2, "perplexity", "1,843", "×1,843"),
        (74.2, "tokens", "74", "+74"),
    ],
)
def test_figures_have_the_digits_that_they_deserve(
    value: float, unit: str, plain: str, difference: str
) -> None:
    assert format_figure(value, unit) == plain
    assert format_figure(value, unit, difference=True) == difference
    assert format_figure(value, unit, difference=True, ascii_only=True).isascii()


def test_a_figure_without_an_interval_shows_none() -> None:
    assert format_interval(Figure(3.0), "tokens") == ""
    assert format_interval(Figure(0.5, 0.4, 0.6), "share") == "40.0 to 60.0"


def test_the_terminal_table_is_ascii_and_says_what_follows(build_run: RunBuilder) -> None:
    table = terminal_table(build_run())
    assert table.isascii()
    lines = table.splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0].split() == ["base", "student", "teacher", "student", "-", "base"]
    assert lines[2].split() == ["KL", "to", "the", "teacher,", "nats", "6.61", "1.18", "-", "-5.43", "better"]
    assert "6.25 to 6.97" in lines[3]
    assert "no clear difference" in table
    assert "Decoding speed, tokens/s" in table
    assert f"{CLOSER}, but not clearly right more often." in table
    assert "KL to the teacher: 6.61 -> 1.18 nats (-5.43, 95 % interval -5.71 to -5.16)" in table


def test_a_run_without_an_evaluation_has_no_table() -> None:
    assert terminal_table(RunView("run", "", [StepView("a", "train", [], None, False, None, None)])) == ""


def _figure(value: float, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


@pytest.fixture
def reasoning_run(build_run: RunBuilder) -> RunView:
    """Samples of a task with think blocks, a quiz by likelihood, and a set for forgetting."""
    run = build_run()
    metrics = _metrics(run)
    for role, shift in (("base", 0.0), ("student", 0.3), ("teacher", 0.4)):
        task = metrics["models"][role]["tasks"]["chain_sum"]
        task["verdicts"] |= {"handed_in": _figure(0.4 + shift), "reasons": _figure(0.3 + shift)}
        task["verdicts"]["tagged"] = _figure(shift)
        task |= {
            "pass_at": {"1": _figure(0.2), "8": _figure(0.3 + shift)},
            "scores": {"reasoning_quality": _figure(0.2 + shift), "repetition": _figure(0.5 - shift)},
            "right_if_well_formed": _figure(0.1 + shift),
            "mean_reasoning_steps": _figure(3 + shift),
            "mean_reasoning_words": _figure(60.0, 5),
            "seconds_per_response": 1.25,
        }
        quiz = {"prompts": 50, "verdicts": {"correct": _figure(0.4)}, "scores": {}, "pass_at": {}}
        metrics["models"][role]["tasks"]["quiz"] = quiz
        old = {"prompts": 20, "verdicts": {"correct": _figure(0.5)}, "given": {"perplexity": _figure(4.0)}}
        metrics["models"][role]["forgetting"] = {"old": old}
    metrics["tasks"] = {
        "chain_sum": {"samples": 8, "temperature": 0.7, "choose_by": "generation"},
        "quiz": {"choose_by": "text", "normalise": "byte", "chance": 0.25},
    }
    gap = metrics["differences"]["student"]
    gap["tasks"]["chain_sum"] |= {
        "pass_at": {"8": _figure(0.3)},
        "scores": {"reasoning_quality": _figure(0.3), "repetition": _figure(-0.3)},
    }
    gap["tasks"]["quiz"] = {"verdicts": {"correct": _figure(0.0)}}
    gap["forgetting"] = {
        "old": {
            "verdicts": {"correct": _figure(0.0)},
            "given": {"perplexity": {"value": 1.2, "low": 1.1, "high": 1.3}},
        }
    }
    return run


def test_reasoning_and_what_training_did_not_touch_have_tables_of_their_own(reasoning_run: RunView) -> None:
    results = results_of(reasoning_run)[0]
    assert [one.label for one in results.of("reasoning")] == [
        "chain_sum, with reasoning",
        "chain_sum, well-formed",
        "chain_sum, quality of form",
        "chain_sum, repetition",
        "chain_sum, right where well-formed",
        "chain_sum, reasoning",
        "chain_sum, reasoning",
    ]
    assert [one.label for one in results.of("forgetting")] == ["old, right answers", "old, perplexity"]
    labels = [one.label for one in results.main]
    assert {"chain_sum, handed in", "chain_sum, pass@8", "chain_sum, time a response"} <= set(labels)
    assert not any("tagged" in one.label or "pass@1" in one.label for one in results.measures)
    better = {one.label: one.verdict("student") for one in results.measures}
    assert better["chain_sum, quality of form"] == "better"
    assert better["chain_sum, repetition"] == "better", "less is better"
    assert better["old, perplexity"] == "worse"


def test_a_figure_says_how_its_answers_came_about(reasoning_run: RunView) -> None:
    said = {one.label: one.explanation for one in results_of(reasoning_run)[0].measures}
    assert said["chain_sum, right answers"] == "mean over 8 samples a prompt at temperature 0.7"
    assert said["quiz, right answers"] == "the option of the likeliest text a byte; by guessing 25 %"


def test_questions_whose_answers_cannot_be_checked_are_shown(build_run: RunBuilder) -> None:
    run = build_run()
    _metrics(run)["tasks"] = {
        "chain_sum": {"prompts": 100, "unchecked": 40},
        "open": {"prompts": 7, "unchecked": 7},
    }
    results = results_of(run)[0]
    said = {one.label: one.explanation for one in results.measures}
    assert said["chain_sum, right answers"] == "40 of 100 questions have no answer that can be checked"
    assert [note.partition(":")[0] for note in results.notes if "can be checked" in note] == ["open"]


def test_the_terminal_shows_reasoning_and_forgetting_below_the_main_table(reasoning_run: RunView) -> None:
    table = terminal_table(reasoning_run)
    assert table.isascii()
    main, reasoning, forgetting = (
        table.index(one) for one in ("chain_sum, pass@8", "\nReasoning", "\nWhat training did not touch")
    )
    assert main < reasoning < forgetting
    assert "chain_sum, time a response, seconds" in table
    assert "chain_sum, reasoning, steps" in table
    assert "Something was forgotten: worse on old, which training did not touch." in table


@pytest.mark.parametrize(
    ("right", "perplexity", "sentence"),
    [
        (_figure(0.0), (1.0, 0.9, 1.1), "Nothing is clearly forgotten on old, which training did not touch."),
        (
            _figure(-0.3),
            (1.0, 0.9, 1.1),
            "Something was forgotten: worse on old, which training did not touch.",
        ),
        (
            _figure(0.3),
            (1.0, 0.9, 1.1),
            "Nothing is clearly forgotten on old, which training did not touch; better on old.",
        ),
    ],
)
def test_the_conclusion_says_what_was_forgotten(
    reasoning_run: RunView, right: dict[str, float], perplexity: tuple[float, float, float], sentence: str
) -> None:
    gap = _metrics(reasoning_run)["differences"]["student"]["forgetting"]["old"]
    gap["verdicts"]["correct"] = right
    gap["given"]["perplexity"] = dict(zip(("value", "low", "high"), perplexity, strict=True))
    found = conclusion(results_of(reasoning_run)[0])
    assert found is not None
    assert found.forgetting == sentence


def test_forgetting_alone_is_a_headline_too(reasoning_run: RunView) -> None:
    metrics = _metrics(reasoning_run)
    for of_role in (*metrics["models"].values(), metrics["differences"]["student"]):
        of_role.pop("tasks", None)
        of_role.pop("held_out", None)
    found = conclusion(results_of(reasoning_run)[0])
    assert found is not None
    assert found.headline == "Something was forgotten: worse on old, which training did not touch."
    assert found.verdict == "worse"


def test_an_interval_without_width_is_no_verdict() -> None:
    sure = Figure(0.3, 0.3, 0.3)
    measure = Measure("right", "share", "higher", {"base": sure, "student": sure}, {"student": sure})
    assert measure.verdict("student") == "unclear"
    assert measure.p_value("student") == 1


def test_one_of_many_tasks_that_is_clear_by_itself_alone_is_no_improvement(build_run: RunBuilder) -> None:
    run = build_run()
    metrics = _metrics(run)
    gaps = metrics["differences"]["student"]["tasks"]
    for number in range(10):
        for model in metrics["models"].values():
            model["tasks"][f"task{number}"] = model["tasks"]["chain_sum"]
        gaps[f"task{number}"] = {"verdicts": {"correct": _figure(0.0)}}
    gaps["task4"]["verdicts"]["correct"] = {"value": 0.06, "low": 0.005, "high": 0.115}
    results = results_of(run)[0]
    found = conclusion(results)
    assert found is not None
    assert "not clearly right more often (clearly so on 0 of 11 tasks)" in found.headline
    assert "Holm's correction" in found.note
    gaps["task4"]["verdicts"]["correct"] = {"value": 0.06, "low": 0.03, "high": 0.09}
    found = conclusion(results_of(run)[0])
    assert found is not None
    assert "right more often (clearly so on 1 of 11 tasks)" in found.headline
    assert found.note == ""
    assert "differences are judged, each at 95 %" in results.caution


@pytest.mark.parametrize(
    ("unit", "better", "gap"),
    [
        ("share", "higher", (0.1, 0.02, 0.2)),
        ("nats", "lower", (-0.4, -0.9, 0.01)),
        ("perplexity", "lower", (0.8, 0.6, 0.99)),
    ],
)
def test_a_p_value_below_5_percent_and_an_interval_without_zero_are_the_same(
    unit: Any, better: Any, gap: tuple[float, float, float]
) -> None:
    measure = Measure("x", unit, better, {}, {"b": Figure(*gap)})
    assert (measure.p_value("b") < 0.05) == (measure.verdict("b") != "unclear")


def test_many_answers_that_were_cut_off_and_what_was_not_measured_are_noted(build_run: RunBuilder) -> None:
    run = build_run()
    models = _metrics(run)["models"]
    models["teacher"]["not_measured"] = {"quiz": "no choice by letter"}
    models["student"]["tasks"]["chain_sum"]["finish_reasons"] = {"stop": 99, "length": 1}
    assert results_of(run)[0].notes == [
        "teacher, quiz: no choice by letter",
        (
            "Cut off, and an unfinished answer is rarely right: "
            "base, chain_sum: 19 of 100; teacher, chain_sum: 19 of 100."
        ),
    ]
