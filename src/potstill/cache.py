"""The `cache` step: what a teacher gives to every supervised token of some rows, kept on disk for training.

Shapes: B rows, T positions, N supervised tokens, H hidden size, V vocabulary.
"""

from array import array
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from potstill.core.errors import DataError, ModelError
from potstill.core.settings import ModelRef, Settings, execution
from potstill.core.step import StepContext, StepResult
from potstill.data.batches import collate, micro_batches
from potstill.data.chat import Rendered, Renderer
from potstill.data.sources import Data, read
from potstill.models import LoadedModel, TransformersModel, hidden_states, load, output_head

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from potstill.logits.codecs import TopK
    from potstill.logits.shards import CachedRow

__all__ = ["CacheSettings", "run"]


class CacheSettings(Settings):
    """Keep a teacher's top-k log-probabilities for every supervised token of traces or plain text."""

    kind: ClassVar[str] = "cache"
    schema_version: ClassVar[int] = 1

    do: Literal["cache"]
    model: ModelRef
    data: Data
    top_k: int = Field(64, ge=1, description="ids kept a token")
    temperatures: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        [1.0], description="temperatures that training may ask for; 1 is always among them"
    )
    max_length: int | None = Field(
        None, ge=2, description="longer rows are left out; by default the model's context"
    )

    batch_tokens: int = execution(4096, ge=1, description="padded tokens a forward pass")

    @field_validator("temperatures")
    @classmethod
    def _with_one(cls, temperatures: list[float]) -> list[float]:
        return sorted({1.0, *temperatures})


def run(settings: CacheSettings, context: StepContext) -> StepResult:
    """Score every row with the teacher and seal what is kept; resumes after the last sealed shard.

    Raises DataError, by row number, for a row with nothing to learn or with another tokenizer's ids, and
    ModelError for a model whose logits are out of reach.
    """
    from potstill.logits.codecs import TopK
    from potstill.logits.shards import LogitCache, ShardWriter, write_index

    model = context.model(settings.model)
    if not isinstance(model, TransformersModel):
        raise ModelError(
            f"{settings.model!r} gives no logits over the whole vocabulary",
            expected="a model that transformers runs here (engine: transformers)",
            mend="declare the teacher's weights once more with engine: transformers, and name that here",
        )
    teacher = load(model)
    renderer = Renderer(teacher.tokenizer)
    rows, too_long = _rows(settings, context, renderer, _context_tokens(teacher))
    codec = TopK(settings.top_k, teacher.vocabulary_size, tuple(settings.temperatures))
    writer = ShardWriter(context.folder, codec, tokenizer=renderer.tokenizer_hash, model=teacher.identity)

    first = {row.key: number for number, row in reversed(list(enumerate(rows)))}
    lengths = [len(row.token_ids) for row in rows]
    # Batches are made of all rows, captured or not, so that an interruption changes none of their numbers.
    plan = micro_batches(lengths, sorted(first.values()), settings.batch_tokens)
    with context.progress("scoring", sum(lengths[number] for number in first.values()), "tokens") as progress:
        for batch in ([rows[number] for number in numbers] for numbers in plan):
            context.check_stop()
            missing = [row.key not in writer for row in batch]
            if any(missing):
                for row, is_missing, kept in zip(batch, missing, _score(teacher, codec, batch), strict=True):
                    if is_missing:
                        writer.append(row, kept)
            progress.advance(sum(len(row.token_ids) for row in batch))
    writer.seal()
    write_index(context.folder, rows)
    cache = LogitCache.open(context.folder)
    counts = {
        "rows": len(rows),
        "distinct_rows": len(first),
        "too_long": too_long,
        "tokens": sum(lengths),
        "supervised_tokens": sum(sum(row.mask) for row in rows),
    }
    return StepResult(
        counts=counts,
        metrics=cache.figures(),
        extra=cache.description,
        tokenizer=cache.tokenizer,
        model_identity=cache.model,
        tokens=sum(lengths[number] for number in first.values()),
    )


def _context_tokens(teacher: LoadedModel) -> int | None:
    return getattr(teacher.model.config.get_text_config(), "max_position_embeddings", None)


def _rows(
    settings: CacheSettings, context: StepContext, renderer: Renderer, context_tokens: int | None
) -> "tuple[list[CachedRow], int]":
    """Every row that fits, in order and in four bytes a token, and how many do not."""
    from potstill.logits.shards import CachedRow

    limit = min((one for one in (settings.max_length, context_tokens) if one is not None), default=None)
    rows, too_long = [], 0
    for number, record in enumerate(read(settings.data, context), start=1):
        if record.response_token_ids is not None and record.tokenizer != renderer.tokenizer_hash:
            raise DataError(
                f"its token ids are another tokenizer's than that of {settings.model!r}",
                where=f"row {number} (record {record.id})",
                expected="the ids that the cached teacher itself would read",
                mend="cache the model that wrote these rows, or another of its family",
            )
        rendered = renderer.render(record, row_number=number)
        if limit is not None and len(rendered.ids) > limit:
            too_long += 1
            continue
        rows.append(CachedRow(array("I", rendered.ids), bytes(rendered.mask), record.held_out, record.id))
    if too_long:
        context.say(f"{too_long:,} rows of more than {limit:,} tokens left out")
    if not rows:
        raise DataError(
            f"each of the {too_long:,} rows has more than {limit:,} tokens",
            expected="rows that fit into `max_length` and the model's context",
            mend="raise max_length, or shorten the rows",
        )
    return rows, too_long


def _score(teacher: LoadedModel, codec: "TopK", batch: "list[CachedRow]") -> "Iterator[dict[str, Tensor]]":
    """What the codec keeps of each row's supervised tokens."""
    import torch

    from potstill.losses.head import per_token, supervised_pairs

    rendered = [Rendered(list(row.token_ids), list(row.mask)) for row in batch]
    tensors = collate(rendered, pad_id=0)
    ids_BT, attention_BT, loss_mask_BT = (
        tensors[name].to(teacher.model.device) for name in ("input_ids", "attention_mask", "loss_mask")
    )
    with torch.no_grad():
        hidden_BTH = hidden_states(teacher.model, ids_BT, attention_BT)
    hidden_NH, _ = supervised_pairs(hidden_BTH, ids_BT, loss_mask_BT)
    head = output_head(teacher.model, teacher.vocabulary_size)
    kept = per_token(hidden_NH, head, lambda logits_CV, rows: codec.encode(logits_CV))
    counts = [row.supervised_tokens for row in rendered]
    split = {name: torch.split(values, counts) for name, values in kept.items()}
    return ({name: parts[number] for name, parts in split.items()} for number in range(len(batch)))
