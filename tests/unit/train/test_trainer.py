import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from potstill.core.errors import TrainingError
from potstill.data.chat import Rendered
from potstill.models import LoadedModel
from potstill.train.arguments import DistillationArguments
from potstill.train.online import OnlineTeacher
from potstill.train.rows import Rows, TrainingData
from potstill.train.trackers import check_trackers
from potstill.train.trainer import DistillationTrainer, learning_rate_factor


def rows(count: int = 6, *, first_token: int = 20) -> Rows:
    made = Rows()
    for number in range(count):
        ids = [first_token + number, *range(40, 44 + number)]
        made.append(Rendered(ids, [0, 0] + [1] * (len(ids) - 2)), f"record-{number}")
    return made


def with_vocabulary(model: Any, size: int = 300) -> LoadedModel:
    """A model and as much of a tokenizer as training on rendered rows needs."""
    return LoadedModel(model, SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(size)}), "tiny")


def trainer(model: Any, folder: Path, training_rows: Rows, **fields: Any) -> DistillationTrainer:
    arguments = DistillationArguments(
        output_dir=str(folder), use_cpu=True, **{"batch": 4, "max_tokens": 16, **fields}
    )
    return DistillationTrainer(with_vocabulary(model), arguments, TrainingData(training_rows))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_no_step_is_lost_to_a_learning_rate_of_zero(schedule: Any) -> None:
    factors = [learning_rate_factor(step, 20, 4, schedule) for step in range(20)]
    assert min(factors) > 0
    assert max(factors) == 1


def test_the_learning_rate_rises_then_falls_by_the_schedule() -> None:
    linear = [learning_rate_factor(step, 10, 2, "linear") for step in range(10)]
    assert linear[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1]
    assert linear[6] == pytest.approx(0.5)
    assert learning_rate_factor(6, 10, 2, "cosine") == pytest.approx(0.5)
    assert learning_rate_factor(9, 10, 2, "cosine") < linear[9]
    assert [learning_rate_factor(step, 10, 2, "constant") for step in range(2, 10)] == [1] * 8


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_ends_at_the_share_that_is_stated(schedule: Any) -> None:
    factors = [learning_rate_factor(step, 1000, 100, schedule, 0.2) for step in range(1000)]
    plain = [learning_rate_factor(step, 1000, 100, schedule) for step in range(1000)]
    assert factors[:100] == plain[:100], "the rise is not touched"
    assert factors[-1] == pytest.approx(0.2, abs=1e-3)
    assert factors[100:] == pytest.approx([0.2 + 0.8 * one for one in plain[100:]])


def test_rows_come_back_as_they_were_added() -> None:
    packed = rows(3)
    assert len(packed) == 3
    assert [*packed.lengths] == [5, 6, 7]
    assert packed[1] == Rendered([21, 40, 41, 42, 43, 44], [0, 0, 1, 1, 1, 1])
    assert [*map(packed.id, range(3))] == ["record-0", "record-1", "record-2"]


def test_a_step_is_split_into_micro_batches_that_hold_each_row_once(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    made = trainer(build_tiny_model(), tmp_path, rows()).micro_batches(rows())([5, 0, 3]).batches
    assert len(made) > 1
    assert sorted(row_id for batch in made for row_id in batch.row_ids) == [
        "record-0",
        "record-3",
        "record-5",
    ]
    assert all(batch.input_ids_BT.numel() <= 16 for batch in made)
    assert sum(batch.supervised for batch in made) == 3 + 6 + 8


def test_the_order_of_an_epoch_depends_on_the_seed_and_the_epoch_alone(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    model, some = build_tiny_model(), rows(40)
    first, second = (trainer(model, tmp_path, some, order_seed=3).get_train_dataloader() for _ in range(2))

    def order(loader: Any, epoch: int) -> list[str]:
        loader.set_epoch(epoch)
        return [row_id for step in loader for batch in step.batches for row_id in batch.row_ids]

    assert order(first, 0) == order(second, 0)
    assert order(first, 1) == order(second, 1) != order(first, 0)
    assert sorted(order(first, 1)) == sorted(map(some.id, range(len(some))))
    assert order(trainer(model, tmp_path, some, order_seed=4).get_train_dataloader(), 0) != order(first, 0)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_rows(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    model = build_tiny_model("qwen2")
    with torch.no_grad():
        model.get_input_embeddings().weight[22] = math.nan  # only record-2 holds this token
    watched = trainer(model, tmp_path, rows(), max_tokens=1)
    with pytest.raises(TrainingError, match=r"step 1 \(records record-2\): the loss is nan"):
        watched.train()


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(
    build_tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda self, model: torch.tensor(math.inf))
    model = build_tiny_model()
    before = {name: one.clone() for name, one in model.named_parameters()}
    with pytest.raises(TrainingError, match=r"step 1 .*gradient norm is inf"):
        trainer(model, tmp_path, rows()).train()
    assert all(torch.equal(before[name], one) for name, one in model.named_parameters())


def test_a_step_moves_the_weights_no_further_than_the_norm_that_gradients_are_clipped_to(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    """By SGD at a rate of 1 a step is the clipped gradient itself."""

    def moved(max_grad_norm: float) -> float:
        model = build_tiny_model()
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        plain = {"optim": "sgd", "learning_rate": 1.0, "schedule": "constant", "autocast": False}
        trainer(
            model, tmp_path, rows(), max_steps=1, warmup_steps=0, max_grad_norm=max_grad_norm, **plain
        ).train()
        squares = [(one.detach() - before[name]).square().sum() for name, one in model.named_parameters()]
        return math.sqrt(sum(map(float, squares)))

    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)
    assert moved(1e9) > 0.05, "without a bound the step is longer"


def test_a_step_without_a_supervised_token_is_refused(build_tiny_model: Any, tmp_path: Path) -> None:
    empty = Rows()
    empty.append(Rendered([5, 6, 7], [0, 0, 0]), "nothing-to-learn")
    with pytest.raises(TrainingError, match="records nothing-to-learn"):
        trainer(build_tiny_model(), tmp_path, empty).train()


def test_tensors_that_never_received_a_gradient_are_named(build_tiny_model: Any, tmp_path: Path) -> None:
    model = build_tiny_model()
    model.model.register_parameter("stray", torch.nn.Parameter(torch.zeros(2)))
    made = trainer(model, tmp_path, rows(), num_train_epochs=1)
    made.train()
    assert made.untouched() == ["model.model.stray"]


def test_a_small_update_does_not_vanish_under_bf16_autocast_and_is_what_float64_says(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    def moved(model: Any, *, autocast: bool) -> torch.Tensor:
        weight = model.model.layers[0].mlp.up_proj.weight
        before = weight.detach().clone()
        made = trainer(model, tmp_path, rows(), learning_rate=1e-6, num_train_epochs=4, autocast=autocast)
        assert made.student.bf16 is autocast
        made.train()
        rounded = weight.to(torch.bfloat16) != before.to(torch.bfloat16)
        assert rounded.float().mean() < 0.1  # bf16 weights would have lost it
        return (weight.detach().double() - before.double()).flatten()

    exact = moved(build_tiny_model().double(), autocast=False)
    found = moved(build_tiny_model(), autocast=True)
    assert (found != 0).float().mean() > 0.9
    assert found.norm().item() == pytest.approx(exact.norm().item(), rel=0.1)
    assert torch.cosine_similarity(found, exact, dim=0) > 0.95


@pytest.mark.parametrize("autocast", [True, False])
def test_whether_rows_can_be_packed_is_found_out_as_the_student_will_run(
    build_tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> None:
    seen: list[tuple[bool, bool]] = []

    def probe(model: Any) -> bool:
        seen.append((model is student, torch.is_autocast_enabled("cpu")))
        return True

    monkeypatch.setattr("potstill.train.trainer.isolates_packed_rows", probe)
    student = build_tiny_model()
    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True, packing=True, autocast=autocast)
    teacher = OnlineTeacher(build_tiny_model(seed=1), with_vocabulary(student))
    DistillationTrainer(with_vocabulary(student), arguments, TrainingData(rows()), teacher=teacher)
    assert seen == [(True, autocast), (False, False)]


def test_a_teacher_on_another_device_than_the_students_is_refused(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    student = build_tiny_model()
    teacher = OnlineTeacher(build_tiny_model(seed=1).to("meta"), with_vocabulary(student))
    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TrainingError, match="the teacher is on meta, and this training is on cpu"):
        DistillationTrainer(with_vocabulary(student), arguments, TrainingData(rows()), teacher=teacher)


# --- parameter groups


def test_each_group_moves_at_its_own_rate_and_a_frozen_one_not_at_all(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    model = build_tiny_model()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    groups = [
        {"match": r"layers\.0\.mlp", "lr_multiplier": 0.1},
        {"match": "self_attn", "lr_multiplier": 0.0},
    ]
    made = trainer(
        model, tmp_path, rows(4), groups=groups, learning_rate=1e-3, max_steps=1, schedule="constant"
    )
    made.train()
    # Adam's first step is the rate itself, whatever the gradient's size.
    moved = {name: (one - before[name]).abs().max().item() for name, one in model.named_parameters()}
    assert moved["model.layers.0.mlp.up_proj.weight"] == pytest.approx(1e-4, rel=1e-2)
    assert moved["model.layers.1.mlp.up_proj.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["model.layers.1.self_attn.q_proj.weight"] == 0
    assert made.untouched() == []


def test_the_schedule_multiplies_each_groups_rate(build_tiny_model: Any, tmp_path: Path) -> None:
    made = trainer(
        build_tiny_model(),
        tmp_path,
        rows(4),
        groups=[{"match": "mlp", "lr_multiplier": 0.1}],
        learning_rate=1e-3,
    )
    made.create_optimizer_and_scheduler(10)
    rates: list[set[float]] = []
    for _ in range(3):
        rates.append({round(group["lr"], 9) for group in made.optimizer.param_groups})
        made.optimizer.step()
        made.lr_scheduler.step()
    for step, found in enumerate(rates):
        factor = learning_rate_factor(step, 10, 0, "cosine")
        assert found == {round(1e-3 * factor, 9), round(1e-4 * factor, 9)}


def test_an_optimiser_that_divides_the_weights_itself_is_refused_with_groups(
    build_tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(build_tiny_model(), tmp_path, rows(4), groups=[{"match": "mlp", "lr_multiplier": 0.1}])
    monkeypatch.setattr(
        Trainer, "get_optimizer_cls_and_kwargs", lambda self, args, model: (torch.optim.SGD, {"params": []})
    )
    with pytest.raises(TrainingError, match="divides the weights by itself"):
        made.create_optimizer()


def test_trained_weights_in_half_precision_are_refused(build_tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="small updates round to nothing"):
        trainer(build_tiny_model().to(torch.bfloat16), tmp_path, rows(4))


def test_frozen_weights_in_float16_are_refused_where_nothing_multiplies_in_bfloat16(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    model = build_tiny_model()
    model.get_input_embeddings().to(torch.float16).requires_grad_(requires_grad=False)
    with pytest.raises(TrainingError, match="frozen in float16, where small gradients"):
        trainer(model, tmp_path, rows(4), autocast=False)


def test_a_student_in_shards_is_refused(
    build_tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match="fsdp would divide the student's weights"):
        trainer(build_tiny_model(), tmp_path, rows(4), fsdp=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match="ACCELERATE_USE_FSDP would divide"):
        trainer(build_tiny_model(), tmp_path, rows(4))


def test_a_step_is_logged_with_its_parts_its_speed_and_its_share_of_the_peak(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    made = trainer(build_tiny_model(), tmp_path, rows(4), max_steps=1)
    made.train()
    logged = made.state.log_history[0]
    assert {"loss", "cross_entropy", "grad_norm", "learning_rate"} <= logged.keys()
    assert logged["tokens"] == sum(rows(4).lengths)
    assert logged["tokens_per_s"] > 0
    assert 0 < logged["mfu"] < 1


def test_a_tracker_that_is_not_installed_is_told_with_the_extra(
    build_tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.train.trackers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"report_to: wandb is not installed[\s\S]*potstill\[trackers\]"):
        trainer(build_tiny_model(), tmp_path, rows(4), report_to=["wandb"])


def test_trackers_that_are_not_ours_are_left_to_transformers() -> None:
    check_trackers(["azure_ml", "flyte"])
