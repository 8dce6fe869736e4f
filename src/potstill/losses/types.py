"""Teacher signals: the next-token distributions that a student is compared with, one row a supervised token.

Shapes: N tokens, H hidden size, V vocabulary, K kept ids. Every log is natural.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.losses.head import Head, full_precision_logits

__all__ = ["Dense", "Live", "Sparse", "TeacherSignal", "concatenate"]


@dataclass(frozen=True)
class Dense:
    """A teacher's logits over the whole vocabulary, untempered."""

    logits_NV: Tensor

    def rows(self, rows: slice) -> "Dense":
        """The signal of some tokens."""
        return Dense(self.logits_NV[rows])

    @property
    def top_ids(self) -> Tensor:
        """Each token's most probable id."""
        return self.logits_NV.argmax(-1)


@dataclass(frozen=True)
class Live:
    """A teacher in memory: only the dense logits of the rows asked for are made."""

    hidden_NH: Tensor
    head: Head

    def rows(self, rows: slice) -> Dense:
        """The dense signal of some tokens."""
        with torch.no_grad():
            return Dense(full_precision_logits(self.head, self.hidden_NH[rows]))


@dataclass(frozen=True)
class Sparse:
    """A teacher's most probable ids, their log-probabilities, and the log of what all others have together.

    These are of softmax(logits / temperature) over the whole vocabulary, so that each row's probabilities and
    tail sum to 1. They hold for that temperature alone: another one needs another normaliser, which no
    arithmetic on these numbers gives.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    log_tail_N: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        assert self.ids_NK.shape == self.log_probs_NK.shape
        assert self.log_tail_N.shape == self.ids_NK.shape[:1]

    def rows(self, rows: slice) -> "Sparse":
        """The signal of some tokens."""
        return Sparse(self.ids_NK[rows], self.log_probs_NK[rows], self.log_tail_N[rows], self.temperature)

    @property
    def top_ids(self) -> Tensor:
        """Each token's most probable id."""
        return self.ids_NK.gather(-1, self.log_probs_NK.argmax(-1, keepdim=True)).squeeze(-1)

    def to(self, device: torch.device | str) -> "Sparse":
        """The signal on another device."""
        return Sparse(
            self.ids_NK.to(device), self.log_probs_NK.to(device), self.log_tail_N.to(device), self.temperature
        )


TeacherSignal = Dense | Live | Sparse


def concatenate(signals: Sequence[Sparse]) -> Sparse:
    """One signal for the tokens of several, in order; they share K and the temperature."""
    assert len({(signal.ids_NK.shape[1], signal.temperature) for signal in signals}) == 1
    return Sparse(
        torch.cat([signal.ids_NK for signal in signals]),
        torch.cat([signal.log_probs_NK for signal in signals]),
        torch.cat([signal.log_tail_N for signal in signals]),
        signals[0].temperature,
    )
