"""Feature losses against loops in float64, their invariances, and a step's gradients however it is split."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.data.chat import Rendered
from potstill.losses.feature import cka_distance, feature_sum, hidden_cosine, hidden_mse, relation_kl
from potstill.models import LoadedModel
from potstill.train.arguments import DistillationArguments
from potstill.train.features import FeatureLoss, counted
from potstill.train.loader import MicroBatches
from potstill.train.lora import add_adapter
from potstill.train.online import OnlineTeacher
from potstill.train.rows import TrainingData
from potstill.train.settings import FeatureSettings, LoraSettings
from potstill.train.student import MicroBatch, StudentWithLoss, make_micro_batch
from potstill.train.trainer import DistillationTrainer

from .test_shared_prefix import PREFIX
from .test_shared_prefix import ROWS as ROWS_OF_A_PREFIX
from .test_training_invariance import ROWS, VOCABULARY, VOCABULARY_OF_IDS, assert_same, gradients, in_rows

KINDS = ("hidden_mse", "hidden_cosine", "cka", "relations")
WIDE: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 4, "head_dim": 12, "intermediate_size": 64}


def states(tokens: int, width: int, seed: int) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- oracles: one number after the other, in numpy


def naive(kind: str, student: Any, teacher: Any, heads: int = 1) -> float:
    """A feature loss of one row's tokens, summed over them."""
    x, y = student.detach().double().numpy(), teacher.detach().double().numpy()
    if kind == "hidden_mse":
        return sum(
            sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s) for s, t in zip(x, y, strict=True)
        )
    if kind == "hidden_cosine":
        norms = [math.sqrt(sum(s**2) * sum(t**2)) for s, t in zip(x, y, strict=True)]
        # The padding token's embedding is zero, and unlike everything.
        return sum(1 - sum(s * t) / norm if norm else 1.0 for s, t, norm in zip(x, y, norms, strict=True))
    if kind == "cka":
        if len(x) < 2:
            return 0.0
        x, y = x - x.mean(0), y - y.mean(0)
        cka = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
        return float(len(x) * (1 - cka))
    return sum(naive_relations(x, y, heads))


def naive_relations(x: Any, y: Any, heads: int) -> list[float]:
    """Of each token the mean over heads of the KL between its relations to itself and those before it."""

    def relation(vectors: Any, head: int, token: int) -> list[float]:
        width = vectors.shape[1] // heads
        own = slice(head * width, (head + 1) * width)
        scores = [
            float(vectors[token, own] @ vectors[other, own]) / math.sqrt(width) for other in range(token + 1)
        ]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        return [weight / sum(weights) for weight in weights]

    found = []
    for token in range(len(x)):
        of_heads = [(relation(y, head, token), relation(x, head, token)) for head in range(heads)]
        kl = [sum(p * math.log(p / q) for p, q in zip(*one, strict=True)) for one in of_heads]
        found.append(sum(kl) / heads)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [[7], [1, 12, 5], [0, 30]])
def test_a_loss_is_what_a_loop_over_its_rows_says(kind: str, rows: list[int]) -> None:
    width = 8 if kind.startswith("hidden") else 12
    student, teacher = states(sum(rows), 8, 1), states(sum(rows), width, 2)
    found = feature_sum(kind, student, teacher, rows, relation_heads=4)
    expected = sum(
        naive(kind, *one, heads=4) for one in zip(student.split(rows), teacher.split(rows), strict=True)
    )
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert expected > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    student, teacher = states(9, 6, 3).requires_grad_(), states(9, 6, 4)
    assert torch.autograd.gradcheck(
        lambda given: feature_sum(kind, given, teacher, [2, 7], relation_heads=2), (student,)
    )


@pytest.mark.parametrize("tokens", [300, 513])
def test_relations_of_long_rows_are_computed_in_chunks_and_are_the_same(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = states(tokens, 6, 1).requires_grad_(), states(tokens, 9, 2)
    found = relation_kl(student, teacher, 3)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    seen: list[int] = []
    monkeypatch.setattr("potstill.losses.feature._CHUNK_TOKENS", 10_000)
    plain = torch.Tensor.log_softmax
    monkeypatch.setattr(
        torch.Tensor, "log_softmax", lambda one, dim: (seen.append(one.shape[1]), plain(one, dim))[1]
    )
    whole = relation_kl(student, teacher, 3)
    assert set(seen) == {tokens}
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole.sum(), student)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_summed_in_full_precision_whatever_autocast_does(kind: str) -> None:
    student, teacher = (states(40, 16, seed).to(torch.bfloat16) for seed in (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = feature_sum(kind, student, teacher, [40], relation_heads=4)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(naive(kind, student, teacher, heads=4), rel=1e-5)


def test_cka_of_very_large_states_stays_finite() -> None:
    large = states(5, 6, 1).float() * 1e15
    found = cka_distance(large.requires_grad_(), states(5, 6, 2).float())
    (gradient,) = torch.autograd.grad(found, large)
    assert 0 < found < 1
    assert gradient.isfinite().all()


def test_states_that_are_all_the_same_have_nothing_in_common_and_no_gradient_that_is_not_finite() -> None:
    same = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    found = cka_distance(same, states(4, 3, 1))
    (gradient,) = torch.autograd.grad(found, same)
    assert found == 1
    assert gradient.isfinite().all()


# --- invariances


SIZES = {"tokens": st.integers(3, 20), "width": st.integers(2, 9), "seed": st.integers(0, 10_000)}
EXAMPLES = settings(deadline=None, max_examples=40)


def rotation(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(states(width, width, seed))[0]


@EXAMPLES
@given(**SIZES, scale=st.floats(1e-3, 1e3))
def test_cka_is_blind_to_rotation_scale_and_shift_and_to_nothing_else(
    tokens: int, width: int, seed: int, scale: float
) -> None:
    x, y = states(tokens, width, seed), states(tokens, 7, seed + 1)
    expected = cka_distance(x, y)
    moved = scale * x @ rotation(width, seed + 2) + states(1, width, seed + 3)
    torch.testing.assert_close(cka_distance(moved, y), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(cka_distance(y, x), expected, rtol=1e-9, atol=1e-12)
    assert 0 <= expected <= 1
    assert abs(cka_distance(moved, x)) < 1e-9
    stretched = x * torch.linspace(1, 5, width, dtype=torch.float64)
    assert cka_distance(stretched, x) > 1e-9


@EXAMPLES
@given(**SIZES, scale=st.floats(1e-3, 1e3))
def test_the_cosine_is_blind_to_scale_alone(tokens: int, width: int, seed: int, scale: float) -> None:
    x, y = states(tokens, width, seed), states(tokens, width, seed + 1)
    expected = hidden_cosine(x, y)
    torch.testing.assert_close(hidden_cosine(scale * x, y), expected, rtol=1e-9, atol=1e-12)
    turned = hidden_cosine(*(one @ rotation(width, seed) for one in (x, y)))
    torch.testing.assert_close(turned, expected, rtol=1e-9, atol=1e-12)
    assert ((expected >= -1e-12) & (expected <= 2 + 1e-12)).all()
    assert not torch.allclose(hidden_cosine(x + 1, y), expected)


@EXAMPLES
@given(**SIZES, scale=st.floats(1.1, 1e3))
def test_the_mean_square_is_blind_to_a_rotation_of_both_and_grows_with_the_square_of_a_scale(
    tokens: int, width: int, seed: int, scale: float
) -> None:
    x, y = states(tokens, width, seed), states(tokens, width, seed + 1)
    expected, turn = hidden_mse(x, y), rotation(width, seed)
    torch.testing.assert_close(hidden_mse(x @ turn, y @ turn), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(hidden_mse(scale * x, scale * y), scale**2 * expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(hidden_mse(scale * x, y), expected)


@EXAMPLES
@given(**SIZES, heads=st.integers(1, 4))
def test_relations_are_never_negative_and_blind_to_a_rotation_within_a_head(
    tokens: int, width: int, seed: int, heads: int
) -> None:
    x, y = states(tokens, heads * width, seed), states(tokens, heads * 3, seed + 1)
    expected = relation_kl(x, y, heads)
    turned = torch.cat([part @ rotation(width, seed) for part in x.split(width, dim=1)], dim=1)
    torch.testing.assert_close(relation_kl(turned, y, heads), expected, rtol=1e-7, atol=1e-9)
    assert (expected >= -1e-12).all()
    assert expected[0] == 0  # the first token has itself alone
    later = x.clone()
    later[-1] += 1
    torch.testing.assert_close(relation_kl(later, y, heads)[:-1], expected[:-1])


# --- models


def feature_of(student: Any, teacher: Any, kind: str, **fields: Any) -> FeatureLoss:
    return FeatureLoss(FeatureSettings(kind=kind, **fields), student, teacher, seed=1)


def with_loss(student: Any, teacher: Any, kind: str, **fields: Any) -> tuple[StudentWithLoss, OnlineTeacher]:
    feature = feature_of(student, teacher, kind, **fields)
    online = OnlineTeacher(teacher, LoadedModel(student, VOCABULARY_OF_IDS, "student"))
    return StudentWithLoss(student, VOCABULARY, alpha=0.3, feature=feature), online


def step(
    student: StudentWithLoss, teacher: OnlineTeacher, batches: Sequence[MicroBatch], *, ranks: int = 1
) -> tuple[float, dict[str, Tensor]]:
    """The feature loss of a step, and the gradients of student and projections."""
    assert student.feature is not None
    supervised = sum(batch.supervised for batch in batches)
    tokens = sum(sum(batch.lengths) for batch in batches)
    scale = 1.0 if student.feature.settings.tokens == "supervised" else supervised / tokens
    total = 0.0
    for batch in batches:
        loss, sums = student(teacher.answer(batch, student.feature), supervised, 1.0, scale)
        loss.backward()
        total += sums["feature"].item() / supervised
    return total, gradients(student)


def naive_feature(student: StudentWithLoss, teacher: Any) -> float:
    """Of one row at a time, from transformers' own hidden states; their layers are numbered alike."""
    feature = student.feature
    assert feature is not None
    supervised, total = feature.settings.tokens == "supervised", 0.0
    for row in ROWS:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            of_student, of_teacher = (
                model(ids, use_cache=False, output_hidden_states=True).hidden_states
                for model in (student.model, teacher)
            )
        counts = torch.tensor([*row.mask[1:], 0], dtype=torch.bool) if supervised else slice(None)
        for layer, other in feature.pairs.items():
            mine = of_student[layer][0]
            if str(layer) in feature.projections:
                mine = mine @ feature.projections[str(layer)].weight.detach().T
            total += naive(feature.settings.kind, mine[counts], of_teacher[other][0][counts])
    tokens = sum(row.supervised_tokens if supervised else len(row.ids) for row in ROWS)
    return total / len(feature.pairs) / tokens


@pytest.mark.parametrize("tokens", ["supervised", "all"])
@pytest.mark.parametrize("kind", ["hidden_mse", "hidden_cosine", "cka"])
def test_the_loss_is_the_mean_over_all_rows_of_what_transformers_hidden_states_say(
    build_tiny_model: Any, kind: str, tokens: str
) -> None:
    model, teacher = build_tiny_model().double(), build_tiny_model(seed=1, **WIDE).double()
    student, online = with_loss(model, teacher, kind, tokens=tokens, embeddings=True)
    assert student.feature is not None
    assert student.feature.pairs == {0: 0, 1: 2, 2: 4}
    found, _ = step(student, online, [make_micro_batch(ROWS)])
    assert found == pytest.approx(naive_feature(student, teacher), rel=1e-6)  # norms work in fp32


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "opt"])
def test_relations_are_those_of_the_vectors_that_attention_has(build_tiny_model: Any, family: str) -> None:
    """Keys and values as transformers keeps them for generation, where no rotary positions change them."""
    model = build_tiny_model(family).double()
    teacher = build_tiny_model("gpt2", seed=1, n_embd=48, n_layer=3, n_head=6).double()
    student, online = with_loss(model, teacher, "relations", layers={1: 2})
    feature = student.feature
    assert feature is not None
    batch = make_micro_batch(ROWS[5:6])
    tokens = counted(batch, "supervised")
    with feature.listening(model) as passed:
        model(batch.input_ids_BT, use_cache=False)
    mine = feature.joined(passed, tokens)
    theirs = online.answer(batch, feature).teacher_states
    assert theirs is not None
    cache = model(batch.input_ids_BT, use_cache=True).past_key_values
    value = cache.layers[0].values[0].transpose(0, 1).flatten(1)[tokens.mask_BT[0]]
    torch.testing.assert_close(mine[1, "value"], value)
    assert {part for _, part in mine} == {"query", "key", "value"}
    expected = sum(
        naive("relations", mine[1, part], theirs[2, part], feature.heads)
        for part in ("query", "key", "value")
    )
    found, _ = step(student, online, [batch])
    assert found == pytest.approx(expected / batch.supervised, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_its_teacher_has_no_loss_and_another_has_some(
    build_tiny_model: Any, family: str, kind: str
) -> None:
    model = build_tiny_model(family)
    extra = {} if kind == "relations" else {"embeddings": True}
    student, online = with_loss(model, copy.deepcopy(model), kind, **extra)
    assert student.feature is not None
    assert not student.feature.projections
    assert abs(step(student, online, [make_micro_batch(ROWS)])[0]) < 1e-6
    other, online = with_loss(model, build_tiny_model(family, seed=1), kind, **extra)
    assert step(other, online, [make_micro_batch(ROWS)])[0] > 1e-3


def alone(student: StudentWithLoss, teacher: OnlineTeacher, batch: MicroBatch) -> dict[str, Tensor]:
    """Gradients of the feature loss by itself."""
    feature = student.feature
    assert feature is not None
    with feature.listening(student.model) as passed:
        student.model(batch.input_ids_BT, use_cache=False)
    tokens = counted(batch, feature.settings.tokens)
    theirs = teacher.answer(batch, feature).teacher_states
    assert theirs is not None
    feature(feature.joined(passed, tokens), theirs, tokens.row_tokens).backward()
    return gradients(student)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_projections_and_the_student_up_to_the_compared_layer_and_no_teacher(
    build_tiny_model: Any, kind: str
) -> None:
    model = build_tiny_model(num_hidden_layers=3, tie_word_embeddings=False)
    teacher = build_tiny_model(seed=1, **WIDE)
    student, online = with_loss(model, teacher, kind, layers={2: 3})
    found = alone(student, online, make_micro_batch(ROWS))
    reached = {name for name, one in found.items() if one.abs().max() > 0}
    block = "model.model.layers"
    expected = {name for name, _ in student.named_parameters() if name.startswith(f"{block}.0.")}
    expected.add("model.model.embed_tokens.weight")
    if kind == "relations":  # of block 2 itself, so only what lies before its attention
        expected |= {f"{block}.1.self_attn.{one}_proj.weight" for one in "qkv"}
        expected.add(f"{block}.1.input_layernorm.weight")
    else:
        expected |= {name for name, _ in student.named_parameters() if name.startswith(f"{block}.1.")}
    if kind.startswith("hidden"):
        expected.add("feature.projections.2.weight")
    assert reached == expected
    assert all(one.grad is None and not one.requires_grad for one in teacher.parameters())


# --- equivalences


def as_whole(batches: list[MicroBatch]) -> list[MicroBatch]:
    return batches


@pytest.mark.parametrize("tokens", ["supervised", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_padding_packing_and_order_change_nothing(
    build_tiny_model: Any, kind: str, tokens: str
) -> None:
    model, teacher = build_tiny_model().double(), build_tiny_model(seed=1, **WIDE).double()
    student, online = with_loss(model, teacher, kind, tokens=tokens)
    loss, expected = step(student, online, [make_micro_batch(ROWS)])
    splits = {
        "row by row": [make_micro_batch([row]) for row in ROWS],
        "backwards": [make_micro_batch(ROWS[3:][::-1]), make_micro_batch(ROWS[:3][::-1])],
        "packed": [make_micro_batch(ROWS[:5], packed=True), make_micro_batch(ROWS[5:], packed=True)],
    }
    for batches in splits.values():
        other, found = step(student, online, batches)
        assert other == pytest.approx(loss, rel=1e-7)
        assert_same(found, expected, 1e-4)  # norms round to fp32
    if kind in ("cka", "relations"):  # taken over a whole micro-batch they would depend on it
        merged = [dataclasses.replace(batch, lengths=(sum(batch.lengths),)) for batch in splits["packed"]]
        assert step(student, online, merged)[0] != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", ["supervised", "all"])
def test_a_prefix_that_is_run_once_changes_nothing(
    build_tiny_model: Any, kind: str, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, teacher = build_tiny_model().double(), build_tiny_model(seed=1, **WIDE).double()
    student, online = with_loss(model, teacher, kind, tokens=tokens)
    batch = make_micro_batch(ROWS_OF_A_PREFIX)
    assert batch.shared_prefix == PREFIX
    passes: list[int] = []
    model.model.register_forward_hook(lambda module, given, output: passes.append(1))
    loss, found = step(student, online, [batch])
    assert len(passes) == 2
    monkeypatch.setattr("potstill.scoring.can_share_prefix", lambda model: False)
    expected_loss, expected = step(student, online, [batch])
    assert len(passes) == 3
    assert loss == pytest.approx(expected_loss, rel=1e-7)
    assert_same(found, expected, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_that_are_recomputed_change_nothing(build_tiny_model: Any, kind: str) -> None:
    found = {}
    for recomputed in (False, True):
        model, teacher = build_tiny_model().double(), build_tiny_model(seed=1, **WIDE).double()
        student, online = with_loss(model.train(), teacher, kind)
        runs: list[int] = []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *given, runs=runs: runs.append(1))
        if recomputed:
            student.activation_checkpointing_enable()
        found[recomputed] = step(student, online, [make_micro_batch(ROWS)])
        assert len(runs) == 1 + recomputed
    assert found[True][0] == found[False][0]
    assert_same(found[True][1], found[False][1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_learns_from_features_what_all_weights_would(build_tiny_model: Any, kind: str) -> None:
    """An adapter of zeros changes no state; its gradient is that of the weight times its other half."""
    teacher = build_tiny_model(seed=1, **WIDE).double()
    plain, online = with_loss(build_tiny_model().double(), teacher, kind)
    expected_loss, of_weights = step(plain, online, [make_micro_batch(ROWS)])
    model = add_adapter(build_tiny_model(), LoraSettings(rank=4, alpha=4.0), seed=3).double()
    adapted, online = with_loss(model, teacher, kind)
    loss, found = step(adapted, online, [make_micro_batch(ROWS)])
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    layer = "model.layers.0.self_attn.v_proj"
    half = model.get_parameter(f"base_model.model.{layer}.lora_A.default.weight")
    wanted = of_weights[f"model.{layer}.weight"] @ half.T
    torch.testing.assert_close(found[f"model.base_model.model.{layer}.lora_B.default.weight"], wanted)


def trained(
    build: Any, folder: Path, kind: str, *, max_tokens: int, packing: bool = False
) -> tuple[dict[str, Tensor], list[float]]:
    model = build().double()
    arguments = DistillationArguments(
        output_dir=str(folder),
        use_cpu=True,
        packing=packing,
        autocast=False,
        max_tokens=max_tokens,
        batch=4,
        num_train_epochs=3,
        learning_rate=1e-2,
        feature={"kind": kind, "tokens": "all", "weight": 5.0},
    )
    student = LoadedModel(model, VOCABULARY_OF_IDS, "student")
    teacher = build(seed=1, **WIDE).double()
    data = TrainingData(in_rows(), in_rows(ROWS[:3]))
    trainer = DistillationTrainer(student, arguments, data, teacher=teacher)
    before = trainer.evaluate()
    trainer.train()
    evaluated = trainer.evaluate()
    assert evaluated["eval_feature"] < before["eval_feature"]
    logged = [entry["feature"] for entry in trainer.state.log_history if "feature" in entry]
    assert len(logged) == 6
    return trainer._trained(), [*logged, evaluated["eval_feature"], evaluated["eval_loss"]]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_trainings_in_one_micro_batch_in_many_and_in_packs_end_alike(
    build_tiny_model: Any, tmp_path: Path, kind: str
) -> None:
    weights, figures = trained(build_tiny_model, tmp_path, kind, max_tokens=10_000)
    for fields in ({"max_tokens": 1}, {"max_tokens": 40, "packing": True}):
        other, found = trained(build_tiny_model, tmp_path, kind, **fields)
        assert found == pytest.approx(figures, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-4)


def test_what_a_silent_row_has_counts_among_all_tokens_and_among_supervised_ones_not() -> None:
    silent = Rendered([5, 6, 7], [0, 0, 0])
    batch = make_micro_batch([silent, ROWS[0]])
    assert counted(batch, "all").row_tokens == [3, len(ROWS[0].ids)]
    assert counted(batch, "supervised").row_tokens == [0, ROWS[0].supervised_tokens]
    packed = make_micro_batch([silent, ROWS[0]], packed=True)
    assert counted(packed, "all").row_tokens == [3, len(ROWS[0].ids)]
    assert counted(packed, "supervised").row_tokens == [0, ROWS[0].supervised_tokens]


@pytest.mark.parametrize("tokens", ["supervised", "all"])
def test_a_rank_without_rows_counts_nothing(tokens: str) -> None:
    for packed in (False, True):
        made = MicroBatches(in_rows(), None, 100, packed, rank=1, ranks=2)([3])
        assert [counted(batch, tokens).row_tokens for batch in made.batches] == [[0]]
