"""The `merge` step: load in full weights, merge or join, save, and check what was saved.

Shapes: T positions, N supervised tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.core.errors import DataError, ModelError
from potstill.core.step import StepContext, StepResult
from potstill.data.batches import micro_batches
from potstill.data.chat import Rendered, Renderer, fit
from potstill.data.sources import read
from potstill.losses.head import TokenFunction
from potstill.losses.metrics import comparison
from potstill.losses.types import Live
from potstill.merge import MergeSettings
from potstill.merge.joining import join_adapters, untie
from potstill.models import (
    LoadedModel,
    TransformersModel,
    adapter_base,
    find_source,
    forward_inputs,
    identity,
    load,
    local_model,
    output_head,
    save_model,
    stored_dtype,
    transformers_model,
)
from potstill.scoring import hidden_of_rows, micro_batch_tokens, score_rows

__all__ = ["Merged", "merge", "merge_into", "merged_model"]

_PROBE_TOKENS = 64
# How far logits in fp32 may be from those of the adapter on its base, as a share of their deviation.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Merged:
    """A merged model as it was saved.

    `logit_difference` is the largest from the adapter on its base in fp32, or from the joined adapters, on a
    probe, as a share of the logits' standard deviation; beyond a thousandth it is the rounding to `dtype`.
    """

    parameters: int
    dtype: str
    logit_difference: float
    tokenizer_hash: str


def merge(settings: MergeSettings, context: StepContext) -> StepResult:
    """Carry out a merge step."""
    return _merge_one(settings, context) if settings.models is None else _merge_several(settings, context)


def _merge_one(settings: MergeSettings, context: StepContext) -> StepResult:
    assert settings.model is not None
    model = transformers_model(context, settings.model, device=settings.device)
    merged = merge_into(context.folder, model, settings.dtype, name=str(settings.model))
    base = adapter_base(find_source(model.path).folder)
    in_use = model.quantize or base.quantize
    context.say(
        f"merged in full weights and saved in {merged.dtype}; logits are at most "
        f"{merged.logit_difference:.1e} of their standard deviation from those of the adapter on its base"
    )
    result = _result(merged, context, base, in_use)
    if settings.data is not None:
        saved = TransformersModel(path=str(context.folder), device=model.device)
        result.metrics["compared"] = found = _compare(settings, context, load(model), load(saved))
        context.say(
            f"KL from the adapter on its base{f' in {in_use}' if in_use else ''} to the merged model: "
            f"{found['mean_kl']:.2g} nats a token, at most {found['largest_kl']:.2g}"
        )
    return result


def _merge_several(settings: MergeSettings, context: StepContext) -> StepResult:
    models: dict[str, TransformersModel] = {}
    for reference in settings.named_models:
        for name, found in context.models(reference).items():
            if name in models:
                raise ModelError("is named twice", where=name, mend="name each model once, and give weights")
            models[name] = local_model(context, name, found, device=settings.device)
    weights = settings.weights_of([*models])
    joined = join_adapters(
        models, weights, settings.method, settings.kept_share, partial(context.derive_seed, "dare")
    )
    base = adapter_base(find_source(next(iter(models.values())).path).folder)
    merged = _save(joined, _probe_logits(joined), settings.dtype or stored_dtype(base), context.folder)
    context.say(
        f"{len(models)} adapters joined by {settings.method} and saved in {merged.dtype}; rounding to it "
        f"moves logits by at most {merged.logit_difference:.1e} of their standard deviation"
    )
    result = _result(merged, context, base, base.quantize)
    result.extra["merged"] |= {"method": settings.method, "weights": dict(zip(models, weights, strict=True))}
    if settings.method != "linear":
        result.extra["merged"]["density"] = settings.kept_share
    return result


def _result(merged: Merged, context: StepContext, base: TransformersModel, in_use: str | None) -> StepResult:
    return StepResult(
        counts={"parameters": merged.parameters},
        metrics={"logit_difference": merged.logit_difference},
        extra={
            "merged": {
                "base": base.model_dump(mode="json", exclude={"device", "dtype"}, exclude_none=True),
                "base_identity": identity(base),
                "base_in_use": in_use or "full weights",
                "dtype": merged.dtype,
            }
        },
        tokenizer=merged.tokenizer_hash,
        model_identity=identity(TransformersModel(path=str(context.folder))),
    )


def merge_into(folder: Path, model: TransformersModel, dtype: str | None = None, *, name: str) -> Merged:
    """Write an adapter merged into its base, in full weights, by default of the type of the base's files.

    The sum is made in fp32. Raises ModelError for a model that is no adapter, for weights that are not
    finite, where the logits of the sum differ by more than a thousandth of their standard deviation from
    those of the adapter on its base, and where other weights are read back than were saved.
    """
    source = find_source(model.path)
    if source.kind != "adapter":
        raise ModelError(
            "is no adapter: there is nothing to merge",
            where=name,
            expected="a train step with lora, or an adapter's folder",
            mend="use the model as it is",
        )
    loaded = load(model, dtype=torch.float32, full_weights=True)
    expected_TV = _probe_logits(loaded)
    plain = LoadedModel(merged_model(loaded.model, name), loaded.tokenizer, loaded.identity)
    if not (difference := _difference(_probe_logits(plain), expected_TV)) <= _TOLERANCE:
        raise ModelError(
            f"the logits of the merged model differ by {difference:.2g} of their standard deviation from "
            "those of the adapter on its base",
            where=name,
            expected=f"at most {_TOLERANCE:g}",
            mend="use the adapter on its base",
        )
    return _save(plain, expected_TV, dtype or stored_dtype(adapter_base(source.folder)), folder, where=name)


def _save(
    plain: LoadedModel, expected_TV: Tensor, dtype: str, folder: Path, *, where: str | None = None
) -> Merged:
    """Write a model in fp32 as another type. Raises ModelError where that loses more than precision."""
    saved_type, device = getattr(torch, dtype), plain.model.device
    parameters, renderer = plain.model.num_parameters(), Renderer(plain.tokenizer)
    plain.model.to(saved_type)
    if not all(one.isfinite().all() for one in plain.model.parameters()):
        raise ModelError(
            f"merged weights are too large for {dtype}", where=where, mend="set dtype: bfloat16 or float32"
        )
    save_model(plain.model, plain.tokenizer, folder, renderer.end_of_turn_ids)
    saved = load(TransformersModel(path=str(folder), device=str(device)), dtype=torch.float32)
    found, rounded = (dict(one.model.named_parameters()) for one in (saved, plain))
    if found.keys() != rounded.keys() or not all(
        torch.equal(one, rounded[key].float()) for key, one in found.items()
    ):
        raise ModelError("what was saved of the merged model is not what is read back", where=str(folder))
    difference = _difference(_probe_logits(saved), expected_TV)
    return Merged(parameters, dtype, difference, renderer.tokenizer_hash)


def _difference(found_TV: Tensor, expected_TV: Tensor) -> float:
    return float((found_TV - expected_TV).abs().max() / expected_TV.std())


def merged_model(adapted: Any, name: str = "adapter") -> Any:
    """The base of an adapted model with the adapter in its weights; the adapted model is used up."""
    plain = adapted.get_base_model()
    if any(
        hasattr(one, "base_layer") for one in (plain.get_output_embeddings(), plain.get_input_embeddings())
    ):
        untie(plain)
    try:
        plain = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(
            f"cannot be merged ({error})", where=name, mend="train the adapter again, or use it on its base"
        ) from error
    return plain.requires_grad_(requires_grad=False)


@torch.no_grad()
def _probe_logits(model: LoadedModel) -> Tensor:
    """Logits at a row of ids from all over the vocabulary (TV)."""
    ids_T = torch.linspace(0, model.vocabulary_size - 1, _PROBE_TOKENS).long().to(model.model.device)
    logits: Tensor = model.model(**forward_inputs(model.model, ids_T[None]), use_cache=False).logits
    return logits[0, :, : model.vocabulary_size].float().cpu()


def _compare(
    settings: MergeSettings, context: StepContext, adapter: LoadedModel, merged: LoadedModel
) -> dict[str, float]:
    """Divergence of the merged model from the adapter as it is used, over the traces' supervised tokens."""
    data = settings.data
    assert data is not None
    renderer = Renderer(merged.tokenizer)
    left_out: list[DataError] = []

    def rendered() -> Iterator[Rendered]:
        for record in read(data, context):
            try:
                if record.response:
                    yield fit(renderer.render(record), settings.max_length)
            except DataError as error:  # a prompt that is too long, say
                left_out.append(error)

    rows = [*islice(rendered(), settings.limit)]
    if not rows:
        reason = f"; the first was left out: {left_out[0].what}" if left_out else ""
        raise DataError(f"there are no responses to compare the models on{reason}", where=str(settings.data))
    if left_out:
        context.say(f"{len(left_out):,} rows are not compared; the first: {left_out[0].what}")
    size = min(adapter.vocabulary_size, merged.vocabulary_size)
    kl, agreement = [], []
    lengths, most = [len(row.ids) for row in rows], micro_batch_tokens(merged.model.device)
    for batch in micro_batches(lengths, range(len(rows)), most):
        context.check_stop()
        part = [rows[number] for number in batch]
        for scored in score_rows(merged, part, partial(_quantities, adapter, size), vocabulary_size=size):
            kl.append(scored["kl"])
            agreement.append(scored["agreement"])
    kl_N, agreement_N = torch.cat(kl), torch.cat(agreement)
    return {
        "rows": len(rows),
        "tokens": len(kl_N),
        "mean_kl": kl_N.mean().item(),
        "largest_kl": kl_N.max().item(),
        "agreement": agreement_N.mean().item(),
    }


def _quantities(
    adapter: LoadedModel, size: int, rows: Sequence[Rendered], targets_N: Tensor
) -> TokenFunction:
    hidden_NH, _ = hidden_of_rows(adapter.model, rows)
    return comparison(targets_N, Live(hidden_NH, output_head(adapter.model, size)))
