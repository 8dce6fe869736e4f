"""The divergence from the base, added to any loss, against autograd and probabilities written out in float64.

Shapes: N tokens, H hidden size, V vocabulary.
"""

import math

import pytest
import torch
from torch import Tensor

from potstill.losses.base_kl import with_base_kl
from potstill.losses.blend import blend
from potstill.losses.head import TokenFunction, WithGradient, weighted_loss
from potstill.losses.response import response_loss
from potstill.losses.types import Dense, Live

from .distributions import exact_sparse, random_logits

N, H, V, WEIGHT = 11, 6, 23, 0.7
TARGETS_N = (torch.arange(N) * 7) % V
WEIGHTS_N = torch.linspace(0.2, 1.5, N, dtype=torch.float64)


class _Head:
    def __init__(self, seed: int) -> None:
        self.weight = random_logits(seed, V, H, 1.0)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight]

    def __call__(self, hidden: Tensor, /) -> Tensor:
        return hidden @ self.weight.T


def _inner(kind: str) -> TokenFunction:
    if kind == "response":
        return response_loss(TARGETS_N)
    teacher = random_logits(4, N, V)
    signal = exact_sparse(teacher, 4, 2.0) if kind == "sparse" else Dense(teacher)
    divergence = "reverse_kl" if kind == "reverse" else "forward_kl"
    return blend(TARGETS_N, signal, alpha=0.4, temperature=2.0, divergence=divergence)


def _base() -> Live:
    return Live(random_logits(8, N, H, 1.0), _Head(9))


def _written_out(logits_NV: Tensor, base_logits_NV: Tensor) -> list[float]:
    """KL(q || b) of every token, as a sum over the vocabulary of Python's floats."""
    found = []
    for student, base in zip(logits_NV.tolist(), base_logits_NV.tolist(), strict=True):
        q, b = ([math.exp(one) for one in logits] for logits in (student, base))
        q, b = [one / sum(q) for one in q], [one / sum(b) for one in b]
        found.append(sum(one * math.log(one / other) for one, other in zip(q, b, strict=True)))
    return found


@pytest.mark.parametrize("kind", ["response", "dense", "sparse", "reverse"])
@pytest.mark.parametrize("chunk_tokens", [3, N])
def test_closed_form_autograd_and_written_out_divergence_agree(kind: str, chunk_tokens: int) -> None:
    head, base = _Head(1), _base()
    hidden_NH = random_logits(0, N, H, 1.0).requires_grad_()
    head.weight.requires_grad_()
    quantities = with_base_kl(_inner(kind), base, WEIGHT)
    assert isinstance(quantities, WithGradient) is (kind != "reverse")
    loss, values = weighted_loss(hidden_NH, head, quantities, WEIGHTS_N, chunk_tokens=chunk_tokens)
    found = torch.autograd.grad(loss, [hidden_NH, head.weight])

    logits_NV = head(hidden_NH)
    plain = _inner(kind)(logits_NV, slice(0, N))
    assert values["base_kl"].tolist() == pytest.approx(
        _written_out(logits_NV, base.rows(slice(0, N)).logits_NV), rel=1e-10
    )
    log_q_NV, log_b_NV = logits_NV.log_softmax(-1), base.rows(slice(0, N)).logits_NV.log_softmax(-1)
    kl_N = (log_q_NV.exp() * (log_q_NV - log_b_NV)).sum(-1)
    expected = (WEIGHTS_N * (plain["loss"] + WEIGHT * kl_N)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for one, wanted in zip(found, torch.autograd.grad(expected, [hidden_NH, head.weight]), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values["cross_entropy"], plain["cross_entropy"].detach(), rtol=1e-12, atol=0)


def test_a_weight_of_zero_leaves_the_loss_and_its_gradient_as_they_are() -> None:
    head, hidden_NH = _Head(1), random_logits(0, N, H, 1.0).requires_grad_()
    results = []
    for quantities in (_inner("sparse"), with_base_kl(_inner("sparse"), _base(), 0.0)):
        loss, _ = weighted_loss(hidden_NH, head, quantities, WEIGHTS_N)
        results.append((loss.item(), torch.autograd.grad(loss, hidden_NH)[0]))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_a_student_that_is_its_base_has_no_divergence_and_no_gradient_from_it() -> None:
    base = _base()
    hidden_NH = base.hidden_NH.clone().requires_grad_()
    results = []
    for quantities in (_inner("response"), with_base_kl(_inner("response"), base, 1e6)):
        loss, values = weighted_loss(hidden_NH, base.head, quantities, WEIGHTS_N)
        results.append((values, torch.autograd.grad(loss, hidden_NH)[0]))
    assert results[1][0]["base_kl"].abs().max() == 0
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits_get_the_float64_gradient_to_their_own_rounding(dtype: torch.dtype) -> None:
    exact_NV, base = random_logits(2, N, V).to(dtype), Dense(random_logits(3, N, V))

    def gradient(logits_NV: Tensor, signal: Dense) -> Tensor:
        quantities = with_base_kl(response_loss(TARGETS_N), signal, WEIGHT)
        assert isinstance(quantities, WithGradient)
        quantities.overwrite(logits_NV, slice(0, N), WEIGHTS_N)
        return logits_NV.double()

    wanted = gradient(exact_NV.double(), base)
    found = gradient(exact_NV.clone(), Dense(base.logits_NV.float()))
    tolerance = 4 * torch.finfo(dtype).eps * wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=4 * torch.finfo(dtype).eps, atol=tolerance)


def test_ids_that_neither_can_say_have_no_part_in_it() -> None:
    logits_NV, base_NV = random_logits(2, N, V), random_logits(3, N, V)
    logits_NV[:, 5] = base_NV[:, 5] = -math.inf
    targets_N = torch.full((N,), 2)
    quantities = with_base_kl(response_loss(targets_N), Dense(base_NV), WEIGHT)
    assert isinstance(quantities, WithGradient)
    gradient_NV = logits_NV.clone()
    values = quantities.overwrite(gradient_NV, slice(0, N), WEIGHTS_N)
    kept = [id_ for id_ in range(V) if id_ != 5]
    assert values["base_kl"].tolist() == pytest.approx(_written_out(logits_NV[:, kept], base_NV[:, kept]))
    assert (gradient_NV[:, 5] == 0).all()


def test_no_tokens_give_every_quantity_and_zero_gradients() -> None:
    head = _Head(1)
    hidden_NH = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    quantities = with_base_kl(response_loss(TARGETS_N[:0]), Live(hidden_NH.detach(), _Head(9)), WEIGHT)
    head.weight.requires_grad_()
    loss, values = weighted_loss(hidden_NH, head, quantities, WEIGHTS_N[:0])
    torch.autograd.backward(loss)
    assert {"loss", "cross_entropy", "base_kl"} == values.keys()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
