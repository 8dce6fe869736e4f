"""Every loss against a naive float64 oracle, and what must hold of it whatever the numbers.

Shapes: N tokens, V vocabulary, K kept ids.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.errors import ModelError, TrainingError
from potstill.losses.blend import blend
from potstill.losses.divergences import forward_kl, log1mexp
from potstill.losses.metrics import agreement, comparison
from potstill.losses.response import cross_entropy, response_loss
from potstill.losses.types import Dense, Sparse, concatenate

from .distributions import exact_sparse, random_logits

V = 23


def _oracle_kl(student: list[float], teacher: list[float], temperature: float) -> float:
    p_total = math.fsum(math.exp(z / temperature) for z in teacher)
    q_total = math.fsum(math.exp(z / temperature) for z in student)
    terms = []
    for z_p, z_q in zip(teacher, student, strict=True):
        p, q = math.exp(z_p / temperature) / p_total, math.exp(z_q / temperature) / q_total
        terms.append(p * (math.log(p) - math.log(q)))
    return math.fsum(terms)


def _oracle_sparse_kl(student: list[float], teacher: list[float], k: int, temperature: float) -> float:
    p = [math.exp(z / temperature) for z in teacher]
    q = [math.exp(z / temperature) for z in student]
    p, q = [one / math.fsum(p) for one in p], [one / math.fsum(q) for one in q]
    order = sorted(range(len(p)), key=lambda one: -p[one])
    kept, others = order[:k], order[k:]
    p_rest, q_rest = math.fsum(p[one] for one in others), math.fsum(q[one] for one in others)
    tail = p_rest * math.log(p_rest / q_rest) if p_rest else 0.0
    return math.fsum(p[one] * math.log(p[one] / q[one]) for one in kept) + tail


def _oracle_cross_entropy(student: list[float], target: int) -> float:
    return math.log(math.fsum(map(math.exp, student))) - student[target]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_dense_forward_kl_equals_the_oracle(temperature: float) -> None:
    student, teacher = random_logits(1), random_logits(2)
    found_N = forward_kl(student, Dense(teacher), temperature)
    wanted = [_oracle_kl(s, t, temperature) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert found_N.tolist() == pytest.approx(wanted, rel=1e-12)
    assert max(wanted) > 0.1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("k", [1, 5, V - 1, V])
def test_sparse_forward_kl_equals_the_oracle(k: int, temperature: float) -> None:
    student, teacher = random_logits(1), random_logits(2)
    found_N = forward_kl(student, exact_sparse(teacher, k, temperature), temperature)
    wanted = [
        _oracle_sparse_kl(s, t, k, temperature)
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert found_N.tolist() == pytest.approx(wanted, rel=1e-10)


def test_cross_entropy_equals_the_oracle() -> None:
    student, targets_N = random_logits(1), torch.tensor([0, 5, 22, 7])
    wanted = [_oracle_cross_entropy(*one) for one in zip(student.tolist(), targets_N.tolist(), strict=True)]
    assert cross_entropy(student, targets_N).tolist() == pytest.approx(wanted, rel=1e-12)
    assert response_loss(targets_N)(student, slice(0, 4))["loss"].tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_every_id_kept_the_sparse_divergence_is_the_dense_one(temperature: float) -> None:
    student, teacher = random_logits(1).requires_grad_(), random_logits(2)
    signal = exact_sparse(teacher, V, temperature)
    assert torch.isneginf(signal.log_tail_N).all()
    dense, sparse = forward_kl(student, Dense(teacher), temperature), forward_kl(student, signal, temperature)
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(sparse.sum(), student)[0],
        torch.autograd.grad(dense.sum(), student)[0],
        rtol=1e-10,
        atol=1e-14,
    )


def test_the_sparse_gradient_is_q_minus_p_on_the_kept_ids_and_scales_q_off_them() -> None:
    student, teacher, k = random_logits(1).requires_grad_(), random_logits(2), 5
    signal = exact_sparse(teacher, k)
    (gradient_NV,) = torch.autograd.grad(forward_kl(student, signal).sum(), student)
    q_NV, p_NV = student.detach().softmax(-1), teacher.softmax(-1)
    kept_NV = torch.zeros_like(q_NV, dtype=torch.bool).scatter(-1, signal.ids_NK, True)
    rest_p, rest_q = (one.masked_fill(kept_NV, 0).sum(-1, keepdim=True) for one in (p_NV, q_NV))
    wanted_NV = torch.where(kept_NV, q_NV - p_NV, q_NV * (1 - rest_p / rest_q))
    torch.testing.assert_close(gradient_NV, wanted_NV, rtol=1e-9, atol=1e-13)


def test_gradcheck_of_both_divergences() -> None:
    student, teacher = random_logits(1, rows=3, width=7).requires_grad_(), random_logits(2, rows=3, width=7)
    assert torch.autograd.gradcheck(lambda z: forward_kl(z, Dense(teacher), 2.0), (student,))
    assert torch.autograd.gradcheck(lambda z: forward_kl(z, exact_sparse(teacher, 3, 2.0), 2.0), (student,))


_LOGITS = st.lists(st.floats(-12, 12), min_size=6, max_size=6)


@given(student=_LOGITS, teacher=_LOGITS, k=st.integers(1, 6), temperature=st.sampled_from([0.5, 1.0, 4.0]))
def test_pitfall_1_the_tail_form_is_at_least_zero_and_at_most_the_full_divergence(
    student: list[float], teacher: list[float], k: int, temperature: float
) -> None:
    student_NV, teacher_NV = (torch.tensor([one], dtype=torch.float64) for one in (student, teacher))
    sparse = forward_kl(student_NV, exact_sparse(teacher_NV, k, temperature), temperature).item()
    dense = forward_kl(student_NV, Dense(teacher_NV), temperature).item()
    assert -1e-12 <= sparse <= dense + 1e-9


def test_pitfall_1_the_bare_sum_over_the_kept_ids_would_be_negative() -> None:
    student, teacher = torch.tensor([[2.0, 2.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.9, 0.9]])
    signal = exact_sparse(teacher, 2)
    student_NK = student.log_softmax(-1).gather(-1, signal.ids_NK)
    assert (signal.log_probs_NK.exp() * (signal.log_probs_NK - student_NK)).sum() < -0.1
    assert forward_kl(student, signal).item() > 0.1


def test_pitfall_3_equal_top_logits_and_logsumexp_do_not_fix_the_distribution_at_another_temperature() -> (
    None
):
    # The same two top logits and the same logsumexp: the rest is one id here, a thousand there.
    narrow = torch.tensor([2.0, 1.0, 0.5] + [-1e4] * 999, dtype=torch.float64)
    wide = torch.tensor([2.0, 1.0] + [0.5 - math.log(1000)] * 1000, dtype=torch.float64)
    assert narrow.logsumexp(-1).item() == pytest.approx(wide.logsumexp(-1).item())
    at_two = [(one / 2).softmax(-1)[0].item() for one in (narrow, wide)]
    assert at_two[0] > 2 * at_two[1]
    with pytest.raises(TrainingError, match=r"temperature 1.*the loss of 2"):
        forward_kl(wide[None], exact_sparse(wide[None], 2), 2.0)


def test_pitfall_9_dense_vocabularies_of_different_width_are_refused() -> None:
    with pytest.raises(ModelError, match=r"\(4, 24\).*\(4, 23\)"):
        forward_kl(random_logits(1), Dense(random_logits(2, width=V + 1)))


@pytest.mark.parametrize("signal", ["dense", "sparse"])
def test_fp32_stays_close_to_float64_where_the_student_is_certain(signal: str) -> None:
    student = torch.tensor([[40.0, 0.0, -5.0, 1.0], [30.0, 29.0, -30.0, -31.0]], dtype=torch.float64)
    teacher = torch.tensor([[3.0, 1.0, 0.0, -1.0], [5.0, 4.0, -2.0, -3.0]], dtype=torch.float64)
    exact = Dense(teacher) if signal == "dense" else exact_sparse(teacher, 2)
    rounded = (
        Dense(exact.logits_NV.float())
        if isinstance(exact, Dense)
        else Sparse(exact.ids_NK, exact.log_probs_NK.float(), exact.log_tail_N.float())
    )
    found_N, wanted_N = forward_kl(student.float(), rounded), forward_kl(student, exact)
    assert torch.isfinite(found_N).all()
    if signal == "dense":
        torch.testing.assert_close(found_N.double(), wanted_N, rtol=1e-5, atol=1e-6)
    else:
        # What fp32 cannot tell from zero counts as its epsilon: less than the truth, never more.
        assert (found_N <= wanted_N + 1e-5).all()
        assert (found_N > 0).all()


def test_a_student_whose_kept_mass_rounds_to_one_has_a_finite_loss_and_gradient() -> None:
    student = torch.tensor([[60.0, 0.0, 0.0, 0.0]], requires_grad=True)
    kept = student.detach().log_softmax(-1)[:, :1]
    assert kept.item() == 0.0, "the clamp is not reached"
    loss = forward_kl(student, exact_sparse(torch.tensor([[2.0, 1.0, 0.0, 0.0]]), 1))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


@given(st.floats(-700, -1e-300))
def test_log1mexp_is_the_log_of_what_is_left_over(x: float) -> None:
    found = log1mexp(torch.tensor(x, dtype=torch.float64)).item()
    assert found == pytest.approx(math.log(-math.expm1(x)), rel=1e-12, abs=1e-15)
    assert log1mexp(torch.tensor(-math.inf)).item() == 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_blend_weighs_cross_entropy_and_divergence_by_alpha_and_t_squared(
    alpha: float, temperature: float
) -> None:
    student, teacher, targets_N = random_logits(1), random_logits(2), torch.tensor([0, 5, 22, 7])
    dense = blend(targets_N, Dense(teacher), alpha=alpha, temperature=temperature)(student, slice(0, 4))
    sparse = blend(targets_N, exact_sparse(teacher, 4, temperature), alpha=alpha, temperature=temperature)
    for row, (s, t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        ce = _oracle_cross_entropy(s, int(targets_N[row]))
        for found, kl in (
            (dense, _oracle_kl(s, t, temperature)),
            (sparse(student, slice(0, 4)), _oracle_sparse_kl(s, t, 4, temperature)),
        ):
            wanted = (1 - alpha) * ce + alpha * temperature**2 * kl
            assert found["loss"][row].item() == pytest.approx(wanted, rel=1e-10)
            assert found["cross_entropy"][row].item() == pytest.approx(ce, rel=1e-10)
            assert found["kl"][row].item() == pytest.approx(kl, rel=1e-10)


def test_a_chunk_of_the_blend_reads_its_own_rows() -> None:
    student, teacher, targets_N = random_logits(1), random_logits(2), torch.tensor([0, 5, 22, 7])
    for signal in (Dense(teacher), exact_sparse(teacher, 4)):
        quantities = blend(targets_N, signal, alpha=0.5)
        whole, part = quantities(student, slice(0, 4)), quantities(student[2:3], slice(2, 3))
        for name, values_N in whole.items():
            assert part[name].item() == pytest.approx(values_N[2].item(), rel=1e-12)


def test_metrics_are_agreement_divergence_and_cross_entropy_at_temperature_one() -> None:
    student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]], dtype=torch.float64)
    targets_N = torch.tensor([0, 2])
    for signal in (Dense(teacher), exact_sparse(teacher, 2)):
        assert agreement(student, signal).tolist() == [1.0, 0.0]
    found = comparison(targets_N, Dense(teacher))(student, slice(0, 2))
    assert found["agreement"].tolist() == [1.0, 0.0]
    for row in range(2):
        s, t = student[row].tolist(), teacher[row].tolist()
        assert found["kl"][row].item() == pytest.approx(_oracle_kl(s, t, 1.0), rel=1e-12)
        assert found["cross_entropy"][row].item() == pytest.approx(
            _oracle_cross_entropy(s, int(targets_N[row])), rel=1e-12
        )


def test_signals_of_several_rows_are_joined_in_order() -> None:
    whole = exact_sparse(random_logits(3), 4)
    joined = concatenate([whole.rows(slice(0, 1)), whole.rows(slice(1, 4))])
    for name in ("ids_NK", "log_probs_NK", "log_tail_N"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    assert whole.to("cpu").temperature == 1.0
