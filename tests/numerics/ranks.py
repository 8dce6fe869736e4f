"""Trainings for one process and, where torchrun starts this module, for several; what they log and learn.

Seven rows in batches of three: an epoch's last step has one row, and of two ranks one has none then. Each
training of several is done twice, with the whole student in each process (DDP) and with a part (FSDP2).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from potstill.core.errors import TrainingError
from potstill.logits.logit_cache import LogitCache
from potstill.losses.types import Dense
from potstill.models import LoadedModel, TransformersModel, load, output_head
from potstill.train.agreement import check_agreement
from potstill.train.arguments import DistillationArguments
from potstill.train.loader import OptimiserStep
from potstill.train.lora import add_adapter
from potstill.train.online import OnlineTeacher
from potstill.train.rows import CachedTeacher, Rows, TrainingData
from potstill.train.settings import LoraSettings
from potstill.train.sharding import whole
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


class Summed(DistillationTrainer):
    """Broken on purpose: parts get the sum over the ranks where the loss is made for their mean."""

    def _prepare_for_training(self, *given: Any) -> Any:
        prepared = super()._prepare_for_training(*given)
        for one in self.student.modules():
            if isinstance(one, FSDPModule):
                one.set_gradient_divide_factor(1.0)
        return prepared


class HeadOfNoRank(DistillationTrainer):
    """Broken on purpose: what the head, here the embedding too, gets of the loss is reduced on no rank."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        def without_weights(*given: Any) -> Any:
            head = output_head(*given)
            head.parameters = []
            return head

        with mock.patch("potstill.train.student.output_head", without_weights):
            return super().training_step(model, inputs, num_items_in_batch)


def accelerate_divides() -> Any:
    """While open, accelerate does on CPUs what it does on GPUs alone: it divides where it is asked to."""
    plain = AcceleratorState.__init__

    def make(self: Any, *given: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        plain(self, *given, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    return mock.patch.object(AcceleratorState, "__init__", make)


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
    "response": Case(arguments={"save_strategy": "steps", "save_steps": SAVED_STEP}),
    "packed": Case(arguments={"packing": True}),
    "cached": Case(teacher="topk", arguments=_DISTILLED),
    "drawn": Case(teacher="sampled", arguments={"alpha": 0.3}),
    "online": Case(teacher="model", arguments={**_DISTILLED, "kl_reduction": "batchmean"}),
    "states": Case(
        teacher="wide",
        arguments={
            **_DISTILLED,
            "feature": {
                "kind": "hidden_mse",
                "embeddings": True,
                "tokens": "all",
                "projection_lr_multiplier": 0.5,
            },
        },
    ),
    "relations": Case(
        student="adapter", teacher="wide", arguments={**_DISTILLED, "feature": {"kind": "relations"}}
    ),
    "cka": Case(teacher="wide", arguments={**_DISTILLED, "packing": True, "feature": {"kind": "cka"}}),
    "adapter": Case(student="adapter", arguments={"save_strategy": "steps", "save_steps": SAVED_STEP}),
    "near its base": Case(student="adapter", arguments={"base_kl": 0.5}),
    "near its start": Case(arguments={"base_kl": 0.5}),
    "untied": Case(student="untied", arguments={"groups": [{"match": "embed_tokens", "lr_multiplier": 0}]}),
    "recomputed": Case(arguments={"activation_checkpointing": True}),
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
STRATEGIES = ("ddp", "fsdp2")
BY_ACCELERATE = ("response", "cached", "online", "adapter", "near its start")
ON_GPUS = {"ddp": ("nf4",), "fsdp2": BY_ACCELERATE}
UNDIVIDED = frozenset({"nf4"})  # what cannot be
# Trained on from the checkpoint of the case of that name.
RESUMED = {"adapter": Case(student="adapter"), "response": Case()}
FAULTY = Case(teacher="nan", arguments={"alpha": 1.0})
BROKEN = {
    "ddp": {"unsynchronised": Case(trainer=Unsynchronised), "counted by rank": Case(trainer=CountedByRank)},
    "fsdp2": {
        "counted by rank": Case(trainer=CountedByRank),
        "summed": Case(trainer=Summed),
        "head of no rank": Case(trainer=HeadOfNoRank),
    },
}


def checkpoint_of(case: str, folder: Path) -> Path:
    """Where a case's training leaves its checkpoint."""
    return folder / f"output-{case}" / f"checkpoint-{SAVED_STEP}"


def cases_of(strategy: str) -> dict[str, Case]:
    """The cases that are trained with a strategy."""
    return {name: case for name, case in CASES.items() if strategy == "ddp" or name not in UNDIVIDED}


def _student(kind: str, folder: Path, device: torch.device) -> LoadedModel:
    if kind == "nf4":
        base = TransformersModel(path=str(folder / "base"), quantize="nf4", device=str(device))
        model = load(base, dtype=torch.float32).model
        return LoadedModel(add_adapter(model, LoraSettings(rank=4), seed=3), VOCABULARY_OF_IDS, kind)
    model = _build({"mixture": "mixtral", "untied": "qwen2"}.get(kind, "llama"))
    if kind == "mixture":
        model.set_experts_implementation("eager")  # transformers' grouped products know no float64
    if kind == "adapter":
        model = add_adapter(model, LoraSettings(rank=4), seed=3)
    return LoadedModel(model.double().to(device), VOCABULARY_OF_IDS, kind)


def _teacher(case: Case, folder: Path, student: LoadedModel) -> Any:
    if case.teacher is None:
        return None
    if case.teacher == "model":
        return OnlineTeacher(_build(seed=1).double().to(student.model.device), student)
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


def train(
    case: Case, name: str, folder: Path, checkpoint: Path | None = None, *, on_gpu: bool = False
) -> dict[str, Any]:
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
        output_dir=str(folder / f"output-{name}"),
        use_cpu=not on_gpu,
        autocast=False,
        **{**usual, **case.arguments},
    )
    student = _student(case.student, folder, arguments.device)
    data = TrainingData(_rows(range(7)), _rows([7, 0, 1][: case.held_out]))
    trainer = case.trainer(student, arguments, data, teacher=_teacher(case, folder, student))
    failure = None
    with mock.patch("potstill.train.trainer.save_file", wraps=save_file) as saving:
        try:
            trainer.train(None if checkpoint is None else str(checkpoint))
        except TrainingError as error:
            failure = str(error)
    parameters = [*trainer.student.parameters()]
    held = sum(one.to_local().numel() if isinstance(one, DTensor) else one.numel() for one in parameters)
    trained = {
        name: whole(one.detach()) for name, one in trainer.student.named_parameters() if one.requires_grad
    }
    save_file(
        {name: one.contiguous() for name, one in trained.items()},
        folder / f"{name}-{arguments.process_index}-of-{arguments.world_size}.safetensors",
    )
    return {
        "log": trainer.state.log_history,
        "written": saving.call_count,
        "failure": failure,
        "held": held / sum(one.numel() for one in parameters),
    }


def _on_gpus(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for strategy, names in ON_GPUS.items():
        found[strategy] = {}
        for name in names:
            case = CASES[name]
            asked = replace(case, arguments={**case.arguments, "strategy": strategy})
            found[strategy][name] = train(asked, name, folder / strategy, on_gpu=True)
    return found


def _on_cpus(folder: Path, of_one: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for strategy in STRATEGIES:
        found[strategy], place = {}, folder / strategy
        runs: dict[str, tuple[Case, Path | None]] = {
            name: (case, None) for name, case in {**cases_of(strategy), **BROKEN[strategy]}.items()
        }
        for name, case in RESUMED.items():
            runs[f"{name} from one"] = case, checkpoint_of(name, of_one)
            runs[f"{name} from two"] = case, checkpoint_of(name, place)
        runs["faulty"] = FAULTY, None
        for name, (case, checkpoint) in runs.items():
            asked = replace(case, arguments={**case.arguments, "strategy": strategy})
            found[strategy][name] = train(asked, name, place, checkpoint)
    for name, case in RESUMED.items():
        of_parts, given = f"{name} from parts", checkpoint_of(name, folder / "fsdp2")
        found["ddp"][of_parts] = train(case, of_parts, folder / "ddp", given)
    found["disagreements"] = _disagreements(folder)
    with accelerate_divides():
        place, found["accelerate"] = folder / "accelerate", {}
        # What the arguments ask of it by themselves on a GPU.
        config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
        dividing = {"strategy": "fsdp2", "fsdp": True, "fsdp_config": config}
        for name in BY_ACCELERATE:
            case = replace(CASES[name], arguments={**CASES[name].arguments, **dividing})
            found["accelerate"][name] = train(case, name, place)
        case = replace(RESUMED["response"], arguments=dividing)
        given = checkpoint_of("response", place)
        found["accelerate"]["response from two"] = train(case, "response from two", place, given)
    return found


def _disagreements(folder: Path) -> dict[str, dict[str, Any]]:
    """What each process is told where the second one holds something else."""
    is_second, found = torch.distributed.get_rank() == 1, {}
    for what in ("nothing", "order of rows", "weights", "one weight", "cache", "checkpoint"):
        arguments = DistillationArguments(
            output_dir=str(folder / what), use_cpu=True, autocast=False, max_steps=1, batch=3
        )
        student, numbers = _student("all", folder, arguments.device), [*range(7)]
        if is_second and what == "order of rows":
            numbers[2:4] = 3, 2
        if is_second and what == "weights":
            with torch.no_grad():
                student.model.get_input_embeddings().weight.mul_(1.001)
        if is_second and what == "one weight":
            with torch.no_grad():
                student.model.get_input_embeddings().weight[5, 3] += 1.0
        cache = folder / "ddp" / ("other" if is_second else "topk")
        teacher = CachedTeacher([LogitCache.open(cache)], 1.0) if what == "cache" else None
        failure = None
        try:
            data = TrainingData(_rows(numbers), _rows([7]))
            DistillationTrainer(student, arguments, data, teacher=teacher)
            check_agreement(
                {"checkpoints to go on from": what + " of 1" * (is_second and what == "checkpoint")}
            )
        except TrainingError as error:
            failure = str(error)
        found[what] = {"failure": failure}
    return found


def _main(folder: str, of_one: str | None = None) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    found = _on_gpus(place) if of_one is None else _on_cpus(place, Path(of_one))
    rank = torch.distributed.get_rank()
    (place / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
