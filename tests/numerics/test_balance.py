"""The auxiliary loss of routers: as a plain loop has it, and transformers, however rows are split."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from potstill.losses.balance import balance_sum

EXPERTS, CHOSEN = 5, 2
ROW_TOKENS = [7, 1, 12]


def routed(rows: Sequence[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits_NE = 2 * torch.randn(sum(rows), EXPERTS, generator=generator, dtype=torch.float64)
    logits_NE[:, 0] += 1.5  # else all experts would be chosen alike
    logits_NE = logits_NE.to(dtype).requires_grad_()
    return logits_NE, logits_NE.topk(CHOSEN).indices


def naive(logits_NE: Tensor, experts_NK: Tensor, row_tokens: Sequence[int]) -> Tensor:
    """E sum_e f_e P_e, by loops over rows, experts and tokens."""
    total, start = torch.zeros((), dtype=torch.float64), 0
    for tokens in row_tokens:
        of_row = range(start, start + tokens)
        for expert in range(EXPERTS):
            frequency = sum(int(expert in experts_NK[token].tolist()) for token in of_row) / tokens
            probability = sum(logits_NE[token].double().softmax(-1)[expert] for token in of_row) / tokens
            total = total + tokens * EXPERTS * frequency * probability
        start += tokens
    return total


def test_it_is_that_of_a_plain_loop_and_so_is_its_gradient() -> None:
    logits_NE, experts_NK = routed(ROW_TOKENS)
    found, expected = (one(logits_NE, experts_NK, ROW_TOKENS) for one in (balance_sum, naive))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [torch.autograd.grad(one, logits_NE)[0] for one in (found, expected)]
    assert gradients[1].abs().max() > 0.01
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_of_one_row_it_is_transformers() -> None:
    logits_NE, experts_NK = routed([20], torch.float32)
    expected = load_balancing_loss_func((logits_NE,), EXPERTS, CHOSEN)
    found = balance_sum(logits_NE, experts_NK, [20])
    assert found.item() / 20 == pytest.approx(expected.item(), rel=1e-5)


def test_it_is_the_number_of_chosen_experts_where_all_are_chosen_alike() -> None:
    logits_NE = torch.zeros(EXPERTS, EXPERTS)
    experts_NK = torch.stack([torch.arange(EXPERTS), (torch.arange(EXPERTS) + 1) % EXPERTS], dim=1)
    assert balance_sum(logits_NE, experts_NK, [EXPERTS]).item() / EXPERTS == pytest.approx(CHOSEN)


def test_it_does_not_depend_on_which_rows_are_together_and_that_of_a_whole_batch_would() -> None:
    logits_NE, experts_NK = routed(ROW_TOKENS)
    whole = balance_sum(logits_NE, experts_NK, ROW_TOKENS).item()
    parts, start = 0.0, 0
    for tokens in ROW_TOKENS:
        part = slice(start, start + tokens)
        parts += balance_sum(logits_NE[part], experts_NK[part], [tokens]).item()
        start += tokens
    assert parts == pytest.approx(whole, rel=1e-12)
    assert balance_sum(logits_NE, experts_NK, [sum(ROW_TOKENS)]).item() != pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("rows", [[0], [0, 3]])
def test_a_row_without_tokens_adds_nothing(rows: Any) -> None:
    logits_NE, experts_NK = routed(rows)
    expected = naive(logits_NE, experts_NK, [one for one in rows if one]).item()
    assert balance_sum(logits_NE, experts_NK, rows).item() == pytest.approx(expected)


def test_it_is_summed_in_float32_at_least() -> None:
    logits_NE, experts_NK = routed(ROW_TOKENS, torch.bfloat16)
    assert balance_sum(logits_NE, experts_NK, ROW_TOKENS).dtype == torch.float32
