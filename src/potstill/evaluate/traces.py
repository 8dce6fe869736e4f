"""How well a model predicts given traces, and how close it is to a teacher on them, in one pass.

Shapes: N supervised tokens, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from potstill.data.chat import Rendered
from potstill.data.prefixes import batches_by_prefix
from potstill.losses.head import CHUNK_TOKENS, TokenFunction
from potstill.losses.metrics import comparison
from potstill.losses.response import response_loss
from potstill.losses.types import Live
from potstill.models import LoadedModel, output_head
from potstill.scoring import hidden_of_rows, score_rows

__all__ = ["TraceFigures", "compare_on_traces"]


@dataclass(frozen=True)
class TraceFigures:
    """Sums over one trace's supervised tokens; KL(teacher || model) and agreement only with a teacher."""

    supervised_tokens: int
    cross_entropy_nats: float
    kl_nats: float | None = None
    agreed_tokens: int | None = None


def compare_on_traces(
    model: LoadedModel,
    teacher: LoadedModel | None,
    rows: Sequence[Rendered],
    *,
    max_tokens: int,
    chunk_tokens: int = CHUNK_TOKENS,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[TraceFigures]:
    """The figures of each row, in order.

    Both models read the same token ids. Their hidden states of one batch (about `max_tokens` tokens) go
    through the two heads chunk by chunk, so that no more than `chunk_tokens` rows of logits exist a model;
    both heads are cut to the ids that both models know. Sums are taken in float64. The caller has made sure
    that the tokenizers are equal. `on_batch` hears how many rows are done and may raise to stop.
    """
    size = min(one.vocabulary_size for one in (model, teacher) if one is not None)
    found: list[TraceFigures | None] = [None] * len(rows)
    for batch in batches_by_prefix(rows, max_tokens):
        scored = score_rows(
            model,
            [rows[number] for number in batch],
            partial(_quantities, teacher, size, max_tokens),
            vocabulary_size=size,
            chunk_tokens=chunk_tokens,
            max_tokens=max_tokens,
        )
        for number, values in zip(batch, scored, strict=True):
            sums = {name: float(value_N.sum()) for name, value_N in values.items()}
            found[number] = TraceFigures(
                rows[number].supervised_tokens,
                sums["cross_entropy"],
                sums.get("kl"),
                round(sums["agreement"]) if "agreement" in sums else None,
            )
        on_batch(len(batch))
    return [one for one in found if one is not None]


def _quantities(
    teacher: LoadedModel | None, size: int, max_tokens: int, rows: Sequence[Rendered], targets_N: Tensor
) -> TokenFunction:
    if teacher is None:
        return response_loss(targets_N)
    hidden_NH, _ = hidden_of_rows(teacher.model, rows, max_tokens=max_tokens)
    return comparison(targets_N, Live(hidden_NH, output_head(teacher.model, size)))
