"""How well one ranking of a list follows another; pure functions.

Shapes: C candidates.
"""

from torch import Tensor

__all__ = ["ranking_kl"]


def ranking_kl(
    relevance_C: Tensor, scores_C: Tensor, *, relevance_temperature: float, score_temperature: float
) -> Tensor:
    """KL(softmax(rho / t1) || softmax(f / t2)) in nats over one question's candidates, a scalar.

    rho is `relevance_C`, what the candidates are worth to the rationale, and takes no gradient; f is
    `scores_C`, what a reranker gives them for the question. There is no factor for the temperatures. In fp32
    or better, not negative (KARD, Kang et al. 2023).
    """
    scores_C = scores_C if scores_C.dtype.itemsize > 4 else scores_C.float()
    target_C = (relevance_C.detach().to(scores_C) / relevance_temperature).log_softmax(-1)
    found_C = (scores_C / score_temperature).log_softmax(-1)
    return (target_C.exp() * (target_C - found_C)).sum()
