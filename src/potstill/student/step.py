"""The `init` step: measure, choose, prune, save, and check what was saved."""

import heapq
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from potstill.core.errors import DataError, ModelError
from potstill.core.events import Progress
from potstill.core.step import StepContext, StepResult
from potstill.data.batches import collate, micro_batches
from potstill.data.chat import Rendered, Renderer, fit
from potstill.data.sources import read
from potstill.models import (
    TransformersModel,
    find_source,
    identity,
    load,
    stored_quantization,
    transformers_model,
)
from potstill.models.pretrained import quiet_transformers
from potstill.student import InitSettings
from potstill.student.depth import block_importance, bypass, decoder_blocks, drop_blocks

__all__ = ["initialise"]

_MICRO_BATCH_TOKENS = 4096
_PROBE_TOKENS = 64


def initialise(settings: InitSettings, context: StepContext) -> StepResult:
    """Carry out an init step."""
    model_settings = _model_settings(settings, context)
    # Pruning copies weights: fp32 holds those of any type as they are.
    loaded = load(model_settings, dtype=None if model_settings.dtype else torch.float32, say=context.say)
    model, renderer = loaded.model, Renderer(loaded.tokenizer)
    count = len(decoder_blocks(model))
    if settings.layers > count:
        raise ModelError(
            f"{settings.layers} blocks cannot be kept of {count}",
            where=str(settings.model),
            expected=f"layers between 1 and {count}",
        )
    rows = _calibration_rows(settings, context, renderer)
    tokens = sum(len(row.ids) for row in rows)
    with context.progress("measuring blocks", total=tokens, unit="tokens") as progress:
        importance = block_importance(model, _batches(rows, model.device, context, progress))
    kept = sorted(sorted(range(count), key=lambda index: importance[index], reverse=True)[: settings.layers])
    dropped = [index for index in range(count) if index not in kept]
    probe_BT = torch.tensor([rows[0].ids[:_PROBE_TOKENS]], device=model.device)
    with bypass(model, dropped), torch.no_grad():
        expected_BTV = model(input_ids=probe_BT, use_cache=False).logits
    parameters_before = model.num_parameters()
    drop_blocks(model, kept)
    parameters = model.num_parameters()
    context.say(
        f"{len(kept)} of {count} blocks and {parameters:,} of {parameters_before:,} parameters kept; "
        f"left out: {', '.join(map(str, dropped)) or 'none'}"
    )
    with quiet_transformers():
        model.save_pretrained(context.folder)
        loaded.tokenizer.save_pretrained(context.folder)
    del model, loaded
    saved = {"path": str(context.folder), "add_tokens": []}
    _check_saved(model_settings.model_copy(update=saved), probe_BT, expected_BTV)
    return StepResult(
        counts={"blocks": len(kept), "parameters": parameters, "calibration_rows": len(rows)},
        metrics={"block_importance": importance, "kept_blocks": kept, "parameters_before": parameters_before},
        extra={} if settings.quantize is None else {"quantize": settings.quantize},
        tokenizer=renderer.tokenizer_hash,
        model_identity=identity(TransformersModel(path=str(context.folder))),
    )


def _model_settings(settings: InitSettings, context: StepContext) -> TransformersModel:
    found = transformers_model(context, settings.model, device=settings.device, why="its blocks are measured")
    scheme = found.quantize or stored_quantization(found)
    if scheme is not None or find_source(found.path).kind == "adapter":
        what = "an adapter" if scheme is None else f"quantised to {scheme}"
        raise ModelError(
            f"is {what} and cannot be pruned", where=str(settings.model), expected="plain weights"
        )
    return found


def _calibration_rows(settings: InitSettings, context: StepContext, renderer: Renderer) -> list[Rendered]:
    """The traces whose ids come first in an order that the seed makes; held-out ones are left alone."""
    traces = (record for record in read(settings.data, context) if not record.held_out)
    chosen = heapq.nsmallest(
        settings.samples,
        traces,
        key=lambda record: (context.derive_seed("calibration", record.id), record.id),
    )
    if not chosen:
        raise DataError("all rows are held out", expected="traces to measure the blocks' importance on")
    return [fit(renderer.render(record), settings.max_length) for record in chosen]


def _batches(
    rows: Sequence[Rendered], device: torch.device, context: StepContext, progress: Progress
) -> Iterator[tuple[Tensor, Tensor]]:
    for group in micro_batches([len(row.ids) for row in rows], range(len(rows)), _MICRO_BATCH_TOKENS):
        context.check_stop()
        tensors = collate([rows[number] for number in group], pad_id=0)
        yield tensors["input_ids"].to(device), tensors["attention_mask"].bool().to(device)
        progress.advance(sum(len(rows[number].ids) for number in group))


def _check_saved(settings: TransformersModel, probe_BT: Tensor, expected_BTV: Tensor) -> None:
    """Load what was saved and compare: an architecture may tie what a block does to its place."""
    model = load(settings, dtype=expected_BTV.dtype).model
    with torch.no_grad():
        found_BTV = model(input_ids=probe_BT, use_cache=False).logits
    apart, spread = (found_BTV - expected_BTV).abs().max(), expected_BTV.std()
    if not apart <= 0.01 * spread:
        raise ModelError(
            f"without some of its blocks a {model.config.model_type} model computes something else than the "
            f"blocks that are left (logits differ by up to {apart:.3g})",
            where=settings.path,
            expected="blocks that work alike wherever they stand",
            mend="use a model of another family",
        )
