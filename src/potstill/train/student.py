"""The student with its loss as one module, whose forward is all of a micro-batch's work.

Shapes: B rows, T tokens, N supervised tokens, H hidden size.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from potstill import scoring
from potstill.data.batches import collate, collate_packed
from potstill.data.chat import Rendered
from potstill.data.prefixes import shared_prefix
from potstill.losses.base_kl import with_base_kl
from potstill.losses.blend import blend
from potstill.losses.head import weighted_loss
from potstill.losses.response import response_loss
from potstill.losses.types import Sampled, Sparse, TeacherSignal
from potstill.models import output_head
from potstill.train.features import FeatureLoss, Passed, States, counted
from potstill.train.sharding import block_classes, is_divisible

if TYPE_CHECKING:
    from potstill.train.base import Base
    from potstill.train.online import OnlineTeacher
    from potstill.train.routing import Routing

__all__ = ["MicroBatch", "StudentWithLoss", "make_micro_batch", "supervised_hidden"]


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded on the right, and the teacher's signal for their supervised tokens, row by row in order.

    `lengths` are each row's real tokens, `supervised` counts those that the loss does; `row_ids` name the
    records in messages. `shared_prefix` counts the first tokens that all rows have in common and none of
    which predicts a supervised one. Packed rows are one row here, without padding, whose positions begin
    again with each of them. `teacher_states` are there where features are compared. `factors` are what the
    tokens of each row weigh, None where all weigh alike.
    """

    input_ids_BT: Tensor
    loss_mask_BT: Tensor
    lengths: tuple[int, ...]
    supervised: int
    teacher: TeacherSignal | None = None
    row_ids: tuple[str, ...] = ()
    shared_prefix: int = 0
    position_ids_BT: Tensor | None = None
    teacher_states: States | None = None
    factors: tuple[float, ...] | None = None

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
    factors: tuple[float, ...] | None = None,
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
        shared_prefix=0 if packed else shared_prefix(rows),
        position_ids_BT=tensors.get("position_ids"),
        factors=factors,
    )


def supervised_hidden(model: Any, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """The hidden states that predict the micro-batch's supervised tokens (NH), and those tokens (N)."""
    return scoring.supervised_hidden(
        model,
        batch.input_ids_BT,
        batch.loss_mask_BT,
        prefix_tokens=batch.shared_prefix,
        position_ids_BT=batch.position_ids_BT,
    )


class StudentWithLoss(nn.Module):
    """Trunk, head and loss in one forward, so that whatever wraps this module for several devices sees it."""

    def __init__(  # noqa: PLR0913  # the settings of the loss, which are flat
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
        base: "Base | None" = None,
        feature: FeatureLoss | None = None,
        routing: "Routing | None" = None,
        teacher: "OnlineTeacher | None" = None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.vocabulary_size, self.bf16 = vocabulary_size, bf16
        self.alpha, self.temperature, self.divergence = alpha, temperature, divergence
        self.beta, self.skew, self.renormalise = beta, skew, renormalise
        self.base, self.feature, self.routing, self.teacher = base, feature, routing, teacher
        self.frozen = nn.ModuleList()

    @property
    def device(self) -> torch.device:
        """Where the student's weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def _no_split_modules(self) -> list[str]:
        # By this name accelerate asks for the classes of blocks.
        return block_classes(self)

    def hold_frozen(self) -> None:
        """Make teacher and frozen base parts of this module, so that what divides its weights divides theirs.

        Quantised ones stay outside, whole on every rank.
        """
        frozen = [one.model for one in (self.teacher, self.base) if one is not None]
        self.frozen.extend(one for one in frozen if one is not self.model and is_divisible(one))

    def train(self, mode: bool = True) -> Self:  # as torch declares it
        """Set whether dropout is on, which it never is in what is frozen."""
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(
        self,
        batch: MicroBatch,
        supervised_tokens: float,
        divergence_scale: float = 1.0,
        feature_scale: float = 1.0,
        routing_scale: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the optimiser step's loss, and each quantity's sum over its tokens.

        `supervised_tokens` is the count of the whole optimiser step, so that gradients do not depend on how
        the step is split, divided by the ranks where gradients are averaged over them; `divergence_scale` is
        `blend`'s, and `feature_scale` is that count divided by that of the tokens which features are compared
        of, `routing_scale` likewise by that of all tokens, which routers see. A teacher in memory answers
        here. The head runs on supervised tokens only, chunk by chunk.
        """
        if self.teacher is not None:
            batch = self.teacher.answer(batch, self.feature)
        listening: AbstractContextManager[Passed] = (
            nullcontext({}) if self.feature is None else self.feature.listening(self.model)
        )
        routers = nullcontext({}) if self.routing is None else self.routing.listening()
        with torch.autocast(batch.input_ids_BT.device.type, torch.bfloat16, enabled=self.bf16):
            with listening as passed, routers as routed:
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
            if self.base is not None:
                quantities = with_base_kl(quantities, self.base.signal(batch), self.base.weight)
            weights_N = hidden_NH.new_full(
                (len(targets_N),),
                1.0 / supervised_tokens,
                dtype=torch.promote_types(hidden_NH.dtype, torch.float32),
            )
            factors_N = torch.ones_like(weights_N)
            if batch.factors is not None:
                factors_B = weights_N.new_tensor(batch.factors)
                factors_N = factors_B.repeat_interleave(batch.loss_mask_BT.sum(1))
            head = output_head(self.model, self.vocabulary_size)
            loss, values = weighted_loss(hidden_NH, head, quantities, weights_N * factors_N)
            sums = {name: (value_N * factors_N).sum(dtype=torch.float64) for name, value_N in values.items()}
            if self.feature is not None:
                assert batch.teacher_states is not None
                tokens = counted(batch, self.feature.settings.tokens)
                states = self.feature.joined(passed, tokens)
                feature = feature_scale * self.feature(states, batch.teacher_states, tokens.row_tokens)
                loss = loss + self.feature.settings.weight * feature / supervised_tokens
                sums["feature"] = feature.detach().double()
                sums["loss"] = sums["loss"] + self.feature.settings.weight * sums["feature"]
            if self.routing is not None:
                self.routing.count(routed, batch)
                if self.routing.weight:
                    auxiliary = routing_scale * self.routing.auxiliary_loss(routed, batch)
                    loss = loss + self.routing.weight * auxiliary / supervised_tokens
                    sums["router_aux"] = auxiliary.detach().double()
                    sums["loss"] = sums["loss"] + self.routing.weight * sums["router_aux"]
        return loss, sums

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass; transformers.Trainer asks its model for this."""
        self.model.activation_checkpointing_enable(**options)
