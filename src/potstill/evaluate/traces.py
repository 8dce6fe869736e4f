"""How well a model predicts given traces, and how close it is to a teacher on them, in one pass.

Shapes: B rows, T tokens, N supervised tokens, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.data.batches import collate, micro_batches
from potstill.data.chat import Rendered
from potstill.losses.head import CHUNK_TOKENS, per_token, supervised_pairs
from potstill.losses.metrics import comparison
from potstill.losses.response import response_loss
from potstill.losses.types import Live
from potstill.models import LoadedModel, hidden_states, output_head

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

    Both models read the same token ids. Their hidden states of one micro-batch (`max_tokens` padded tokens)
    go through the two heads chunk by chunk, so that no more than `chunk_tokens` rows of logits exist a model;
    both heads are cut to the ids that both models know. Sums are taken in float64. The caller has made sure
    that the tokenizers are equal. `on_batch` hears how many rows are done and may raise to stop.
    """
    size = min(one.vocabulary_size for one in (model, teacher) if one is not None)
    found: list[TraceFigures | None] = [None] * len(rows)
    lengths = [len(row.ids) for row in rows]
    for batch in micro_batches(lengths, range(len(rows)), max_tokens):
        values = _quantities(model, teacher, [rows[number] for number in batch], size, chunk_tokens)
        counts = [sum(rows[number].mask[1:]) for number in batch]
        parts = {name: torch.split(value_N.double().cpu(), counts) for name, value_N in values.items()}
        for place, number in enumerate(batch):
            sums = {name: float(part[place].sum()) for name, part in parts.items()}
            found[number] = TraceFigures(
                counts[place],
                sums["cross_entropy"],
                sums.get("kl"),
                round(sums["agreement"]) if "agreement" in sums else None,
            )
        on_batch(len(batch))
    return [one for one in found if one is not None]


@torch.no_grad()
def _quantities(
    model: LoadedModel, teacher: LoadedModel | None, rows: list[Rendered], size: int, chunk_tokens: int
) -> dict[str, Tensor]:
    tensors = {name: tensor.to(model.model.device) for name, tensor in collate(rows, pad_id=0).items()}
    ids_BT, attention_BT, mask_BT = tensors["input_ids"], tensors["attention_mask"], tensors["loss_mask"]

    def trunk(one: Any) -> tuple[Tensor, Tensor]:
        return supervised_pairs(hidden_states(one, ids_BT, attention_BT), ids_BT, mask_BT)

    hidden_NH, targets_N = trunk(model.model)
    if teacher is None:
        quantities = response_loss(targets_N)
    else:
        teacher_hidden_NH, _ = trunk(teacher.model)
        quantities = comparison(targets_N, Live(teacher_hidden_NH, output_head(teacher.model, size)))
    return per_token(hidden_NH, output_head(model.model, size), quantities, chunk_tokens=chunk_tokens)
