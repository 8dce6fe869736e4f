"""The other divergences against the written-out sums, and what each kind of signal allows.

Shapes: N tokens, V vocabulary, K the teacher's kept ids.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from potstill.core.errors import TrainingError
from potstill.losses.blend import blend
from potstill.losses.divergences import (
    DIVERGENCES,
    adaptive_kl,
    check_divergence,
    divergence,
    forward_kl,
    jsd,
    renormalised,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    tvd,
)
from potstill.losses.head import weighted_loss
from potstill.losses.types import Dense, Live, Sampled, Sparse

from .distributions import exact_sparse, random_logits

N, V = 4, 23
OF_BUCKETS = ["forward_kl", "skew_kl", "tvd"]
Distribution = list[float]


def _softmax(logits: list[float], temperature: float) -> Distribution:
    weights = [math.exp(one / temperature) for one in logits]
    return [one / math.fsum(weights) for one in weights]


def _kl(p: Distribution, q: Distribution) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def _mixture(share: float, p: Distribution, q: Distribution) -> Distribution:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def _jsd(beta: float, p: Distribution, q: Distribution) -> float:
    middle = _mixture(beta, p, q)
    return beta * _kl(p, middle) + (1 - beta) * _kl(q, middle)


def _adaptive_kl(p: Distribution, q: Distribution) -> float:
    order = sorted(range(len(p)), key=lambda one: -p[one])
    head = next(
        order[:count] for count in range(1, len(p) + 1) if math.fsum(p[i] for i in order[:count]) >= 0.5
    )
    gap = [abs(a - b) for a, b in zip(p, q, strict=True)]
    share = math.fsum(gap[i] for i in head) / math.fsum(gap)
    return share * _kl(p, q) + (1 - share) * _kl(q, p)


ORACLES: dict[str, Callable[[Distribution, Distribution], float]] = {
    "forward_kl": _kl,
    "reverse_kl": lambda p, q: _kl(q, p),
    "jsd": lambda p, q: _jsd(0.3, p, q),
    "skew_kl": lambda p, q: _kl(p, _mixture(0.2, p, q)),
    "skew_reverse_kl": lambda p, q: _kl(q, _mixture(0.8, p, q)),
    "tvd": lambda p, q: 0.5 * math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)),
    "adaptive_kl": _adaptive_kl,
}


def _divergence(name: str, student: Tensor, teacher: Any, temperature: float = 1.0) -> Tensor:
    return divergence(name, student, teacher, temperature, beta=0.3, skew=0.2)


def test_every_divergence_has_an_oracle() -> None:
    assert tuple(ORACLES) == DIVERGENCES


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_from_a_dense_teacher_equals_the_oracle(name: str, temperature: float) -> None:
    student, teacher = random_logits(1), random_logits(2)
    found_N = _divergence(name, student, Dense(teacher), temperature)
    wanted = [
        ORACLES[name](_softmax(t, temperature), _softmax(s, temperature))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert found_N.tolist() == pytest.approx(wanted, rel=1e-11)
    assert max(wanted) > 0.01


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, V - 1])
@pytest.mark.parametrize("name", OF_BUCKETS)
def test_a_divergence_from_a_sparse_teacher_is_the_oracle_on_kept_ids_and_tail(
    name: str, k: int, temperature: float
) -> None:
    student, teacher = random_logits(1), random_logits(2)
    signal = exact_sparse(teacher, k, temperature)
    found_N = _divergence(name, student, signal, temperature)
    for row in range(N):
        kept = signal.ids_NK[row].tolist()
        p, q = (_softmax(one[row].tolist(), temperature) for one in (teacher, student))
        buckets = [
            [one[i] for i in kept] + [math.fsum(x for i, x in enumerate(one) if i not in kept)]
            for one in (p, q)
        ]
        assert found_N[row].item() == pytest.approx(ORACLES[name](*buckets), rel=1e-10)


_LOGITS = st.lists(st.floats(-12, 12), min_size=6, max_size=6)


@pytest.mark.parametrize("name", OF_BUCKETS)
@given(student=_LOGITS, teacher=_LOGITS, k=st.integers(1, 6), temperature=st.sampled_from([0.5, 1.0, 4.0]))
def test_pitfall_1_on_buckets_a_divergence_is_at_least_zero_and_at_most_the_dense_one(
    name: str, student: list[float], teacher: list[float], k: int, temperature: float
) -> None:
    student_NV, teacher_NV = (torch.tensor([one], dtype=torch.float64) for one in (student, teacher))
    sparse = _divergence(name, student_NV, exact_sparse(teacher_NV, k, temperature), temperature).item()
    dense = _divergence(name, student_NV, Dense(teacher_NV), temperature).item()
    assert -1e-12 <= sparse <= dense + 1e-9
    if k == 6:
        assert sparse == pytest.approx(dense, rel=1e-9, abs=1e-12)


@given(student=_LOGITS, teacher=_LOGITS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_zero_of_equals_and_never_negative(
    name: str, student: list[float], teacher: list[float]
) -> None:
    student_NV, teacher_NV = (torch.tensor([one], dtype=torch.float64) for one in (student, teacher))
    assert _divergence(name, student_NV, Dense(teacher_NV)).item() >= -1e-12
    assert _divergence(name, teacher_NV, Dense(teacher_NV)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"adaptive_kl"}))
def test_gradcheck(name: str) -> None:
    student, teacher = random_logits(1, width=7).requires_grad_(), random_logits(2, width=7)
    signals: list[Any] = [Dense(teacher), *([exact_sparse(teacher, 3, 2.0)] if name in OF_BUCKETS else [])]
    for signal in signals:
        assert torch.autograd.gradcheck(
            lambda z, signal=signal: _divergence(name, z, signal, 2.0), (student,)
        )


def test_the_weights_of_the_adaptive_divergence_have_no_gradient() -> None:
    student, teacher = random_logits(1).requires_grad_(), Dense(random_logits(2))
    forward, backward = forward_kl(student, teacher), reverse_kl(student, teacher)
    found = adaptive_kl(student, teacher)
    share = ((found - backward) / (forward - backward)).detach()
    assert ((share > 0.01) & (share < 0.99)).all()
    (wanted,) = torch.autograd.grad((share * forward + (1 - share) * backward).sum(), student)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), student)[0], wanted, rtol=1e-8, atol=1e-12)


def test_the_ends_of_jsd_are_the_two_directions_of_kl_and_skew_zero_is_none() -> None:
    student, teacher = random_logits(1), Dense(random_logits(2))
    for found, wanted in (
        (jsd(student, teacher, beta=0.0), forward_kl(student, teacher)),
        (jsd(student, teacher, beta=1.0), reverse_kl(student, teacher)),
        (skew_kl(student, teacher, skew=0.0), forward_kl(student, teacher)),
        (skew_reverse_kl(student, teacher, skew=0.0), reverse_kl(student, teacher)),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    # The limits that the ends stand for.
    small = jsd(student, teacher, beta=1e-7) / 1e-7
    torch.testing.assert_close(small, forward_kl(student, teacher), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_ids_that_neither_model_can_say_count_nothing_and_leave_the_gradient_finite(name: str) -> None:
    student, teacher = random_logits(1), random_logits(2)
    student[:, -4:], teacher[:, -4:] = -math.inf, -math.inf
    student.requires_grad_()
    found = _divergence(name, student, Dense(teacher))
    cut = _divergence(name, student[:, :-4], Dense(teacher[:, :-4]))
    torch.testing.assert_close(found, cut, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert torch.isfinite(gradient).all()
    assert not gradient[:, -4:].any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_fp32_far_apart_is_finite_or_truly_infinite_but_never_no_number(name: str) -> None:
    student = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    found = _divergence(name, student, Dense(torch.tensor([[-200.0, 0.0, 200.0]])))
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert not found.isnan().any()
    assert torch.isfinite(gradient).all()


def _draws(teacher_NV: Tensor, temperature: float, draws: int, seed: int) -> Sampled:
    """Every draw an id of its own with an equal share: repeated ids add up."""
    generator = torch.Generator().manual_seed(seed)
    ids_NK = (teacher_NV / temperature).softmax(-1).multinomial(draws, replacement=True, generator=generator)
    return Sampled(ids_NK, torch.full(ids_NK.shape, 1 / draws, dtype=torch.float64), temperature)


def _gradient(student_NV: Tensor, signal: Any, temperature: float) -> Tensor:
    """Of alpha = 1 through the closed form, over T^2."""
    weights_N = torch.ones(len(student_NV), dtype=torch.float64) / temperature**2
    quantities = blend(
        torch.zeros(len(student_NV), dtype=torch.int64), signal, alpha=1.0, temperature=temperature
    )

    class Identity:
        parameters = ()

        def __call__(self, hidden: Tensor, /) -> Tensor:
            return hidden.clone()

    hidden_NV = student_NV.clone().requires_grad_()
    (gradient_NV,) = torch.autograd.grad(
        weighted_loss(hidden_NV, Identity(), quantities, weights_N)[0], hidden_NV
    )
    return gradient_NV


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_from_sampled_ids_is_right_on_average_and_from_the_renormalised_top_k_it_is_not(
    temperature: float,
) -> None:
    copies, draws = 4000, 5
    student, teacher = (
        random_logits(1, rows=1, width=8, spread=1.0),
        random_logits(2, rows=1, width=8, spread=1.0),
    )
    wanted_V = _gradient(student, Dense(teacher), temperature)[0]
    signal = _draws(teacher.expand(copies, -1), temperature, draws, seed=3)
    gradients_NV = _gradient(student.expand(copies, -1), signal, temperature)
    error_V = gradients_NV.std(0) / math.sqrt(copies)
    assert ((gradients_NV.mean(0) - wanted_V).abs() < 4 * error_V).all()
    assert (error_V < 0.02).all()
    biased_V = _gradient(student, renormalised(exact_sparse(teacher, draws, temperature)), temperature)[0]
    assert ((biased_V - wanted_V).abs() > 4 * error_V).any()


def test_the_renormalised_top_k_is_forward_kl_from_the_kept_ids_over_their_mass() -> None:
    student, teacher = random_logits(1), random_logits(2)
    signal = exact_sparse(teacher, 4)
    found = forward_kl(student, renormalised(signal))
    p_NK = signal.log_probs_NK.exp() / signal.log_probs_NK.exp().sum(-1, keepdim=True)
    q_NK = student.softmax(-1).gather(-1, signal.ids_NK)
    torch.testing.assert_close(found, (p_NK * (p_NK / q_NK).log()).sum(-1), rtol=1e-11, atol=0)
    whole = forward_kl(student, renormalised(exact_sparse(teacher, V)))
    torch.testing.assert_close(whole, forward_kl(student, Dense(teacher)), rtol=1e-11, atol=0)
    values = blend(torch.zeros(N, dtype=torch.int64), signal, alpha=1.0, renormalise=True)(
        student, slice(0, N)
    )
    torch.testing.assert_close(values["kl"], found)
    torch.testing.assert_close(values["teacher_tail"], signal.log_tail_N.exp())


@pytest.mark.parametrize("signal", [Dense, Live, Sparse, Sampled])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_pitfall_2_what_a_signal_cannot_give_is_refused_with_the_reason(name: str, signal: Any) -> None:
    if signal in {Dense, Live} or name == "forward_kl" or (signal is Sparse and name in OF_BUCKETS):
        check_divergence(name, signal)
        return
    reason = "the ids that only the student finds likely" if signal is Sparse else "wrong even on average"
    with pytest.raises(TrainingError, match=reason):
        check_divergence(name, signal)
    stored = (
        exact_sparse(random_logits(2), 3) if signal is Sparse else _draws(random_logits(2), 1.0, 3, seed=0)
    )
    with pytest.raises(TrainingError, match=reason):
        divergence(name, random_logits(1), stored)
    with pytest.raises(TrainingError, match=reason):
        blend(torch.zeros(N, dtype=torch.int64), stored, alpha=0.5, divergence=name)


def test_only_forward_kl_from_a_top_k_is_renormalised_and_unknown_names_are_refused() -> None:
    check_divergence("forward_kl", Sparse, renormalise=True)
    for name, signal in (("tvd", Sparse), ("forward_kl", Dense), ("forward_kl", Sampled)):
        with pytest.raises(TrainingError, match="renormalising is for forward_kl"):
            check_divergence(name, signal, renormalise=True)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"no divergence 'kl'\s+expected: one of forward_kl"):
        check_divergence("kl", Dense)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_blend_adds_alpha_t_squared_times_the_divergence_of_its_name(name: str) -> None:
    student, teacher, targets_N = random_logits(1), Dense(random_logits(2)), torch.tensor([0, 5, 22, 7])
    settings: dict[str, Any] = {"divergence": name, "beta": 0.3, "skew": 0.2, "divergence_scale": 5.0}
    values = blend(targets_N, teacher, alpha=0.3, temperature=2.0, **settings)(student, slice(0, N))
    cross_entropy_N = -student.log_softmax(-1).gather(-1, targets_N[:, None])[:, 0]
    divergence_N = _divergence(name, student, teacher, 2.0)
    torch.testing.assert_close(values["kl"], divergence_N)
    torch.testing.assert_close(values["cross_entropy"], cross_entropy_N)
    torch.testing.assert_close(values["loss"], 0.7 * cross_entropy_N + 0.3 * 4 * 5 * divergence_N)
    assert values.keys() == {"loss", "cross_entropy", "kl", "agreement"}


@pytest.mark.parametrize("name", ["forward_kl", "tvd"])
def test_tokens_over_sequences_as_the_scale_reproduces_torchs_batchmean(name: str) -> None:
    sequences, positions, width = 2, 5, 7
    student, teacher = random_logits(1, rows=10, width=width), random_logits(2, rows=10, width=width)
    targets_N = torch.arange(10) % width
    quantities = blend(
        targets_N,
        Dense(teacher),
        alpha=0.4,
        temperature=2.0,
        divergence=name,
        divergence_scale=positions * sequences / sequences,
    )
    weights_N = torch.full((10,), 1 / 10, dtype=torch.float64)
    found = (quantities(student, slice(0, 10))["loss"] * weights_N).sum()
    q_BTV, p_BTV = ((one / 2).softmax(-1).reshape(sequences, positions, width) for one in (student, teacher))
    if name == "forward_kl":
        summed = torch.nn.KLDivLoss(reduction="batchmean")(q_BTV.log(), p_BTV)
    else:
        summed = 0.5 * (p_BTV - q_BTV).abs().sum() / sequences
    wanted = 0.6 * torch.nn.functional.cross_entropy(student, targets_N) + 0.4 * 4 * summed
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_ties_count_as_agreement_with_any_of_the_most_probable_ids() -> None:
    student = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    for likely, wanted in ((0, 1.0), (1, 1.0), (2, 0.0)):
        teacher = Dense(torch.nn.functional.one_hot(torch.tensor([likely]), 3).double())
        values = blend(torch.zeros(1, dtype=torch.int64), teacher, alpha=0.5)(student, slice(0, 1))
        assert values["agreement"].tolist() == [wanted]


def test_the_distance_is_at_most_one() -> None:
    far = tvd(torch.tensor([[100.0, 0.0]]), Dense(torch.tensor([[0.0, 100.0]])))
    assert far.tolist() == [1.0]
