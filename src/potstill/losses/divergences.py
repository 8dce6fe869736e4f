"""Divergences between a teacher's and a student's next-token distributions.

p is the teacher, q the student, T the temperature: p = softmax(teacher logits / T). Shapes: N tokens, V
vocabulary, K the teacher's kept ids.
"""

import torch
from torch import Tensor
from torch.nn import functional

from potstill.core.errors import ModelError, TrainingError
from potstill.losses.types import Dense, Sparse

__all__ = ["forward_kl", "forward_kl_from_log_probs", "log1mexp"]


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0: the log of what a log-probability leaves over."""
    return torch.log(-torch.expm1(x))


def forward_kl(student_logits_NV: Tensor, teacher: Dense | Sparse, temperature: float = 1.0) -> Tensor:
    """KL(p || q) at one temperature in nats, one a token, without the factor T^2 (Hinton et al. 2015).

    Dense: sum_i p_i log(p_i / q_i). Sparse: the sum over the kept ids plus the tail bucket P log(P / Q),
    where P and Q are what teacher and student give to all other ids together. By the log-sum inequality that
    is at least 0 and at most the dense divergence, and equal to it at K = V; the bare sum over the kept ids
    is no divergence. Raises ModelError where two dense vocabularies differ, TrainingError where a sparse
    signal is of another temperature.
    """
    return forward_kl_from_log_probs(
        functional.log_softmax(student_logits_NV / temperature, -1), teacher, temperature
    )


def forward_kl_from_log_probs(
    student_log_probs_NV: Tensor, teacher: Dense | Sparse, temperature: float = 1.0
) -> Tensor:
    """`forward_kl` for a caller that has log softmax(student logits / T) already."""
    if isinstance(teacher, Sparse):
        return _sparse_forward_kl(student_log_probs_NV, teacher, temperature)
    if teacher.logits_NV.shape != student_log_probs_NV.shape:
        raise ModelError(
            f"the teacher's logits are {tuple(teacher.logits_NV.shape)}, the student's "
            f"{tuple(student_log_probs_NV.shape)} (tokens, vocabulary)",
            expected="two models of one tokenizer, both sliced to its length",
        )
    teacher_log_probs_NV = functional.log_softmax(teacher.logits_NV / temperature, -1)
    return functional.kl_div(
        student_log_probs_NV, teacher_log_probs_NV, reduction="none", log_target=True
    ).sum(-1)


def _sparse_forward_kl(student_log_probs_NV: Tensor, teacher: Sparse, temperature: float) -> Tensor:
    if teacher.temperature != temperature:
        raise TrainingError(
            f"the teacher's signal is of temperature {teacher.temperature:g}, the loss of {temperature:g}",
            expected="one temperature: what is kept of a distribution cannot be tempered anew",
        )
    student_NK = student_log_probs_NV.gather(-1, teacher.ids_NK)
    kept_N = (teacher.log_probs_NK.exp() * (teacher.log_probs_NK - student_NK)).sum(-1)
    # The student's kept mass may round to 1, which would put the log of its tail at minus infinity. The
    # teacher's tail is kept as a log and may be zero: then 0 log 0 = 0.
    student_mass_N = student_NK.logsumexp(-1).clamp(max=-torch.finfo(student_NK.dtype).eps)
    tail_N = teacher.log_tail_N.exp()
    return kept_N + torch.xlogy(tail_N, tail_N) - tail_N * log1mexp(student_mass_N)
