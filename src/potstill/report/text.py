"""Plain-text tables in ASCII, for terminals of any encoding."""

import textwrap
from collections.abc import Sequence

from potstill.report.conclusion import conclusion
from potstill.report.html import evidence, verdict_words
from potstill.report.results import (
    Measure,
    Results,
    format_figure,
    format_interval,
    results_of,
)
from potstill.report.view import RunView

__all__ = ["aligned", "terminal_table"]

_WIDTH = 110


def aligned(rows: Sequence[Sequence[str]], *, header: bool = True) -> str:
    """Rows as columns of equal width, two spaces apart, with a rule below the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def terminal_table(run: RunView) -> str:
    """Each evaluate step's figures with 95 % intervals, and what follows; empty without an evaluation."""
    parts = []
    tables = results_of(run)
    for results in tables:
        for title, measures in (
            (results.title if len(tables) > 1 else "", results.main),
            ("Reasoning", results.of("reasoning")),
            ("What training did not touch", results.of("forgetting")),
        ):
            if measures:
                parts.append(aligned(_rows(title, results, measures)))
        parts += [textwrap.fill(note, _WIDTH) for note in (*results.notes, results.caution) if note]
        found = conclusion(results)
        if found is not None:
            proof = [f"  {evidence(measure, results, ascii_only=True)}" for measure in found.evidence]
            said = [one for one in (found.forgetting, found.note) if one]
            parts.append("\n".join([found.headline, *said, *proof]))
    return "\n\n".join(parts)


def _rows(title: str, results: Results, measures: Sequence[Measure]) -> list[list[str]]:
    """A line of figures a measure and one of intervals below it."""
    student, base = results.student, results.baseline
    compared = student is not None and base is not None
    rows = [[title, *results.roles, *([f"{student} - {base}"] if compared else [])]]
    for measure in measures:
        values, ranges = [measure.heading], [""]
        for role in results.roles:
            figure = measure.values.get(role)
            values.append(format_figure(figure.value, measure.unit, ascii_only=True) if figure else "-")
            ranges.append(format_interval(figure, measure.unit, ascii_only=True) if figure else "")
        if compared:
            gap = measure.differences.get(student or "")
            shown = format_figure(gap.value, measure.unit, difference=True, ascii_only=True) if gap else ""
            values.append(f"{shown}  {verdict_words(measure.verdict(student or ''))}".rstrip())
            ranges.append(format_interval(gap, measure.unit, difference=True, ascii_only=True) if gap else "")
        rows.append(values)
        if any(ranges):
            rows.append(ranges)
    return rows
