"""The training loss of logit distillation: cross-entropy and divergence, blended.

Shapes: N tokens, C tokens of one chunk, V vocabulary.
"""

from torch import Tensor
from torch.nn import functional

from potstill.losses.divergences import forward_kl_from_log_probs
from potstill.losses.head import TokenFunction
from potstill.losses.metrics import agreement
from potstill.losses.types import TeacherSignal

__all__ = ["blend"]


def blend(
    targets_N: Tensor, teacher: TeacherSignal, *, alpha: float, temperature: float = 1.0
) -> TokenFunction:
    """(1 - alpha) CE(target, q) + alpha T^2 KL(p_T || q_T), a token, as "loss" (Hinton et al. 2015, sec. 2).

    CE is at temperature 1; T^2 keeps the size of the KL's gradient when T changes. Also "cross_entropy", "kl"
    (at T, without the factor) and "agreement".
    """

    def quantities(logits_CV: Tensor, rows: slice) -> dict[str, Tensor]:
        signal = teacher.rows(rows)
        log_probs_CV = functional.log_softmax(logits_CV, -1)
        cross_entropy_C = functional.nll_loss(log_probs_CV, targets_N[rows], reduction="none")
        if temperature != 1.0:
            log_probs_CV = functional.log_softmax(logits_CV / temperature, -1)
        kl_C = forward_kl_from_log_probs(log_probs_CV, signal, temperature)
        return {
            "loss": (1 - alpha) * cross_entropy_C + alpha * temperature**2 * kl_C,
            "cross_entropy": cross_entropy_C,
            "kl": kl_C,
            "agreement": agreement(logits_CV, signal),
        }

    return quantities
