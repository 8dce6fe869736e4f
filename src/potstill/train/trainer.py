"""One trainer on transformers.Trainer, which keeps optimiser, schedule, checkpoints and logs.

Ours are the order of the data (a pure plan), the loop over the micro-batches of one optimiser step with one
count of supervised tokens, and the refusal of a loss that is not finite.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from potstill.core.errors import TrainingError
from potstill.data.batches import epoch_plan, micro_batches
from potstill.train import checkpoints
from potstill.train.rows import Rows, SignalSource
from potstill.train.student import MicroBatch, StudentWithLoss, make_micro_batch

__all__ = ["DistillationArguments", "DistillationTrainer", "Schedule", "learning_rate_factor"]

Schedule = Literal["cosine", "linear", "constant"]

_WEIGHTS_FILE = "trained.safetensors"
_ROWS_SHOWN = 8


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """What the learning rate is multiplied with at a step, counted from 0: a linear rise, then the schedule.

    Neither the first nor the last step is lost to a rate of zero.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "constant":
        return 1.0
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


class _EpochPlan(Sampler[list[int]]):
    """The row numbers of each optimiser step of one epoch."""

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is; transformers and accelerate call this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter(epoch_plan(self.lengths, self.batch, self.seed, self.epoch))

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch)


class _StepLoader(DataLoader[int]):
    """Yields the micro-batches of one optimiser step at a time."""

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is; transformers calls this."""
        plan = self.batch_sampler
        assert isinstance(plan, _EpochPlan)
        plan.set_epoch(epoch)


@dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments with what is ours, and with defaults that suit it: every step is logged.

    `batch` is sequences an optimiser step; `max_tokens` is padded tokens a micro-batch and changes nothing
    but speed and memory; `order_seed` decides the order of the rows, epoch by epoch.
    """

    batch: int = 16
    max_tokens: int = 2048
    order_seed: int = 0
    schedule: Schedule = "cosine"

    optim: OptimizerNames | str = "adamw_torch_fused"
    save_strategy: SaveStrategy | str = "no"
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False
    disable_tqdm: bool | None = True
    report_to: str | list[str] | None = "none"
    dataloader_pin_memory: bool = False

    def __post_init__(self) -> None:
        self.per_device_train_batch_size = self.batch
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # one process trains on one device


class DistillationTrainer(Trainer):
    """Trains a student on rows, against a teacher's signal where there is one.

    Held-out rows are evaluated whenever the control asks for it.
    """

    args: DistillationArguments
    optimizer: torch.optim.Optimizer
    control: TrainerControl

    def __init__(
        self,
        student: StudentWithLoss,
        arguments: DistillationArguments,
        rows: Rows,
        held_out: Rows,
        teacher: SignalSource | None = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(model=student, args=arguments, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.student, self.rows, self.held_out, self.teacher = student, rows, held_out, teacher
        self.plan = _EpochPlan(rows.lengths, arguments.batch, arguments.order_seed)
        self._figures: dict[str, float] = {}
        self._row_ids: list[str] = []

    def micro_batches(self, rows: Rows, numbers: list[int]) -> list[MicroBatch]:
        """Rows by number as micro-batches of at most `max_tokens`, with the teacher's signal."""
        chosen = {number: rows[number] for number in numbers}
        lengths = [len(row.ids) for row in chosen.values()]
        made = []
        for group in micro_batches(lengths, range(len(numbers)), self.args.max_tokens):
            members = [numbers[position] for position in group]
            signal = None if self.teacher is None else self.teacher(rows, members)
            row_ids = tuple(rows.ids[number] for number in members)
            made.append(make_micro_batch([chosen[number] for number in members], signal, row_ids))
        return made

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The steps of the plan; accelerate leaves them alone, because they are global already."""

        def collate(numbers: list[int]) -> list[MicroBatch]:
            return self.micro_batches(self.rows, numbers)

        numbers: Any = range(len(self.rows))
        return _StepLoader(numbers, batch_sampler=self.plan, collate_fn=collate)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of an optimiser step's micro-batches, with one count of supervised tokens."""
        model.train()
        supervised = sum(batch.supervised for batch in inputs)
        self._row_ids = [row_id for batch in inputs for row_id in batch.row_ids]
        if supervised == 0:
            raise TrainingError(
                "no supervised token: there is nothing to learn", where=self._where(self._row_ids)
            )
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for batch in inputs:
            loss, values = model(batch.to(self.student.device), supervised)
            self.accelerator.backward(loss)
            losses.append(loss.detach())
            for name, value in values.items():
                sums[name] = sums[name] + value if name in sums else value
        for batch, one in zip(inputs, torch.stack(losses).tolist(), strict=True):
            if not math.isfinite(one):
                raise TrainingError(
                    f"the loss is {one}",
                    where=self._where(batch.row_ids),
                    mend="lower lr, lengthen warmup_ratio, or look at these rows",
                )
        self._figures = {name: value.item() / supervised for name, value in sums.items() if name != "loss"}
        self._figures["tokens"] = sum(batch.tokens for batch in inputs)
        return torch.stack(losses).sum().to(self.args.device)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient norm is {float(norm)}",
                where=self._where(self._row_ids),
                mend="lower lr, lengthen warmup_ratio, or look at these rows",
            )
        return norm

    def _where(self, row_ids: list[str] | tuple[str, ...]) -> str:
        shown = ", ".join(row_ids[:_ROWS_SHOWN]) + (", ..." if len(row_ids) > _ROWS_SHOWN else "")
        return f"step {self.state.global_step + 1} (records {shown})"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step with the parts of its loss."""
        super().log({**logs, **self._figures} if "loss" in logs else logs)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """The loss on the held-out rows and its parts, as "eval_loss" and so on; logged."""
        self.student.eval()
        totals: dict[str, float] = {}
        supervised = 0
        with torch.no_grad():
            for group in micro_batches(
                self.held_out.lengths, range(len(self.held_out)), self.args.max_tokens
            ):
                for batch in self.micro_batches(self.held_out, group):
                    _, values = self.student(batch.to(self.student.device), 1)
                    supervised += batch.supervised
                    for name, value in values.items():
                        totals[name] = totals.get(name, 0.0) + value.item()
        metrics = {f"eval_{name}": total / supervised for name, total in totals.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of `learning_rate_factor`."""
        warmup_steps = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            return learning_rate_factor(step, num_training_steps, warmup_steps, self.args.schedule)

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def untouched(self) -> list[str]:
        """Names of trainable tensors that never received a gradient."""
        # The optimiser makes a state for a tensor at its first gradient, and checkpoints carry it.
        return [
            name
            for name, one in self.student.named_parameters()
            if one.requires_grad and one not in self.optimizer.state
        ]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with checkpoints.writing(Path(str(self.args.output_dir))):
            super()._save_checkpoint(model, trial)

    def _trained(self) -> dict[str, Tensor]:
        return {name: one.detach() for name, one in self.student.named_parameters() if one.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # A checkpoint holds what is trained, once: frozen weights are where they came from.
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: one.contiguous() for name, one in self._trained().items()}, folder / _WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved, trained = load_file(Path(resume_from_checkpoint) / _WEIGHTS_FILE), self._trained()
        if saved.keys() != trained.keys():
            raise TrainingError(
                "the checkpoint holds other weights than are trained now",
                where=resume_from_checkpoint,
                mend="run the step again with --force",
            )
        with torch.no_grad():
            for name, one in trained.items():
                one.copy_(saved[name])
