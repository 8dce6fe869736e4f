"""Trainings for one process and, where torchrun starts this module, for several; what they log and learn.

Seven rows in batches of three: an epoch's last step has one row, and of two ranks one has none then.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from potstill.core.errors import TrainingError
from potstill.logits.shards import LogitCache
from potstill.losses.types import Dense
from potstill.models import LoadedModel, TransformersModel, load
from potstill.train.arguments import DistillationArguments
from potstill.train.loader import OptimiserStep
from potstill.train.lora import add_adapter
from potstill.train.online import OnlineTeacher
from potstill.train.rows import CachedTeacher, Rows, TrainingData
from potstill.train.settings import LoraSettings
from potstill.train.trainer import DistillationTrainer

from ..conftest import _build
from .test_training_invariance import ROWS, TEMPERATURE, VOCABULARY, VOCABULARY_OF_IDS

STEPS, SAVED_STEP, FAULTY_ROW = 21, 8, "r5"


class Unsynchronised(DistillationTrainer):
    """Broken on purpose: it calls the module inside DDP's wrapper."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        return super().training_step(self.student, inputs, num_items_in_batch)


class CountedByRank(DistillationTrainer):
    """Broken on purpose: it divides by the tokens of its own rows."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        groups = self.micro_batches(self.rows).split(inputs.numbers, self.args.process_index)
        own = tuple(number for group in groups for number in group)
        return super().training_step(model, OptimiserStep(own or inputs.numbers, inputs.batches))


@dataclass(frozen=True)
class Case:
    """One training: its student (all weights, an adapter, one on NF4, a mixture), teacher, arguments."""

    student: str = "all"
    teacher: str | None = None
    held_out: int = 3
    trainer: type[DistillationTrainer] = DistillationTrainer
    arguments: dict[str, Any] = field(default_factory=dict)


_DISTILLED = {"alpha": 0.3, "temperature": TEMPERATURE}
CASES = {
    "response": Case(),
    "packed": Case(arguments={"packing": True}),
    "cached": Case(teacher="topk", arguments=_DISTILLED),
    "drawn": Case(teacher="sampled", arguments={"alpha": 0.3}),
    "online": Case(teacher="model", arguments={**_DISTILLED, "kl_reduction": "batchmean"}),
    "states": Case(
        teacher="wide",
        arguments={
            **_DISTILLED,
            "feature": {"kind": "hidden_mse", "embeddings": True, "tokens": "all", "projection_lr": 0.5},
        },
    ),
    "relations": Case(
        student="adapter", teacher="wide", arguments={**_DISTILLED, "feature": {"kind": "relations"}}
    ),
    "cka": Case(teacher="wide", arguments={**_DISTILLED, "packing": True, "feature": {"kind": "cka"}}),
    "adapter": Case(student="adapter", arguments={"save_strategy": "steps", "save_steps": SAVED_STEP}),
    "near its base": Case(student="adapter", arguments={"base_kl": 0.5}),
    "nf4": Case(student="nf4"),
    "mixture": Case(student="mixture", arguments={"router_aux_loss_coef": 0.1}),
    "stopped": Case(
        held_out=1,
        arguments={
            "early_stopping": {"patience": 1},
            "eval_strategy": "no",
            "learning_rate": 0.1,
            "schedule": "constant",
        },
    ),
}
RESUMED = Case(student="adapter")
FAULTY = Case(teacher="nan", arguments={"alpha": 1.0})
BROKEN = {"unsynchronised": Case(trainer=Unsynchronised), "counted by rank": Case(trainer=CountedByRank)}


def _student(kind: str, folder: Path) -> LoadedModel:
    if kind == "nf4":
        base = TransformersModel(path=str(folder / "base"), quantize="nf4", device="cpu")
        model = load(base, dtype=torch.float32).model
        return LoadedModel(add_adapter(model, LoraSettings(rank=4), seed=3), VOCABULARY_OF_IDS, kind)
    model = _build("mixtral" if kind == "mixture" else "llama")
    if kind == "mixture":
        model.set_experts_implementation("eager")  # transformers' grouped products know no float64
    if kind == "adapter":
        model = add_adapter(model, LoraSettings(rank=4), seed=3)
    return LoadedModel(model.double(), VOCABULARY_OF_IDS, kind)


def _teacher(case: Case, folder: Path, student: LoadedModel) -> Any:
    if case.teacher is None:
        return None
    if case.teacher == "model":
        return OnlineTeacher(_build(seed=1).double(), student)
    if case.teacher == "wide":
        return OnlineTeacher(_build(seed=1, hidden_size=48, num_hidden_layers=4).double(), student)
    if case.teacher == "nan":
        return _without_distribution
    return CachedTeacher([LogitCache.open(folder / case.teacher)], case.arguments.get("temperature", 1.0))


def _rows(numbers: Sequence[int]) -> Rows:
    made = Rows()
    for number in numbers:
        made.append(ROWS[number], f"r{number}", source=number)
    return made


def _without_distribution(rows: Rows, numbers: Sequence[int]) -> Dense:
    """A teacher whose logits for one row are NaN."""
    values = [float("nan") if rows.id(number) == FAULTY_ROW else 0.0 for number in numbers]
    parts = [
        torch.full((rows.supervised(number), VOCABULARY), value, dtype=torch.float64)
        for number, value in zip(numbers, values, strict=True)
    ]
    return Dense(torch.cat(parts))


def train(case: Case, name: str, folder: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """What training logs, how many files of weights this process writes, and the error that ends it.

    `folder` has the caches; it gets the output, and the trained weights of each process.
    """
    usual = {
        "batch": 3,
        "max_tokens": 20,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "eval_strategy": "epoch",
    }
    arguments = DistillationArguments(
        output_dir=str(folder / f"output-{name}"), use_cpu=True, autocast=False, **{**usual, **case.arguments}
    )
    student = _student(case.student, folder)
    data = TrainingData(_rows(range(7)), _rows([7, 0, 1][: case.held_out]))
    trainer = case.trainer(student, arguments, data, teacher=_teacher(case, folder, student))
    failure = None
    with mock.patch("potstill.train.trainer.save_file", wraps=save_file) as saving:
        try:
            trainer.train(None if checkpoint is None else str(checkpoint))
        except TrainingError as error:
            failure = str(error)
    trained = {name: one.detach() for name, one in trainer.student.named_parameters() if one.requires_grad}
    save_file(
        {name: one.contiguous() for name, one in trained.items()},
        folder / f"{name}-{arguments.process_index}-of-{arguments.world_size}.safetensors",
    )
    return {"log": trainer.state.log_history, "written": saving.call_count, "failure": failure}


def _main(folder: Path, checkpoint: Path) -> None:
    torch.set_num_threads(1)
    found = {name: train(case, name, folder) for name, case in {**CASES, **BROKEN}.items()}
    found["resumed"] = train(RESUMED, "resumed", folder, checkpoint)
    found["faulty"] = train(FAULTY, "faulty", folder)
    rank = torch.distributed.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:]))
