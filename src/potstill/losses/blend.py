"""The training loss of logit distillation: cross-entropy and divergence, blended.

Shapes: N tokens, C tokens of one chunk, V vocabulary.
"""

from torch import Tensor

from potstill.losses.closed_form import ClosedForm
from potstill.losses.divergences import check_divergence, renormalised
from potstill.losses.divergences import divergence as divergence_of
from potstill.losses.head import TokenFunction
from potstill.losses.metrics import agreement
from potstill.losses.response import cross_entropy
from potstill.losses.types import Sparse, TeacherSignal

__all__ = ["blend"]


def blend(
    targets_N: Tensor,
    teacher: TeacherSignal,
    *,
    alpha: float,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    renormalise: bool = False,
    divergence_scale: float = 1.0,
) -> TokenFunction:
    """(1 - alpha) CE(target, q) + alpha T^2 D(p_T, q_T), a token, as "loss" (Hinton et al. 2015, sec. 2).

    CE is at temperature 1; T^2 keeps the size of the divergence's gradient when T changes. Also
    "cross_entropy", "kl" (the divergence at T, without any factor), "agreement", and of a sparse teacher
    "teacher_tail", its mass outside the kept ids. `beta` is JSD's, `skew` the skew divergences';
    `renormalise` takes a sparse teacher's kept ids for all there is, which is biased (`renormalised`).

    `divergence_scale` multiplies D in the loss. Weights of 1 / (supervised tokens) make both terms means over
    tokens; with supervised tokens / sequences as the scale D is instead summed over tokens and divided by the
    sequences, as torch's KLDivLoss(reduction="batchmean") does with [sequences, tokens, vocabulary].

    Forward KL has its gradient in closed form. Raises TrainingError as `check_divergence` does.
    """
    check_divergence(divergence, type(teacher), renormalise=renormalise)

    def quantities(logits_CV: Tensor, rows: slice) -> dict[str, Tensor]:
        kept = teacher.rows(rows)
        signal = renormalised(kept) if renormalise and isinstance(kept, Sparse) else kept
        cross_entropy_C = cross_entropy(logits_CV, targets_N[rows])
        divergence_C = divergence_of(divergence, logits_CV, signal, temperature, beta=beta, skew=skew)
        scale = alpha * temperature**2 * divergence_scale
        values = {
            "loss": (1 - alpha) * cross_entropy_C + scale * divergence_C,
            "cross_entropy": cross_entropy_C,
            "kl": divergence_C,
            "agreement": agreement(logits_CV, signal),
        }
        if isinstance(kept, Sparse):
            values["teacher_tail"] = kept.log_tail_N.exp()
        return values

    if divergence != "forward_kl":
        return quantities
    return ClosedForm(quantities, targets_N, teacher, alpha, temperature, divergence_scale, renormalise)
