import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from potstill.evaluate.rows import (
    HELD_OUT_FILE,
    SCORES_FILE,
    AnswerRow,
    TraceRow,
    write_answers,
    write_traces,
)
from potstill.report import RunView, comparison, comparison_table, write_comparison
from potstill.train.settings import FeatureSettings, TrainSettings

RunBuilder = Callable[..., RunView]


@pytest.fixture
def sweep(build_run: RunBuilder) -> list[RunView]:
    """Three runs of one recipe at three learning rates; the second is right far more often."""
    runs = []
    for lr, right, kl in (("0.0001", 0.1, 1.9), ("0.0003", 0.8, 1.18), ("0.001", 0.5, 1.2)):
        run = build_run(f"lr={lr}")
        manifest: Any = run.steps[4].manifest
        student = manifest.metrics["models"]["student"]
        student["tasks"]["chain_sum"]["verdicts"]["correct"] = {
            "value": right,
            "low": right - 0.08,
            "high": right + 0.08,
        }
        student["held_out"]["kl_nats_per_token"] = {"value": kl, "low": kl - 0.05, "high": kl + 0.05}
        runs.append(
            replace(run, recipe_text=run.recipe_text.replace("3.0e-4", lr).replace("quickstart", run.name))
        )
    return runs


def _columns(table: str) -> list[list[str]]:
    rule = table.splitlines()[1]
    starts = [
        index for index, sign in enumerate(rule) if sign == "-" and (index == 0 or rule[index - 1] == " ")
    ]
    ends = [*starts[1:], None]
    return [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in table.splitlines()]


def test_a_sweep_shows_what_differs_and_what_came_of_it(sweep: list[RunView]) -> None:
    table = comparison_table(sweep)
    assert table.isascii()
    rows = _columns(table)
    assert rows[0][:2] == ["run", "KL to the teacher, nats"]
    assert rows[0][-5:] == ["training loss", "held-out loss", "tokens trained on", "time", "student.lr"]
    assert [row[0] for row in rows[2:8:2]] == ["lr=0.0001", "lr=0.0003", "lr=0.001"]
    assert [row[-1] for row in rows[2:8:2]] == ["0.0001", "0.0003", "0.001"]


def test_best_is_said_only_where_intervals_do_not_overlap(sweep: list[RunView]) -> None:
    rows = _columns(comparison_table(sweep))
    right = rows[0].index("chain_sum, right answers")
    closeness = rows[0].index("KL to the teacher, nats")
    assert [row[right] for row in rows[2:8:2]] == ["10.0 %", "80.0 % *", "50.0 %"]
    assert [row[closeness] for row in rows[2:8:2]] == ["1.90", "1.18", "1.20"]
    assert rows[3][right] == "2.0 to 18.0"


def test_a_run_without_an_evaluation_has_its_row(sweep: list[RunView], tmp_path: Path) -> None:
    stopped = replace(sweep[0], steps=sweep[0].steps[:3])
    rows = _columns(comparison_table([stopped, *sweep[1:]]))
    assert rows[2][0] == "lr=0.0001"
    assert "-" in rows[2]
    write_comparison([stopped, *sweep[1:]], tmp_path / "comparison.html")


def test_recipes_that_have_little_in_common_are_not_listed_key_by_key(sweep: list[RunView]) -> None:
    other = replace(
        sweep[1], recipe_text="name: other\nsteps:\n" + "".join(f"  s{n}: {{do: train}}\n" for n in range(20))
    )
    assert _columns(comparison_table([sweep[0], other]))[0][:2] == ["run", "KL to the teacher, nats"]


def test_a_recipe_that_cannot_be_read_does_not_stop_the_comparison(sweep: list[RunView]) -> None:
    broken = replace(sweep[1], recipe_text="a: [")
    assert "lr=0.0003" in comparison_table([sweep[0], broken])


def test_the_page_names_the_clear_winner_and_draws_the_losses(sweep: list[RunView], tmp_path: Path) -> None:
    write_comparison(sweep, tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "Clearly best: lr=0.0003 (chain_sum, right answers)." in text
    assert re.findall("<figcaption>(.*?)</figcaption>", text) == [
        "KL to the teacher",
        "Top-1 agreement",
        "Perplexity",
        "chain_sum, right answers",
        "Held-out loss",
    ]
    assert text.count('<svg class="chart"') == 5
    for run in sweep:
        assert text.count(f">{run.name}</text>") == 5


@pytest.fixture
def paired(sweep: list[RunView]) -> list[RunView]:
    """The sweep with held-out traces: its prompts differ widely, and 0.0003 is a little better on each."""
    for run, excess in zip(sweep, (0.03, 0.0, 0.02), strict=True):
        traces = [
            TraceRow(f"r{n}", f"p{n}", 50, 80.0 + 10 * n, (0.1 * n + excess * (0.9 + n % 2 / 5)) * 50, 40 - n)
            for n in range(20)
        ]
        folder = run.steps[-1].folder
        assert folder is not None
        write_traces(folder / HELD_OUT_FILE, {"base": traces[::-1], "student": traces})
    return sweep


def test_on_the_same_traces_differences_decide_where_intervals_overlap(paired: list[RunView]) -> None:
    rows = _columns(comparison_table(paired))
    closeness = rows[0].index("KL to the teacher, nats")
    assert rows[0][closeness + 1] == "above the lowest"
    assert [row[closeness] for row in rows[2:8:2]] == ["1.90", "1.18 *", "1.20"]
    assert [row[closeness + 1] for row in rows[2:8:2]] == ["+0.030", "-", "+0.020"]
    assert [row[closeness + 1] for row in rows[3:9:2]] == ["+0.029 to +0.031", "", "+0.019 to +0.021"]
    assert "no other run's difference to it" in comparison_table(paired)


def test_equal_differences_on_every_trace_have_no_interval_and_are_no_verdict(
    sweep: list[RunView], tmp_path: Path
) -> None:
    for run, excess in zip(sweep, (0.03, 0.0, 0.02), strict=True):
        _traces(run, [TraceRow(f"r{n}", f"p{n}", 50, 80.0, (0.1 * n + excess) * 50, 40) for n in range(4)])
    rows = _columns(comparison_table(sweep).partition("\n\n")[0])
    closeness = rows[0].index("KL to the teacher, nats")
    assert [row[closeness] for row in rows[2:8:2]] == ["1.90", "1.18", "1.20"]
    assert [row[closeness + 1] for row in rows[2:8:2]] == ["+0.030", "-", "+0.020"]
    assert [row[closeness + 1] for row in rows[3:9:2]] == ["", "", ""]
    write_comparison(sweep, tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert not re.search(r"\b(inf|nan)\b", text)


def test_two_runs_with_one_student_leave_none_the_best(paired: list[RunView], tmp_path: Path) -> None:
    runs = [*paired, replace(paired[1], name="again")]
    write_comparison(runs, tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "Best in KL to the teacher, and not told apart: lr=0.0003, again." in text
    rows = _columns(comparison_table(runs))
    closeness = rows[0].index("KL to the teacher, nats")
    assert [row[closeness] for row in rows[2:10:2]] == ["1.90", "1.18", "1.20", "1.18"]


def _traces(run: RunView, rows: list[TraceRow]) -> None:
    folder = run.steps[-1].folder
    assert folder is not None
    write_traces(folder / HELD_OUT_FILE, {"student": rows})


def test_runs_on_other_traces_are_shown_and_not_compared(paired: list[RunView], tmp_path: Path) -> None:
    # Its own interval lies far below the others'; but it was measured on an easier trace.
    _traces(paired[2], [TraceRow("other", "p9", 50, 1.0, 0.1, 50)])
    table = comparison_table(paired)
    rows = _columns(table.partition("\n\n")[0])
    assert "above the lowest" not in rows[0]
    assert not any("*" in row[rows[0].index("KL to the teacher, nats")] for row in rows)
    assert "KL to the teacher is not compared: other prompts in each run." in table
    write_comparison(paired, tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "KL to the teacher is not compared" in text
    assert "KL to the teacher (" not in text.partition("<table")[0]


def test_runs_that_share_some_traces_are_paired_on_those(paired: list[RunView]) -> None:
    # Ten of the twenty traces that the others have, and five of its own that are very hard.
    shared = [
        TraceRow(f"r{n}", f"p{n}", 50, 80.0 + 10 * n, (0.1 * n + 0.018 + 0.004 * (n % 2)) * 50, 40 - n)
        for n in range(10)
    ]
    hard = [TraceRow(f"h{n}", f"q{n}", 50, 900.0, 500.0, 0) for n in range(5)]
    _traces(paired[2], [*hard, *shared])
    table = comparison_table(paired)
    rows = _columns(table.partition("\n\n")[0])
    gaps = [row[rows[0].index("above the lowest")] for row in rows[2:8:2]]
    assert gaps == ["+0.030", "-", "+0.020"]
    assert "KL to the teacher is compared on the 10 rows that all runs share, of up to 20." in table


def test_runs_whose_tokens_differ_are_not_compared(paired: list[RunView]) -> None:
    _traces(paired[2], [TraceRow(f"r{n}", f"p{n}", 31, 80.0, 0.1, 30) for n in range(20)])
    assert "Perplexity is not compared: the same text makes other tokens in each run." in comparison_table(
        paired
    )


def test_runs_with_another_teacher_are_not_compared_by_it(paired: list[RunView]) -> None:
    manifest = paired[2].steps[-1].manifest
    assert manifest is not None
    manifest.inputs["teacher"] = {"path": "another"}
    table = comparison_table(paired)
    assert "KL to the teacher is not compared: another teacher in each run." in table
    assert "Top-1 agreement is not compared: another teacher in each run." in table
    assert "Perplexity is not compared" not in table


def test_epochs_of_one_step_are_different_teachers(paired: list[RunView]) -> None:
    for run, epoch in zip(paired, (1, 2, 2), strict=True):
        manifest = run.steps[-1].manifest
        assert manifest is not None
        manifest.metrics["teacher"] = f"big:epoch{epoch}"
        manifest.inputs[f"big:epoch{epoch}"] = {"big": "f" * 64}
    assert "KL to the teacher is not compared: another teacher in each run." in comparison_table(paired)
    assert "is not compared" not in comparison_table(paired[1:])


def _answered(run: RunView, right: list[bool], *, first: int = 0) -> None:
    """Give the student's answers to chain_sum; prompts are numbered on from `first`."""
    folder = run.steps[-1].folder
    assert folder is not None
    rows = [
        AnswerRow(f"r{first + n}", f"p{first + n}", "[]", "5", "stop", 3, 3, verdicts={"correct": one})
        for n, one in enumerate(right)
    ]
    write_answers(folder / SCORES_FILE, {"student": {"chain_sum": rows}})


def test_answers_that_are_more_in_one_run_are_not_compared(sweep: list[RunView]) -> None:
    _answered(sweep[0], [True, False])
    _answered(sweep[1], [True, False])
    folder = sweep[1].steps[-1].folder
    assert folder is not None
    rows = [
        AnswerRow(f"r{n}", f"p{n}", "[]", "5", "stop", 3, 3, verdicts={"correct": True}, sample=sample)
        for n in range(2)
        for sample in range(2)
    ]
    write_answers(folder / SCORES_FILE, {"student": {"chain_sum": rows}})
    text = "a prompt has another number of judged answers in each run."
    assert text in comparison_table(sweep[:2])


def test_right_answers_are_paired_by_prompt(sweep: list[RunView]) -> None:
    # Their own intervals overlap by far; but wherever the first is right, the second is, and 8 times more.
    _answered(sweep[0], [n % 5 == 0 for n in range(40)])
    _answered(sweep[1], [n % 5 <= 1 for n in range(40)])
    manifests: list[Any] = [run.steps[4].manifest for run in sweep[:2]]
    for manifest, value in zip(manifests, (0.2, 0.4), strict=True):
        right = {"value": value, "low": value - 0.13, "high": value + 0.15}
        manifest.metrics["models"]["student"]["tasks"]["chain_sum"]["verdicts"]["correct"] = right
    table = comparison_table(sweep[:2])
    rows = _columns(table.partition("\n\n")[0])
    column = rows[0].index("chain_sum, right answers")
    assert [row[column] for row in rows[2:6:2]] == ["20.0 %", "40.0 % *"]


def test_answers_to_other_problems_of_one_name_are_not_compared(sweep: list[RunView]) -> None:
    _answered(sweep[0], [False] * 40)
    _answered(sweep[1], [True] * 40, first=100)
    table = comparison_table(sweep[:2])
    assert "chain_sum, right answers is not compared: other prompts in each run." in table
    assert "80.0 % *" not in table


def test_runs_of_different_recipes_stand_side_by_side(
    paired: list[RunView], build_run: RunBuilder, tmp_path: Path
) -> None:
    other = build_run("other")
    manifest: Any = other.steps[4].manifest
    models = manifest.metrics["models"]
    manifest.metrics["models"] = {"base": models["base"], "stage2": models["student"]}
    del manifest.metrics["models"]["stage2"]["held_out"]
    text = "name: other\nsteps:\n" + "".join(f"  s{n}: {{do: train}}\n" for n in range(20))
    runs = [*paired, replace(other, recipe_text=text)]
    table = comparison_table(runs)
    rows = _columns(table.partition("\n\n")[0])
    assert [row[0] for row in rows[2:10:2]] == ["lr=0.0001", "lr=0.0003", "lr=0.001", "other"]
    closeness = rows[0].index("KL to the teacher, nats")
    assert [row[closeness] for row in rows[2:10:2]] == ["1.90", "1.18 *", "1.20", "-"]
    write_comparison(runs, tmp_path / "comparison.html")


def test_runs_of_one_name_are_told_apart_by_their_folders(sweep: list[RunView], tmp_path: Path) -> None:
    again = replace(sweep[0], folder=tmp_path / "again" / sweep[0].name)
    table = comparison_table([sweep[0], again])
    assert str(again.folder) in table
    assert str(sweep[0].folder) in table


def test_the_memory_of_training_is_shown_where_it_is_known(sweep: list[RunView]) -> None:
    assert "memory of training" not in comparison_table(sweep)
    for run, peak in zip(sweep, (1.25e9, 2e9), strict=False):
        student: Any = run.steps[3].manifest
        student.peak_memory_bytes = int(peak)
    rows = _columns(comparison_table(sweep))
    assert [row[rows[0].index("memory of training")] for row in rows[2:8:2]] == ["1.25 GB", "2.00 GB", "-"]
    gpu: Any = sweep[2].steps[3].manifest
    gpu.peak_gpu_memory_bytes = int(5e9)
    assert "5.00 GB of GPU" in comparison_table(sweep)


def test_values_of_different_losses_are_not_put_side_by_side(sweep: list[RunView], tmp_path: Path) -> None:
    softer = replace(
        sweep[1], recipe_text=sweep[1].recipe_text.replace("batch: 8", "batch: 8, temperature: 2.0")
    )
    header = _columns(comparison_table([sweep[0], softer]))[0]
    assert "student.temperature" in header
    assert "held-out loss" not in header
    write_comparison([sweep[0], softer], tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "minimised different losses" in text
    assert "<figcaption>Held-out loss" not in text


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ("alpha: 0.5", True),  # what a student of cached logits has by default
        ("alpha: 0.4", False),
        ("feature: {kind: cka, weight: 5}", False),
        ("label_weight: 0.5", False),
        ("base_kl: 0.1", False),
        ("base_kl: 0", True),
        ("router_aux_loss_coef: 0.01", False),
        ("mask_prefix: true", False),
        ("lora: {rank: 8, alpha: 32}", True),
    ],
)
def test_losses_are_compared_where_the_same_function_was_minimised(
    sweep: list[RunView], changed: str, same: bool
) -> None:
    other = replace(sweep[1], recipe_text=sweep[1].recipe_text.replace("batch: 8", f"batch: 8, {changed}"))
    header = _columns(comparison_table([sweep[0], other]))[0]
    assert ("training loss" in header) is same
    assert ("held-out loss" in header) is same


def test_a_teacher_alone_changes_what_is_minimised(sweep: list[RunView]) -> None:
    plain, taught = (
        replace(
            run,
            recipe_text=re.sub(
                "data: logits(.*), batch", f"data: traces\\1{teacher}, batch", run.recipe_text
            ),
        )
        for run, teacher in ((sweep[0], ""), (sweep[1], ", teacher: big"))
    )
    for run in (plain, taught):
        run.steps[3].needs.remove("logits")
    assert "training loss" not in _columns(comparison_table([plain, taught]))[0]


def test_what_a_train_step_minimises_by_default_is_what_its_settings_say() -> None:
    for defaults, settings in (
        (comparison._LOSS_SETTINGS, TrainSettings),
        (comparison._FEATURE_SETTINGS, FeatureSettings),
    ):
        assert defaults == {name: settings.model_fields[name].default for name in defaults}


@pytest.mark.parametrize(("right", "clear"), [(7, True), (5, False)])
def test_best_is_said_of_measures_that_are_clear_among_so_many(
    sweep: list[RunView], tmp_path: Path, right: int, clear: bool
) -> None:
    """Five right answers of forty against none are clear by themselves, and not among four measures."""
    for run in sweep[:2]:
        _answered(run, [run is sweep[1] and n < right for n in range(40)])
    table = comparison_table(sweep[:2])
    rows = _columns(table.partition("\n\n")[0])
    column = rows[0].index("chain_sum, right answers")
    assert [row[column] for row in rows[2:6:2]] == ["10.0 %", "80.0 % *"]
    note = "not among the 4 measures that are compared (Holm's correction): chain_sum, right answers."
    assert (note in table) is not clear
    write_comparison(sweep[:2], tmp_path / "all.html")
    text = (tmp_path / "all.html").read_text(encoding="utf-8")
    named = "KL to the teacher, chain_sum, right answers" if clear else "KL to the teacher"
    assert f"Clearly best: lr=0.0003 ({named})." in text
    assert ("not among the 4 measures" in text) is not clear


def _staged(run: RunView, name: str, **settings: float) -> RunView:
    given = "".join(f", {key}: {value}" for key, value in settings.items())
    first = f"  student-blocks: {{do: train, student: pruned, data: logits, lr: 1.0{given}}}\n"
    text = run.recipe_text.replace("  exam:", first + "  exam:").replace("lr: 0.0003", f"lr: 0.0003{given}")
    text = text.replace(
        "student: {do: train, student: pruned", "student: {do: train, student: student-blocks"
    )
    return replace(run, name=name, recipe_text=text)


def test_a_setting_that_all_stages_have_is_one_column(sweep: list[RunView]) -> None:
    runs = [_staged(sweep[1], f"alpha={alpha}", alpha=alpha) for alpha in (0.5, 1.0)]
    rows = _columns(comparison_table(runs))
    assert rows[0][-2:] == ["time", "alpha (student, student-blocks)"]
    assert [row[-1] for row in rows[2:6:2]] == ["0.5", "1"]


def test_a_list_among_the_settings_is_shown_without_its_brackets(sweep: list[RunView]) -> None:
    groups = sweep[1].recipe_text.replace(
        "batch: 8", "batch: 8, groups: [{match: embed, lr_multiplier: 0.1}]"
    )
    rows = _columns(comparison_table([sweep[1], replace(sweep[1], recipe_text=groups)]))
    assert rows[0][-1] == "student.groups"
    assert rows[4][-1] == "match: embed, lr_multiplier: 0.1"


def test_a_step_that_only_some_runs_have_is_one_column(sweep: list[RunView]) -> None:
    rows = _columns(comparison_table([sweep[1], _staged(sweep[1], "two-stages")]))
    assert rows[0][-2:] == ["time", "student-blocks"]
    assert [row[-1] for row in rows[2:6:2]] == ["-", "yes"]


def test_without_a_clear_winner_none_is_named(sweep: list[RunView], tmp_path: Path) -> None:
    write_comparison([sweep[1], replace(sweep[1], name="again")], tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "No run is clearly best" in text


@pytest.fixture
def arms(build_run: RunBuilder) -> list[RunView]:
    """Four arms in two seeds: each seed has its own traces, on which an arm exceeds the first so much.

    Each excess is a tenth more or less by prompt. That of "length" changes its sign with the seed and, by
    half, with the prompt.
    """
    runs = []
    for arm, excess in {"rule": 0.0, "random": 0.05, "length": 0.0, "one-stage": -0.1}.items():
        for seed in (1, 2):
            run = build_run(f"{arm},seed={seed}")
            signs = [0.02 * (-1) ** seed + 0.01 * (-1) ** n if arm == "length" else 0.0 for n in range(20)]
            traces = [
                TraceRow(
                    f"r{seed}{n}",
                    f"p{n}",
                    50,
                    80.0,
                    (1.0 + 0.1 * n + excess * (0.9 + n % 2 / 5) + signs[n]) * 50,
                    40,
                )
                for n in range(20)
            ]
            folder = run.steps[-1].folder
            assert folder is not None
            write_traces(folder / HELD_OUT_FILE, {"student": traces})
            runs.append(
                replace(
                    run,
                    recipe_text=re.sub(r"^seed: .*$", f"seed: {seed}", run.recipe_text, flags=re.MULTILINE),
                )
            )
    return runs


def test_arms_are_shown_with_their_paired_differences_and_those_of_each_seed(arms: list[RunView]) -> None:
    (lines,) = (part.splitlines() for part in comparison_table(arms).split("\n\n") if part.startswith("arm"))
    assert lines[0].split()[:2] == ["arm", "seeds"]
    assert "minus rule" in lines[0]
    found = {line.split()[0]: line for line in lines[2:]}
    assert list(found) == ["rule", "random", "length", "one-stage"]
    assert {line.split()[1] for line in found.values()} == {"2"}
    assert "+0.050 (+0.048 to +0.052)" in found["random"]
    assert found["random"].endswith("further")
    assert found["length"].endswith("no clear difference")
    assert found["one-stage"].endswith("closer")
    assert "-0.020, +0.020" in found["length"]


def test_a_second_run_of_an_arm_and_its_seed_is_an_arm_of_its_own(arms: list[RunView]) -> None:
    (lines,) = (part for part in comparison_table(arms).split("\n\n") if part.startswith("arm"))
    again = replace(arms[2], name="random")  # its recipe has the seed 1 as well
    (more,) = (part for part in comparison_table([*arms, again]).split("\n\n") if part.startswith("arm"))
    before, after = ([line.split() for line in part.splitlines()[2:]] for part in (lines, more))
    assert after[:-1] == before
    assert after[-1][:3] == ["random", "(2)", "1"]


def test_arms_with_other_teachers_are_not_compared_by_them(arms: list[RunView]) -> None:
    manifest = arms[-1].steps[-1].manifest
    assert manifest is not None
    manifest.inputs["teacher"] = {"path": "another"}
    assert not any(part.startswith("arm") and "KL" in part for part in comparison_table(arms).split("\n\n"))


def test_a_recipe_that_cannot_be_read_does_not_stop_the_comparison_of_arms(arms: list[RunView]) -> None:
    broken = replace(arms[-1], recipe_text="a: [")
    assert "minus rule" in comparison_table([*arms[:-1], broken])


def test_the_page_has_the_arms_too(arms: list[RunView], tmp_path: Path) -> None:
    write_comparison(arms, tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "arm by arm" in text
    assert "+0.050 (+0.048 to +0.052)" in text
    write_comparison(arms[::2], tmp_path / "comparison.html")
    assert "arm by arm" not in (tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_arms_are_shown_by_what_they_kept_and_learned_as_well(arms: list[RunView]) -> None:
    for run in arms:
        right = run.name.startswith("one-stage")
        _answered(run, [right or n % 2 == 0 for n in range(20)])
    tables = [part.splitlines() for part in comparison_table(arms).split("\n\n") if part.startswith("arm")]
    assert ["KL to the teacher, nats" in lines[0] for lines in tables] == [True, False]
    found = {line.split("  ")[0]: line for line in tables[1][2:]}
    assert "chain_sum, right answers" in tables[1][0]
    assert "50.0 % (" in found["rule"]
    assert "+50.0 (" in found["one-stage"]
    assert found["one-stage"].endswith("better")
    assert found["random"].endswith("no clear difference")


def test_what_each_run_trained_on_is_counted_in_tokens(sweep: list[RunView]) -> None:
    rows = _columns(comparison_table(sweep))
    assert [row[rows[0].index("tokens trained on")] for row in rows[2:8:2]] == ["55,680"] * 3
