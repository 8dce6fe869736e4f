"""The student with its loss as one module, whose forward is all of a micro-batch's work.

Shapes: B rows, T tokens, N supervised tokens, H hidden size.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from potstill.data.batches import collate, collate_packed
from potstill.data.chat import Rendered
from potstill.losses.blend import blend
from potstill.losses.head import supervised_pairs, weighted_loss
from potstill.losses.response import response_loss
from potstill.losses.types import Sampled, Sparse, TeacherSignal
from potstill.models import can_share_prefix, hidden_states, hidden_states_after, output_head

__all__ = ["MicroBatch", "StudentWithLoss", "make_micro_batch", "supervised_hidden"]


# Below this a second pass through the layers costs more than the tokens it saves.
_WORTH_SHARING = 8


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded on the right, and the teacher's signal for their supervised tokens, row by row in order.

    `lengths` are each row's real tokens, `supervised` counts those that the loss does; `row_ids` name the
    records in messages. `shared_prefix` counts the first tokens that all rows have in common and none of
    which predicts a supervised one. Packed rows are one row here, without padding, whose positions begin
    again with each of them.
    """

    input_ids_BT: Tensor
    loss_mask_BT: Tensor
    lengths: tuple[int, ...]
    supervised: int
    teacher: TeacherSignal | None = None
    row_ids: tuple[str, ...] = ()
    shared_prefix: int = 0
    position_ids_BT: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Real tokens of all rows."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> "MicroBatch":
        """The micro-batch on a device."""
        teacher = self.teacher
        if isinstance(teacher, Sparse | Sampled):
            teacher = teacher.to(device)
        return replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device),
            loss_mask_BT=self.loss_mask_BT.to(device),
            position_ids_BT=None if self.position_ids_BT is None else self.position_ids_BT.to(device),
            teacher=teacher,
        )


def make_micro_batch(
    rows: list[Rendered],
    teacher: TeacherSignal | None = None,
    row_ids: tuple[str, ...] = (),
    *,
    packed: bool = False,
) -> MicroBatch:
    """Rows as tensors. What the padding holds does not matter: causal attention never looks at it."""
    tensors = collate_packed(rows) if packed else collate(rows, pad_id=0)
    return MicroBatch(
        tensors["input_ids"],
        tensors["loss_mask"],
        lengths=tuple(len(row.ids) for row in rows),
        supervised=sum(row.supervised_tokens for row in rows),
        teacher=teacher,
        row_ids=row_ids,
        shared_prefix=0 if packed else _shared_prefix(rows),
        position_ids_BT=tensors.get("position_ids"),
    )


def _shared_prefix(rows: list[Rendered]) -> int:
    """How many first tokens all rows share, short of the first that predicts a supervised token."""
    first, others = rows[0].ids, [row.ids for row in rows[1:]]
    end = min(row.mask.index(1) if 1 in row.mask else len(row.mask) for row in rows) - 1
    if not others:
        return 0
    return next((i for i in range(end) if any(ids[i] != first[i] for ids in others)), max(end, 0))


def supervised_hidden(model: Any, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """The trunk's hidden states that predict the micro-batch's supervised tokens (NH), and those tokens (N).

    A prefix that all rows share (a system prompt, say) is run once for all of them. No attention mask is
    needed, because causal attention never looks at the padding on the right.
    """
    prefix = batch.shared_prefix if can_share_prefix(model) and batch.shared_prefix >= _WORTH_SHARING else 0
    if prefix:
        hidden_BTH = hidden_states_after(model, batch.input_ids_BT, prefix)
    else:
        hidden_BTH = hidden_states(model, batch.input_ids_BT, position_ids_BT=batch.position_ids_BT)
    return supervised_pairs(hidden_BTH, batch.input_ids_BT[:, prefix:], batch.loss_mask_BT[:, prefix:])


class StudentWithLoss(nn.Module):
    """Trunk, head and loss in one forward, so that whatever wraps this module for several devices sees it."""

    def __init__(
        self,
        model: Any,
        vocabulary_size: int,
        *,
        alpha: float = 0.0,
        temperature: float = 1.0,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        skew: float = 0.1,
        renormalise: bool = False,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.vocabulary_size, self.bf16 = vocabulary_size, bf16
        self.alpha, self.temperature, self.divergence = alpha, temperature, divergence
        self.beta, self.skew, self.renormalise = beta, skew, renormalise

    @property
    def device(self) -> torch.device:
        """Where the student's weights are."""
        device: torch.device = self.model.device
        return device

    def forward(
        self, batch: MicroBatch, supervised_tokens: int, divergence_scale: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the optimiser step's loss, and each quantity's sum over its tokens.

        `supervised_tokens` is the count of the whole optimiser step, so that gradients do not depend on how
        the step is split; `divergence_scale` is `blend`'s. The head runs on supervised tokens only, chunk by
        chunk.
        """
        with torch.autocast(batch.input_ids_BT.device.type, torch.bfloat16, enabled=self.bf16):
            hidden_NH, targets_N = supervised_hidden(self.model, batch)
            if batch.teacher is None:
                quantities = response_loss(targets_N)
            else:
                quantities = blend(
                    targets_N,
                    batch.teacher,
                    alpha=self.alpha,
                    temperature=self.temperature,
                    divergence=self.divergence,
                    beta=self.beta,
                    skew=self.skew,
                    renormalise=self.renormalise,
                    divergence_scale=divergence_scale,
                )
            weights_N = hidden_NH.new_full(
                (len(targets_N),),
                1.0 / supervised_tokens,
                dtype=torch.promote_types(hidden_NH.dtype, torch.float32),
            )
            head = output_head(self.model, self.vocabulary_size)
            loss, values = weighted_loss(hidden_NH, head, quantities, weights_N)
        return loss, {name: value_N.sum(dtype=torch.float64) for name, value_N in values.items()}

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass; transformers.Trainer asks its model for this."""
        self.model.activation_checkpointing_enable(**options)
