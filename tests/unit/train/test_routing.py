"""What routers do while a mixture of experts trains: counted, told, frozen, evened, the same if resumed."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import Interrupted, TrainingError
from potstill.models import TransformersModel, load
from potstill.train.arguments import DistillationArguments
from potstill.train.routing import Routing
from potstill.train.rows import TrainingData
from potstill.train.trainer import DistillationTrainer

from .test_step import cached, weights
from .test_trainer import rows, with_vocabulary

Training = Callable[..., Any]

ONLY_EXPERTS = [{"match": r"\.mlp\.experts\."}, {"match": ".", "lr_multiplier": 0}]
ONLY_ROUTERS = [{"match": r"\.mlp\.gate\."}, {"match": ".", "lr_multiplier": 0}]


@pytest.fixture
def mixture(build_tiny_model: Any, moe_family: str, tiny_tokenizer: Any, tmp_path: Path) -> TransformersModel:
    build_tiny_model(moe_family).save_pretrained(tmp_path / "mixture")
    tiny_tokenizer.save_pretrained(tmp_path / "mixture")
    return TransformersModel(path=str(tmp_path / "mixture"))


def trainer(model: Any, folder: Path, **fields: Any) -> DistillationTrainer:
    arguments = DistillationArguments(
        output_dir=str(folder), use_cpu=True, **{"batch": 4, "max_tokens": 16, "autocast": False, **fields}
    )
    held_out = rows(5, first_token=60)
    return DistillationTrainer(with_vocabulary(model), arguments, TrainingData(rows(), held_out))


# --- load


@pytest.mark.parametrize("packing", [False, True])
def test_every_real_token_of_held_out_rows_counts_once_a_choice(
    build_tiny_model: Any, moe_family: str, tmp_path: Path, packing: bool
) -> None:
    model = build_tiny_model(moe_family)
    made = trainer(model, tmp_path, packing=packing)
    assert any(len(set(batch.lengths)) > 1 for batch in made.micro_batches(made.held_out)(range(5)).batches)
    metrics = made.evaluate()
    expected = [Counter[int](), Counter[int]()]
    for number in range(5):  # row by row, without padding
        with torch.no_grad():
            logits = model(
                torch.tensor([made.held_out[number].ids]), output_router_logits=True, use_cache=False
            ).router_logits
        for counter, logits_NE in zip(expected, logits, strict=True):
            counter.update(logits_NE.topk(2).indices.flatten().tolist())
    counts = made.state.log_history[-1]["expert_counts"]
    assert list(counts) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    for found, counter in zip(counts.values(), expected, strict=True):
        assert found == [counter[expert] for expert in range(8)]
        assert sum(found) == 2 * sum(made.held_out.lengths)
    assert 0 < metrics["eval_expert_entropy"] < 1
    assert metrics["eval_dead_experts"] == sum(one.count(0) for one in counts.values())


def test_the_frozen_base_of_a_student_is_not_counted(build_tiny_model: Any, tmp_path: Path) -> None:
    plain, near = (trainer(build_tiny_model("mixtral"), tmp_path, base_kl=weight) for weight in (0.0, 0.5))
    for made in (plain, near):
        made.evaluate()
    assert near.state.log_history[-1]["expert_counts"] == plain.state.log_history[-1]["expert_counts"]


def test_a_dense_student_costs_no_hook_and_has_no_figures(build_tiny_model: Any, tmp_path: Path) -> None:
    model = build_tiny_model()
    made = trainer(model, tmp_path)
    hooked: list[str] = []
    for name, module in model.named_modules():
        monitored = module.register_forward_hook

        def register(*given: Any, name: str = name, monitored: Any = monitored, **named: Any) -> Any:
            hooked.append(name)
            return monitored(*given, **named)

        module.register_forward_hook = register
    metrics = made.evaluate()
    assert hooked == []
    assert not any("expert" in name for name in metrics)
    assert "expert_counts" not in made.state.log_history[-1]


def test_hooks_are_gone_after_an_evaluation_and_a_training_step(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    model = build_tiny_model("qwen3_moe")
    made = trainer(model, tmp_path, max_steps=1, router_aux_loss_coef=0.1)
    made.train()
    made.evaluate()
    assert all(not router._forward_hooks for router in made.student.routing.routers.values())


def test_the_load_before_and_after_is_told_and_kept(train: Training, mixture: TransformersModel) -> None:
    result, _, context = train(student=mixture, epochs=2, lr=2e-2)
    before, after = result.metrics["expert_load"]
    assert (before["step"], after["step"]) == (0, 6)
    assert before["counts"] != after["counts"]
    events = [event for event in context.reporter.events if event["event"] == "expert_load"]
    assert [event["optimiser_step"] for event in events] == [0, 3, 6]
    assert events[-1]["counts"] == after["counts"]
    assert any("2 routers to 2 of 8 experts" in line for line in context.reporter.said)
    assert any("dead experts, load entropy 0." in line for line in context.reporter.said)
    points = [point for point in result.metrics["history"] if "eval_loss" in point]
    assert all(0 < point["eval_expert_entropy"] < 1 for point in points)
    assert not any("expert_counts" in point for point in result.metrics["history"])
    assert result.metrics["untouched"] == []


def test_with_early_stopping_the_load_is_that_of_the_kept_weights(
    train: Training, mixture: TransformersModel
) -> None:
    result, _, _ = train(
        student=mixture, epochs=30, lr=3e-2, early_stopping={"patience": 2}, schedule="constant"
    )
    assert result.metrics["kept_step"] < result.counts["steps"]
    assert result.metrics["expert_load"][-1]["step"] == result.metrics["kept_step"]


# --- what is trained


@pytest.mark.parametrize(
    ("groups", "trained"), [(ONLY_EXPERTS, ".mlp.experts."), (ONLY_ROUTERS, ".mlp.gate.")]
)
def test_groups_train_what_they_name_and_nothing_else(
    train: Training,
    mixture: TransformersModel,
    step_context: Any,
    seal: Any,
    traces: Any,
    groups: Any,
    trained: str,
) -> None:
    """Logit distillation of experts or routers alone, from the uncompressed model through the cache."""
    cache = cached(step_context, seal, mixture, traces())
    before = load(mixture, dtype=torch.float32).model
    with torch.no_grad():  # stands for a compression: a student that is not its teacher
        for name, one in before.named_parameters():
            if ".mlp." in name:
                one.add_(0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1)))
    student = Path(mixture.path).parent / "damaged"
    before.save_pretrained(student)
    load(mixture).tokenizer.save_pretrained(student)
    result, folder, _ = train(
        "healed", student=TransformersModel(path=str(student)), data=cache, alpha=1.0, epochs=6, groups=groups
    )
    after = dict(load(TransformersModel(path=str(folder)), dtype=torch.float32).model.named_parameters())
    for name, one in before.named_parameters():
        assert torch.equal(after[name], one) is (trained not in name), name
    first, *_, last = [point["eval_kl"] for point in result.metrics["history"] if "eval_kl" in point]
    assert last < first
    table = result.metrics["parameter_groups"]
    assert result.counts["trained_parameters"] == table[0]["parameters"]
    assert table[1]["lr"] == 0


def test_interrupted_equals_uninterrupted(train: Training, mixture: TransformersModel) -> None:
    fields: dict[str, Any] = {"student": mixture, "epochs": 4, "router_aux_loss_coef": 0.05}
    expected, expected_folder, _ = train("whole", **fields)
    with pytest.raises(Interrupted):
        train("parted", stop_at=5, **fields)
    found, folder, context = train("parted", **fields)
    assert "goes on after step 5 of 12" in context.reporter.said
    assert weights(folder) == weights(expected_folder)
    assert found.metrics == expected.metrics
    assert found.metrics["expert_load"]


# --- auxiliary loss


def test_it_is_in_the_objective_where_it_is_stated_or_the_models_configuration_asks_for_it(
    build_tiny_model: Any, moe_family: str
) -> None:
    model = build_tiny_model(moe_family, router_aux_loss_coef=0.02)
    assert Routing(model).weight == 0
    assert "is not in the objective" in Routing(model).as_text()
    assert Routing(model, 0.3).weight == 0.3
    assert "0.3 times their auxiliary loss is in the objective" in Routing(model, 0.3).as_text()
    model.config.output_router_logits = True
    assert Routing(model).weight == 0.02
    assert Routing(model, 0.0).weight == 0
    dense = build_tiny_model()
    dense.config.output_router_logits, dense.config.router_aux_loss_coef = True, 0.02
    assert Routing(dense).weight == 0


def test_it_is_blended_into_the_loss_and_logged_apart(build_tiny_model: Any, tmp_path: Path) -> None:
    made = trainer(build_tiny_model("olmoe"), tmp_path, max_steps=2, router_aux_loss_coef=0.5)
    made.train()
    for entry in made.state.log_history[:2]:
        assert entry["router_aux"] > 2  # of even choices it is the number of experts a token
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 0.5 * entry["router_aux"], rel=1e-5)
    metrics = made.evaluate()
    assert metrics["eval_loss"] == pytest.approx(
        metrics["eval_cross_entropy"] + 0.5 * metrics["eval_router_aux"], rel=1e-5
    )


def test_it_evens_the_load(build_tiny_model: Any, tmp_path: Path) -> None:
    entropies = {}
    for weight in (0.0, 3.0):
        made = trainer(
            build_tiny_model("mixtral"),
            tmp_path,
            router_aux_loss_coef=weight,
            num_train_epochs=30,
            learning_rate=1e-2,
            max_grad_norm=100.0,
        )
        made.train()
        entropies[weight] = made.evaluate()["eval_expert_entropy"]
    assert entropies[3.0] > entropies[0.0] + 0.02


def test_it_is_refused_for_a_dense_model(build_tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"router_aux_loss_coef is 0\.1, and a llama model has no known"):
        trainer(build_tiny_model(), tmp_path, router_aux_loss_coef=0.1)
    assert trainer(build_tiny_model(), tmp_path, router_aux_loss_coef=0.0).student.routing.routers == {}


def test_without_a_gradient_it_is_refused_and_not_silently_lost(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    frozen = [{"match": "lm_head"}, {"match": ".", "lr_multiplier": 0}]
    made = trainer(build_tiny_model("qwen3_moe"), tmp_path, groups=frozen, router_aux_loss_coef=0.1)
    with pytest.raises(TrainingError, match=r"nothing to train[\s\S]*router_aux_loss_coef: 0"):
        made.train()
