"""KL regularisation: a loss to which a student's divergence from what it was before training is added.

q is the student, b its base, at temperature 1.

Shapes: C tokens of one chunk, R tokens of one tile, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.losses.closed_form import tile_parts
from potstill.losses.divergences import reverse_kl
from potstill.losses.head import TokenFunction, WithGradient, at_least_fp32
from potstill.losses.types import Dense, Live

__all__ = ["with_base_kl"]


def with_base_kl(inner: TokenFunction, base: Dense | Live, weight: float) -> TokenFunction:
    """The quantities of `inner`, and "base_kl", KL(q || b) a token, `weight` times which is in the "loss".

    The gradient is in closed form where that of `inner` is: q (log(q / b) - KL), times the weight.
    """

    def quantities(logits_CV: Tensor, rows: slice) -> dict[str, Tensor]:
        base_kl_C = reverse_kl(logits_CV, base.rows(rows))
        return _added(inner(logits_CV, rows), base_kl_C, weight)

    return _Regularised(quantities, inner, base, weight) if isinstance(inner, WithGradient) else quantities


def _added(values: dict[str, Tensor], base_kl_C: Tensor, weight: float) -> dict[str, Tensor]:
    return {**values, "loss": values["loss"] + weight * base_kl_C, "base_kl": base_kl_C}


@dataclass(frozen=True)
class _Regularised:
    """`values`, whose gradient is that of `inner` and the divergence's own, tile by tile."""

    values: TokenFunction
    inner: WithGradient
    base: Dense | Live
    weight: float

    def __call__(self, logits_CV: Tensor, rows: slice) -> dict[str, Tensor]:
        """The quantities by plain operations."""
        return self.values(logits_CV, rows)

    @torch.no_grad()
    def overwrite(self, logits_CV: Tensor, rows: slice, weights_C: Tensor | None) -> dict[str, Tensor]:
        """The same quantities; the logits, of any type, become the weighted loss's gradient."""
        base_CV = self.base.rows(rows).logits_NV
        parts = []
        for part in tile_parts(logits_CV):
            logits_RV, weights_R = logits_CV[part], None if weights_C is None else weights_C[part]
            wide = at_least_fp32(logits_RV.dtype)
            log_q_RV = logits_RV.to(wide).log_softmax(-1)
            ratio_RV = log_q_RV - base_CV[part].to(wide).log_softmax(-1)
            q_RV = log_q_RV.exp_()
            ratio_RV.masked_fill_(q_RV == 0, 0.0)
            kl_R1 = (q_RV * ratio_RV).sum(-1, keepdim=True)
            within = slice(rows.start + part.start, rows.start + part.stop)
            values = self.inner.overwrite(logits_RV, within, weights_R)
            if weights_R is not None:
                q_RV.mul_(ratio_RV.sub_(kl_R1)).mul_(self.weight * weights_R.to(wide)[:, None])
                logits_RV.add_(q_RV)
            parts.append(_added(values, kl_R1[:, 0], self.weight))
        return {name: torch.cat([one[name] for one in parts]) for name in parts[0]}
