"""The Markdown card of a student's folder."""

import re
from pathlib import Path
from typing import Any

import yaml

from potstill.core.events import format_seconds
from potstill.models import is_encoder_decoder, shares_experts
from potstill.report.conclusion import conclusion
from potstill.report.html import evidence, verdict_words
from potstill.report.page import flatten
from potstill.report.results import Results, format_figure, format_interval, results_of
from potstill.report.view import RunView, StepView

__all__ = ["model_card"]


def model_card(run: RunView, step: StepView, *, files: Path | None = None) -> str:
    """What a model is: base, teacher, data, figures with intervals, use, limits and settings, in Markdown.

    `files` is where the model's files lie, by default the step's folder.
    """
    manifest = step.manifest
    assert manifest is not None, f"{step.name} has no artifact"
    adapter = "adapter_config.json" in manifest.files
    ancestors = _ancestors(run, step)
    evaluations = [
        (results, role)
        for results in results_of(run)
        if not results.parts and (role := _role(results, step)) is not None
    ]
    sections = [
        f"---\nlibrary_name: {'peft' if adapter else 'transformers'}\ntags:\n- distillation\n- potstill\n---",
        f"# {_text(run.name)}: {_text(step.name)}",
        f"Made by the `{step.kind}` step {_code(step.name)} of the potstill run {_code(run.name)}.",
        "## Where it comes from\n\n" + _table(["", ""], _lineage(run, step, ancestors)),
    ]
    for results, role in evaluations:
        title = f": {_text(results.title)}" if len(evaluations) > 1 else ""
        sections.append(f"## What was measured{title}\n\n" + _figures(results, role))
    if not evaluations:
        sections.append("## What was measured\n\nNo evaluation of this model was part of the run.")
    sections += [
        "## Use\n\n" + _use(step, adapter, files or step.folder),
        "## Limits\n\n" + _limits(evaluations, ancestors),
        "## Settings\n\n"
        + _table(["setting", "value"], [(key, _code(value)) for key, value in _settings(manifest)]),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) + ".",
    ]
    return "\n\n".join(sections) + "\n"


def _settings(manifest: Any) -> list[tuple[str, str]]:
    return [
        *((key, value) for key, value in flatten(manifest.settings) if key != "do"),
        ("seed", str(manifest.seed)),
    ]


def _ancestors(run: RunView, step: StepView) -> list[StepView]:
    """Every step that a step needs, directly or through others, in the order they ran."""
    by_name = {one.name: one for one in run.steps}
    found: set[str] = set()
    waiting = list(step.needs)
    while waiting:
        name = waiting.pop()
        if name in by_name and name not in found:
            found.add(name)
            waiting += by_name[name].needs
    return [one for one in run.steps if one.name in found]


def _lineage(run: RunView, step: StepView, ancestors: list[StepView]) -> list[tuple[str, str]]:
    assert step.manifest is not None
    models = _declared_models(run)
    settings = step.manifest.settings
    rows = []
    for key, label in (("student", "Base"), ("model", "Base")):
        if isinstance(settings.get(key), str):
            rows.append((label, _described(settings[key], models, ancestors)))
    for one in ancestors:
        if one.manifest is None:
            continue
        teacher = one.manifest.settings.get("model")
        if one.kind in ("generate", "cache") and isinstance(teacher, str):
            what = "wrote the traces" if one.kind == "generate" else "gave its probabilities"
            rows.append((f"Teacher that {what}", _described(teacher, models, ancestors)))
    for one in ancestors:
        if one.kind in ("generate", "select", "cache", "retrieve") and one.manifest is not None:
            counts = ", ".join(
                f"{count:,} {name.replace('_', ' ')}" for name, count in one.manifest.counts.items()
            )
            rows.append((f"Data: {_text(one.name)}", _text(counts) or one.kind))
    rows.append(("Made in", format_seconds(step.manifest.seconds)))
    return rows


def _described(reference: str, models: dict[str, Any], ancestors: list[StepView]) -> str:
    """A model by the name the recipe gives it, and what stands behind that name."""
    declared = models.get(reference)
    if isinstance(declared, dict):
        name = declared.get("path") or declared.get("model") or declared.get("function")
        engine = declared.get("engine")
        behind = f"{name}" + (f", by {engine}" if engine and engine != "transformers" else "")
        return f"{_code(reference)} ({_text(behind)})"
    maker = next((one for one in ancestors if one.name == reference), None)
    if maker is not None and maker.manifest is not None:
        source = maker.manifest.settings.get("model") or maker.manifest.settings.get("student")
        inner = f", from {_described(source, models, ancestors)}" if isinstance(source, str) else ""
        return f"{_code(reference)} ({maker.kind} step{inner})"
    return _code(reference)


def _declared_models(run: RunView) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(run.recipe_text)
    except yaml.YAMLError:
        return {}
    models = recipe.get("models") if isinstance(recipe, dict) else None
    return models if isinstance(models, dict) else {}


def _role(results: Results, step: StepView) -> str | None:
    """Under which name an evaluation knows a step's model: by its weights, or as the recipe calls it."""
    assert step.manifest is not None
    known = step.manifest.model_identity
    return next(
        (
            role
            for role, model in results.models.items()
            if model.get("reference") == step.name or (known is not None and model.get("identity") == known)
        ),
        None,
    )


def _figures(results: Results, role: str) -> str:
    base = results.baseline if results.baseline != role else None
    header = ["", *(_text(one) for one in results.roles)]
    if base is not None:
        header.append(f"{_text(role)} − {_text(base)}")
    rows = []
    for measure in results.measures:
        row = [_text(measure.heading)]
        for one in results.roles:
            figure = measure.values.get(one)
            interval = format_interval(figure, measure.unit) if figure else ""
            row.append(
                "–" if figure is None else format_figure(figure.value, measure.unit) + _bracketed(interval)
            )
        if base is not None:
            gap = measure.differences.get(role)
            text = ""
            if gap is not None:
                points = " points" if measure.unit == "share" else ""
                text = format_figure(gap.value, measure.unit, difference=True) + points
                text += _bracketed(format_interval(gap, measure.unit, difference=True))
                verdict = verdict_words(measure.verdict(role))
                text += f" {verdict}" if verdict else ""
            row.append(text)
        rows.append(row)
    parts = []
    found = conclusion(results)
    if found is not None and results.student == role:
        parts.append(" ".join(_text(one) for one in (found.headline, found.forgetting, found.note) if one))
        parts.append("\n".join(f"- {_text(evidence(measure, results))}" for measure in found.evidence))
    parts.append(_table(header, rows))
    parts.append(
        "In brackets: 95 % intervals. Better or worse is said only where that of the difference leaves out 0."
    )
    return "\n\n".join(parts)


def _bracketed(interval: str) -> str:
    return f" [{interval}]" if interval else ""


def _use(step: StepView, adapter: bool, files: Path | None) -> str:
    folder = step.folder.as_posix() if step.folder else "FOLDER"
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
    kind = "Seq2SeqLM" if files is not None and is_encoder_decoder(files) else "CausalLM"
    note = ""
    if step.folder is not None and shares_experts(step.folder):
        loading = (
            "from potstill.models import TransformersModel, load\n\n"
            f'loaded = load(TransformersModel(path="{folder}"))\n'
        )
        tokenizer = "model, tokenizer = loaded.model, loaded.tokenizer\n"
        note = (
            "Its experts share a core, which transformers alone does not know: `potstill export --to "
            "huggingface` writes the model with whole experts.\n\n"
        )
    elif adapter:
        loading = (
            f"from peft import AutoPeftModelFor{kind}\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelFor{kind}.from_pretrained("{folder}")\n'
        )
    else:
        loading = (
            f"from transformers import AutoModelFor{kind}, AutoTokenizer\n\n"
            f'model = AutoModelFor{kind}.from_pretrained("{folder}")\n'
        )
    loading += tokenizer
    return (
        f"```python\n{loading}```\n\n```\npotstill chat {folder}\n```\n\n{note}"
        "Prompts go through the tokenizer's chat template, the one that the model was trained with."
    )


def _limits(evaluations: list[tuple[Results, str]], ancestors: list[StepView]) -> str:
    lines = []
    for results, role in evaluations:
        held_out = results.models[role].get("held_out") or {}
        if held_out.get("rows"):
            lines.append(
                f"Fidelity was measured on {held_out['rows']:,} held-out traces of the training's own kind."
            )
        if results.prompts:
            tasks = ", ".join(f"{_text(task)} ({count:,} prompts)" for task, count in results.prompts.items())
            lines.append(f"Answers were verified on: {tasks}. Nothing is known about other tasks.")
    caps = {
        one.manifest.settings.get("max_new_tokens")
        for one in ancestors
        if one.manifest and one.kind == "generate"
    }
    longest = max((cap for cap in caps if isinstance(cap, int)), default=None)
    if longest is not None:
        lines.append(
            f"The traces it learned from were capped at {longest:,} tokens; longer answers are untrained."
        )
    lines.append(
        "It inherits the faults, biases and licences of its base and teacher; no safety training was added."
    )
    return "\n".join(f"- {line}" for line in lines)


def _table(header: list[str], rows: Any) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _text(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Text as code; a run of backticks inside is fenced by a longer one."""
    line = " ".join(text.split()).replace("|", "\\|") or " "
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"
