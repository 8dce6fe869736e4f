"""The gradient in closed form against autograd and against probabilities written out in float64.

Shapes: N tokens, H hidden size, V vocabulary, K the teacher's kept ids.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from potstill.losses import closed_form
from potstill.losses.blend import blend
from potstill.losses.closed_form import ClosedForm
from potstill.losses.divergences import DIVERGENCES
from potstill.losses.head import TokenFunction, WithGradient, weighted_loss
from potstill.losses.response import response_loss
from potstill.losses.types import Dense, Live, Sampled, Sparse, TeacherSignal

from .distributions import exact_sparse

N, H, V, K = 11, 6, 17, 4
KINDS = ["none", "dense", "live", "sparse", "sparse of one", "sparse of all", "sampled", "renormalised"]


@dataclass
class _Head:
    weight: Tensor
    bias: Tensor | None = None
    cap: float | None = None
    vocabulary: int | None = None  # the matrix may have more rows: padding

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def __call__(self, hidden: Tensor, /) -> Tensor:
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.vocabulary is not None:
            logits = logits[..., : self.vocabulary]
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap


def _random(*shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(device, dtype)


def _sampled(logits_NV: Tensor, temperature: float) -> Sampled:
    """Shares of six draws, filled up with id 0 at a share of 0, as a stored signal is."""
    rows = torch.arange(len(logits_NV), device=logits_NV.device)[:, None]
    ids_NK = torch.cat([rows % V, (rows + 3) % V, (rows + 5) % V, 0 * rows, 0 * rows], -1)
    shares_NK = torch.tensor([0.5, 1 / 3, 1 / 6, 0, 0], dtype=logits_NV.dtype, device=logits_NV.device)
    return Sampled(ids_NK, shares_NK.expand(len(logits_NV), -1), temperature)


def _signal(kind: str, logits_NV: Tensor, temperature: float) -> TeacherSignal:
    if kind == "dense":
        return Dense(logits_NV)
    if kind == "live":
        width = logits_NV.shape[1]
        return Live(logits_NV, _Head(torch.eye(width, dtype=logits_NV.dtype, device=logits_NV.device)))
    if kind == "sampled":
        return _sampled(logits_NV, temperature)
    k = {"sparse": K, "sparse of one": 1, "sparse of all": V, "renormalised": K}[kind]
    return exact_sparse(logits_NV, k, temperature)


def _quantities(
    kind: str, targets_N: Tensor, teacher_NV: Tensor, *, alpha: float, temperature: float, scale: float = 1.0
) -> ClosedForm:
    if kind == "none":
        quantities = response_loss(targets_N)
    else:
        signal = _signal(kind, teacher_NV, temperature)
        settings: dict[str, Any] = {"alpha": alpha, "temperature": temperature, "divergence_scale": scale}
        quantities = blend(targets_N, signal, renormalise=kind == "renormalised", **settings)
    assert isinstance(quantities, ClosedForm)
    return quantities


def _through_autograd(quantities: TokenFunction) -> TokenFunction:
    return quantities.__call__


def _written_out(
    kind: str, logits_NV: Tensor, targets_N: Tensor, teacher_NV: Tensor, alpha: float, temperature: float
) -> Tensor:
    """The loss of each token from whole vectors of probabilities."""
    q_NV, rows = logits_NV.softmax(-1), torch.arange(len(logits_NV), device=logits_NV.device)
    cross_entropy_N = -q_NV[rows, targets_N].log()
    if kind == "none":
        return cross_entropy_N
    q_NV, p_NV = (logits_NV / temperature).softmax(-1), (teacher_NV / temperature).softmax(-1)
    signal = _signal(kind, teacher_NV, temperature)
    if isinstance(signal, Sampled):
        p_NV = torch.zeros_like(p_NV).scatter_add_(-1, signal.ids_NK, signal.shares_NK)
    if isinstance(signal, Sparse):
        kept_NV = torch.zeros_like(p_NV).scatter_(-1, signal.ids_NK, 1.0)
        if kind == "renormalised":
            p_NV = p_NV * kept_NV / (p_NV * kept_NV).sum(-1, keepdim=True)
        else:
            tails = [(one * (1 - kept_NV)).sum(-1, keepdim=True) for one in (p_NV, q_NV)]
            p_NV, q_NV = (
                torch.cat([one * kept_NV, rest], -1) for one, rest in zip((p_NV, q_NV), tails, strict=True)
            )
            q_NV = torch.where(p_NV > 0, q_NV, 1.0)
    kl_N = (torch.xlogy(p_NV, p_NV) - p_NV * q_NV.log()).sum(-1)
    return (1 - alpha) * cross_entropy_N + alpha * temperature**2 * kl_N


@pytest.mark.parametrize(
    ("alpha", "temperature"), [(0.6, 1.0), (0.6, 2.0), (0.3, 3.0), (1.0, 0.5), (0.0, 2.0)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_autograd_and_written_out_probabilities_agree(
    kind: str, alpha: float, temperature: float, device: str
) -> None:
    hidden_NH = _random(N, H, seed=1, device=device).requires_grad_()
    padded = V + 3
    head = _Head(
        _random(padded, H, seed=2, device=device).requires_grad_(),
        _random(padded, seed=3, device=device).requires_grad_(),
        cap=2.0,
        vocabulary=V,
    )
    targets_N = torch.randint(V, (N,), generator=torch.Generator().manual_seed(4)).to(device)
    weights_N = _random(N, seed=5, device=device).abs() / N
    teacher_NV = 2 * _random(N, V, seed=6, device=device)
    inputs = [hidden_NH, *head.parameters]
    losses_N = _written_out(kind, head(hidden_NH), targets_N, teacher_NV, alpha, temperature)
    wanted = (losses_N * weights_N).sum()
    wanted_gradients = torch.autograd.grad(wanted, inputs)

    closed = _quantities(kind, targets_N, teacher_NV, alpha=alpha, temperature=temperature)
    assert isinstance(closed, WithGradient)
    plain = _through_autograd(closed)
    assert not isinstance(plain, WithGradient)
    cases: list[tuple[TokenFunction, int]] = [(plain, 4)]
    sizes = [(128, 4)] if closed_form._has_kernel(hidden_NH) else [(1, 4), (3, 4), (128, 100), (2, 1)]
    cases += [(replace(closed, tile_rows=tile), chunk) for tile, chunk in sizes]
    names = set()
    for quantities, chunk_tokens in cases:
        loss, values = weighted_loss(hidden_NH, head, quantities, weights_N, chunk_tokens=chunk_tokens)
        torch.testing.assert_close(loss, wanted, rtol=1e-11, atol=0)
        torch.testing.assert_close(values["loss"], losses_N.detach(), rtol=1e-10, atol=1e-13)
        for found, gradient in zip(torch.autograd.grad(loss, inputs), wanted_gradients, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-13)
        names.add(frozenset(values))
    assert len(names) == 1, "closed form and autograd name different quantities"


@pytest.mark.parametrize("kind", KINDS)
def test_quantities_of_the_closed_form_are_those_of_plain_operations(kind: str, device: str) -> None:
    logits_NV, targets_N = 2 * _random(N, V, seed=1, device=device), torch.arange(N, device=device)
    teacher_NV = _random(N, V, seed=2, device=device)
    closed = _quantities(kind, targets_N, teacher_NV, alpha=0.4, temperature=2.0, scale=3.0)
    wanted = closed(logits_NV[2:9], slice(2, 9))
    for weights_C in (None, torch.ones(7, dtype=torch.float64, device=device)):
        found = replace(closed, tile_rows=3).overwrite(logits_NV[2:9].clone(), slice(2, 9), weights_C)
        assert found.keys() == wanted.keys()
        for name, value_C in wanted.items():
            torch.testing.assert_close(found[name], value_C, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_hidden_states_weight_and_bias(kind: str, device: str) -> None:
    targets_N = torch.tensor([0, 3, 16, 2, 0], device=device)
    teacher_NV = _random(5, V, seed=1, device=device)
    closed = _quantities(kind, targets_N, teacher_NV, alpha=0.5, temperature=2.0)
    weights_N = torch.tensor([0.1, 0.3, 0.2, 0.0, 0.4], dtype=torch.float64, device=device)

    def loss(hidden_NH: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total, _ = weighted_loss(hidden_NH, _Head(weight, bias, cap=2.0), closed, weights_N, chunk_tokens=2)
        return 3 * total  # a gradient from above other than one

    shapes = [(5, 2), (V, 2), (V,)]
    inputs = [_random(*shape, seed=seed, device=device) for seed, shape in enumerate(shapes)]
    fast = closed_form._has_kernel(weights_N)  # triton's interpreter takes milliseconds a row
    assert torch.autograd.gradcheck(loss, [one.requires_grad_() for one in inputs], fast_mode=fast)


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_logits_get_the_float64_gradient_to_their_own_rounding(kind: str, device: str) -> None:
    # Student and teacher are nearly equal, so that what is left of q - p is small beside both.
    logits_NV = (3 * _random(N, V, seed=1, device=device)).bfloat16().double()
    teacher_NV = logits_NV + 0.05 * _random(N, V, seed=2, device=device)
    targets_N = torch.arange(N, device=device)
    weights_N = torch.ones(N, dtype=torch.float64, device=device)

    def gradient(dtype: torch.dtype) -> Tensor:
        teacher = teacher_NV.to(torch.promote_types(dtype, torch.float32))
        closed = _quantities(kind, targets_N, teacher, alpha=0.9, temperature=2.0)
        written_NV = logits_NV.to(dtype, copy=True)
        closed.overwrite(written_NV, slice(0, N), weights_N)
        assert written_NV.dtype == dtype
        return written_NV.double()

    exact = gradient(torch.float64)
    torch.testing.assert_close(gradient(torch.float32), exact, rtol=1e-4, atol=2e-6)
    cut_off = closed_form._has_kernel(logits_NV) and device == "cpu"  # triton's interpreter does not round
    torch.testing.assert_close(gradient(torch.bfloat16), exact, rtol=2**-7 if cut_off else 2**-8, atol=2e-6)
    torch.testing.assert_close(gradient(torch.float16), exact, rtol=2**-11, atol=2e-6)


@pytest.mark.parametrize("kind", ["dense", "sparse", "sampled"])
@pytest.mark.parametrize("place", [slice(-3, None), slice(0, 8)], ids=["last", "first"])
def test_ids_that_neither_model_can_say_have_no_part_in_loss_or_gradient(
    kind: str, place: slice, device: str
) -> None:
    masked_NV, masked_teacher_NV = (_random(N, V, seed=seed, device=device) for seed in (1, 2))
    targets_N = torch.full((N,), 9, device=device)
    masked_NV[:, place], masked_teacher_NV[:, place] = -math.inf, -math.inf
    closed = _quantities(kind, targets_N, masked_teacher_NV, alpha=0.5, temperature=3.0)
    plain_NV = masked_NV.clone().requires_grad_()
    wanted = closed(plain_NV, slice(0, N))["loss"]
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), plain_NV)
    values = closed.overwrite(masked_NV, slice(0, N), torch.ones(N, dtype=torch.float64, device=device))
    assert kind == "sampled" or torch.isfinite(wanted).all()
    torch.testing.assert_close(values["loss"], wanted.detach(), rtol=1e-10, atol=0)
    if kind != "sampled":  # its shares may name them, and then the loss is infinite
        assert torch.isfinite(masked_NV).all()
        assert not masked_NV[:, place].any()
        torch.testing.assert_close(masked_NV, wanted_gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", ["dense", "sparse", "sparse of one"])
def test_a_student_too_certain_for_fp32_has_a_finite_loss_and_gradient(kind: str, device: str) -> None:
    logits_NV = torch.zeros(N, V, device=device)
    logits_NV[:, 0] = 300.0
    teacher_NV = torch.zeros(N, V, device=device)
    teacher_NV[:, 0] = 2.0
    targets_N = torch.zeros(N, dtype=torch.int64, device=device)
    closed = _quantities(kind, targets_N, teacher_NV, alpha=0.5, temperature=2.0)
    reference_NV = logits_NV.clone().requires_grad_()
    wanted = closed(reference_NV, slice(0, N))["loss"]
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), reference_NV)
    found = closed.overwrite(logits_NV, slice(0, N), torch.ones(N, device=device))["loss"]
    for one in (found, logits_NV):
        assert torch.isfinite(one).all()
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(logits_NV, wanted_gradient, rtol=1e-3, atol=1e-5)


def test_a_teacher_rounded_to_fp16_gives_the_gradient_of_its_own_loss(device: str) -> None:
    targets_N = torch.arange(N, device=device)
    exact = exact_sparse(_random(N, V, seed=2, device=device), K, 1.0)
    rounded = Sparse(exact.ids_NK, exact.log_probs_NK.half(), exact.log_tail_N.half())
    assert (rounded.log_probs_NK.double() != exact.log_probs_NK).any()
    closed = blend(targets_N, rounded, alpha=1.0)
    assert isinstance(closed, ClosedForm)
    logits_NV = _random(N, V, seed=1, device=device)
    doubled = Sparse(rounded.ids_NK, rounded.log_probs_NK.double(), rounded.log_tail_N.double())
    reference_NV = logits_NV.clone().requires_grad_()
    wanted = blend(targets_N, doubled, alpha=1.0)(reference_NV, slice(0, N))["loss"]
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), reference_NV)
    found = closed.overwrite(logits_NV, slice(0, N), torch.ones(N, device=device))["loss"]
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(logits_NV, wanted_gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_pitfall_12_logits_that_are_no_numbers_give_a_loss_that_is_none(kind: str, device: str) -> None:
    logits_NV, teacher_NV = (_random(N, V, seed=seed, device=device) for seed in (1, 2))
    logits_NV[3, 5] = math.nan
    closed = _quantities(kind, torch.arange(N, device=device), teacher_NV, alpha=0.5, temperature=2.0)
    loss_N = closed.overwrite(logits_NV, slice(0, N), torch.ones(N, device=device))["loss"]
    assert loss_N.isnan().tolist() == [row == 3 for row in range(N)]


def test_a_teacher_that_is_no_number_shows_in_the_loss(device: str) -> None:
    logits_NV, teacher_NV = (_random(N, V, seed=seed, device=device) for seed in (1, 2))
    teacher_NV[3, 5] = math.nan
    closed = _quantities("dense", torch.arange(N, device=device), teacher_NV, alpha=0.5, temperature=2.0)
    loss_N = closed.overwrite(logits_NV, slice(0, N), torch.ones(N, device=device))["loss"]
    assert loss_N.isnan().tolist() == [row == 3 for row in range(N)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_only_forward_kl_has_a_closed_form(divergence: str) -> None:
    quantities = blend(torch.arange(N), Dense(_random(N, V)), alpha=0.5, divergence=divergence)
    assert isinstance(quantities, WithGradient) == (divergence == "forward_kl")


class _Peak(TorchDispatchMode):
    """The most bytes alive at once, of all that is made within."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {
            one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)
        }
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in given:
                storage = one.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        self._made = {key: one for key, one in self._made.items() if not one[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return result


def _peak_bytes(tokens: int, wrap: Callable[[ClosedForm], TokenFunction]) -> tuple[int, int]:
    """Peak bytes beyond the head's gradient, and the bytes of one chunk of logits."""
    vocabulary, width, chunk_tokens = 4096, 8, 16
    hidden_NH = _random(tokens, width, dtype=torch.float32).requires_grad_()
    head = _Head(_random(vocabulary, width, seed=1, dtype=torch.float32).requires_grad_())
    teacher = exact_sparse(_random(tokens, vocabulary, seed=2, dtype=torch.float32), K, 2.0)
    closed = blend(torch.arange(tokens), teacher, alpha=0.5, temperature=2.0)
    assert isinstance(closed, ClosedForm)
    quantities = wrap(replace(closed, tile_rows=1))
    weights_N = torch.full((tokens,), 1 / tokens)
    with _Peak() as peak:
        loss, _ = weighted_loss(hidden_NH, head, quantities, weights_N, chunk_tokens=chunk_tokens)
        torch.autograd.backward(loss)
    return peak.most - head.weight.nbytes, 4 * vocabulary * chunk_tokens


@pytest.mark.parametrize("tokens", [16, 256])
def test_beyond_the_gradients_little_more_than_one_chunk_of_logits_is_alive(tokens: int) -> None:
    most, chunk = _peak_bytes(tokens, lambda closed: closed)
    assert chunk <= most < 1.3 * chunk
    through_autograd, _ = _peak_bytes(tokens, _through_autograd)
    assert through_autograd > 2.5 * chunk, "the measurement sees nothing"


def test_a_parameter_takes_its_gradient_without_a_copy_and_a_changed_one_is_not_handed_on_again() -> None:
    head = _Head(_random(V, H, seed=1).requires_grad_())
    loss, _ = weighted_loss(
        _random(N, H, seed=2), head, response_loss(torch.arange(N)), torch.ones(N, dtype=torch.float64)
    )
    torch.autograd.backward(loss, retain_graph=True)
    assert head.weight.grad is not None
    first = head.weight.grad.clone()
    (again,) = torch.autograd.grad(loss, [head.weight], retain_graph=True)
    assert again.data_ptr() == head.weight.grad.data_ptr(), "the gradient was copied"
    assert torch.equal(again, first)
    head.weight.grad.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_a_weight_that_the_head_uses_twice_gets_both_gradients() -> None:
    weight, hidden_NH = _random(V, H, seed=1).requires_grad_(), _random(N, H, seed=2).requires_grad_()

    class Twice(_Head):
        def __call__(self, hidden: Tensor, /) -> Tensor:
            linear = torch.nn.functional.linear
            return linear(hidden, self.weight) + linear(input=hidden, weight=self.weight) + hidden @ weight.T

    targets_N, weights_N = torch.arange(N), torch.ones(N, dtype=torch.float64)
    logits_NV = 3 * hidden_NH @ weight.T
    wanted = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
    wanted_gradients = torch.autograd.grad(wanted, [hidden_NH, weight])
    loss, _ = weighted_loss(hidden_NH, Twice(weight), response_loss(targets_N), weights_N, chunk_tokens=4)
    for found, gradient in zip(torch.autograd.grad(loss, [hidden_NH, weight]), wanted_gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-13)


def test_a_head_whose_last_operation_needs_its_result_is_refused_and_not_silently_wrong() -> None:
    class Ending(_Head):
        def __call__(self, hidden: Tensor, /) -> Tensor:
            return (hidden @ self.weight.T).tanh()

    head = Ending(_random(V, H, seed=1).requires_grad_())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted_loss(_random(N, H), head, response_loss(torch.arange(N)), torch.ones(N))


def test_under_autocast_the_gradient_is_the_plain_one_to_bf16() -> None:
    hidden_NH = _random(N, H, seed=1, dtype=torch.float32).requires_grad_()
    head = _Head(
        _random(V, H, seed=2, dtype=torch.float32).requires_grad_(),
        _random(V, seed=3, dtype=torch.float32).requires_grad_(),
    )
    closed = _quantities(
        "sparse", torch.arange(N), _random(N, V, seed=4, dtype=torch.float32), alpha=0.5, temperature=2.0
    )
    inputs, weights_N = [hidden_NH, *head.parameters], torch.full((N,), 1 / N)
    loss, _ = weighted_loss(hidden_NH, head, closed, weights_N, chunk_tokens=4)
    wanted = torch.autograd.grad(loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(hidden_NH).dtype == torch.bfloat16, "autocast is off"
        loss, _ = weighted_loss(hidden_NH, head, closed, weights_N, chunk_tokens=4)
    for found, gradient in zip(torch.autograd.grad(loss, inputs), wanted, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, gradient, rtol=0.05, atol=2e-3)
        assert not torch.equal(found, gradient)
