import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from potstill.core.errors import TrainingError
from potstill.data.chat import Rendered
from potstill.train.rows import Rows
from potstill.train.student import StudentWithLoss
from potstill.train.trainer import DistillationArguments, DistillationTrainer, learning_rate_factor


def rows(count: int = 6, *, first_token: int = 20) -> Rows:
    made = Rows()
    for number in range(count):
        ids = [first_token + number, *range(40, 44 + number)]
        made.append(Rendered(ids, [0, 0] + [1] * (len(ids) - 2)), f"record-{number}")
    return made


def trainer(model: Any, folder: Path, training_rows: Rows, **fields: Any) -> DistillationTrainer:
    arguments = DistillationArguments(
        output_dir=str(folder), use_cpu=True, **{"batch": 4, "max_tokens": 16, **fields}
    )
    return DistillationTrainer(StudentWithLoss(model.train(), 300), arguments, training_rows, Rows())


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


def test_rows_come_back_as_they_were_added() -> None:
    packed = rows(3)
    assert len(packed) == 3
    assert packed.lengths == [5, 6, 7]
    assert packed[1] == Rendered([21, 40, 41, 42, 43, 44], [0, 0, 1, 1, 1, 1])
    assert packed.ids == ["record-0", "record-1", "record-2"]


def test_a_step_is_split_into_micro_batches_that_hold_each_row_once(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    made = trainer(build_tiny_model(), tmp_path, rows()).micro_batches(rows(), [5, 0, 3])
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
        return [row_id for step in loader for batch in step for row_id in batch.row_ids]

    assert order(first, 0) == order(second, 0)
    assert order(first, 1) == order(second, 1) != order(first, 0)
    assert sorted(order(first, 1)) == sorted(some.ids)
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


def test_a_small_update_of_a_weight_does_not_vanish_under_bf16_autocast(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    model = build_tiny_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    made = trainer(model, tmp_path, rows(), learning_rate=1e-6, num_train_epochs=1)
    made.student.bf16 = True
    made.train()
    assert weight.dtype == torch.float32
    rounded, rounded_before = weight.to(torch.bfloat16), before.to(torch.bfloat16)
    assert (weight != before).float().mean() > 0.9
    assert (rounded != rounded_before).float().mean() < 0.1  # bf16 weights would have lost it
