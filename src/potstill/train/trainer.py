"""One trainer on transformers.Trainer, which keeps optimiser, schedule, checkpoints and logs.

Ours are the order of the data (a pure plan), the loop over the micro-batches of one optimiser step with one
count of supervised tokens over all processes (ranks), and the refusal of a loss that is not finite.
"""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import IntervalStrategy

from potstill.core.errors import TrainingError
from potstill.core.memory import keep_freed_memory
from potstill.models import (
    check_same_vocabulary,
    dead_experts,
    decoder_start_id,
    isolates_packed_rows,
    load_entropy,
    supports_bf16,
    writing,
)
from potstill.train import cpu, sharding
from potstill.train.agreement import check_agreement, weights_digest
from potstill.train.arguments import DistillationArguments
from potstill.train.base import Base
from potstill.train.checks import check_device, check_loss, check_precision, check_strategy
from potstill.train.early_stopping import EarlyStopping
from potstill.train.features import FeatureLoss
from potstill.train.groups import ParameterGroups
from potstill.train.inputs import (
    DataInput,
    Examples,
    ModelInput,
    TeacherInput,
    is_model,
    resolve_inputs,
    resolve_student,
)
from potstill.train.loader import EpochPlan, MicroBatches, OptimiserStep, StepLoader
from potstill.train.online import OnlineTeacher
from potstill.train.routing import Routing
from potstill.train.rows import CachedTeacher, Rows
from potstill.train.saving import save_student
from potstill.train.settings import EarlyStoppingSettings, FeatureSettings, Schedule
from potstill.train.student import StudentWithLoss
from potstill.train.throughput import StepCost, peak_flops_per_s
from potstill.train.trackers import check_trackers

__all__ = ["DistillationTrainer", "learning_rate_factor"]

_WEIGHTS_FILE = "trained.safetensors"
_ROWS_SHOWN = 8
# What get_optimizer_cls_and_kwargs gives for optimisers that group the weights themselves.
_OWN_GROUPS = frozenset({"params", "model", "optimizer_dict"})


def learning_rate_factor(
    step: int, total_steps: int, warmup_steps: int, schedule: Schedule, min_lr_ratio: float = 0.0
) -> float:
    """What the learning rate is multiplied with at a step, counted from 0: a linear rise, then the schedule.

    The schedule falls from 1 towards `min_lr_ratio`. Neither the first nor the last step is lost to a rate of
    zero.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "constant":
        return 1.0
    left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return min_lr_ratio + (1 - min_lr_ratio) * left


def _default_alpha(teacher: object) -> float:
    return 0.0 if teacher is None else 0.5


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = value + sums.get(name, 0.0)


class DistillationTrainer(Trainer):
    """Trains a student on rows, against a teacher's signal where there is one; usable without a recipe.

    The student is a model of transformers or PEFT with `tokenizer`, or a path or hub id. Data are examples
    ({"prompt", "response"}, {"messages"}, or any other shape that data files may have), or a folder of cached
    logits, which is a training set by itself. The teacher is a model, a path or hub id, or a folder with
    cached logits of the examples; without one the student learns from the responses alone. Held-out examples
    are evaluated whenever the arguments or the control ask for it. The path of a data file serves for
    examples. `base` is what `base_kl` keeps the student near: by default what it is when the trainer is made,
    for an adapter its base and for full weights a frozen copy.

    Started by torchrun or accelerate launch it is one of several processes: each trains on its part of every
    step's rows, all have one loss and one log, and the first writes. Each holds the whole student, or with
    the arguments' strategy "fsdp2" its part of it; then all have to call `save_model` and `evaluate`.
    Gradients do not depend on how many they are, and a checkpoint serves any number of them.

    ```python
    from potstill import DistillationArguments, DistillationTrainer

    arguments = DistillationArguments(
        num_train_epochs=3,
        learning_rate=3e-4,
        alpha=0.5,
        temperature=2.0,
        groups=[{"match": "embed_tokens", "lr_multiplier": 0.1}],
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
        base: ModelInput | None = None,
        tokenizer: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        settings = arguments.settings()
        check_trackers(arguments.report_to or [])
        if arguments.device.type == "cpu":
            keep_freed_memory()
        self.loaded = resolve_student(student, tokenizer, arguments.device)
        model = self.loaded.model
        check_strategy(arguments, model)
        found, self.teacher = resolve_inputs(
            self.loaded,
            data,
            held_out,
            teacher,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            max_length=arguments.max_length,
        )
        self.rows, self.held_out = found.train, found.held_out
        if model.device.type == "cuda":  # from elsewhere it is moved
            check_device(model, arguments.device, "student")
        if isinstance(self.teacher, OnlineTeacher):
            check_device(self.teacher.model, arguments.device, "teacher")
        check_loss(arguments, self.teacher)
        if settings.early_stopping is not None and not len(self.held_out):
            raise TrainingError(
                "early_stopping watches the loss of held-out rows, and there are none",
                mend="give the data a held-out share, or leave early_stopping out",
            )
        self.groups = ParameterGroups(model, settings.groups, arguments.learning_rate, arguments.weight_decay)
        bf16 = supports_bf16(arguments.device) if arguments.autocast is None else arguments.autocast
        check_precision(model, autocast=bf16)
        reference = self._reference(base, arguments)
        if model.device.type == "cpu":
            longest = max(itertools.chain(self.rows.lengths, self.held_out.lengths))
            for one in (model, reference):
                if one is not None:
                    packed = bool(arguments.packing)
                    cpu.choose_attention(
                        one, arguments.max_tokens if packed else longest, packed=packed, bf16=bf16
                    )
        self.base = (
            Base(model, self.loaded.vocabulary_size, arguments.base_kl, reference)
            if arguments.base_kl
            else None
        )
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
            base=self.base,
            feature=self._feature(settings.feature, arguments.seed, bf16=bf16),
            routing=Routing(model, arguments.router_aux_loss_coef),
            teacher=self.teacher if isinstance(self.teacher, OnlineTeacher) else None,
            bf16=bf16,
        )
        self._check_agreement(arguments.world_size, reference)
        if arguments.divides:
            self.student.hold_frozen()
        self.plan = EpochPlan(
            self.rows.lengths, arguments.batch, arguments.order_seed, together=self.rows.rows_a_trace
        )
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
        if arguments.world_size > 1:  # else every process would drop out the same units
            torch.manual_seed(arguments.seed + arguments.process_index)
        self.remove_callback(PrinterCallback)
        self.early_stopping = self._early_stopping(settings.early_stopping)

    def _check_agreement(self, processes: int, reference: nn.Module | None) -> None:
        if processes == 1:  # digests read every weight
            return
        teacher = self.teacher.model if isinstance(self.teacher, OnlineTeacher) else None
        libraries = [f"{one} {metadata.version(one)}" for one in ("potstill", "torch", "transformers")]
        rows = f"{len(self.rows):,} ({self.rows.digest}), {len(self.held_out):,} held out "
        check_agreement(
            {
                "libraries": ", ".join(libraries),
                "rows": f"{rows}({self.held_out.digest})",
                "weights": weights_digest(self.loaded.model, teacher, reference),
                "cached logits": self.teacher.digest if isinstance(self.teacher, CachedTeacher) else "none",
            }
        )

    def _packs(self, wanted: bool | None, *, bf16: bool) -> bool:
        models = [self.loaded.model]
        if self.base is not None and self.base.model is not self.loaded.model:
            models.append(self.base.model)
        teacher = self.teacher.model if isinstance(self.teacher, OnlineTeacher) else None
        if teacher is not None:
            models.append(teacher)

        def isolates(model: Any) -> bool:
            # As it will run: flash attention takes no float32, and a teacher has no autocast.
            enabled = bf16 and model is not teacher
            with torch.autocast(model.device.type, torch.bfloat16, enabled=enabled):
                return isolates_packed_rows(model)

        # transformers has no public name for the attention that a model uses.
        attention = [str(model.config.get_text_config()._attn_implementation) for model in models]  # noqa: SLF001  # see above
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

    def _reference(self, base: ModelInput | None, arguments: DistillationArguments) -> nn.Module | None:
        if base is None or not arguments.base_kl:
            return None
        if isinstance(base, nn.Module):
            return base.to(arguments.device)
        if isinstance(base, str | Path) and not is_model(base):
            raise TrainingError(
                "base is a folder without a model",
                where=str(base),
                expected="a model: KL(student || base) weighs each id by the student's probability, and "
                "cached logits are of the base's likeliest ids",
                mend="name the model; what a cache of it gives, KL(base || student), is alpha with that "
                "cache as data",
            )
        found = resolve_student(base, None, arguments.device)
        check_same_vocabulary(found.tokenizer, self.loaded.tokenizer, names=("base", "student"))
        model: nn.Module = found.model
        return model

    def _feature(self, settings: FeatureSettings | None, seed: int, *, bf16: bool) -> FeatureLoss | None:
        if settings is None:
            return None
        assert isinstance(self.teacher, OnlineTeacher)
        model = self.loaded.model
        if decoder_start_id(model.config) is not None:
            raise TrainingError(
                f"feature: the inner states of a {model.config.model_type} model are those of two stacks",
                expected="a decoder-only student, whose layers are one row",
                mend="leave feature out: its answers' loss needs no inner states",
            )
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):  # as the student will run
            return FeatureLoss(settings, model, self.teacher.model, seed)

    def _early_stopping(self, settings: EarlyStoppingSettings | None) -> EarlyStopping | None:
        if settings is None:
            return None
        if settings.every is None and self.args.eval_strategy == IntervalStrategy.NO:
            settings = settings.model_copy(update={"every": len(self.plan)})
        made = EarlyStopping(settings, self._write_trained, self._read_trained)
        # Behind all others: it removes weights once a checkpoint is whole.
        self.add_callback(made)
        return made

    def micro_batches(self, rows: Rows) -> MicroBatches:
        """What makes this rank's micro-batches of rows, with what is stored of the teacher."""
        stored = None if isinstance(self.teacher, OnlineTeacher) else self.teacher
        ranks = self.args.process_index, self.args.world_size
        return MicroBatches(rows, stored, self.args.max_tokens, self.packs, *ranks, self.args.divides)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The steps of the plan, of which each rank makes its part; accelerate leaves them alone."""
        numbers: Any = range(len(self.rows))
        return StepLoader(
            numbers,
            batch_sampler=self.plan,
            collate_fn=self.micro_batches(self.rows),
            num_workers=self.args.dataloader_num_workers,
        )

    def get_total_train_batch_size(self, args: Any) -> int:
        """Sequences an optimiser step."""
        return self.args.batch

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of an optimiser step's micro-batches, with one count of supervised tokens."""
        model.train()
        started = time.perf_counter()
        step: OptimiserStep = inputs
        supervised = sum(map(self.rows.supervised, step.numbers))
        self._row_ids = [*map(self.rows.id, step.numbers)]
        if supervised == 0:
            raise TrainingError(
                "no supervised token: there is nothing to learn", where=self._where(self._row_ids)
            )
        scales = self._scales(self.rows, step.numbers)
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for batch in step.batches:
            # Gradients that wait to be reduced are whole, which a divided student has no room for.
            at_once = self.args.divides or batch is step.batches[-1]
            with nullcontext() if at_once else self.accelerator.no_sync(model):
                # DDP and FSDP make a mean over the ranks of what has to be their sum.
                here = batch.to(self.student.device)
                loss, values = model(here, supervised / self.args.world_size, *scales)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
            _add(sums, values)
        faults = (~torch.stack(losses).isfinite()).nonzero().flatten().tolist()
        figures, first_faults = self._over_ranks(sums, fault=faults[0] + 1 if faults else 0)
        figures = {name: value / supervised for name, value in figures.items()}
        loss_of_step = figures.pop("loss")
        for rank, place in enumerate(first_faults):
            if place:
                numbers = self.micro_batches(self.rows).split(step.numbers, rank)[place - 1]
                raise TrainingError(
                    f"the loss is {loss_of_step}",
                    where=self._where([*map(self.rows.id, numbers)]),
                    mend="lower lr, lengthen warmup_ratio, or look at these rows",
                )
        lengths = [self.rows.length(number) for number in step.numbers]
        self._figures = {**figures, "tokens": sum(lengths)}
        self._step = (started, self._cost.flops(lengths, [*map(self.rows.supervised, step.numbers)]))
        return torch.tensor(loss_of_step, device=self.args.device)

    def _over_ranks(self, sums: dict[str, Tensor], fault: int = 0) -> tuple[dict[str, float], list[int]]:
        """Each quantity's sum over all ranks, the same on each to the last bit, and every rank's `fault`."""
        own = torch.stack([*sums.values(), torch.tensor(fault, dtype=torch.float64, device=self.args.device)])
        by_rank = self.accelerator.gather(own[None])
        *totals, _ = by_rank.sum(0).tolist()
        return dict(zip(sums, totals, strict=True)), [int(one) for one in by_rank[:, -1].tolist()]

    def on_any_rank(self, wish: bool) -> bool:
        """Whether any rank wishes something; all of them have to ask, and wait here for the others."""
        if self.args.world_size == 1:
            return wish
        return bool(self.accelerator.gather(torch.tensor([wish], device=self.args.device)).any())

    def _scales(self, rows: Rows, numbers: Sequence[int]) -> tuple[float, float, float]:
        """What some rows' divergence, feature loss and routers' loss are multiplied with, to be means."""
        supervised = sum(map(rows.supervised, numbers))
        divergence = 1.0 if self.args.kl_reduction == "token" else supervised / len(numbers)
        over_all_tokens = supervised / sum(map(rows.length, numbers))
        feature = self.student.feature
        of_supervised = feature is None or feature.settings.tokens == "supervised"
        return divergence, 1.0 if of_supervised else over_all_tokens, over_all_tokens

    def _prepare_for_training(self, *given: Any) -> Any:
        if self.args.divides and not self.is_fsdp_enabled:
            # On a CPU accelerate would take DDP in its place. To transformers this is a model that was
            # divided as it was loaded.
            sharding.divide(self.student)
            self.is_distributed_loading_by_transformers = True
        prepared = super()._prepare_for_training(*given)
        if self.args.divides:
            sharding.check_divided(self.student)
        return prepared

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = sharding.whole(super()._clip_grad_norm(model))
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient norm is {float(norm)}",
                where=self._where(self._row_ids),
                mend="lower lr, lengthen warmup_ratio, or look at these rows",
            )
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return sharding.whole(super()._get_grad_norm(model, grad_norm))

    def _where(self, row_ids: Sequence[str]) -> str:
        shown = ", ".join(row_ids[:_ROWS_SHOWN]) + (", ..." if len(row_ids) > _ROWS_SHOWN else "")
        return f"step {self.state.global_step + 1} (records {shown})"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step with the parts of its loss, tokens a second, and the share of the peak FLOPs ("mfu")."""
        if "loss" in logs:
            started, flops = self._step
            seconds = time.perf_counter() - started
            dtype = torch.bfloat16 if self.student.bf16 else self.student.model.dtype
            peak = self.args.world_size * peak_flops_per_s(self.student.device, dtype)
            speed = {"tokens_per_s": self._figures["tokens"] / seconds, "mfu": flops / seconds / peak}
            logs = {**logs, **self._figures, "flops": flops, **speed}
        super().log(logs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on the held-out rows and its parts, as "eval_loss" and so on; logged.

        Of a mixture of experts also how evenly these rows' tokens are spread, "eval_expert_entropy" as the
        mean over layers, and "eval_dead_experts", those of all layers that next to no token reaches; what
        each expert of each router got is "expert_counts" of the entry in the trainer's log.

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
        sums: dict[str, Tensor] = {}
        supervised = self.held_out.supervised_tokens
        scales = self._scales(self.held_out, range(len(self.held_out)))
        routing = self.student.routing
        assert routing is not None
        with torch.no_grad(), routing.counting() as counts:
            for batch in self.micro_batches(self.held_out).one_by_one(range(len(self.held_out))):
                _, values = self.student(batch.to(self.student.device), 1, *scales)
                _add(sums, values)
        sharding.release(self.student)
        totals, _ = self._over_ranks(sums)
        metrics = {f"eval_{name}": total / supervised for name, total in totals.items()}
        if not routing.routers:
            self.log(metrics)
        else:
            by_router = routing.by_router(self.accelerator.gather(counts[None]).sum(0))
            entropies = [load_entropy(one) for one in by_router.values()]
            metrics["eval_expert_entropy"] = sum(entropies) / len(entropies)
            metrics["eval_dead_experts"] = sum(len(dead_experts(one)) for one in by_router.values())
            self.log(metrics)
            # Behind the log, of which trackers take plain figures alone.
            self.state.log_history[-1]["expert_counts"] = by_router
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser over our parameter groups, frozen weights left out."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            # What "params" holds here is taken in place of Trainer's own groups.
            if not is_optimizer_factory(kind) and not _OWN_GROUPS & options.keys():
                self.optimizer_cls_and_kwargs = (kind, {**options, "params": self._optimiser_groups()})
            elif self.args.groups or (self.args.feature or {}).get("projection_lr_multiplier", 1) != 1:
                raise TrainingError(
                    f"the optimiser {self.args.optim} divides the weights by itself, and groups or a "
                    "projection_lr_multiplier are given",
                    mend="choose another optimiser, or leave these out",
                )
        made: torch.optim.Optimizer = super().create_optimizer(model)
        return made

    def _optimiser_groups(self) -> list[dict[str, Any]]:
        groups, feature = self.groups.for_optimiser(), self.student.feature
        if feature is not None:
            groups += feature.optimiser_group(self.args.learning_rate, self.args.weight_decay)
        return groups

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of `learning_rate_factor`."""
        warmup_steps = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            return learning_rate_factor(
                step, num_training_steps, warmup_steps, self.args.schedule, self.args.min_lr_ratio
            )

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
        """Write the student, with its tokenizer, as a folder that plain transformers or PEFT loads.

        Projections of features lie in it apart, in `features.PROJECTIONS_FILE`. Every process of a divided
        student has to call it.
        """
        if _internal_call:  # of a checkpoint
            self._save(output_dir)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        save_student(self.loaded, folder, self.student.feature, writes=self.args.should_save)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing(Path(str(self.args.output_dir))):
            super()._save_checkpoint(model, trial)

    def _trained(self) -> dict[str, Tensor]:
        return {name: one for name, one in self.student.named_parameters() if one.requires_grad}

    def _write_trained(self, path: Path) -> None:
        if not (self.args.should_save or self.args.divides):
            return
        trained = {}
        for name, one in self._trained().items():
            value = sharding.whole(one.detach())
            if self.args.should_save:  # no more than one is whole on a GPU
                trained[name] = value.cpu().contiguous()
        if self.args.should_save:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(trained, path)

    def _read_trained(self, path: Path) -> None:
        saved, trained = load_file(path), self._trained()
        if saved.keys() != trained.keys():
            raise sharding.other_weights(path.parent)
        for name, one in trained.items():
            sharding.assign(one, saved[name])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # A checkpoint holds what is trained, once: frozen weights are where they came from.
        if not self.args.divides:
            self._write_trained(Path(output_dir or str(self.args.output_dir)) / _WEIGHTS_FILE)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.divides:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharding.write_shards(Path(output_dir), self._trained(), self.optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if sharding.has_shards(checkpoint):
            sharding.read_shards(checkpoint, self._trained())
        else:
            self._read_trained(checkpoint / _WEIGHTS_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        has_shards = checkpoint is not None and sharding.has_shards(Path(checkpoint))
        if checkpoint is None or not (self.args.divides or has_shards):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        if has_shards:
            sharding.read_shards(folder, self._trained(), self.optimizer)
        else:
            saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
            sharding.divide_moments(saved, self.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
