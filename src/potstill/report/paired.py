"""The students of several runs on the same held-out traces: differences paired by prompt.

An interval of each student alone is mostly about which prompts happened to be held out, and that they share.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from potstill.evaluate.intervals import Estimate, bootstrap_ratio_difference
from potstill.evaluate.paired import HeldOutRun, PairedKL, paired_kl
from potstill.evaluate.rows import HELD_OUT_FILE
from potstill.report.results import Better, results_of
from potstill.report.view import RunView

__all__ = ["arms_of", "differences_to_best"]

Columns = Mapping[str, list[Any]]

# The sums in a trace's row that a measure is the mean of, by the measure's label.
_SUMS = {
    "KL to the teacher": "kl_nats",
    "Top-1 agreement": "agreed_tokens",
    "Perplexity": "cross_entropy_nats",
}


def differences_to_best(runs: Sequence[RunView], label: str, better: Better) -> list[Estimate | None] | None:
    """Each run's measure less the best run's, with its 95 % interval; None for the best itself.

    None for all of them where a run was not measured on the same tokens of the same traces. Of perplexities
    the logarithms are subtracted.
    """
    found = [_student_columns(run) for run in runs]
    columns = [one for one in found if one is not None]
    name = _SUMS.get(label)
    if name is None or len(columns) < max(2, len(runs)):
        return None
    shared = ("record_id", "supervised_tokens")
    if any(one[key] != columns[0][key] for one in columns for key in shared):
        return None
    if any(None in one[name] for one in columns):
        return None
    sums = [sum(one[name]) for one in columns]
    best = sums.index(max(sums) if better == "higher" else min(sums))
    tokens, clusters = columns[0]["supervised_tokens"], columns[0]["prompt_id"]
    differences: list[Estimate | None] = []
    for number, one in enumerate(columns):
        gap = bootstrap_ratio_difference((columns[best][name], tokens), (one[name], tokens), clusters, seed=0)
        differences.append(None if number == best else gap)
    return differences


def _student_columns(run: RunView) -> Columns | None:
    """The rows of the student's traces by column, from the last evaluation that kept them."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    folders = {step.name: step.folder for step in run.steps_of("evaluate")}
    for results in reversed(results_of(run)):
        folder = folders[results.step]
        if folder is None or not (folder / HELD_OUT_FILE).is_file():
            continue
        table = pq.read_table(folder / HELD_OUT_FILE)
        columns: Columns = table.filter(pc.field("model") == results.judged).to_pydict()
        if columns["record_id"]:
            return columns
    return None


def arms_of(runs: Sequence[RunView]) -> list[PairedKL]:
    """The arms of a comparison over several seeds, the first of them the one that others are compared with.

    An arm is a run's name without its seed: `rule,seed=1` and `rule,seed=2` are two runs of one arm. Empty
    for fewer than two arms, and where each has one seed only.
    """
    found = []
    for run in runs:
        evaluated = {step.name: step.folder for step in run.steps_of("evaluate")}
        for results in reversed(results_of(run)):
            folder = evaluated[results.step]
            if folder is not None and results.student is not None and (folder / HELD_OUT_FILE).is_file():
                found.append(HeldOutRun(_arm(run.name), _seed(run), folder, results.student))
                break
    arms = paired_kl(found)
    return arms if len(arms) > 1 and any(one.seeds > 1 for one in arms) else []


def _arm(name: str) -> str:
    return ",".join(part for part in name.split(",") if not part.startswith("seed=")) or name


def _seed(run: RunView) -> int:
    try:
        found = yaml.safe_load(run.recipe_text)
    except yaml.YAMLError:
        return 0
    return int(found.get("seed", 0)) if isinstance(found, dict) else 0
