"""Random logits in float64, and the exact sparse signal of dense ones.

Shapes: N tokens, V vocabulary, K kept ids.
"""

import math

import torch
from torch import Tensor

from potstill.losses.types import Sparse

VOCABULARY = 23


def random_logits(seed: int, rows: int = 4, width: int = VOCABULARY, spread: float = 3.0) -> Tensor:
    """Logits NV of normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, width, generator=generator, dtype=torch.float64)


def exact_sparse(logits_NV: Tensor, k: int, temperature: float = 1.0) -> Sparse:
    """The k most probable ids of dense logits, and their tail summed id by id."""
    log_probs_NV = (logits_NV / temperature).log_softmax(-1)
    log_probs_NK, ids_NK = log_probs_NV.topk(k, -1)
    log_tail_N = log_probs_NV.scatter(-1, ids_NK, -math.inf).logsumexp(-1)
    return Sparse(ids_NK, log_probs_NK, log_tail_N, temperature)
