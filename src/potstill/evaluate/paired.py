"""Runs against each other on the same held-out traces: KL to the teacher, paired over prompts and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from potstill.evaluate.intervals import Estimate, bootstrap_ratio, bootstrap_ratio_difference
from potstill.evaluate.rows import HELD_OUT_FILE, TraceRow, read_traces

__all__ = ["HeldOutRun", "PairedKL", "paired_kl"]

_Rows = dict[tuple[int, str], TraceRow]
"""By the run's seed and the trace's id."""


@dataclass(frozen=True)
class HeldOutRun:
    """One run's evaluate step: its folder, the student's role there, and the run's arm and seed."""

    arm: str
    seed: int
    folder: Path
    role: str


@dataclass(frozen=True)
class PairedKL:
    """An arm's KL to the teacher in nats a token, and how much that is more than the first arm's.

    `difference` is over the traces that both arms were measured on, seed by seed, and `by_seed` the same of
    each seed alone; None and empty for the first arm and where no trace is the same.
    """

    arm: str
    seeds: int
    kl: Estimate
    difference: Estimate | None
    by_seed: list[float]


def paired_kl(runs: Sequence[HeldOutRun]) -> list[PairedKL]:
    """Each arm's KL with a bootstrap interval over prompts, and its paired difference to the first arm.

    A prompt is a cluster: its samples of all seeds are drawn together, and for both arms at once, so that
    more seeds do not pass for more prompts. Intervals tell of the prompts; how much other seeds would change
    is seen in `by_seed`. Arms without a KL are left out.
    """
    arms: dict[str, _Rows] = {}
    for run in runs:
        rows = arms.setdefault(run.arm, {})
        for row in read_traces(run.folder / HELD_OUT_FILE, run.role):
            if row.kl_nats is not None:
                rows[run.seed, row.record_id] = row
    arms = {arm: rows for arm, rows in arms.items() if rows}
    found: list[PairedKL] = []
    for arm, rows in arms.items():
        first = next(iter(arms.values()))
        common = [key for key in first if key in rows] if rows is not first else []
        seeds = sorted({seed for seed, _ in common})
        found.append(
            PairedKL(
                arm,
                len({seed for seed, _ in rows}),
                bootstrap_ratio(*_columns(rows, list(rows)), _clusters(rows, list(rows)), seed=0),
                _difference(first, rows, common) if common else None,
                [
                    _difference(first, rows, [key for key in common if key[0] == seed]).value
                    for seed in seeds
                    if len(seeds) > 1
                ],
            )
        )
    return found


def _difference(first: _Rows, second: _Rows, keys: list[tuple[int, str]]) -> Estimate:
    clusters = _clusters(first, keys)
    return bootstrap_ratio_difference(_columns(first, keys), _columns(second, keys), clusters, seed=0)


def _columns(rows: _Rows, keys: list[tuple[int, str]]) -> tuple[list[float], list[float]]:
    chosen = [rows[key] for key in keys]
    return [row.kl_nats or 0.0 for row in chosen], [float(row.supervised_tokens) for row in chosen]


def _clusters(rows: _Rows, keys: list[tuple[int, str]]) -> list[str]:
    return [rows[key].prompt_id for key in keys]
