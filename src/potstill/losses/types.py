"""Teacher signals: the next-token distributions that a student is compared with, one row a supervised token.

Shapes: N tokens, H hidden size, V vocabulary, K kept ids. Every log is natural.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from potstill.losses.head import Head, full_precision_logits

__all__ = ["Dense", "Live", "Sampled", "Sparse", "TeacherSignal", "concatenate"]


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


@dataclass(frozen=True)
class Sampled:
    """Ids drawn from a teacher's distribution at one temperature, and the share of the draws that each got.

    The expectation of the shares is the distribution itself, so that a loss which is linear in the teacher's
    probabilities has unbiased gradients (random-sampling KD, arXiv 2503.16870). K is the largest count of
    distinct ids; a row with fewer is filled up with shares of 0.
    """

    ids_NK: Tensor
    shares_NK: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        assert self.ids_NK.shape == self.shares_NK.shape

    def rows(self, rows: slice) -> "Sampled":
        """The signal of some tokens."""
        return Sampled(self.ids_NK[rows], self.shares_NK[rows], self.temperature)

    @property
    def top_ids(self) -> Tensor:
        """Each token's most drawn id, an estimate of the most probable one."""
        return self.ids_NK.gather(-1, self.shares_NK.argmax(-1, keepdim=True)).squeeze(-1)

    def to(self, device: torch.device | str) -> "Sampled":
        """The signal on another device."""
        return Sampled(self.ids_NK.to(device), self.shares_NK.to(device), self.temperature)


TeacherSignal = Dense | Live | Sparse | Sampled
Stored = TypeVar("Stored", Sparse, Sampled)


def concatenate(signals: Sequence[Stored]) -> Stored:
    """One signal for the tokens of several of one kind, in order; they share the temperature.

    Sparse signals share K as well; sampled ones are filled up to the largest.
    """
    first = signals[0]
    assert len({signal.temperature for signal in signals}) == 1
    if isinstance(first, Sparse):
        assert len({signal.ids_NK.shape[1] for signal in signals}) == 1
        return Sparse(
            torch.cat([signal.ids_NK for signal in signals]),
            torch.cat([signal.log_probs_NK for signal in signals]),
            torch.cat([signal.log_tail_N for signal in signals]),
            first.temperature,
        )
    width = max(signal.ids_NK.shape[1] for signal in signals)

    def filled(values_NK: Tensor) -> Tensor:
        return functional.pad(values_NK, (0, width - values_NK.shape[1]))

    return Sampled(
        torch.cat([filled(signal.ids_NK) for signal in signals]),
        torch.cat([filled(signal.shares_NK) for signal in signals]),
        first.temperature,
    )
