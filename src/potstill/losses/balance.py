"""How evenly a mixture's tokens are spread over its experts, as a loss.

Shapes: B rows, N tokens of all rows one behind the other, E experts, K experts a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.losses.head import at_least_fp32

__all__ = ["balance_sum"]


def balance_sum(logits_NE: Tensor, experts_NK: Tensor, row_tokens: Sequence[int]) -> Tensor:
    """The auxiliary loss of one router, E sum_e f_e P_e of each row times the row's tokens, summed over rows.

    f_e is the share of a row's tokens that expert e was chosen for (they add up to K) and P_e the mean of its
    router probability: Switch Transformers, Fedus et al. 2021, eq. 4 to 6, of a row and not of a batch
    (DeepSeek-V3, eq. 17 to 20), so that it does not depend on which rows meet in a micro-batch. It is K where
    all experts are chosen alike. The gradient flows through P alone. `row_tokens` are the tokens of each row.
    A scalar, accumulated in float32 or more.
    """
    tokens_B = torch.tensor(row_tokens, device=logits_NE.device)
    row_N = torch.repeat_interleave(torch.arange(len(row_tokens), device=logits_NE.device), tokens_B)
    probabilities_NE = logits_NE.to(at_least_fp32(logits_NE.dtype)).softmax(-1)
    chosen_NE = torch.zeros_like(probabilities_NE).scatter_(1, experts_NK, 1.0)
    empty_BE = probabilities_NE.new_zeros(len(row_tokens), logits_NE.shape[1])
    chosen_BE = empty_BE.index_add(0, row_N, chosen_NE)
    probabilities_BE = empty_BE.index_add(0, row_N, probabilities_NE)
    products_B = (chosen_BE * probabilities_BE).sum(-1) / tokens_B.clamp_min(1)
    return logits_NE.shape[1] * products_B.sum()
