"""Which layers are compared, what the projections are, where they end up, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from potstill.core.errors import ModelError, TrainingError
from potstill.models import LoadedModel, TransformersModel, load
from potstill.train import features
from potstill.train.features import PROJECTIONS_FILE, FeatureLoss, layer_map
from potstill.train.online import OnlineTeacher
from potstill.train.settings import FeatureSettings
from potstill.train.student import make_micro_batch
from potstill.train.trainer import DistillationTrainer

from .test_trainer import rows, with_vocabulary

WIDE: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 4, "head_dim": 12}


def settings(**fields: Any) -> FeatureSettings:
    return FeatureSettings.model_validate({"kind": "hidden_mse", **fields})


def trainer(model: Any, teacher: Any, folder: Path, feature: Any, **fields: Any) -> DistillationTrainer:
    from potstill.train.arguments import DistillationArguments
    from potstill.train.rows import TrainingData

    arguments = DistillationArguments(
        output_dir=str(folder), use_cpu=True, batch=6, feature=feature, **{"autocast": False, **fields}
    )
    return DistillationTrainer(with_vocabulary(model), arguments, TrainingData(rows()), teacher=teacher)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_student_is_looked_into_as_it_will_run(
    build_tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> None:
    """Flash attention, for one, runs a student in float32 under autocast only."""
    seen, probe = [], features._probe

    def probed(*given: Any, **named: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return probe(*given, **named)

    monkeypatch.setattr(features, "_probe", probed)
    model = build_tiny_model()
    teacher = OnlineTeacher(build_tiny_model(seed=1), with_vocabulary(model))
    trainer(model, teacher, tmp_path, {"kind": "hidden_mse"}, autocast=autocast)
    assert seen[0] is autocast


# --- layers


@pytest.mark.parametrize("relations", [False, True])
def test_only_the_layers_that_are_compared_are_kept(build_tiny_model: Any, *, relations: bool) -> None:
    model = build_tiny_model(num_hidden_layers=4)
    parts = ("query", "key", "value") if relations else ("state",)
    with features._listening(model, {2: None, 4: None}, relations=relations) as passed:
        model(torch.tensor([[5, 6, 7]]))
    assert passed.keys() == {(layer, part) for layer in (2, 4) for part in parts}
    assert {len(passes) for passes in passed.values()} == {1}


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        ("uniform", 3, 6, {1: 2, 2: 4, 3: 6}),
        ("uniform", 4, 6, {1: 2, 2: 3, 3: 5, 4: 6}),
        ("uniform", 4, 2, {1: 1, 2: 1, 3: 2, 4: 2}),
        ("uniform", 9, 2, {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 2, 8: 2, 9: 2}),
        ("last", 4, 7, {4: 7}),
        ("first_and_last", 4, 7, {1: 1, 4: 7}),
        ({2: 5}, 4, 7, {2: 5}),
    ],
)
def test_layers_are_paired(layers: Any, student: int, teacher: int, expected: dict[int, int]) -> None:
    assert layer_map(settings(layers=layers), student, teacher) == expected
    assert layer_map(settings(layers=layers, embeddings=True), student, teacher) == {0: 0, **expected}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({5: 1}, "student's layer 5, and its last is 4"),
        ({1: 9}, "teacher's layer 9, and its last is 7"),
    ],
)
def test_a_layer_that_a_model_does_not_have_is_named(layers: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        layer_map(settings(layers=layers), 4, 7)


# --- projections


def test_there_is_a_projection_where_widths_differ_and_it_begins_as_an_isometry(
    build_tiny_model: Any,
) -> None:
    model, teacher = build_tiny_model(), build_tiny_model(seed=1, **WIDE)
    feature = FeatureLoss(settings(embeddings=True), model, teacher, seed=1)
    assert list(feature.projections) == ["0", "1", "2"]
    for one in feature.projections.children():
        assert isinstance(one, torch.nn.Linear)
        assert one.bias is None
        assert one.weight.dtype == torch.float32
        torch.testing.assert_close(one.weight.T @ one.weight, torch.eye(32))
    again = FeatureLoss(settings(embeddings=True), model, teacher, seed=1)
    other = FeatureLoss(settings(embeddings=True), model, teacher, seed=2)
    mine, same, different = (one.projections.state_dict()["1.weight"] for one in (feature, again, other))
    assert torch.equal(mine, same)
    assert not torch.equal(mine, different)
    for kind in ("cka", "relations"):
        assert not FeatureLoss(settings(kind=kind), model, teacher, seed=1).projections
    assert not FeatureLoss(settings(), model, build_tiny_model(seed=1), seed=1).projections


def test_making_a_feature_loss_draws_no_random_numbers_and_leaves_the_models_modes(
    build_tiny_model: Any,
) -> None:
    model = build_tiny_model("opt", dropout=0.5).train()
    before = torch.get_rng_state()
    assert FeatureLoss(settings(), model, build_tiny_model(seed=1, **WIDE), seed=1).projections
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_projections_train_at_their_own_rate_and_are_saved_apart_from_the_student(
    build_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    moved = {}
    for rate in (1.0, 0.1):
        made = trainer(
            build_tiny_model(),
            build_tiny_model(seed=1, **WIDE),
            tmp_path,
            {"kind": "hidden_mse", "projection_lr_multiplier": rate},
            max_steps=1,
            schedule="constant",
            learning_rate=1e-3,
        )
        feature = made.student.feature
        assert feature is not None
        before = {name: one.clone() for name, one in feature.projections.state_dict().items()}
        made.train()
        after = feature.projections.state_dict()
        # Adam's first step is the rate itself.
        moved[rate] = max((after[name] - before[name]).abs().max().item() for name in before)
        assert made.untouched() == []
    assert moved == {1.0: pytest.approx(1e-3, rel=1e-2), 0.1: pytest.approx(1e-4, rel=1e-2)}

    made.loaded = LoadedModel(made.loaded.model, tiny_tokenizer, "tiny")
    made.save_model(str(tmp_path / "student"))
    saved = load_file(tmp_path / "student" / PROJECTIONS_FILE)
    assert saved.keys() == {"1.weight", "2.weight"}
    assert all(torch.equal(saved[name], after[name]) for name in saved)
    weights = load_file(tmp_path / "student" / "model.safetensors")
    assert not any("projection" in name for name in weights)
    assert [path.name for path in (tmp_path / "student").glob("*.safetensors")] == ["model.safetensors"]


def test_the_loss_is_blended_by_weight_and_logged_apart(build_tiny_model: Any, tmp_path: Path) -> None:
    made = trainer(
        build_tiny_model(),
        build_tiny_model(seed=1, **WIDE),
        tmp_path,
        {"kind": "hidden_cosine", "weight": 3.0},
        max_steps=2,
        alpha=0.25,
        temperature=2.0,
    )
    made.train()
    for entry in made.state.log_history[:2]:
        answers = 0.75 * entry["cross_entropy"] + 0.25 * 4 * entry["kl"]
        assert entry["feature"] > 0
        assert entry["loss"] == pytest.approx(answers + 3.0 * entry["feature"], rel=1e-5)


@pytest.mark.parametrize("teacher", [{"quantize": "nf4"}, {"dtype": "bfloat16"}], ids=["nf4", "bf16"])
def test_a_teacher_in_fewer_bits_has_states_near_its_own(
    build_tiny_model: Any, shared_model_folder: Path, teacher: dict[str, Any]
) -> None:
    full, small = (
        load(TransformersModel(path=str(shared_model_folder), device="cpu", **fields)).model
        for fields in ({"dtype": "float32"}, teacher)
    )
    for kind in ("hidden_mse", "relations"):
        feature = FeatureLoss(settings(kind=kind), build_tiny_model(), small, seed=1)
        batch = make_micro_batch([rows()[5]])
        theirs = [
            OnlineTeacher(one, with_vocabulary(build_tiny_model())).answer(batch, feature).teacher_states
            for one in (full, small)
        ]
        assert theirs[0] is not None
        assert theirs[1] is not None
        for key, state in theirs[0].items():
            apart = (theirs[1][key].float() - state).norm() / state.norm()
            assert 0 < apart < 0.6  # of two unrelated ones about 1.4


# --- what is refused


def test_relation_heads_divide_the_vectors_of_both_models(build_tiny_model: Any) -> None:
    model = build_tiny_model()  # queries of 32, keys and values of 16
    teacher = build_tiny_model(seed=1, **WIDE)  # queries of 48, keys and values of 24
    assert FeatureLoss(settings(kind="relations"), model, teacher, seed=1).heads == 4
    stated = settings(kind="relations", relation_heads=8)
    assert FeatureLoss(stated, model, teacher, seed=1).heads == 8
    with pytest.raises(TrainingError, match=r"relation_heads is 3.*16, 24, 32, 48[\s\S]*a divisor of 8"):
        FeatureLoss(settings(kind="relations", relation_heads=3), model, teacher, seed=1)


def test_relations_of_vectors_that_are_not_known_by_name_are_refused(build_tiny_model: Any) -> None:
    model = build_tiny_model()
    for block in model.model.layers:
        block.self_attn.projection = block.self_attn.q_proj
        del block.self_attn.q_proj
    with pytest.raises(ModelError, match="queries, keys and values of a llama model are not known"):
        FeatureLoss(settings(kind="relations"), model, build_tiny_model(), seed=1)


def test_a_student_frozen_up_to_the_compared_layer_is_refused(build_tiny_model: Any, tmp_path: Path) -> None:
    model = build_tiny_model(tie_word_embeddings=False)
    made = trainer(
        model,
        build_tiny_model(seed=1),
        tmp_path,
        {"kind": "cka", "layers": {1: 1}},
        groups=[{"match": r"embed_tokens|layers\.0\.", "lr_multiplier": 0}],
    )
    with pytest.raises(TrainingError, match="no compared state of the student's has a gradient"):
        made.train()


def test_relations_under_reentrant_recomputation_are_refused_and_not_silently_lost(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    made = trainer(
        build_tiny_model(),
        build_tiny_model(seed=1),
        tmp_path,
        {"kind": "relations"},
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(TrainingError, match="use_reentrant: false"):
        made.train()


def test_features_without_a_teacher_in_memory_are_refused(build_tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="inner states with the teacher's, and there is no teacher"):
        trainer(build_tiny_model(), None, tmp_path, {"kind": "cka"})


def test_an_optimiser_that_divides_the_weights_itself_knows_no_projection_lr(
    build_tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    made = trainer(
        build_tiny_model(),
        build_tiny_model(seed=1, **WIDE),
        tmp_path,
        {"kind": "hidden_mse", "projection_lr_multiplier": 0.1},
    )
    monkeypatch.setattr(
        Trainer, "get_optimizer_cls_and_kwargs", lambda self, args, model: (torch.optim.SGD, {"params": []})
    )
    with pytest.raises(TrainingError, match="divides the weights by itself"):
        made.create_optimizer()
