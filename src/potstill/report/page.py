"""One run as one offline HTML page: the answer first, then what carries it, then every detail."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.core.events import format_seconds
from potstill.core.store import Manifest, write_atomically
from potstill.report.arms import arm_costs
from potstill.report.conclusion import conclusion
from potstill.report.graph import draw_graph
from potstill.report.html import render
from potstill.report.results import Figure, Results, results_of
from potstill.report.selection import save_score_histograms, selection_sections
from potstill.report.stages import stage_sections
from potstill.report.students import student_sections
from potstill.report.tables import across_tasks
from potstill.report.training import peak_memory, training_sections, training_table
from potstill.report.view import RunView, StepView

__all__ = ["FIGURES_FOLDER", "flatten", "write_report"]

FIGURES_FOLDER = "report.figures"
_SHOWN_LETTERS = 6000
_LONGEST_LIST = 40


def write_report(run: RunView, path: Path) -> None:
    """Write the report of a run, finished or not, as one HTML file that needs nothing else.

    Histograms of scores are written beside it as well, in the folder `report.figures`.
    """
    results = results_of(run)
    main = results[-1] if results else None
    pooled = {part for one in results for part in one.parts}
    text = render(
        "report.html.j2",
        run=run,
        facts=_facts(run),
        failures=[{"step": step.name, "error": error} for step in run.steps if (error := run.error(step))],
        conclusion=conclusion(main) if main else None,
        plain_headline=_plain_headline(run, main),
        main=main,
        graph=draw_graph(run),
        reused=any(run.status(step) == "reused" for step in run.steps),
        stages=stage_sections(run),
        training=training_sections(run),
        costs=training_table(run),
        results=[
            {
                **vars(one),
                "title": one.title,
                "main": one.main,
                "reasoning": one.of("reasoning"),
                "forgetting": one.of("forgetting"),
                "groups": one.of("group"),
                "across": _across(run, one),
                "arms": None if one.step in pooled else arm_costs(run, one),
                "compared": one.compared,
                "endings": _endings(one),
            }
            for one in results
        ],
        samples=[sample for one in results for sample in _samples(run, one)],
        generation=_generation(run),
        labels=_labels(run),
        selection=selection_sections(run),
        students=student_sections(run),
        steps=[_provenance(run, step) for step in run.steps],
        versions=_versions(run),
        machine=_machine(run),
    )
    write_atomically(path, text)
    save_score_histograms(run, path.parent / FIGURES_FOLDER)


def _facts(run: RunView) -> list[str]:
    facts = []
    new = [step for step in run.steps if run.status(step) == "made"]
    made = [step.seconds for step in new if step.seconds is not None]
    reused = [step.seconds for step in run.steps if step.seconds is not None and run.status(step) == "reused"]
    if run.wall_seconds is not None:
        facts.append(f"{format_seconds(run.wall_seconds)} in all")
    elif made:
        facts.append(f"{format_seconds(sum(made))} in all")
    if (measured := run.side_by_side(new)) is not None:
        wall, summed = map(format_seconds, measured)
        facts.append(f"steps of {summed} made in {wall}, side by side")
    if reused:
        facts.append(f"{format_seconds(sum(reused))} of earlier work reused")
    done = sum(step.manifest is not None for step in run.steps)
    facts.append(f"{done} of {len(run.steps)} steps" if done < len(run.steps) else f"{done} steps")
    return facts


def _plain_headline(run: RunView, main: Results | None) -> str:
    """What to say where no student was compared with a baseline."""
    if main is not None:
        return (
            f"{', '.join(main.roles)} evaluated; nothing to compare the student with."
            if main.roles
            else "Evaluated."
        )
    if run.outcome == "interrupted":
        return "The run was interrupted before any model was evaluated; the same command takes it up again."
    if run.outcome == "failed":
        return "The run failed before any model was evaluated."
    return "No model was evaluated in this run."


def _endings(results: Results) -> dict[str, dict[str, str]]:
    endings: dict[str, dict[str, str]] = {}
    for task in results.prompts:
        for role, model in results.models.items():
            kinds = [model.get(kind, {}).get(task, {}) for kind in ("tasks", "forgetting")]
            if reasons := {
                reason: count for one in kinds for reason, count in one.get("finish_reasons", {}).items()
            }:
                endings.setdefault(task, {})[role] = ", ".join(
                    f"{count} {reason}" for reason, count in reasons.items()
                )
    return endings


def _across(run: RunView, results: Results) -> list[dict[str, Any]]:
    """Right answers of each model to tasks that ask the same questions, against the baseline on the first."""
    step = next((step for step in run.steps if step.name == results.step), None)
    if step is None or results.baseline is None or len(results.prompts) < 2:
        return []
    right = {one.task: one for one in results.of("task") if one.task is not None}
    found = []
    for tasks, gaps in across_tasks(step, results.baseline):
        differences = {
            task: {
                role: Figure(gap["value"], gap["low"], gap["high"])
                for (role, of_task), gap in gaps.items()
                if of_task == task
            }
            for task in tasks
        }
        found.append(
            {
                "tasks": tasks,
                "roles": results.roles,
                "measures": [replace(right[task], differences=differences[task]) for task in tasks],
                "first": f"{results.baseline} on {tasks[0]}",
            }
        )
    return found


def _labels(run: RunView) -> list[str]:
    """What labels were predicted and how sure it is, and how often the classifier was right on others."""
    learnt, predicted = {}, {}
    for step in run.steps:
        for event in run.logged(step, "labels_learnt"):
            learnt[event["label"]] = (
                f"{event['label']}: right for {event['accuracy'] * 100:.0f} % of {event['rows']:,} labelled "
                f"rows that were left out, at a mean confidence of {event['confidence']:.2f}."
            )
        for event in run.logged(step, "labels_predicted"):
            parts = [
                f"{value} {count:,} (confidence {event['confidence'][value]:.2f})"
                for value, count in event["rows"].items()
            ]
            parts += [f"too unsure {event['unsure']:,}"] if event["unsure"] else []
            said = ", ".join(parts) or "none"
            predicted[event["label"], event["source"]] = (
                f"{event['label']}, predicted in {event['source']}: {said}."
            )
    return [*learnt.values(), *predicted.values()]


def _samples(run: RunView, results: Results) -> list[dict[str, Any]]:
    """The samples that an evaluate step kept, ready to show; none where the file is gone."""
    folder = next((step.folder for step in run.steps if step.name == results.step), None)
    if folder is None:
        return []
    try:
        kept = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    samples = []
    for number, sample in enumerate(kept, start=1):
        answers = []
        if sample.get("trace") is not None:
            answers.append(
                {"role": "trace", "facts": ["given in the data"], "text": _shorten(sample["trace"])}
            )
        for role, answer in sample["answers"].items():
            facts = [f"{answer['response_tokens']} tokens"] if answer["response_tokens"] else []
            if answer.get("finish_reason") == "length":
                facts.append("cut off")
            facts += [
                _verdict_words(name, holds)
                for name, holds in answer.get("verdicts", {}).items()
                if name not in ("handed_in", "reasons", "tagged")
            ]
            answers.append({"role": role, "facts": facts, "text": _shorten(answer["response"])})
        verdicts = {
            role: answer.get("verdicts", {}).get("correct") for role, answer in sample["answers"].items()
        }
        samples.append(
            {
                "title": f"{number}. {_one_line(sample['messages'])}",
                "prompt": _shorten(
                    "\n\n".join(f"{one['role']}: {one['content']}" for one in sample["messages"])
                ),
                "reference": sample.get("reference"),
                "answers": answers,
                "verdicts": [(role, verdict) for role, verdict in verdicts.items() if verdict is not None],
                "student": results.student,
            }
        )
    return samples


def _verdict_words(name: str, holds: bool) -> str:
    if name == "correct":
        return "right" if holds else "wrong"
    words = "well-formed" if name == "well_formed" else name.replace("_", " ")
    return words if holds else f"not {words}"


def _one_line(messages: list[dict[str, str]]) -> str:
    text = " ".join(messages[-1]["content"].split()) if messages else "(no prompt)"
    return text if len(text) <= 90 else text[:89].rstrip() + "…"


def _shorten(text: str) -> str:
    if len(text) <= _SHOWN_LETTERS:
        return text
    return f"{text[:_SHOWN_LETTERS]}\n… ({len(text) - _SHOWN_LETTERS:,} more characters)"


def _generation(run: RunView) -> dict[str, Any] | None:
    """Counts and figures of the generate steps, side by side."""
    steps = run.steps_of("generate")
    figures = [dict(_figures(step.manifest, provenance=False)) for step in steps if step.manifest is not None]
    labels = list(dict.fromkeys(label for one in figures for label in one))
    if not labels:
        return None
    rows = [
        (step.name, [one.get(label, "–") for label in labels])
        for step, one in zip(steps, figures, strict=True)
    ]
    return {"labels": labels, "rows": rows, "groups": _groups(steps)}


def _groups(steps: Sequence[StepView]) -> list[dict[str, Any]]:
    """For each label how many traces of its values were written, and which share of the judged ones is right.

    The steps that `each` makes of one are one row.
    """
    found: dict[str, dict[str, dict[str, Counter[str]]]] = {}
    for step in steps:
        for label, values in (step.manifest.metrics.get("groups", {}) if step.manifest else {}).items():
            row = found.setdefault(label, {}).setdefault(step.name.partition("[")[0], {})
            for value, count in values.items():
                row.setdefault(value, Counter()).update(count)
    tables = []
    for label, by_step in found.items():
        values = sorted({value for row in by_step.values() for value in row})
        rows = [(name, [_group(row.get(value)) for value in values]) for name, row in by_step.items()]
        tables.append({"label": label, "values": values, "rows": rows})
    return tables


def _group(count: Counter[str] | None) -> str:
    if count is None:
        return "–"
    right = f", {count['right'] / count['judged'] * 100:.1f} % right" if count["judged"] else ""
    return f"{count['traces']:,}{right}"


def _provenance(run: RunView, step: StepView) -> dict[str, Any]:
    manifest = step.manifest
    settings = [(key, value) for key, value in flatten(manifest.settings) if key != "do"] if manifest else []
    return {
        "name": step.name,
        "kind": step.kind,
        "status": run.status(step),
        "settings": settings,
        "figures": _figures(manifest) if manifest else [],
    }


def _figures(manifest: Manifest, *, provenance: bool = True) -> list[tuple[str, str]]:
    """Counts and the plain figures among the metrics; lists and tables are shown elsewhere."""
    rows = [(key.replace("_", " "), f"{count:,}") for key, count in manifest.counts.items()]
    if manifest.kind not in ("evaluate", "select"):
        found = flatten(
            {
                key: value
                for key, value in manifest.metrics.items()
                if not isinstance(value, list) and (manifest.kind, key) != ("generate", "groups")
            }
        )
        rows += [(key.replace("_", " ").replace(".", ": "), value) for key, value in found]
    if manifest.tokens:
        rows.append(("tokens spent", f"{manifest.tokens:,}"))
    rows.append(("seconds", f"{manifest.seconds:,.1f}"))
    if manifest.seconds > 0 and manifest.tokens:
        rows.append(("tokens a second", f"{manifest.tokens / manifest.seconds:,.0f}"))
    if peak := peak_memory([manifest]):
        rows.append(("peak memory", peak))
    if provenance:
        rows.append(("fingerprint", manifest.fingerprint[:24]))
    if provenance and manifest.model_identity:
        rows.append(("model", manifest.model_identity[:24]))
    return rows


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) pairs; longer lists are counted instead of shown."""
    if isinstance(value, dict):
        return [
            pair
            for key, item in value.items()
            for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list) and len(value) > _LONGEST_LIST:
        return [(prefix, f"{len(value)} entries")]
    if isinstance(value, float):
        text = f"{value:.6g}"
    elif value is None:
        text = "–"
    else:
        text = str(value) if isinstance(value, str | int) else json.dumps(value, ensure_ascii=False)
    return [(prefix, text)]


def _versions(run: RunView) -> list[tuple[str, str]]:
    """Every version that made a part of this run; several where reused steps are older."""
    found: dict[str, list[str]] = {}
    for step in run.steps:
        for package, version in (step.manifest.versions if step.manifest else {}).items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return [(package, ", ".join(versions)) for package, versions in found.items()]


def _machine(run: RunView) -> list[tuple[str, str]]:
    for event in reversed(run.latest_events):
        if event.get("event") == "run_started" and isinstance(event.get("machine"), dict):
            return flatten(event["machine"])
    machines = [step.manifest.metrics.get("machine") for step in run.steps if step.manifest]
    return flatten(next((one for one in reversed(machines) if isinstance(one, dict)), {}))
