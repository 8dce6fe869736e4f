"""A mixture of experts learns what a plain loop over its rows says, its routers' auxiliary loss included."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from potstill.models import isolates_packed_rows
from potstill.train.routing import Routing
from potstill.train.student import MicroBatch, StudentWithLoss, make_micro_batch

from .precision import in_float64
from .test_training_invariance import (
    ALPHA,
    ROWS,
    TEMPERATURE,
    VOCABULARY,
    assert_same,
    gradients,
    split,
    teacher_signal,
)

WEIGHT = 0.5


def naive(model: Any, teacher: Any, weight: float) -> tuple[float, dict[str, Tensor]]:
    """One row at a time through transformers' own forward; the auxiliary loss weighs a row by its tokens."""
    supervised, tokens = sum(row.supervised_tokens for row in ROWS), sum(len(row.ids) for row in ROWS)
    total = 0.0
    for row in ROWS:
        ids, mask = torch.tensor([row.ids]), torch.tensor(row.mask[1:], dtype=torch.bool)
        output = model(ids, use_cache=False, output_router_logits=True)
        logits_NV = output.logits[0, :-1, :VOCABULARY][mask]
        cross_entropy = functional.cross_entropy(logits_NV, ids[0, 1:][mask], reduction="sum")
        p_NV = (teacher_signal(teacher, [row]).logits_NV / TEMPERATURE).softmax(-1)
        log_q_NV = (logits_NV / TEMPERATURE).log_softmax(-1)
        kl = (p_NV * (p_NV.log() - log_q_NV)).sum()
        loss = ((1 - ALPHA) * cross_entropy + ALPHA * TEMPERATURE**2 * kl) / supervised
        for logits_NE in output.router_logits:  # layer by layer: together they would make up for each other
            balance = load_balancing_loss_func((logits_NE,), logits_NE.shape[-1], 2)
            loss = loss + weight * balance * len(row.ids) / tokens / len(output.router_logits)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def of_student(student: StudentWithLoss, batches: list[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    supervised = sum(batch.supervised for batch in batches)
    scale, total = supervised / sum(map(len, (row.ids for row in ROWS))), 0.0
    for batch in batches:
        loss, sums = student(batch, supervised, 1.0, 1.0, scale)
        loss.backward()
        assert sums["loss"].item() / supervised == pytest.approx(loss.item(), rel=1e-5)
        total += loss.item()
    return total, gradients(student.model)


@pytest.mark.parametrize("weight", [0.0, WEIGHT])
def test_its_loss_and_gradients_are_those_of_a_plain_loop(
    build_tiny_model: Any, moe_family: str, weight: float
) -> None:
    model = in_float64(build_tiny_model(moe_family))
    teacher = in_float64(build_tiny_model(moe_family, seed=1))
    expected_loss, expected = naive(model, teacher, weight)
    student = StudentWithLoss(
        model, VOCABULARY, alpha=ALPHA, temperature=TEMPERATURE, routing=Routing(model, weight)
    )
    found_loss, found = of_student(student, split([3, 5], teacher))
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same(found, expected, 1e-4)  # norms and routers' probabilities work in fp32


@pytest.mark.parametrize("way", ["one by one", "all together", "packed", "recomputed"])
def test_its_gradients_do_not_depend_on_how_rows_are_split_packed_or_recomputed(
    build_tiny_model: Any, moe_family: str, way: str
) -> None:
    model = in_float64(build_tiny_model(moe_family)).train()
    student = StudentWithLoss(model, VOCABULARY, routing=Routing(model, WEIGHT))
    expected_loss, expected = of_student(student, split([3, 5]))
    if way == "packed":
        assert isolates_packed_rows(model)
        batches = [make_micro_batch(ROWS[:5], packed=True), make_micro_batch(ROWS[5:], packed=True)]
    else:
        batches = split({"one by one": [1] * 8, "all together": [8], "recomputed": [3, 5]}[way])
    passes: list[Any] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *given: passes.append(given))
    if way == "recomputed":
        model.activation_checkpointing_enable()
    found_loss, found = of_student(student, batches)
    assert len(passes) == len(batches) * (2 if way == "recomputed" else 1)
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same(found, expected, 1e-4)


def test_without_its_auxiliary_loss_the_comparison_fails(build_tiny_model: Any) -> None:
    """What the tests above compare is there: a router's gradient is another one without it."""
    model = in_float64(build_tiny_model("qwen3_moe"))
    with_loss, without = (
        of_student(StudentWithLoss(model, VOCABULARY, routing=Routing(model, weight)), split([8]))[1]
        for weight in (WEIGHT, 0.0)
    )
    name = "model.layers.0.mlp.gate.weight"
    apart = (with_loss[name] - without[name]).norm() / without[name].norm()
    assert apart > 0.01
