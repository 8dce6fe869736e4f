"""What evaluation asks of each token: agreement with the teacher, divergence from it, and perplexity's terms.

Shapes: N tokens, C tokens of one chunk, V vocabulary.
"""

from torch import Tensor

from potstill.losses.divergences import forward_kl
from potstill.losses.head import TokenFunction
from potstill.losses.response import cross_entropy
from potstill.losses.types import Dense, Sampled, Sparse, TeacherSignal

__all__ = ["agreement", "comparison"]


def agreement(student_logits_NV: Tensor, teacher: Dense | Sparse | Sampled) -> Tensor:
    """1.0 where no token is more probable to the student than the teacher's first, else 0.0, one a token."""
    of_teacher_N = student_logits_NV.gather(-1, teacher.top_ids[:, None])[:, 0]
    return (of_teacher_N >= student_logits_NV.amax(-1)).to(student_logits_NV.dtype)


def comparison(targets_N: Tensor, teacher: TeacherSignal) -> TokenFunction:
    """For `per_token`: "cross_entropy" on the targets, "kl" KL(teacher || student) at T = 1, and "agreement".

    In nats. The exponential of the mean cross-entropy is the perplexity. A sparse teacher gives the lower
    bound of the divergence that its tail bucket allows.
    """

    def quantities(logits_CV: Tensor, rows: slice) -> dict[str, Tensor]:
        signal = teacher.rows(rows)
        return {
            "cross_entropy": cross_entropy(logits_CV, targets_N[rows]),
            "kl": forward_kl(logits_CV, signal),
            "agreement": agreement(logits_CV, signal),
        }

    return quantities
