"""The arguments of a training from Python: transformers' own with ours beside them."""

import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from pydantic import ValidationError
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from potstill.core.errors import TrainingError
from potstill.train.settings import HONOURED, OWNED, Divergence, Schedule, Strategy, TrainSettings

__all__ = ["DistillationArguments"]


@dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments with what is ours, and with defaults that suit it: every step is logged.

    `batch` is sequences an optimiser step, over all processes; `max_tokens` is padded tokens a micro-batch
    and changes nothing but speed and memory, nor does `packing` (rows one behind the other in place of
    padding; by default on a GPU with flash attention); `order_seed` decides the order of the rows, epoch by
    epoch. `alpha` weighs the teacher's distribution, by default 0.5 where there is a teacher; `divergence`,
    `beta`, `skew`, `renormalise`, `kl_reduction`, `top_k`, `base_kl`, `router_aux_loss_coef` and
    `min_lr_ratio` are a recipe's.
    `groups` are mappings with `match`, `lr` and `weight_decay`, `feature` is a mapping with `kind`, `weight`
    and so on, `early_stopping` one with `patience`, `min_delta` and `every`, as in a recipe; it evaluates
    every so many steps, by default an epoch, unless `eval_strategy` says when. `autocast` multiplies in
    bfloat16, by default where the device does so itself. `max_length` cuts rows off; by default the student's
    context does. `strategy` says what each of several processes holds: all of the student ("ddp"), or its
    part of every weight, gradient and moment ("fsdp2").

    TrainingError for a value that a recipe would refuse, and for a field of transformers that one of ours
    stands for (`gradient_accumulation_steps`, say).
    """

    batch: int = 16
    max_tokens: int = 2048
    packing: bool | None = None
    order_seed: int = 0
    schedule: Schedule = "cosine"
    min_lr_ratio: float = 0.0
    alpha: float | None = None
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    renormalise: bool = False
    kl_reduction: Literal["token", "batchmean"] = "token"
    top_k: int | None = None
    base_kl: float = 0.0
    router_aux_loss_coef: float | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    feature: dict[str, Any] | None = None
    early_stopping: dict[str, Any] | None = None
    autocast: bool | None = None
    max_length: int | None = None
    strategy: Strategy = "ddp"

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
        if self.strategy not in get_args(Strategy):
            raise TrainingError(
                f"strategy is {self.strategy!r}", expected=" or ".join(map(repr, get_args(Strategy)))
            )
        has_ranks = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self.strategy == "fsdp2" and has_ranks and not self.use_cpu and torch.cuda.is_available():
            # Through accelerate, with transformers' defaults: whole weights of a block are freed behind it.
            self.fsdp, self.fsdp_config = True, {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
        self.per_device_train_batch_size = self.batch
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # one process trains on one device

    @property
    def divides(self) -> bool:
        """Whether the student is divided among processes; one alone has all of it."""
        return self.strategy == "fsdp2" and self.world_size > 1

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
