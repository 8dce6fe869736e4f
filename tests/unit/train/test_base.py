"""The divergence from the base: what it is measured against, and what it does to a training."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from potstill.core.errors import TrainingError
from potstill.data.chat import Rendered
from potstill.models import LoadedModel
from potstill.train.arguments import DistillationArguments
from potstill.train.base import Base
from potstill.train.lora import add_adapter
from potstill.train.rows import Rows, TrainingData
from potstill.train.settings import LoraSettings
from potstill.train.student import make_micro_batch
from potstill.train.trainer import DistillationTrainer

V = 300
VOCABULARY = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(V)})
ROWS = [Rendered([20 + number, *range(40, 46 + number)], [0, 0] + [1] * (5 + number)) for number in range(6)]


def rows() -> Rows:
    made = Rows()
    for number, row in enumerate(ROWS):
        made.append(row, f"record-{number}")
    return made


def adapted(model: Any, *, moved: bool = False, **fields: Any) -> Any:
    """A model with an adapter, which changes nothing yet unless it is moved."""
    model = add_adapter(model, LoraSettings(rank=4, **fields), seed=3)
    for name, one in model.named_parameters():
        if moved and "lora_B" in name:
            torch.nn.init.normal_(one, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def trainer(model: Any, folder: Path, **fields: Any) -> DistillationTrainer:
    arguments = DistillationArguments(
        output_dir=str(folder),
        use_cpu=True,
        **{"batch": 3, "autocast": False, "learning_rate": 1e-2, "num_train_epochs": 4, **fields},
    )
    student = LoadedModel(model, VOCABULARY, "tiny")
    return DistillationTrainer(student, arguments, TrainingData(rows()))


def logits_of(model: Any, row: Rendered) -> torch.Tensor:
    """The logits that predict a row's supervised tokens, from one plain pass."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([row.ids]), use_cache=False).logits[0, :-1, :V]
    return logits_TV[torch.tensor(row.mask[1:], dtype=torch.bool)]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
@pytest.mark.parametrize("target", ["all-linear", ["lm_head"]])
def test_the_base_is_the_model_without_its_adapter_and_without_dropout(
    build_tiny_model: Any, family: str, target: Any
) -> None:
    if family != "llama" and target != "all-linear":
        pytest.skip("one family shows it")
    options = {"dropout": 0.5} if family == "opt" else {"tie_word_embeddings": False}
    plain = build_tiny_model(family, **options)
    model = adapted(copy.deepcopy(plain), moved=True, target=target, dropout=0.5).train()
    signal = Base(model, V, 0.1).signal(make_micro_batch(ROWS))
    expected = torch.cat([logits_of(plain, row) for row in ROWS])
    torch.testing.assert_close(signal.rows(slice(0, len(expected))).logits_NV, expected)
    model.eval()
    assert not torch.allclose(torch.cat([logits_of(model, row) for row in ROWS]), expected)


def test_afterwards_the_adapter_is_on_and_what_is_frozen_stays_so(build_tiny_model: Any) -> None:
    model = adapted(build_tiny_model(), moved=True).train()
    frozen = next(one for name, one in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    before = {name: one.requires_grad for name, one in model.named_parameters()}
    expected = logits_of(model, ROWS[0])
    base = Base(model, V, 0.1)
    base.signal(make_micro_batch(ROWS)).rows(slice(0, 2))
    assert torch.equal(logits_of(model, ROWS[0]), expected)
    assert {name: one.requires_grad for name, one in model.named_parameters()} == before
    assert not frozen.requires_grad
    assert model.training


def test_an_adapters_base_is_the_students_own_model_and_no_copy(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    made = trainer(adapted(build_tiny_model()), tmp_path, base_kl=0.1)
    assert made.base is not None
    assert made.base.model is made.student.model
    full = trainer(build_tiny_model(), tmp_path, base_kl=0.1)
    assert full.base is not None
    assert full.base.model is not full.student.model


def test_it_is_zero_before_the_first_step_and_smaller_the_more_it_weighs(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    apart = {}
    for weight in (0.01, 10.0):
        made = trainer(adapted(build_tiny_model().double()), tmp_path, base_kl=weight)
        made.train()
        found = [entry["base_kl"] for entry in made.state.log_history if "base_kl" in entry]
        assert found[0] == 0.0
        assert min(found[1:]) > 0
        apart[weight] = found[-1]
        entry = made.state.log_history[-2]
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + weight * entry["base_kl"])
    assert apart[10.0] < 0.1 * apart[0.01]


def test_a_weight_of_zero_trains_as_without_it(build_tiny_model: Any, tmp_path: Path) -> None:
    weights = []
    for fields in ({}, {"base_kl": 0.0}):
        made = trainer(adapted(build_tiny_model(), dropout=0.1), tmp_path, **fields)
        made.train()
        assert not any("base_kl" in entry for entry in made.state.log_history)
        weights.append(made._trained())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_adapter_that_is_trained_on_is_compared_with_the_original_base(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    plain = build_tiny_model().double()
    model = adapted(copy.deepcopy(plain), moved=True)  # what a first stage has left
    made = trainer(model.double(), tmp_path, base_kl=0.1, batch=len(ROWS), max_steps=1)
    expected = []
    for row in ROWS:
        log_q_NV, log_b_NV = (logits_of(one, row).log_softmax(-1) for one in (model, plain))
        expected.append(functional.kl_div(log_b_NV, log_q_NV, log_target=True, reduction="none").sum(-1))
    made.train()
    assert made.state.log_history[0]["base_kl"] == pytest.approx(torch.cat(expected).mean().item(), rel=1e-6)
    assert torch.cat(expected).mean() > 0.01


def test_full_weights_are_compared_with_a_frozen_copy_of_what_they_were(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    model = build_tiny_model(tie_word_embeddings=True).double()
    plain = copy.deepcopy(model)
    made = trainer(model, tmp_path, base_kl=0.1, batch=len(ROWS), max_steps=3)
    made.train()
    found = [entry["base_kl"] for entry in made.state.log_history if "base_kl" in entry]
    assert found[0] == 0.0
    assert min(found[1:]) > 0
    assert not any(name.startswith("base") for name, _ in made.student.named_parameters())
    assert made.base is not None
    for (name, one), (_, other) in zip(
        made.base.model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), f"{name} was trained"
        assert not one.requires_grad
    expected = torch.cat([logits_of(plain, row) for row in ROWS])
    signal = made.base.signal(make_micro_batch(ROWS))
    torch.testing.assert_close(signal.rows(slice(0, len(expected))).logits_NV, expected)


def test_a_base_that_is_given_is_what_the_student_is_compared_with(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    other = build_tiny_model(seed=1).double()
    expected = []
    for row in ROWS:
        log_q_NV, log_b_NV = (
            logits_of(one, row).log_softmax(-1) for one in (build_tiny_model().double(), other)
        )
        expected.append(functional.kl_div(log_b_NV, log_q_NV, log_target=True, reduction="none").sum(-1))
    arguments = DistillationArguments(
        output_dir=str(tmp_path), use_cpu=True, batch=len(ROWS), autocast=False, base_kl=0.1, max_steps=1
    )
    student = LoadedModel(build_tiny_model().double(), VOCABULARY, "tiny")
    made = DistillationTrainer(student, arguments, TrainingData(rows()), base=other)
    made.train()
    assert made.state.log_history[0]["base_kl"] == pytest.approx(torch.cat(expected).mean().item(), rel=1e-6)


def test_a_base_that_the_adapter_was_put_on_is_the_student_without_it(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    base = build_tiny_model().double()
    student = LoadedModel(adapted(base, moved=True).double(), VOCABULARY, "tiny")
    arguments = DistillationArguments(
        output_dir=str(tmp_path), use_cpu=True, batch=len(ROWS), autocast=False, base_kl=0.1, max_steps=1
    )
    made = DistillationTrainer(student, arguments, TrainingData(rows()), base=base)
    made.train()
    assert made.state.log_history[0]["base_kl"] > 0.01
    assert made.untouched() == []


def test_cached_logits_are_no_base(build_tiny_model: Any, tmp_path: Path) -> None:
    (tmp_path / "logits").mkdir()
    (tmp_path / "logits" / "cache.json").write_text("{}", encoding="utf-8")
    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True, batch=2, base_kl=0.1)
    student = LoadedModel(build_tiny_model(), VOCABULARY, "tiny")
    with pytest.raises(TrainingError, match=r"base is a folder without a model(.|\n)*alpha with that cache"):
        DistillationTrainer(student, arguments, TrainingData(rows()), base=str(tmp_path / "logits"))
