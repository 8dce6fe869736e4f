"""What arms cost: every step behind a model counts once, and parallel ways as long as the longest one."""

from pathlib import Path
from typing import Any

from potstill.core.store import Manifest
from potstill.report import RunView, StepView, write_report
from potstill.report.arms import arm_costs
from potstill.report.results import results_of

from .evaluations import with_metrics

STEPS: dict[str, tuple[str, list[str], float]] = {
    "traces": ("generate", [], 10.0),
    "specialist[a]": ("train", ["traces"], 100.0),
    "specialist[b]": ("train", ["traces"], 60.0),
    "retold[a]": ("generate", ["specialist[a]", "traces"], 5.0),
    "retold[b]": ("generate", ["specialist[b]", "traces"], 7.0),
    "cascade": ("train", ["retold[a]", "retold[b]"], 30.0),
    "direct": ("train", ["traces"], 40.0),
    "exam": ("evaluate", ["direct", "cascade", "specialist[b]"], 9.0),
}
MODELS = {"direct": "direct", "cascade": "cascade", "specialist": "specialist", "base": "base"}


def run() -> RunView:
    steps = []
    for name, (kind, needs, seconds) in STEPS.items():
        metrics: dict[str, Any] = {"flops": 1e9} if kind == "train" else {}
        if kind == "evaluate":
            group = {"math": {"prompts": 4, "correct": {"value": 0.5, "low": 0.2, "high": 0.8}}}
            task = {"prompts": 4, "groups": group}
            metrics = {
                "baseline": "direct",
                "models": {
                    role: {"reference": reference, "tasks": {"domains": task}}
                    for role, reference in MODELS.items()
                },
                "differences": {"cascade": {"tasks": {"domains": {"groups": group}}}},
            }
        manifest = Manifest(
            kind=kind,
            fingerprint="0",
            content="0",
            settings={"do": kind},
            seed=1,
            files={},
            versions={},
            seconds=seconds,
            tokens=1000 if kind == "train" else 0,
            metrics=metrics,
        )
        steps.append(StepView(name, kind, needs, seconds, False, manifest, Path()))
    return RunView("cascade", "", steps)


def test_an_arm_has_the_costs_of_all_that_it_was_trained_from() -> None:
    [results] = results_of(run())
    table = arm_costs(run(), results)
    assert table is not None
    rows = {row[0]: dict(zip(table["head"], row, strict=True)) for row in table["rows"]}
    assert list(rows) == ["direct", "cascade", "specialist"], "a declared model was not trained here"
    cascade = rows["cascade"]
    assert (cascade["trained steps"], cascade["own tokens"], cascade["training tokens"]) == (
        "3",
        "1,000",
        "3,000",
    )
    assert cascade["training FLOPs"] == "3.00e+09"
    assert cascade["training"] == "3 min 10 s"
    assert cascade["training, in parallel"] == "2 min 10 s", "the slower specialist, then the student"
    assert cascade["writing traces"] == "22.0 s"
    assert cascade["all, in parallel"] == "2 min 25 s"
    assert rows["direct"]["training"] == rows["direct"]["training, in parallel"] == "40.0 s"
    assert rows["specialist"]["training"] == "1 min 00 s", "of the specialist that was evaluated"


def with_events(times: dict[str, tuple[float, float]]) -> RunView:
    """The run with an event at each step's start and end, seconds after its own start."""
    events: list[dict[str, Any]] = [{"event": "run_started", "time": 0.0}]
    for name, (start, end) in times.items():
        events.append({"event": "step_started", "step": name, "time": start})
        events.append({"event": "step_finished", "step": name, "time": end})
    return RunView("cascade", "", run().steps, sorted(events, key=lambda one: float(one["time"])))


def test_what_ran_side_by_side_is_measured_and_no_longer_estimated() -> None:
    beside = with_events(
        {
            "traces": (0.0, 10.0),
            "specialist[a]": (10.0, 130.0),
            "specialist[b]": (10.0, 90.0),
            "retold[a]": (130.0, 135.0),
            "retold[b]": (135.0, 142.0),
            "cascade": (142.0, 172.0),
            "direct": (142.0, 200.0),
            "exam": (200.0, 209.0),
        }
    )
    [results] = results_of(beside)
    table = arm_costs(beside, results)
    assert table is not None
    rows = {row[0]: dict(zip(table["head"], row, strict=True)) for row in table["rows"]}
    assert rows["cascade"]["training, in parallel"] == "2 min 30 s, measured", "120 s of two, then 30 s"
    assert rows["cascade"]["training"] == "3 min 10 s"
    assert rows["cascade"]["all, in parallel"] == "2 min 52 s, measured"
    assert rows["direct"]["training, in parallel"] == "40.0 s", "of one step there is nothing beside it"
    assert beside.side_by_side(beside.steps) == (209.0, 319.0)


def test_what_ran_one_after_the_other_or_in_another_run_stays_an_estimate() -> None:
    in_turn = with_events({"specialist[a]": (0.0, 100.0), "specialist[b]": (100.0, 160.0)})
    a, b = (step for step in in_turn.steps if step.name.startswith("specialist"))
    assert in_turn.side_by_side([a, b]) is None
    assert in_turn.side_by_side(in_turn.steps) is None, "others were made before"


def priced(**costs: float) -> RunView:
    """The run with what answers of some steps cost, in dollars."""
    steps = [
        with_metrics(one, bought={"answers": 4, "cost_usd": costs[one.name]}) if one.name in costs else one
        for one in run().steps
    ]
    return RunView("cascade", "", steps)


def test_what_was_bought_is_a_cost_of_every_arm_behind_which_it_stands() -> None:
    bought = priced(traces=1.5, **{"retold[a]": 0.25})
    [results] = results_of(bought)
    table = arm_costs(bought, results)
    assert table is not None
    assert {row[0]: row[-1] for row in table["rows"]} == {
        "direct": "$1.50",
        "cascade": "$1.75",
        "specialist": "$1.50",
    }
    assert table["head"][-1] == "cost"
    later = priced(**{"retold[a]": 0.25})
    dearer = arm_costs(later, *results_of(later))
    assert dearer is not None
    assert [row[-1] for row in dearer["rows"]] == ["–", "$0.25", "–"]
    free = arm_costs(run(), results)
    assert free is not None
    assert "cost" not in free["head"]


def domains(one: RunView) -> dict[str, Any]:
    """The figures of the task, which all models have in common."""
    manifest = one.steps[-1].manifest
    assert manifest is not None
    found: dict[str, Any] = manifest.metrics["models"]["direct"]["tasks"]["domains"]
    return found


def test_arms_have_their_costs_without_groups_too(tmp_path: Path) -> None:
    plain = run()
    domains(plain).pop("groups")
    write_report(plain, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "By group" not in page
    assert "What each arm cost" in page


def test_a_group_has_as_many_prompts_as_are_of_it(tmp_path: Path) -> None:
    cascade = run()
    domains(cascade)["prompts"] = 9
    write_report(cascade, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    row = page.partition("By group")[2].partition("domains, math, right answers")[2].partition("</th>")[0]
    assert "4 prompts" in row


def test_groups_are_measures_of_their_own_with_paired_differences() -> None:
    [results] = results_of(run())
    [measure] = results.of("group")
    assert measure.label == "domains, math, right answers"
    assert measure.differences["cascade"].value == 0.5
    assert not results.main or measure not in results.main
