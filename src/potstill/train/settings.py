"""Settings of the `train` step; nothing heavy is imported here."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from potstill.core.settings import ModelRef, Settings, execution
from potstill.data.sources import Data

__all__ = ["LoraSettings", "TrainSettings"]


def _ours(names: str, instead: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), instead)


# Fields of TrainingArguments that a setting of ours decides, and which.
OWNED = {
    **_ours("num_train_epochs", "epochs"),
    **_ours("max_steps", "max_steps"),
    **_ours(
        "per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size "
        "train_sampling_strategy length_column_name dataloader_drop_last dataloader_num_workers "
        "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order",
        "batch (sequences a step) and max_tokens (tokens a micro-batch)",
    ),
    **_ours("per_device_eval_batch_size eval_accumulation_steps", "max_tokens (tokens a micro-batch)"),
    **_ours("learning_rate", "lr"),
    **_ours("lr_scheduler_type lr_scheduler_kwargs", "schedule"),
    **_ours("warmup_steps warmup_ratio", "warmup_ratio"),
    **_ours("weight_decay", "weight_decay"),
    **_ours("adam_beta1 adam_beta2", "betas"),
    **_ours("max_grad_norm", "max_grad_norm"),
    **_ours("seed data_seed full_determinism", "the recipe's seed"),
    **_ours("use_cpu", "device"),
    **_ours(
        "bf16 fp16 bf16_full_eval fp16_full_eval",
        "the device: bf16 autocast over fp32 weights where it has bf16",
    ),
    **_ours(
        "output_dir save_strategy save_steps save_total_limit save_only_model save_on_each_node "
        "enable_jit_checkpoint resume_from_checkpoint ignore_data_skip "
        "restore_callback_states_from_checkpoint",
        "checkpoint_minutes; an interrupted run resumes by itself",
    ),
    **_ours("eval_strategy eval_steps eval_delay eval_on_start do_eval", "evaluate_every"),
    **_ours(
        "load_best_model_at_end metric_for_best_model greater_is_better",
        "the last step, which is what is kept",
    ),
    **_ours(
        "logging_strategy logging_steps logging_first_step logging_nan_inf_filter disable_tqdm "
        "include_num_input_tokens_seen",
        "the step's own log: every step is logged, and a loss that is not finite stops the run",
    ),
    **_ours(
        "label_smoothing_factor average_tokens_across_devices label_names remove_unused_columns "
        "prediction_loss_only neftune_noise_alpha use_liger_kernel liger_kernel_config use_cache",
        "the loss settings: alpha, temperature, divergence",
    ),
    **_ours("do_train do_predict local_rank", "nothing: a train step trains"),
    **_ours(
        "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_revision hub_always_push",
        "nothing",
    ),
}


class LoraSettings(Settings):
    """Low-rank adapters on linear layers (Hu et al. 2021): W x + (alpha / rank) B A x, with W frozen."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="all-linear, or names of layers"
    )


class TrainSettings(Settings):
    """Train on traces (cross-entropy) or on a teacher's cached logits: (1 - alpha) CE + alpha T^2 KL."""

    kind: ClassVar[str] = "train"
    schema_version: ClassVar[int] = 1

    do: Literal["train"]
    student: ModelRef
    data: Data
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="stop after so many steps; the schedule ends there")
    batch: int = Field(16, ge=1, description="sequences an optimiser step, over all devices")
    lr: float = Field(1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2)
    max_grad_norm: float = Field(1.0, gt=0)
    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="weight of the teacher's distribution; by default 0.5 with logits, 0 with traces",
    )
    temperature: float = Field(1.0, gt=0)
    divergence: Literal["forward_kl"] = "forward_kl"
    lora: LoraSettings | None = None
    max_length: int | None = Field(
        None, ge=2, description="tokens a row, the rest is cut off; by default the student's context"
    )
    trainer: dict[str, Any] = Field({}, description="further fields of transformers.TrainingArguments")

    max_tokens: int | None = execution(
        None, ge=1, description="padded tokens a micro-batch; by default by device"
    )
    checkpoint_minutes: float = execution(10.0, ge=0, description="0 keeps every step")
    evaluate_every: int | None = execution(
        None, ge=1, description="steps; start, epoch ends and end come anyway"
    )
    device: str | None = execution(None, description="cpu, cuda, ...; by default the GPU where there is one")

    @field_validator("trainer")
    @classmethod
    def _refuse_owned(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for name in fields:
            if name in OWNED:
                raise ValueError(f"{name} is decided by {OWNED[name]}")
        return fields

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas are two numbers of at least 0 and less than 1")
        return self
