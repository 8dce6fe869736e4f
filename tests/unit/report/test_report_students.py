"""How a student was made, and what it is before any training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.report import RunView, write_report
from potstill.report.students import student_sections

from .evaluations import with_metrics_of

RunBuilder = Callable[..., RunView]

QUALITY = {
    "kl_nats_per_token": 2.3456,
    "perplexity": 41.25,
    "agreement": 0.331,
    "rows": 21,
    "tokens": 1800,
    "measured_on": "held-out",
}
CANDIDATES = [
    {
        "blocks": 9,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "attention_heads": 9,
        "parameters": 60_172_992,
    }
    | {"loss": 9.5},
    {
        "blocks": 18,
        "hidden_size": 432,
        "intermediate_size": 1152,
        "attention_heads": 9,
        "parameters": 60_067_440,
    }
    | {"loss": 8.25},
]


def with_metrics(run: RunView, **metrics: Any) -> RunView:
    return with_metrics_of(run, "init", **{"parameters_before": 134_515_008, **metrics})


def test_a_student_has_a_row_as_it_is_before_any_training(build_run: RunBuilder, tmp_path: Path) -> None:
    run = with_metrics(build_run(), quality=QUALITY)
    sections = student_sections(run)
    assert sections is not None
    assert sections["rows"] == [
        ["pruned", "92,000,000 (68%)", "2.346", "33.1%", "41.2", "21 held-out traces"]
    ]
    write_report(run, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "checkpoint 0" in text
    assert "21 held-out traces" in text


def test_candidates_are_a_table_with_the_best_first(build_run: RunBuilder, tmp_path: Path) -> None:
    run = with_metrics(build_run(), quality=QUALITY, candidates=CANDIDATES, chosen_candidate=1)
    sections = student_sections(run)
    assert sections is not None
    (search,) = sections["tables"]
    assert search["rows"] == [
        ["2 (chosen)", "18", "432", "1,152", "9", "60,067,440", "8.250"],
        ["1", "9", "576", "1,536", "9", "60,172,992", "9.500"],
    ]
    write_report(run, tmp_path / "report.html")
    assert "pruned: sizes that were tried" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_blocks_and_hidden_channels_that_were_kept_are_drawn(build_run: RunBuilder) -> None:
    width = {"hidden_importance": [3.0, 1.0, 2.0, 0.5], "kept_hidden": [0, 2]}
    sections = student_sections(with_metrics(build_run(), width=width))
    assert sections is not None
    assert [one["title"] for one in sections["charts"]] == [
        "pruned: 18 of 30 blocks kept",
        "pruned: 2 of 4 hidden channels kept",
    ]


EXPERTS = [
    {"layer": 1, "frequency": [0.5, 0.3, 0.2], "mean_contribution": [1.0, 0.9, 0.3]}
    | {"parameters": 1200, "parameters_before": 3000, "bytes": 4_800_000, "bytes_before": 12_000_000},
    {"layer": 3, "frequency": [0.4, 0.4, 0.2], "mean_contribution": [1.0, 0.9, 0.3]}
    | {"parameters": 1200, "parameters_before": 3000, "bytes": 4_800_000, "bytes_before": 12_000_000},
]
WEIGHTS = {"weight_bytes": 20_000_000, "weight_bytes_before": 34_400_000}


def test_experts_that_share_a_core_have_size_and_error_by_layer(
    build_run: RunBuilder, tmp_path: Path
) -> None:
    experts = [{**one, "error": {"gate_up": 0.123, "down": 0.2}} for one in EXPERTS]
    run = with_metrics(build_run(), experts=experts, **WEIGHTS)
    sections = student_sections(run)
    assert sections is not None
    [table] = sections["tables"]
    heads = ["layer", "busiest expert", "parameters", "MB", "error of gate and up", "error of down"]
    assert table["head"] == heads
    assert table["rows"] == [
        ["1", "50.0% of tokens", "1,200 of 3,000", "4.8 of 12.0", "12.3%", "20.0%"],
        ["3", "40.0% of tokens", "1,200 of 3,000", "4.8 of 12.0", "12.3%", "20.0%"],
    ]
    assert "20.0 of 34.4 MB" in table["note"]
    write_report(run, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "pruned: its experts" in text
    assert "error of gate and up" in text


def test_experts_that_were_left_out_are_counted_by_layer(build_run: RunBuilder) -> None:
    run = with_metrics(build_run(), experts=[{**one, "kept": [0, 1]} for one in EXPERTS], **WEIGHTS)
    sections = student_sections(run)
    assert sections is not None
    assert sections["tables"][0]["head"] == ["layer", "busiest expert", "experts", "parameters", "MB"]
    assert [row[2] for row in sections["tables"][0]["rows"]] == ["2 of 3", "2 of 3"]


def test_of_experts_that_became_one_layer_the_routing_is_told(build_run: RunBuilder) -> None:
    told = [{key: one[key] for key in ("layer", "frequency", "mean_contribution")} for one in EXPERTS]
    sections = student_sections(with_metrics(build_run(), experts=told, **WEIGHTS))
    assert sections is not None
    assert sections["tables"][0]["rows"][0] == ["1", "50.0% of tokens"]
    assert "norm" not in sections["tables"][0]["note"]


def test_an_artifact_from_before_has_its_blocks_alone(build_run: RunBuilder) -> None:
    sections = student_sections(build_run())
    assert sections is not None
    assert sections["rows"] == sections["tables"] == []
    assert len(sections["charts"]) == 1


def test_a_run_without_init_steps_has_no_such_part(build_run: RunBuilder) -> None:
    run = build_run()
    assert student_sections(replace(run, steps=[one for one in run.steps if one.kind != "init"])) is None
