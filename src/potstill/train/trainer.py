"""One trainer on transformers.Trainer, which keeps optimiser, schedule, checkpoints and logs.

Ours are the order of the data (a pure plan), the loop over the micro-batches of one optimiser step with one
count of supervised tokens, and the refusal of a loss that is not finite.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from potstill.core.errors import TrainingError
from potstill.data.batches import epoch_plan, micro_batches, packs
from potstill.losses.divergences import check_divergence
from potstill.losses.types import Live
from potstill.models import isolates_packed_rows, supports_bf16
from potstill.train import checkpoints, cpu
from potstill.train.early_stopping import EarlyStopping
from potstill.train.groups import ParameterGroups
from potstill.train.inputs import (
    DataInput,
    Examples,
    ModelInput,
    TeacherInput,
    resolve_inputs,
    resolve_student,
)
from potstill.train.online import OnlineTeacher
from potstill.train.rows import CachedTeacher, Rows, SignalSource
from potstill.train.saving import save_student
from potstill.train.settings import HONOURED, OWNED, Divergence, EarlyStoppingSettings, TrainSettings
from potstill.train.student import MicroBatch, StudentWithLoss, make_micro_batch
from potstill.train.throughput import StepCost, peak_flops_per_s
from potstill.train.trackers import check_trackers

__all__ = ["DistillationArguments", "DistillationTrainer", "Schedule", "learning_rate_factor"]

Schedule = Literal["cosine", "linear", "constant"]

_WEIGHTS_FILE = "trained.safetensors"
_ROWS_SHOWN = 8
# What get_optimizer_cls_and_kwargs gives for optimisers that group the weights themselves.
_OWN_GROUPS = frozenset({"params", "model", "optimizer_dict"})


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


def _check_loss(arguments: "DistillationArguments", teacher: object) -> None:
    """Refuse a loss that the teacher's signal cannot give, before anything is trained."""
    if teacher is None:
        asked = f"alpha is {arguments.alpha:g}" if arguments.alpha else None
        if arguments.divergence != "forward_kl":
            asked = f"divergence is {arguments.divergence}"
        if asked is not None:
            raise TrainingError(
                f"{asked}, but there is no teacher: the data are responses alone",
                expected="cached logits as data, a teacher, or alpha: 0 and no divergence",
                mend="add a cache step and name it as data, or name a teacher",
            )
    elif isinstance(teacher, OnlineTeacher | CachedTeacher):
        kind = Live if isinstance(teacher, OnlineTeacher) else teacher.signal_type
        check_divergence(arguments.divergence, kind, renormalise=arguments.renormalise)


def _default_alpha(teacher: object) -> float:
    return 0.0 if teacher is None else 0.5


def _check_one_process(processes: int) -> None:
    """Refuse to be one of several processes: each would train on all rows, and none would be the faster."""
    if processes > 1:
        raise TrainingError(
            f"there are {processes} processes, and training takes one",
            mend="start potstill itself, without torchrun or accelerate launch",
        )


def _check_precision(model: nn.Module, *, autocast: bool) -> None:
    """Refuse types that lose updates or gradients.

    In half precision a small update of a trained weight rounds to nothing; in float16, which only autocast
    leaves, a head's gradient of one token among thousands does.
    """
    for name, one in model.named_parameters():
        if one.dtype == torch.float16 and not autocast:
            raise TrainingError(
                f"{name} is frozen in float16, where small gradients round to nothing"
                if not one.requires_grad
                else f"{name} is to be trained in float16",
                expected="float32, or bfloat16 where the device multiplies in it",
                mend="load the model with dtype: float32, or leave dtype out",
            )
        if one.requires_grad and one.dtype in (torch.bfloat16, torch.float16):
            raise TrainingError(
                f"{name} is to be trained in {str(one.dtype).removeprefix('torch.')}",
                expected="trained weights in float32: in half precision small updates round to nothing",
                mend="load the model with dtype=torch.float32, or give its path instead",
            )


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


@dataclass
class _MicroBatches:
    """Makes a step's micro-batches of row numbers, in whatever process: it knows neither model nor device."""

    rows: Rows
    teacher: SignalSource | None
    max_tokens: int
    packed: bool

    def __call__(self, numbers: Sequence[int]) -> list[MicroBatch]:
        return list(self.one_by_one(numbers))

    def one_by_one(self, numbers: Sequence[int]) -> Iterator[MicroBatch]:
        """The micro-batches of any number of rows, each made when it is its turn."""
        lengths = [self.rows.length(number) for number in numbers]
        split = packs if self.packed else micro_batches
        for group in split(lengths, range(len(numbers)), self.max_tokens):
            members = [numbers[position] for position in group]
            yield make_micro_batch(
                [self.rows[number] for number in members],
                None if self.teacher is None else self.teacher(self.rows, members),
                tuple(self.rows.ids[number] for number in members),
                packed=self.packed,
            )


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
    but speed and memory, nor does `packing` (rows one behind the other in place of padding; by default on a
    GPU with flash attention); `order_seed` decides the order of the rows, epoch by epoch. `alpha` weighs the
    teacher's distribution, by default 0.5 where there is a teacher; `divergence`, `beta`, `skew`,
    `renormalise` and `kl_reduction` are those of a recipe. `groups` are mappings with `match`, `lr`
    and `weight_decay`, `early_stopping` is a mapping with `patience`, `min_delta` and `every`, as in a
    recipe; it evaluates every so many steps, by default an epoch, unless `eval_strategy` says when.
    `autocast` multiplies in bfloat16, by default where the device does so itself. `max_length` cuts rows
    off; by default the student's context does.

    TrainingError for a value that a recipe would refuse, and for a field of transformers that one of ours
    stands for (`gradient_accumulation_steps`, say).
    """

    batch: int = 16
    max_tokens: int = 2048
    packing: bool | None = None
    order_seed: int = 0
    schedule: Schedule = "cosine"
    alpha: float | None = None
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    renormalise: bool = False
    kl_reduction: Literal["token", "batchmean"] = "token"
    groups: list[dict[str, Any]] = field(default_factory=list)
    early_stopping: dict[str, Any] | None = None
    autocast: bool | None = None
    max_length: int | None = None

    optim: OptimizerNames | str = "adamw_torch_fused"
    save_strategy: SaveStrategy | str = "no"
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False
    disable_tqdm: bool | None = True
    report_to: str | list[str] | None = "none"
    dataloader_pin_memory: bool = False

    def __post_init__(self) -> None:
        self.settings()
        self._refuse_overtaken()
        self.per_device_train_batch_size = self.batch
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # one process trains on one device

    def settings(self) -> TrainSettings:
        """Our fields as a recipe's settings, whose constraints they have. Raises TrainingError."""
        theirs = {one.name for one in fields(TrainingArguments)}
        ours = {one.name for one in fields(self)} & TrainSettings.model_fields.keys() - theirs
        given = {name: getattr(self, name) for name in ours}
        try:
            return TrainSettings.model_validate(
                {"do": "train", "student": "student", "data": "rows", **given}
            )
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, and it is {fault['input']!r}"
                for fault in error.errors()
            ]
            raise TrainingError("; ".join(faults), expected="what a recipe's train step takes") from error

    def _refuse_overtaken(self) -> None:
        # What this class makes of two defaults, for arguments that are made from others.
        made = {"per_device_train_batch_size": self.batch, "include_num_input_tokens_seen": "no"}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in OWNED.keys() - HONOURED and value not in (one.default, made.get(one.name)):
                raise TrainingError(
                    f"{one.name}={value!r} would not do what it says",
                    expected=f"its default: it is decided by {OWNED[one.name]}",
                    mend="leave it out",
                )


class DistillationTrainer(Trainer):
    """Trains a student on rows, against a teacher's signal where there is one; usable without a recipe.

    The student is a model of transformers or PEFT with `tokenizer`, or a path or hub id. Data are examples
    ({"prompt", "response"}, {"messages"}, or any other shape that data files may have), or a folder of cached
    logits, which is a training set by itself. The teacher is a model, a path or hub id, or a folder with
    cached logits of the examples; without one the student learns from the responses alone. Held-out examples
    are evaluated whenever the arguments or the control ask for it. The path of a data file serves for
    examples.

    ```python
    from potstill import DistillationArguments, DistillationTrainer

    arguments = DistillationArguments(
        num_train_epochs=3,
        learning_rate=3e-4,
        alpha=0.5,
        temperature=2.0,
        groups=[{"match": "embed_tokens", "lr": 0.1}],
    )
    trainer = DistillationTrainer(
        "smollm2-135m-instruct",
        arguments,
        [{"prompt": "What is 2 + 3?", "response": "2 + 3 = 5"}],
        teacher="HuggingFaceTB/SmolLM2-360M-Instruct",
    )
    trainer.train()
    trainer.save_model("student")
    ```
    """

    args: DistillationArguments
    optimizer: torch.optim.Optimizer
    control: TrainerControl

    def __init__(
        self,
        student: ModelInput,
        arguments: DistillationArguments,
        data: DataInput,
        *,
        held_out: Examples | str | Path | None = None,
        teacher: TeacherInput = None,
        tokenizer: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        settings = arguments.settings()
        _check_one_process(arguments.world_size)
        check_trackers(arguments.report_to or [])
        if arguments.device.type == "cpu":
            cpu.tune_memory()
        self.loaded = resolve_student(student, tokenizer, arguments.device)
        model = self.loaded.model
        found, self.teacher = resolve_inputs(
            self.loaded,
            data,
            held_out,
            teacher,
            temperature=arguments.temperature,
            max_length=arguments.max_length,
        )
        self.rows, self.held_out = found.train, found.held_out
        _check_loss(arguments, self.teacher)
        if settings.early_stopping is not None and not len(self.held_out):
            raise TrainingError(
                "early_stopping watches the loss of held-out rows, and there are none",
                mend="give the data a held-out share, or leave early_stopping out",
            )
        self.groups = ParameterGroups(model, settings.groups, arguments.learning_rate, arguments.weight_decay)
        bf16 = supports_bf16(arguments.device) if arguments.autocast is None else arguments.autocast
        _check_precision(model, autocast=bf16)
        if model.device.type == "cpu":
            longest = max([*self.rows.lengths, *self.held_out.lengths])
            cpu.choose_attention(model, arguments.max_tokens if arguments.packing else longest)
        self.packs = self._packs(arguments.packing, bf16=bf16)
        self.student = StudentWithLoss(
            model,
            self.loaded.vocabulary_size,
            alpha=_default_alpha(self.teacher) if arguments.alpha is None else arguments.alpha,
            temperature=arguments.temperature,
            divergence=arguments.divergence,
            beta=arguments.beta,
            skew=arguments.skew,
            renormalise=arguments.renormalise,
            bf16=bf16,
        )
        self.plan = _EpochPlan(self.rows.lengths, arguments.batch, arguments.order_seed)
        self._cost = StepCost(model)
        self._figures: dict[str, float] = {}
        self._row_ids: list[str] = []
        self._step = (0.0, 0.0)  # when it started, and its model FLOPs
        super().__init__(
            model=self.student,
            args=arguments,
            # Trainer only asks whether there is one.
            eval_dataset=self.held_out if len(self.held_out) else None,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.early_stopping = self._early_stopping(settings.early_stopping)

    def _packs(self, wanted: bool | None, *, bf16: bool) -> bool:
        models = [self.loaded.model]
        if isinstance(self.teacher, OnlineTeacher):
            models.append(self.teacher.model)

        def isolates(model: Any) -> bool:
            # As it will run: flash attention takes no float32, and a teacher has no autocast.
            enabled = bf16 and model is self.loaded.model
            with torch.autocast(model.device.type, torch.bfloat16, enabled=enabled):
                return isolates_packed_rows(model)

        # transformers has no public name for the attention that a model uses.
        attention = [str(model.config.get_text_config()._attn_implementation) for model in models]  # noqa: SLF001
        if wanted is None:
            # Elsewhere a mask over the whole pack costs more than padding.
            fast = all(name.startswith("flash") for name in attention)
            wanted = fast and all(model.device.type == "cuda" and isolates(model) for model in models)
        elif wanted:
            for model, name in zip(models, attention, strict=True):
                if not isolates(model):
                    raise TrainingError(
                        f"packing: in a {model.config.model_type} model with {name} attention packed rows "
                        "see one another",
                        expected="a model whose attention ends where the position ids begin again",
                        mend="leave packing out: rows of similar length share a micro-batch then",
                    )
        return wanted

    def _early_stopping(self, settings: EarlyStoppingSettings | None) -> EarlyStopping | None:
        if settings is None:
            return None
        if settings.every is None and self.args.eval_strategy == IntervalStrategy.NO:
            settings = settings.model_copy(update={"every": len(self.plan)})
        made = EarlyStopping(settings, self._write_trained, self._read_trained)
        # Behind all others: it removes weights once a checkpoint is whole.
        self.add_callback(made)
        return made

    def micro_batches(self, rows: Rows, numbers: Sequence[int]) -> list[MicroBatch]:
        """Rows by number as micro-batches of at most `max_tokens`, with what is stored of the teacher."""
        return self._micro_batches(rows)(numbers)

    def _micro_batches(self, rows: Rows) -> _MicroBatches:
        stored = None if isinstance(self.teacher, OnlineTeacher) else self.teacher
        return _MicroBatches(rows, stored, self.args.max_tokens, self.packs)

    def _on_device(self, batch: MicroBatch) -> MicroBatch:
        batch = batch.to(self.student.device)
        if isinstance(self.teacher, OnlineTeacher):
            return replace(batch, teacher=self.teacher.signal(batch))
        return batch

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The steps of the plan; accelerate leaves them alone, because they are global already."""
        numbers: Any = range(len(self.rows))
        return _StepLoader(
            numbers,
            batch_sampler=self.plan,
            collate_fn=self._micro_batches(self.rows),
            num_workers=self.args.dataloader_num_workers,
        )

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of an optimiser step's micro-batches, with one count of supervised tokens."""
        model.train()
        started = time.perf_counter()
        supervised = sum(batch.supervised for batch in inputs)
        self._row_ids = [row_id for batch in inputs for row_id in batch.row_ids]
        if supervised == 0:
            raise TrainingError(
                "no supervised token: there is nothing to learn", where=self._where(self._row_ids)
            )
        scale = self._divergence_scale(supervised, len(self._row_ids))
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for batch in inputs:
            loss, values = model(self._on_device(batch), supervised, scale)
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
        lengths = [length for batch in inputs for length in batch.lengths]
        self._step = (started, self._cost.flops(lengths, supervised))
        return torch.stack(losses).sum().to(self.args.device)

    def _divergence_scale(self, supervised: int, sequences: int) -> float:
        return 1.0 if self.args.kl_reduction == "token" else supervised / sequences

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
        """Log a step with the parts of its loss, tokens a second, and the share of the peak FLOPs ("mfu")."""
        if "loss" in logs:
            started, flops = self._step
            seconds = time.perf_counter() - started
            dtype = torch.bfloat16 if self.student.bf16 else self.student.model.dtype
            peak = peak_flops_per_s(self.student.device, dtype)
            speed = {"tokens_per_s": self._figures["tokens"] / seconds, "mfu": flops / seconds / peak}
            logs = {**logs, **self._figures, **speed}
        super().log(logs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on the held-out rows and its parts, as "eval_loss" and so on; logged.

        The arguments are those of transformers' trainer, which leaves them at their defaults. Raises
        TrainingError for other rows or another prefix, and where no rows are held out.
        """
        if eval_dataset is not None or metric_key_prefix != "eval":
            raise TrainingError(
                "evaluate was given other rows or another prefix",
                expected="no arguments: it evaluates the held-out rows that the trainer was made with",
                mend="make a trainer with these rows as held_out",
            )
        if not len(self.held_out):
            raise TrainingError("there are no held-out rows to evaluate", mend="give the trainer held_out")
        self.student.eval()
        totals: dict[str, float] = {}
        supervised = 0
        scale = self._divergence_scale(self.held_out.supervised_tokens, len(self.held_out))
        with torch.no_grad():
            for batch in self._micro_batches(self.held_out).one_by_one(range(len(self.held_out))):
                _, values = self.student(self._on_device(batch), 1, scale)
                supervised += batch.supervised
                for name, value in values.items():
                    totals[name] = totals.get(name, 0.0) + value.item()
        metrics = {f"eval_{name}": total / supervised for name, total in totals.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser over our parameter groups, frozen weights left out."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            # What "params" holds here is taken in place of Trainer's own groups.
            if not is_optimizer_factory(kind) and not _OWN_GROUPS & options.keys():
                self.optimizer_cls_and_kwargs = (kind, {**options, "params": self.groups.for_optimiser()})
            elif self.args.groups:
                raise TrainingError(
                    f"the optimiser {self.args.optim} divides the weights by itself, and groups are given",
                    mend="choose another optimiser, or leave groups out",
                )
        made: torch.optim.Optimizer = super().create_optimizer(model)
        return made

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student, with its tokenizer, as a folder that plain transformers or PEFT loads."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)  # of a checkpoint
        else:
            save_student(self.loaded, Path(output_dir or str(self.args.output_dir)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with checkpoints.writing(Path(str(self.args.output_dir))):
            super()._save_checkpoint(model, trial)

    def _trained(self) -> dict[str, Tensor]:
        return {name: one.detach() for name, one in self.student.named_parameters() if one.requires_grad}

    def _write_trained(self, path: Path) -> None:
        with checkpoints.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: one.contiguous() for name, one in self._trained().items()}, path)

    def _read_trained(self, path: Path) -> None:
        saved, trained = load_file(path), self._trained()
        if saved.keys() != trained.keys():
            raise TrainingError(
                "the checkpoint holds other weights than are trained now",
                where=str(path.parent),
                mend="run the step again with --force",
            )
        with torch.no_grad():
            for name, one in trained.items():
                one.copy_(saved[name])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # A checkpoint holds what is trained, once: frozen weights are where they came from.
        self._write_trained(Path(output_dir or str(self.args.output_dir)) / _WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._read_trained(Path(resume_from_checkpoint) / _WEIGHTS_FILE)
