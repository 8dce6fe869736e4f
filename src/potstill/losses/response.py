"""The response loss: cross-entropy on the tokens the teacher wrote.

Shapes: N tokens, V vocabulary.
"""

from torch import Tensor
from torch.nn import functional

from potstill.losses.closed_form import ClosedForm
from potstill.losses.head import TokenFunction

__all__ = ["cross_entropy", "response_loss"]


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log softmax(logits)[target] in nats, one a token; its mean's exponential is the perplexity."""
    return functional.cross_entropy(logits_NV, targets_N, reduction="none")


def response_loss(targets_N: Tensor) -> TokenFunction:
    """The loss of sequence-level distillation (Kim and Rush 2016): "loss" is "cross_entropy"."""

    def quantities(logits_CV: Tensor, rows: slice) -> dict[str, Tensor]:
        cross_entropy_C = cross_entropy(logits_CV, targets_N[rows])
        return {"loss": cross_entropy_C, "cross_entropy": cross_entropy_C}

    return ClosedForm(quantities, targets_N)
