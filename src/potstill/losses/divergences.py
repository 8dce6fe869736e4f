"""Divergences between a teacher's and a student's next-token distributions.

p is the teacher, q the student, T the temperature: p = softmax(teacher logits / T). Each divergence takes the
student's logits (NV), the teacher's signal and T, and gives one value a token in nats, without a factor T^2.
A sparse signal and the student are compared on K + 1 buckets: the kept ids, and all others as one, the tail.

Shapes: N tokens, V vocabulary, K the teacher's kept ids, B buckets (V dense, K + 1 sparse).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from potstill.core.errors import ModelError, TrainingError
from potstill.losses.types import Dense, Live, Sampled, Sparse

__all__ = [
    "DIVERGENCES",
    "adaptive_kl",
    "check_divergence",
    "divergence",
    "forward_kl",
    "jsd",
    "log1mexp",
    "renormalised",
    "require_comparable",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
]

_HEAD_MASS = 0.5
_OF_BUCKETS = ("forward_kl", "skew_kl", "tvd")


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0: the log of what a log-probability leaves over."""
    return torch.log(-torch.expm1(x))


def forward_kl(
    student_logits_NV: Tensor, teacher: Dense | Sparse | Sampled, temperature: float = 1.0
) -> Tensor:
    """KL(p || q) = sum_i p_i log(p_i / q_i) (Hinton et al. 2015).

    Sparse: on the buckets, by the log-sum inequality at least 0, at most the dense divergence, and equal to
    it at K = V; the bare sum over the kept ids is no divergence. Sampled: the divergence from the shares,
    whose gradient has the dense one's as its expectation, while its value is larger than the dense one by the
    entropy that sampling lost.

    Raises ModelError where two dense vocabularies differ, TrainingError where a sparse or sampled signal is
    of another temperature; so does every divergence here.
    """
    if isinstance(teacher, Sampled):
        require_comparable(student_logits_NV, teacher, temperature)
        student_NK = functional.log_softmax(student_logits_NV / temperature, -1).gather(-1, teacher.ids_NK)
        return _kl(teacher.shares_NK.log(), student_NK)
    return _kl(*_log_probs(student_logits_NV, teacher, temperature))


def renormalised(teacher: Sparse) -> Sampled:
    """A top-k signal as if its kept ids were all there is: each probability divided by the kept mass.

    Biased: a student that learns it is over-confident, since it takes the tail's mass from all other ids at
    any loss of the teacher's own uncertainty, and the smaller k the more. It reproduces systems that cut the
    teacher off; the tail bucket is what `forward_kl` does by itself.
    """
    return Sampled(teacher.ids_NK, teacher.log_probs_NK.softmax(-1), teacher.temperature)


def reverse_kl(student_logits_NV: Tensor, teacher: Dense, temperature: float = 1.0) -> Tensor:
    """KL(q || p) = sum_i q_i log(q_i / p_i), which seeks modes (Gu et al. 2024, MiniLLM)."""
    log_p_NV, log_q_NV = _log_probs(student_logits_NV, teacher, temperature)
    return _kl(log_q_NV, log_p_NV)


def jsd(student_logits_NV: Tensor, teacher: Dense, temperature: float = 1.0, *, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon: beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q.

    At its ends, where that is 0, it is the limit that its quotient by beta or 1 - beta has: KL(p || q) at
    beta = 0, KL(q || p) at beta = 1 (Agarwal et al. 2024, GKD).
    """
    assert 0 <= beta <= 1
    log_p_NV, log_q_NV = _log_probs(student_logits_NV, teacher, temperature)
    if beta == 0:
        return _kl(log_p_NV, log_q_NV)
    if beta == 1:
        return _kl(log_q_NV, log_p_NV)
    log_m_NV = _log_mixture(log_p_NV, log_q_NV, beta)
    return beta * _kl(log_p_NV, log_m_NV) + (1 - beta) * _kl(log_q_NV, log_m_NV)


def skew_kl(
    student_logits_NV: Tensor, teacher: Dense | Sparse, temperature: float = 1.0, *, skew: float = 0.1
) -> Tensor:
    """KL(p || skew p + (1 - skew) q); the mixture's q has a gradient too (Ko et al. 2024, DistiLLM).

    Sparse: on the buckets, at least 0, at most the dense divergence, equal to it at K = V.
    """
    assert 0 <= skew < 1
    log_p_NB, log_q_NB = _log_probs(student_logits_NV, teacher, temperature)
    return _kl(log_p_NB, _log_mixture(log_p_NB, log_q_NB, skew))


def skew_reverse_kl(
    student_logits_NV: Tensor, teacher: Dense, temperature: float = 1.0, *, skew: float = 0.1
) -> Tensor:
    """KL(q || (1 - skew) p + skew q); the mixture's q has a gradient too (Ko et al. 2024, DistiLLM)."""
    assert 0 <= skew < 1
    log_p_NV, log_q_NV = _log_probs(student_logits_NV, teacher, temperature)
    return _kl(log_q_NV, _log_mixture(log_q_NV, log_p_NV, skew))


def tvd(student_logits_NV: Tensor, teacher: Dense | Sparse, temperature: float = 1.0) -> Tensor:
    """Total variation distance: half the sum of |p_i - q_i|, at most 1 (Wen et al. 2023, f-DISTILL).

    Sparse: on the buckets, at least 0, at most the dense distance, equal to it at K = V.
    """
    log_p_NB, log_q_NB = _log_probs(student_logits_NV, teacher, temperature)
    return 0.5 * (log_p_NB.exp() - log_q_NB.exp()).abs().sum(-1)


def adaptive_kl(student_logits_NV: Tensor, teacher: Dense, temperature: float = 1.0) -> Tensor:
    """g_head / (g_head + g_tail) KL(p || q) + g_tail / (g_head + g_tail) KL(q || p) (Wu et al. 2024, AKL).

    The head is the smallest set of the teacher's most probable ids with at least half its mass, the tail all
    others; g is the sum of |p_i - q_i| over either. The weights have no gradient.
    """
    log_p_NV, log_q_NV = _log_probs(student_logits_NV, teacher, temperature)
    with torch.no_grad():
        p_NV, order_NV = log_p_NV.exp().sort(-1, descending=True)
        gap_NV = (p_NV - log_q_NV.exp().gather(-1, order_NV)).abs()
        before_NV = p_NV.cumsum(-1) - p_NV
        head_N = gap_NV.masked_fill(before_NV >= _HEAD_MASS, 0).sum(-1)
        share_N = head_N / gap_NV.sum(-1).clamp(min=torch.finfo(gap_NV.dtype).tiny)
    return share_N * _kl(log_p_NV, log_q_NV) + (1 - share_N) * _kl(log_q_NV, log_p_NV)


_FUNCTIONS: dict[str, Any] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "adaptive_kl": adaptive_kl,
}
DIVERGENCES: tuple[str, ...] = tuple(_FUNCTIONS)


def divergence(
    name: str,
    student_logits_NV: Tensor,
    teacher: Dense | Sparse | Sampled,
    temperature: float = 1.0,
    *,
    beta: float = 0.5,
    skew: float = 0.1,
) -> Tensor:
    """The divergence of a name in `DIVERGENCES`; raises as `check_divergence` does."""
    check_divergence(name, type(teacher))
    options = {"jsd": {"beta": beta}, "skew_kl": {"skew": skew}, "skew_reverse_kl": {"skew": skew}}
    value_N: Tensor = _FUNCTIONS[name](student_logits_NV, teacher, temperature, **options.get(name, {}))
    return value_N


def check_divergence(
    divergence: str,
    signal: type[Dense] | type[Live] | type[Sparse] | type[Sampled],
    *,
    renormalise: bool = False,
) -> None:
    """Raise TrainingError, with the reason, where a divergence cannot be had from a kind of signal."""
    if divergence not in DIVERGENCES:
        raise TrainingError(
            f"there is no divergence {divergence!r}", expected=f"one of {', '.join(DIVERGENCES)}"
        )
    if renormalise and (divergence != "forward_kl" or signal is not Sparse):
        raise TrainingError(
            "renormalising is for forward_kl from a teacher's top-k",
            expected="a top-k signal and forward_kl, or no renormalising",
        )
    if signal is Sparse and divergence not in _OF_BUCKETS:
        raise TrainingError(
            f"{divergence} weighs each id by the student's own probability, and a top-k signal does not say "
            "what the teacher gives to the ids that only the student finds likely",
            expected=f"one of {', '.join(_OF_BUCKETS)} with top-k",
            mend=f"for {divergence} let the teacher run beside the student: then it scores every id",
        )
    if signal is Sampled and divergence != "forward_kl":
        raise TrainingError(
            f"{divergence} is not linear in the teacher's probabilities, so its gradient from sampled ids "
            "would be wrong even on average",
            expected="forward_kl with sampled ids",
            mend=f"for {divergence} let the teacher run beside the student",
        )


def require_comparable(
    student_logits_NV: Tensor, teacher: Dense | Sparse | Sampled, temperature: float
) -> None:
    """Raise ModelError where vocabularies differ, TrainingError where a stored signal is of another T."""
    if isinstance(teacher, Dense):
        if teacher.logits_NV.shape != student_logits_NV.shape:
            raise ModelError(
                f"the teacher's logits are {tuple(teacher.logits_NV.shape)}, the student's "
                f"{tuple(student_logits_NV.shape)} (tokens, vocabulary)",
                expected="two models of one tokenizer, both sliced to its length",
            )
    elif teacher.temperature != temperature:
        raise TrainingError(
            f"the teacher's signal is of temperature {teacher.temperature:g}, the loss of {temperature:g}",
            expected="one temperature: what is kept of a distribution cannot be tempered anew",
        )


def _log_probs(
    student_logits_NV: Tensor, teacher: Dense | Sparse, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log p and log q at a temperature: of the vocabulary, or of the buckets of a sparse signal."""
    require_comparable(student_logits_NV, teacher, temperature)
    log_q_NV = functional.log_softmax(student_logits_NV / temperature, -1)
    if isinstance(teacher, Dense):
        return functional.log_softmax(teacher.logits_NV / temperature, -1), log_q_NV
    log_p_NB = torch.cat([teacher.log_probs_NK, teacher.log_tail_N[:, None]], -1)
    return log_p_NB, _buckets(log_q_NV, teacher.ids_NK)


def _buckets(log_probs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The log-probabilities of the kept ids and of the tail, which is summed id by id: 1 - kept would cancel.

    A tail too small for its type counts as the smallest number, so that its log stays finite.
    """
    limits = torch.finfo(log_probs_NV.dtype)
    others_NV = log_probs_NV.scatter(-1, ids_NK, limits.min / 2)
    tail_N = others_NV.logsumexp(-1, keepdim=True).clamp(min=math.log(limits.tiny))
    return torch.cat([log_probs_NV.gather(-1, ids_NK), tail_N], -1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of p (log p - log q) over the last axis, where 0 log 0 = 0 in the value and in the gradient."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0)).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q); of two zeros the log of the smallest number."""
    mixture = share * log_p.exp() + (1 - share) * log_q.exp()
    return mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()
