"""The routers of a mixture-of-experts student: which experts its tokens reach, and the loss that evens them.

Shapes: B rows, T tokens, N tokens of all rows one behind the other, E experts, K experts a token.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from potstill.core.errors import TrainingError
from potstill.losses.balance import balance_sum
from potstill.models import Routed, find_routers, listen_to_routers
from potstill.train.features import counted

if TYPE_CHECKING:
    from potstill.train.student import MicroBatch

__all__ = ["Routing"]


class Routing:
    """A student's routers, none in a dense one; `weight` is that of their auxiliary loss.

    The weight is as stated, else the one in the model's configuration where that asks for the loss
    (`output_router_logits`), as in transformers' own forward, else 0. Raises TrainingError for a weight that
    is stated for a model without routers.
    """

    def __init__(self, model: Any, weight: float | None = None) -> None:
        self.routers = find_routers(model)
        config = model.config.get_text_config()
        if weight and not self.routers:
            raise TrainingError(
                f"router_aux_loss_coef is {weight:g}, and a {config.model_type} model has no known routers",
                expected="a mixture of experts whose routers give logits, scores and the chosen experts",
                mend="leave router_aux_loss_coef out",
            )
        if weight is None and self.routers and getattr(config, "output_router_logits", False):
            weight = getattr(config, "router_aux_loss_coef", None)
        self.weight = weight or 0.0
        self._experts = [router.num_experts for router in self.routers.values()]
        self._counts: Tensor | None = None

    def listening(self) -> AbstractContextManager[Mapping[str, Routed]]:
        """While open, what the routers give, if the auxiliary loss or `counting` asks for it."""
        wanted = self.weight or self._counts is not None
        return listen_to_routers(self.routers) if wanted else nullcontext({})

    def auxiliary_loss(self, given: Mapping[str, Routed], batch: "MicroBatch") -> Tensor:
        """`balance_sum` of the micro-batch's rows, all their tokens, as the mean over routers.

        Raises TrainingError where it has no gradient.
        """
        mask_BT, row_tokens = counted(batch, "all")
        mask_N = mask_BT.flatten()
        total = torch.stack(
            [balance_sum(one.logits_NE[mask_N], one.experts_NK[mask_N], row_tokens) for one in given.values()]
        ).mean()
        if torch.is_grad_enabled() and not total.requires_grad:
            raise TrainingError(
                "the routers' auxiliary loss has nothing to train: their logits have no gradient",
                expected="trained weights in a router or before one, and activations that are recomputed "
                "with use_reentrant: false, if at all",
                mend="set router_aux_loss_coef: 0, or train more of the student",
            )
        return total

    @contextmanager
    def counting(self) -> Iterator[Tensor]:
        """While open, how often each expert of each router is chosen in the student's passes, E after E."""
        device = next((router.weight.device for router in self.routers.values()), None)
        self._counts = torch.zeros(sum(self._experts), dtype=torch.int64, device=device)
        try:
            yield self._counts
        finally:
            self._counts = None

    def count(self, given: Mapping[str, Routed], batch: "MicroBatch") -> None:
        """Add a micro-batch's choices, padding left out, where they are counted."""
        if self._counts is None or not given:
            return
        mask_N = counted(batch, "all").mask_BT.flatten()
        self._counts += torch.cat(
            [
                torch.bincount(one.experts_NK[mask_N].flatten(), minlength=experts)
                for one, experts in zip(given.values(), self._experts, strict=True)
            ]
        )

    def by_router(self, counts: Tensor) -> dict[str, list[int]]:
        """Counts by router, for a log."""
        parts = torch.split(counts, self._experts) if self.routers else ()
        return {name: part.tolist() for name, part in zip(self.routers, parts, strict=True)}

    def as_text(self) -> str:
        """What is routed and by which loss it is evened, for a terminal."""
        sizes = sorted({(router.num_experts, router.top_k) for router in self.routers.values()})
        text = f"{len(self.routers)} routers to " + ", ".join(f"{k} of {experts}" for experts, k in sizes)
        loss = f"{self.weight:g} times their auxiliary loss is in the objective"
        return f"{text} experts; {loss if self.weight else 'their auxiliary loss is not in the objective'}"
