"""Settings of the `train` step; nothing heavy is imported here."""

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from potstill.core.settings import ModelRef, Settings, execution
from potstill.data.sources import Data

__all__ = [
    "EarlyStoppingSettings",
    "FeatureSettings",
    "LoraSettings",
    "ParameterGroup",
    "Schedule",
    "Strategy",
    "TrainSettings",
    "default_max_tokens",
]


Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "adaptive_kl"]
Schedule = Literal["cosine", "linear", "constant"]
Strategy = Literal["ddp", "fsdp2"]


def _names(text: str) -> list[str]:
    return text.split()


def _ours(names: str, instead: str) -> dict[str, str]:
    return dict.fromkeys(_names(names), instead)


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
    **_ours("seed full_determinism", "the recipe's seed"),
    **_ours("data_seed", "the recipe's seed, or from Python order_seed"),
    **_ours("use_cpu", "device"),
    **_ours(
        "bf16 fp16 bf16_full_eval fp16_full_eval",
        "the device: bf16 autocast over fp32 weights where it has bf16, or from Python autocast",
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
        "early_stopping; without it the last step is what is kept",
    ),
    **_ours(
        "logging_strategy logging_steps logging_first_step logging_nan_inf_filter disable_tqdm "
        "include_num_input_tokens_seen",
        "the step's own log: every step is logged, and a loss that is not finite stops the run",
    ),
    **_ours(
        "label_smoothing_factor average_tokens_across_devices label_names remove_unused_columns "
        "prediction_loss_only neftune_noise_alpha use_liger_kernel liger_kernel_config use_cache",
        "the loss settings: alpha, temperature, divergence, kl_reduction",
    ),
    **_ours(
        "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
        "gradient_checkpointing_kwargs",
        "activation_checkpointing of the step itself",
    ),
    **_ours("report_to", "report_to, beside the step's own log"),
    **_ours("do_train do_predict local_rank", "nothing: a train step trains"),
    **_ours(
        "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_revision hub_always_push",
        "nothing: what training saves is a folder to be uploaded afterwards",
    ),
}

# Those of them that have no other word from Python, where they mean what transformers says.
HONOURED = frozenset(
    _names(
        "num_train_epochs max_steps learning_rate weight_decay warmup_steps adam_beta1 adam_beta2 "
        "max_grad_norm seed full_determinism use_cpu dataloader_num_workers output_dir save_strategy "
        "save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint "
        "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint "
        "eval_strategy eval_steps eval_delay eval_on_start do_eval metric_for_best_model "
        "greater_is_better logging_first_step disable_tqdm average_tokens_across_devices report_to "
        "do_train do_predict local_rank hub_model_id hub_token hub_strategy hub_private_repo "
        "hub_revision hub_always_push activation_checkpointing activation_checkpointing_kwargs "
        "gradient_checkpointing gradient_checkpointing_kwargs"
    )
)


class LoraSettings(Settings):
    """Low-rank adapters on linear layers (Hu et al. 2021): W x + s B A x with s = alpha / rank, and W frozen.

    On a base in 4 bits (`quantize: nf4` of the model) this is QLoRA.
    """

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="all-linear, or names of layers"
    )
    dora: bool = Field(
        False,
        description="train the length of each row of W + s B A apart from its direction (Liu et al. 2024)",
    )
    rslora: bool = Field(
        False, description="s = alpha / sqrt(rank), which suits high ranks (Kalajdzievski 2023)"
    )


class EarlyStoppingSettings(Settings):
    """Stop when the held-out loss falls no more, and keep the weights with which it was lowest."""

    patience: int = Field(3, ge=1, description="evaluations in a row in which the loss did not fall")
    min_delta: float = Field(
        0.0,
        ge=0,
        description="by how much a loss must be lower to count as a fall; the lowest is kept in any case",
    )
    every: int | None = Field(
        None, ge=1, description="steps between the evaluations that count; by default an epoch"
    )


class ParameterGroup(Settings):
    """Weights that train at a rate of their own; the first group that matches a weight's name has it."""

    match: str = Field(min_length=1, description="regular expression, searched for in the weight's name")
    lr_multiplier: float = Field(
        1.0, ge=0, description="what the learning rate is multiplied with; 0 freezes"
    )
    weight_decay: float | None = Field(
        None, ge=0, description="by default the step's; biases and norms have none in any case"
    )

    @field_validator("match")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
        return pattern


class FeatureSettings(Settings):
    """Bring the student's inner states near those of a `teacher` in memory, beside the loss of its answers.

    Layers are numbered as in transformers' `hidden_states`: 0 is what the first block reads, l what block l
    hands on, and the last what the head reads. Relations are those inside block l.
    """

    kind: Literal["hidden_mse", "hidden_cosine", "cka", "relations"] = Field(
        description="mean square or 1 - cosine of hidden states, 1 - linear CKA of a row's states, or KL of "
        "how its queries, keys and values relate"
    )
    weight: float = Field(
        1.0, gt=0, description="what the feature loss is multiplied with before it is added"
    )
    layers: Literal["uniform", "last", "first_and_last"] | dict[int, int] = Field(
        "uniform",
        description="which layers are compared: every one of the student with one of the teacher, evenly "
        "spread; some; or a mapping from the student's to the teacher's",
    )
    embeddings: bool = Field(False, description="layer 0 as well")
    tokens: Literal["supervised", "all"] = Field(
        "supervised", description="states that predict supervised tokens, or those of all tokens"
    )
    relation_heads: int | None = Field(
        None,
        ge=1,
        description="of relations: equal heads that both models' vectors are split into anew; by default as "
        "many as divide all widths, at most the student's attention heads",
    )
    projection_lr_multiplier: float = Field(
        1.0, gt=0, description="what lr is multiplied with for projections to another width"
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _numbers(cls, layers: Any) -> Any:
        # In JSON and on the command line a mapping's keys are texts.
        if not isinstance(layers, dict):
            return layers
        return {int(key) if str(key).isdecimal() else key: value for key, value in layers.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.layers, dict) and (
            not self.layers or min(*self.layers, *self.layers.values(), 0) < 0
        ):
            raise ValueError("layers is a mapping from the student's layers to the teacher's, counted from 0")
        if self.kind == "relations":
            if self.embeddings or (
                isinstance(self.layers, dict) and 0 in {*self.layers, *self.layers.values()}
            ):
                raise ValueError("relations are inside blocks, of which layer 1 is the first")
        elif self.relation_heads is not None:
            raise ValueError(f"relation_heads belongs to relations, and kind is {self.kind}")
        if self.projection_lr_multiplier != 1 and not self.kind.startswith("hidden_"):
            raise ValueError(f"{self.kind} needs no projection that projection_lr_multiplier could train")
        return self


class TrainSettings(Settings):
    """Train on traces (cross-entropy), or on a teacher's logits as well: (1 - alpha) CE + alpha T^2 D.

    The logits are cached, where `data` is a cache step, or come from a `teacher` in memory.
    """

    kind: ClassVar[str] = "train"
    schema_version: ClassVar[int] = 1

    do: Literal["train"]
    student: ModelRef
    data: Data
    teacher: ModelRef | None = Field(
        None, description="a model in memory beside the student, for data without a teacher's logits"
    )
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="stop after so many steps; the schedule ends there")
    tokens: int | None = Field(
        None,
        ge=1,
        description="in place of epochs: stop after the step in which so many tokens, prompts included, have "
        "been trained on, rows beginning anew where they end; the schedule ends there",
    )
    batch: int = Field(16, ge=1, description="sequences an optimiser step, over all devices")
    lr: float = Field(1e-4, gt=0)
    schedule: Schedule = "cosine"
    min_lr_ratio: float = Field(0.0, ge=0, lt=1, description="share of lr that the schedule ends at")
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2)
    max_grad_norm: float = Field(1.0, gt=0)
    groups: list[ParameterGroup] = Field(
        [], description="weights with a learning rate of their own, in order; others train at lr"
    )
    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="weight of the teacher's distribution; by default 0.5 with a teacher, else 0",
    )
    temperature: float = Field(1.0, gt=0)
    divergence: Divergence = Field(
        "forward_kl", description="between the teacher's and the student's distributions"
    )
    beta: float = Field(0.5, ge=0, le=1, description="of jsd: 0 is forward KL, 1 reverse KL")
    skew: float = Field(0.1, gt=0, lt=1, description="of skew_kl and skew_reverse_kl")
    renormalise: bool = Field(
        False, description="biased: takes a teacher's top-k for all there is, without its tail"
    )
    kl_reduction: Literal["token", "batchmean"] = Field(
        "token", description="the divergence's mean over tokens, or its sum over tokens divided by sequences"
    )
    top_k: int | None = Field(
        None,
        ge=1,
        description="of cached logits, so many ids a token, the others in the tail; by default all kept ones",
    )
    base_kl: float = Field(
        0.0,
        ge=0,
        description="weight of KL(student || base), which keeps the student near the model that it was "
        "before training: the base of an adapter, or else a frozen copy",
    )
    router_aux_loss_coef: float | None = Field(
        None,
        ge=0,
        description="weight of the loss that evens the load of a mixture's experts, row by row; by default "
        "the model's own where its configuration says output_router_logits, else 0",
    )
    feature: FeatureSettings | None = Field(
        None, description="learn from the inner states of a `teacher` in memory as well"
    )
    early_stopping: EarlyStoppingSettings | None = None
    keep_epochs: Literal["all"] | Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="keep the model of each epoch as well, or of the last so many: `student:epoch1` names it",
    )
    lora: LoraSettings | None = None
    max_length: int | None = Field(
        None, ge=2, description="tokens a row, the rest is cut off; by default the student's context"
    )
    mask_prefix: bool = Field(
        False, description="of continued responses, leave out of the loss what another model wrote before"
    )
    label_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="of an encoder-decoder: learn each trace as two tasks (Hsieh et al. 2023), its answer "
        "behind `[label]` and its reasoning behind `[rationale]`, where the answers' loss has this weight "
        "(0.5 there) and that of the reasoning the rest; a trace counts as one sequence of `batch`",
    )
    trainer: dict[str, Any] = Field({}, description="further fields of transformers.TrainingArguments")

    max_tokens: int | None = execution(
        None, ge=1, description="padded tokens a micro-batch; by default by device"
    )
    packing: bool | None = execution(
        None,
        description="rows one behind the other in place of padding; by default on a GPU with flash attention",
    )
    activation_checkpointing: bool = execution(
        False,
        description="compute activations again in the backward pass instead of keeping them: less memory, "
        "about a third more time",
    )
    checkpoint_minutes: float = execution(10.0, ge=0, description="0 keeps every step")
    evaluate_every: int | None = execution(
        None, ge=1, description="steps; start, epoch ends, end and what early_stopping needs come anyway"
    )
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = execution(
        [], description="experiment trackers, which the extra `trackers` installs"
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

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        if self.label_weight is not None and self.mask_prefix:
            raise ValueError(
                "label_weight parts a response, and mask_prefix masks the beginning of a whole one"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.tokens is not None and self.max_steps is not None:
            raise ValueError("tokens and max_steps both say where training ends; leave one of them out")
        if self.min_lr_ratio and self.schedule == "constant":
            raise ValueError("min_lr_ratio is where a schedule ends that falls, and schedule is constant")
        return self

    def refuses_view(self, view: str) -> str | None:
        """Why there will be no model of an epoch (`epoch1`), as far as the settings can tell; or None."""
        number = int(view.removeprefix("epoch"))
        if self.keep_epochs is None:
            return "the step keeps no models of single epochs: set its keep_epochs"
        if self.max_steps is not None or self.tokens is not None:
            return None
        if number > self.epochs:
            return f"the step trains {self.epochs:g} epochs"
        if self.keep_epochs != "all" and self.early_stopping is None:
            first = int(self.epochs) - self.keep_epochs + 1
            return (
                f"the step keeps its last {self.keep_epochs}, from epoch{first} on"
                if number < first
                else None
            )
        return None


def default_max_tokens(device_type: str) -> int:
    """Padded tokens that a micro-batch has where `max_tokens` is not set."""
    return 2048 if device_type == "cpu" else 16384
