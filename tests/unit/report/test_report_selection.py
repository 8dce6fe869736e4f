"""The selection part of a report: the histogram, its files, and the rule beside its controls."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from potstill.report import RunView, StepView, write_report

if TYPE_CHECKING:
    from potstill.core.store import Manifest


def _arm(rows: int, tokens: float, gap: float) -> dict[str, float]:
    return {
        "rows": rows,
        "mean_tokens": tokens,
        "mean_teacher_probability": 0.8,
        "mean_student_probability": 0.8 - gap,
        "mean_divergence": gap,
    }


METRICS: dict[str, Any] = {
    "score": "divergence",
    "kept_by": "length",
    "effective_threshold": 0.25,
    "divergence": {"mean": 0.21, "low": -0.1, "high": 0.5},
    "arms": {
        "all": _arm(150, 210.0, 0.21),
        "rule": _arm(90, 260.0, 0.33),
        "random": _arm(90, 211.5, 0.2),
        "length": _arm(90, 258.4, 0.24),
    },
    "histogram": {"edges": [-0.1, 0.1, 0.3, 0.5], "kept": [0, 40, 50], "dropped": [40, 20, 0]},
    "warnings": ["the kept responses are <b>longer</b>"],
}


@pytest.fixture
def run_with_selection(build_run: Callable[..., RunView]) -> Callable[..., RunView]:
    """A run with a select step named `picked` and its metrics changed."""

    def build(**changes: Any) -> RunView:
        run = build_run()
        traces = run.steps[0]
        assert traces.manifest is not None
        manifest: Manifest = traces.manifest.model_copy(
            update={
                "kind": "select",
                "counts": {"records": 110, "held_out": 20, "rows": 170, "dropped_by_length": 60},
                "metrics": {**METRICS, **changes},
            }
        )
        picked = StepView("picked", "select", ["traces"], 12.0, False, manifest, None)
        return replace(run, steps=[*run.steps, picked])

    return build


def _section(run: RunView, path: Path) -> str:
    write_report(run, path)
    text = path.read_text(encoding="utf-8")
    found = re.search(r"<h2>Which traces were selected</h2>(.*?)<h2>", text, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_the_rule_stands_beside_its_controls(
    run_with_selection: Callable[..., RunView], tmp_path: Path
) -> None:
    section = _section(run_with_selection(), tmp_path / "report.html")
    assert "90 of 150 rows kept (60%)" in section
    assert "lowest score kept 0.25" in section
    assert "kept in the rule&#39;s place: as many of like length" in section
    heads = re.findall(r'<th scope="col">(.*?)</th>', section)
    assert heads == [
        "means",
        "all rows",
        "the rule&#39;s",
        "as many at random",
        "as many of like length (kept)",
    ]
    rows = {
        name: re.findall(r"<td>(.*?)</td>", cells)
        for name, cells in re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', section)
    }
    assert rows["rows"] == ["150", "90", "90", "90"]
    assert rows["tokens a response"] == ["210.0", "260.0", "211.5", "258.4"]
    assert rows["divergence"] == ["+0.2100", "+0.3300", "+0.2000", "+0.2400"]
    assert "P(student)" in rows
    assert "sentences" not in rows


def test_warnings_are_shown_as_text(run_with_selection: Callable[..., RunView], tmp_path: Path) -> None:
    section = _section(run_with_selection(), tmp_path / "report.html")
    assert "<b>Warning:</b> the kept responses are &lt;b&gt;longer&lt;/b&gt;" in section


def test_the_histogram_shows_the_cut_in_the_page_and_in_files(
    run_with_selection: Callable[..., RunView], tmp_path: Path
) -> None:
    run = run_with_selection()
    section = _section(run, tmp_path / "report.html")
    assert "cut 0.25" in section
    assert "var(--series-1)" in section
    svg = (tmp_path / "report.figures" / "picked-scores.svg").read_text(encoding="utf-8")
    ET.fromstring(svg)  # our own drawing
    assert "cut 0.25" in svg
    assert "var(--" not in svg
    assert "#0102" not in svg, "a stand-in for a colour is left"
    png = (tmp_path / "report.figures" / "picked-scores.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    before = {path.name: path.read_bytes() for path in (tmp_path / "report.figures").iterdir()}
    write_report(run, tmp_path / "report.html")
    assert {path.name: path.read_bytes() for path in (tmp_path / "report.figures").iterdir()} == before


def test_without_one_threshold_there_is_no_cut(
    run_with_selection: Callable[..., RunView], tmp_path: Path
) -> None:
    section = _section(
        run_with_selection(effective_threshold=None, score="count of teacher sentences"),
        tmp_path / "report.html",
    )
    assert "cut " not in section
    assert "lowest score kept" not in section
    assert "count of teacher sentences" in section


def test_a_run_without_a_selection_has_no_such_part(
    build_run: Callable[..., RunView], tmp_path: Path
) -> None:
    write_report(build_run(), tmp_path / "report.html")
    assert "Which traces were selected" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "report.figures").exists()
