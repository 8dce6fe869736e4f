"""The `init` step: load, make a student by the method asked for, save, check what was saved, measure it."""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from potstill.core.errors import DataError, ModelError
from potstill.core.step import StepContext, StepResult
from potstill.data.chat import Rendered, Renderer, fit
from potstill.data.sources import read
from potstill.models import (
    LoadedModel,
    TransformersModel,
    decoder_start_id,
    find_source,
    identity,
    load,
    stored_quantization,
    supports_bf16,
    transformers_model,
)
from potstill.models.pretrained import quiet_transformers
from potstill.scoring import compare_on_traces, micro_batch_tokens
from potstill.student import InitSettings
from potstill.student.configured import from_config
from potstill.student.fresh import fresh
from potstill.student.making import PROBE_TOKENS, Made, Original, check_same
from potstill.student.moe import prune_experts, shared_experts, to_dense
from potstill.student.prune import copy_blocks, prune

__all__ = ["initialise"]

# Each makes a student in memory and leaves the model that it is given as it is.
_METHODS: dict[str, Callable[[Original], Made]] = {
    "prune": prune,
    "fresh": fresh,
    "copy": copy_blocks,
    "prune_experts": prune_experts,
    "share_experts": shared_experts,
    "to_dense": to_dense,
    "from_config": from_config,
}


def initialise(settings: InitSettings, context: StepContext) -> StepResult:
    """Carry out an init step."""
    model_settings = _model_settings(settings, context)
    # Pruning copies weights: fp32 holds those of any type as they are.
    loaded = load(model_settings, dtype=None if model_settings.dtype else torch.float32, say=context.say)
    renderer = Renderer(loaded.tokenizer)
    calibration, held_out = _rows(settings, context, renderer)
    if settings.method != "from_config" and decoder_start_id(loaded.model.config) is not None:
        raise ModelError(
            f"is an encoder-decoder, of which method {settings.method} makes no smaller one",
            where=str(settings.model),
            expected="a decoder-only model, whose blocks are one row",
            mend="use method from_config for a new model, or train the encoder-decoder as it is",
        )
    probe_BT = torch.tensor([calibration[0].ids[:PROBE_TOKENS]], device=loaded.model.device)
    bf16 = model_settings.dtype is None and supports_bf16(loaded.model.device)
    original = Original(settings, context, loaded, calibration, probe_BT, bf16)
    made = _METHODS[settings.method](original)
    parameters, parameters_before = made.model.num_parameters(), loaded.model.num_parameters()
    context.say(f"{made.said}; {parameters:,} of {parameters_before:,} parameters")
    expected_BTV = original.logits(made.model) if made.expected_BTV is None else made.expected_BTV
    with quiet_transformers():
        made.model.save_pretrained(context.folder)
        loaded.tokenizer.save_pretrained(context.folder)
    del made.model
    saved = model_settings.model_copy(update={"path": str(context.folder), "add_tokens": []})
    student = load(saved, dtype=expected_BTV.dtype)
    family = student.model.config.model_type
    check_same(original.logits(student.model), expected_BTV, family, str(context.folder))
    quality: dict[str, Any] | None = None
    if decoder_start_id(student.model.config) == decoder_start_id(loaded.model.config):
        if bf16:
            # In the type in which steps that change no weights load them; the full ones are let go of first.
            del original, student, loaded
            student, loaded = load(saved), load(model_settings)
        quality = _quality(student, loaded, held_out or calibration, context, held_out=bool(held_out))
    return StepResult(
        counts={**made.counts, "parameters": parameters, "calibration_rows": len(calibration)},
        metrics={
            **made.metrics,
            "parameters_before": parameters_before,
            **({} if quality is None else {"quality": quality}),
        },
        extra={} if settings.quantize is None else {"quantize": settings.quantize},
        tokenizer=renderer.tokenizer_hash,
        model_identity=identity(TransformersModel(path=str(context.folder))),
    )


def _model_settings(settings: InitSettings, context: StepContext) -> TransformersModel:
    found = transformers_model(context, settings.model, device=settings.device, why="its weights are cut")
    scheme = found.quantize or stored_quantization(found)
    if scheme is not None or find_source(found.path).kind == "adapter":
        what = "an adapter" if scheme is None else f"quantised to {scheme}"
        raise ModelError(
            f"is {what} and cannot be pruned", where=str(settings.model), expected="plain weights"
        )
    return found


def _rows(
    settings: InitSettings, context: StepContext, renderer: Renderer
) -> tuple[list[Rendered], list[Rendered]]:
    """Calibration and held-out traces: of either those that come first in an order that the seed makes."""
    heaps: dict[bool, list[tuple[int, str, Rendered]]] = {False: [], True: []}
    too_long: DataError | None = None
    for number, record in enumerate(read(settings.data, context), start=1):
        heap, place = heaps[record.held_out], -context.derive_seed("calibration", record.id)
        if len(heap) < settings.samples or place > heap[0][0]:
            row = renderer.render(record)
            try:
                row = fit(row, settings.max_length, row_number=number)
            except DataError as error:
                too_long = too_long or error
                continue
            (heapq.heappush if len(heap) < settings.samples else heapq.heapreplace)(
                heap, (place, record.id, row)
            )
    calibration, held_out = ([row for *_, row in sorted(heaps[one], reverse=True)] for one in (False, True))
    if not calibration:
        raise too_long or DataError("all rows are held out", expected="traces to measure importance on")
    if too_long is not None:
        context.say(f"rows whose prompts fill max_length ({settings.max_length:,}) are not measured on")
    return calibration, held_out


def _quality(
    student: LoadedModel,
    teacher: LoadedModel,
    rows: Sequence[Rendered],
    context: StepContext,
    *,
    held_out: bool,
) -> dict[str, Any]:
    """How far the student is from its teacher before any training, a supervised token."""
    if not held_out:
        context.say("no traces are held out: its quality is measured on those that it was made with")
    with context.progress("measuring the student", total=len(rows)) as progress:

        def on_batch(count: int) -> None:
            progress.advance(count)
            context.check_stop()

        device = teacher.model.device
        found = compare_on_traces(
            student, teacher, rows, max_tokens=micro_batch_tokens(device), on_batch=on_batch
        )
    tokens = sum(one.supervised_tokens for one in found)
    quality = {
        "kl_nats_per_token": sum(one.kl_nats or 0.0 for one in found) / tokens,
        "perplexity": math.exp(min(sum(one.cross_entropy_nats for one in found) / tokens, 700.0)),
        "agreement": sum(one.agreed_tokens or 0 for one in found) / tokens,
    }
    context.say(
        f"before training: KL {quality['kl_nats_per_token']:.2f} nats a token, perplexity "
        f"{quality['perplexity']:,.1f}, top-1 agreement {quality['agreement']:.1%}"
    )
    return {
        **quality,
        "rows": len(rows),
        "tokens": tokens,
        "measured_on": "held-out" if held_out else "calibration",
    }
