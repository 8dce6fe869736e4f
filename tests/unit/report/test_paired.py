"""Runs beside each other: by a model that all have, and by their own models where only the seed differs."""

from pathlib import Path

import pytest

from potstill.report import RunView, comparison_table, write_comparison

from .evaluations import evaluation, run, step, with_metrics

TRACES = {"direct": [True] + [False] * 19, "cascade": [True] * 15 + [False] * 5}
TIES = {**TRACES, "cascade": [True] * 4 + [False] * 16}


def joined(root: Path, **ways: dict[str, list[bool]]) -> list[RunView]:
    """A run a way to join specialists, with its exam."""
    return [
        run(way, [evaluation(root / way, "exam", {"domains": ("p", right)})]) for way, right in ways.items()
    ]


@pytest.mark.parametrize("first", ["traces", "ties"])
def test_runs_are_compared_by_a_model_that_all_of_them_have(tmp_path: Path, first: str) -> None:
    """Merged weights are a model of the specialists' size, and the students are far smaller."""
    ways = {"traces": TRACES, "ties": {**TIES, "merged": [True] * 20}}
    runs = joined(tmp_path, **dict(sorted(ways.items(), key=lambda way: way[0] != first)))
    table = comparison_table(runs)
    assert "domains, right answers (cascade)" in table
    cells = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.startswith("t")}
    assert cells["traces"][:3] == ["75.0", "%", "*"]
    assert cells["ties"][:2] == ["20.0", "%"]
    assert "100.0" not in table
    write_comparison(runs, tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "Clearly best: traces (domains, right answers" in text


def test_runs_without_a_model_in_common_are_compared_by_their_own_ones_and_say_so(tmp_path: Path) -> None:
    runs = joined(tmp_path, traces=TRACES, ties={"direct": TIES["direct"], "merged": [True] * 20})
    table = comparison_table(runs)
    assert "domains, right answers is of other models in each run: cascade (traces); merged (ties)." in table
    assert "(cascade)  " not in table


def test_parts_of_one_each_are_compared_all_together(tmp_path: Path) -> None:
    runs = []
    for way, right in (("traces", [True, False, False, False]), ("ties", [True] * 4)):
        parts = [
            evaluation(
                tmp_path / way / domain,
                f"own-domain[{domain}]",
                {"own": (domain, {"undivided": [False] * 4, "specialist": right})},
            )
            for domain in ("logic", "words")
        ]
        runs.append(run(way, parts))
    table = comparison_table(runs)
    assert table.splitlines()[0].split()[1:4] == ["own,", "right", "answers"]
    assert "own-domain[" not in table
    cells = {line.split()[0]: line.split()[1] for line in table.splitlines() if line.startswith("t")}
    assert cells == {"traces": "25.0", "ties": "100.0"}


def test_what_cannot_be_pooled_of_parts_stands_under_their_own_names(tmp_path: Path) -> None:
    right = {"base": [False] * 4, "student": [True] * 4}
    runs = []
    for way in ("one", "two"):
        tasks = {domain: {"own": (domain, right), "same": ("p", right)} for domain in ("logic", "words")}
        parts = [
            evaluation(tmp_path / way / domain, f"exam[{domain}]", of_domain)
            for domain, of_domain in tasks.items()
        ]
        runs.append(run(way, parts))
    header = comparison_table(runs).splitlines()[0]
    assert "exam[logic]: same, right answers" in header
    assert "exam[words]: same, right answers" in header
    assert header.count("own, right answers") == 1


def test_steps_of_one_each_that_are_no_parts_stand_under_their_own_names(tmp_path: Path) -> None:
    runs = []
    for way in ("one", "two"):
        steps = [
            evaluation(
                tmp_path / way / rank,
                f"exam[{rank}]",
                {"sums": ("p", {"base": [False] * 4, "student": [True] * 4})},
            )
            for rank in ("8", "16")
        ]
        runs.append(run(way, steps))
    header = comparison_table(runs).splitlines()[0]
    assert "exam[8]: sums, right answers" in header
    assert "exam[16]: sums, right answers" in header


def seeds(root: Path) -> list[RunView]:
    """Three seeds of one recipe, each with problems of its own; a cascade is right on six more of twenty."""
    runs = []
    for seed in (1, 2, 3):
        right = {
            "direct": [n < 2 for n in range(20)],
            "undivided-cascade": [n < 2 + (seed == 1) for n in range(20)],
            "cascade": [n < 8 + seed % 2 for n in range(20)],
        }
        exam = evaluation(root / str(seed), "exam", {"domains": (f"seed{seed}-", right)})
        runs.append(run(f"seed={seed}", [exam], seed=seed))
    return runs


def test_over_seeds_the_models_of_a_run_are_the_arms(tmp_path: Path) -> None:
    runs = seeds(tmp_path)
    (lines,) = (part.splitlines() for part in comparison_table(runs).split("\n\n") if part.startswith("arm"))
    assert "domains, right answers" in lines[0]
    assert "minus direct" in lines[0]
    found = {line.split()[0]: line for line in lines[2:]}
    assert list(found) == ["direct", "undivided-cascade", "cascade"]
    assert {line.split()[1] for line in found.values()} == {"3"}
    assert "10.0 % (" in found["direct"]
    assert "43.3 % (" in found["cascade"], "9, 8 and 9 of 20"
    assert "+33.3 (" in found["cascade"]
    assert "+35.0, +30.0, +35.0" in found["cascade"]
    assert found["cascade"].endswith("better")
    assert found["undivided-cascade"].endswith("no clear difference")


def test_over_seeds_of_several_arms_the_arms_are_the_runs(tmp_path: Path) -> None:
    a, b = seeds(tmp_path / "a")[:2], seeds(tmp_path / "b")[:2]
    runs = [
        RunView(f"{arm},{one.name}", one.recipe_text, one.steps)
        for arm, two in (("x", a), ("y", b))
        for one in two
    ]
    (lines,) = (part.splitlines() for part in comparison_table(runs).split("\n\n") if part.startswith("arm"))
    assert [line.split()[0] for line in lines[2:]] == ["x", "y"]


def test_an_arm_without_a_name_beside_others_is_the_recipe_as_it_is(tmp_path: Path) -> None:
    a, b = seeds(tmp_path / "a")[:2], seeds(tmp_path / "b")[:2]
    runs = [*a, *(RunView(f"x,{one.name}", one.recipe_text, one.steps) for one in b)]
    (lines,) = (part.splitlines() for part in comparison_table(runs).split("\n\n") if part.startswith("arm"))
    assert [line.split("  ")[0] for line in lines[2:]] == ["as it is", "x"]


def test_a_teacher_among_the_models_is_no_arm(tmp_path: Path) -> None:
    runs = seeds(tmp_path)
    for one in runs:
        manifest = one.steps[0].manifest
        assert manifest is not None
        manifest.metrics["models"]["cascade"]["is_teacher"] = True
    (lines,) = (part.splitlines() for part in comparison_table(runs).split("\n\n") if part.startswith("arm"))
    assert [line.split()[0] for line in lines[2:]] == ["direct", "undivided-cascade"]


def test_what_runs_bought_is_a_column_where_it_is_known(tmp_path: Path) -> None:
    free, dear = joined(tmp_path, free=TRACES, dear=TRACES)
    assert "cost" not in comparison_table([free, dear]).splitlines()[0]
    bought = [
        with_metrics(step(name, "generate"), bought={"answers": 2, "cost_usd": 1.25})
        for name in ("one", "two")
    ]
    dear.steps.extend(bought)
    lines = comparison_table([free, dear]).splitlines()
    assert lines[0].split()[-1] == "cost"
    costs = {line.split()[0]: line.split()[-1] for line in lines if line.startswith(("free", "dear"))}
    assert costs == {"free": "-", "dear": "$2.50"}
