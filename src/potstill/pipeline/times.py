"""How long steps may take: by what like ones took before, else by what this machine reaches."""

import math
from collections.abc import Callable
from typing import Any

from potstill.core.settings import ModelRef
from potstill.models import TransformersModel, choose_device, stored_configuration, supports_bf16
from potstill.pipeline.graph import Node
from potstill.pipeline.planner import (
    READING,
    WRITING,
    PlannedStep,
    Planner,
    Speed,
    init_work,
    parameters_of,
    trains_adapter,
    upstream_tokens,
)
from potstill.scale import Cluster
from potstill.scale.local import this_machine
from potstill.scale.roofline import generation, scoring_seconds, train_flops
from potstill.teachers import OpenAIModel
from potstill.teachers.transformers import local_batch

__all__ = ["evaluation_tokens", "planned_seconds"]

_STREAM_TOKENS_PER_S = 40.0  # that an API writes a request, where nothing was measured
# An init step measures importance, then model and student on as many rows again; drop_one once more a block.
_INIT_PASSES, _USUAL_BLOCKS = 3, 30
_GRADIENT_PASSES = 3  # forward, and twice as much back
_FULL_BYTES = 4  # of a second moment, in fp32


def planned_seconds(planner: Planner, node: Node, planned: PlannedStep) -> float | None:
    """How long a step may take; a note says by what, None where there is nothing to go by."""
    if node.kind == "evaluate":
        return _evaluating(planner, node)
    if node.kind == "init":
        return _making_student(planner, node)
    if not planned.tokens:
        return None
    parameters = _parameters(planner, node)
    if not _is_copied(node) and (speed := planner.speed(planner.work(node), parameters)):
        _note_known(planner, node, speed)
        return planned.tokens * (parameters or 1) / speed.per_s
    guess = {"train": _training, "select": _selecting, "generate": _asking, "cache": _caching}.get(node.kind)
    return None if guess is None else guess(planner, node, planned)


def _is_copied(node: Node) -> bool:
    """Whether no model runs: what traces hold is taken over."""
    return bool(getattr(node.settings, "from_traces", False))


def _parameters(planner: Planner, node: Node) -> float | None:
    """Those of the model that a step's time goes by, of several on average; None of one known by itself."""
    settings: Any = node.settings
    models = {"train": ("student",), "cache": ("model",)}.get(node.kind, ())
    named = settings.models.values() if node.kind == "select" else (getattr(settings, one) for one in models)
    found = [planner.parameters(node, one) for one in named]
    return sum(one or 0 for one in found) / len(found) if found and None not in found else None


def _training(planner: Planner, node: Node, planned: PlannedStep) -> float | None:
    settings: Any = node.settings
    # Forward, to the inputs, and to the weights where they are trained; once more forward to recompute.
    passes = 3 - trains_adapter(planner, node) + settings.activation_checkpointing

    def seconds(here: Cluster, parameters: int) -> float:
        flops = train_flops(parameters, planned.tokens or 0, passes=passes)
        return flops / (here.device.train_share * here.device.flops_per_s)

    return _guessed(planner, node, settings.student, seconds)


def _selecting(planner: Planner, node: Node, planned: PlannedStep) -> float | None:
    settings: Any = node.settings
    each = (planned.tokens or 0) / max(1, len(settings.models))
    length = each / max(1, planner.rows_of(node, settings.data) or 1)
    parts = [_reading(planner, node, model, each, length) for model in settings.models.values()]
    return sum(one or 0.0 for one in parts) or None


def _caching(planner: Planner, node: Node, planned: PlannedStep) -> float | None:
    settings: Any = node.settings
    if _is_copied(node) or not planned.rows:
        return None
    tokens = planned.tokens or 0
    return _reading(planner, node, settings.model, tokens, tokens / planned.rows)


def _asking(planner: Planner, node: Node, planned: PlannedStep) -> float | None:
    settings: Any = node.settings
    model = planner.graph.models.get(settings.model.target)
    if not planned.rows:
        return None
    if not isinstance(model, OpenAIModel):
        rows = min(settings.concurrency or local_batch(planner.device(node)), planned.rows)
        return _writing(planner, node, settings.model, planned.tokens or 0, settings.max_new_tokens, rows)
    at_once = min(settings.concurrency or model.concurrency, planned.rows)
    _note_guess(planner, node, f"{at_once} requests at once at {_STREAM_TOKENS_PER_S:g} tokens/s each")
    return (planned.tokens or 0) / (at_once * _STREAM_TOKENS_PER_S)


def evaluation_tokens(planner: Planner, node: Node) -> tuple[int, int] | None:
    """What each model of an evaluate step writes at most, and what it reads; None where that is unknown."""
    settings: Any = node.settings
    written = read = 0.0
    for task in settings.all_tasks.values():
        rows = _rows(planner, node, task.data)
        if rows is None:
            return None
        rows = min(rows, task.limit or settings.limit or rows)
        decoding = settings.decoding(task)
        prompts = rows * planner.prompt_tokens(node, task.data)
        if task.generates:
            written += rows * decoding.samples * decoding.max_new_tokens
            read += prompts * decoding.samples
        else:
            read += prompts
    if settings.data is not None:
        traces, rows = upstream_tokens(planner, node), _rows(planner, node, settings.data)
        if traces is None or rows is None:
            return None
        read += traces * _share(planner, node, settings.data)
        read += rows * planner.prompt_tokens(node, settings.data)
    return round(written), round(read)


def _rows(planner: Planner, node: Node, data: Any) -> float | None:
    """How many rows an evaluate step reads of some data: of a step's, those of the view."""
    total = 0.0
    for one in data if isinstance(data, list) else [data]:
        if (rows := planner.rows_of(node, one)) is None:
            return None
        total += rows * _share(planner, node, one)
    return total


def _share(planner: Planner, node: Node, data: Any) -> float:
    """The share of steps' rows that is read, where those that are held out are asked for."""
    members = data if isinstance(data, list) else [data]
    if any(getattr(one, "view", None) != "held_out" for one in members):
        return 1.0
    shares = [getattr(maker.settings, "held_out", 0.0) for maker in planner.makers(node, data)]
    return max(shares, default=0.0) or 1.0  # of a source's own held-out rows nobody knows beforehand


def _evaluating(planner: Planner, node: Node) -> float | None:
    settings: Any = node.settings
    tokens = evaluation_tokens(planner, node)
    if tokens is None or not any(tokens):
        return None
    written, read = tokens
    total = 0.0
    for reference in settings.roles.values():
        model = planner.graph.models.get(reference.target)
        if isinstance(model, OpenAIModel):
            _note_guess(planner, node, f"a server that writes {_STREAM_TOKENS_PER_S:g} tokens/s a request")
            total += written / (model.concurrency * _STREAM_TOKENS_PER_S)
            continue
        parameters = planner.parameters(node, reference)
        if written and (speed := parameters and planner.speed(WRITING, parameters)):
            _note_known(planner, node, speed)
            total += written * parameters / speed.per_s
        elif written:
            longest = max(settings.decoding(task).max_new_tokens for task in settings.all_tasks.values())
            total += _writing(planner, node, reference, written, longest, settings.batch) or 0.0
        for reader in filter(None, (reference, settings.teacher)):  # a teacher reads with each model
            parameters = planner.parameters(node, reader)
            if read and (speed := parameters and planner.speed(READING, parameters)):
                _note_known(planner, node, speed)
                total += read * parameters / speed.per_s
            elif read:
                total += _reading(planner, node, reader, read) or 0.0
    return total or None


def _making_student(planner: Planner, node: Node) -> float | None:
    settings: Any = node.settings
    rows = planner.rows_of(node, settings.data)
    parameters = planner.parameters(node, settings.model)
    if rows is None or not parameters:
        return None
    calibration = min(rows, settings.samples)
    if speed := planner.speed(init_work(settings.method, settings.depth_by), parameters):
        _note_known(planner, node, speed)
        return float(calibration * parameters / speed.per_s)
    traces = upstream_tokens(planner, node)
    if traces is None:
        return None
    tokens = calibration * min(
        settings.max_length, traces / max(rows, 1) + planner.prompt_tokens(node, settings.data)
    )
    passes = _INIT_PASSES + (_USUAL_BLOCKS if settings.depth_by == "drop_one" else 0)
    if settings.method == "share_experts":
        passes += planner.of_model(node, settings.model, _moment_passes) or 0
        passes += _GRADIENT_PASSES * (settings.core_by == "fisher")
    return _reading(planner, node, settings.model, passes * tokens, tokens / max(calibration, 1))


def _moment_passes(model: TransformersModel) -> int | None:
    """In how many passes the second moments of a mixture's layers are measured, by its configuration."""
    from potstill.student.moe_sharing import layers_at_once

    stated = stored_configuration(model)
    layers, hidden = stated.get("num_hidden_layers"), stated.get("hidden_size")
    experts = stated.get("num_experts") or stated.get("num_local_experts")
    inner = stated.get("moe_intermediate_size") or stated.get("intermediate_size")
    if not (layers and hidden and experts and inner):
        return None
    return math.ceil(int(layers) / layers_at_once(experts, hidden, inner, _FULL_BYTES))


def _reading(
    planner: Planner, node: Node, reference: ModelRef, tokens: float, length: float = 0.0
) -> float | None:
    """Of so many tokens forward, in rows of about so many."""
    return _guessed(
        planner,
        node,
        reference,
        lambda here, parameters: scoring_seconds(here.device, parameters, tokens, length),
    )


def _writing(
    planner: Planner, node: Node, reference: ModelRef, tokens: float, longest: int, rows: int
) -> float | None:
    """Of so many tokens in responses of at most `longest`, so many at once."""

    def seconds(here: Cluster, parameters: int) -> float | None:
        found = generation(here, parameters, prompt_tokens=1, response_tokens=longest, rows=rows)
        return None if found is None else tokens / found.tokens_per_s

    return _guessed(planner, node, reference, seconds)


def _guessed(
    planner: Planner, node: Node, reference: ModelRef, seconds: Callable[[Cluster, int], float | None]
) -> float | None:
    """What the cost model says of a model on this machine; noted, since it is a guess."""

    def of(model: TransformersModel) -> float | None:
        import torch

        stated = getattr(node.settings, "device", None) or model.device
        device = choose_device(model.model_copy(update={"device": stated}))
        parameters = parameters_of(model)
        if not parameters:
            return None
        here = this_machine(device, torch.bfloat16 if supports_bf16(device) else torch.float32)
        return seconds(here, parameters) or None

    found = planner.of_model(node, reference, of)
    if found is not None:
        _note_guess(planner, node, "from what this machine's products and memory reach")
    return found


def _note_guess(planner: Planner, node: Node, what: str) -> None:
    planner.note(f"step {node.name}: its time is a guess, {what}")


def _note_known(planner: Planner, node: Node, speed: Speed) -> None:
    by = "its model" if speed.parameters is None else f"a model of {speed.parameters:,.0f} parameters"
    planner.note(f"step {node.name}: its time is by what {by} last did of this")
