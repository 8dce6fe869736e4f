"""The `train` step: student and rows in, a Hugging Face folder or an adapter out."""

import copy
import dataclasses
import difflib
from typing import Any

import torch
from transformers import TrainingArguments

from potstill.core.errors import RecipeError, TrainingError
from potstill.core.step import StepContext, StepResult
from potstill.data.chat import Renderer
from potstill.models import (
    LoadedModel,
    TransformersModel,
    adapter_base,
    find_source,
    identity,
    load,
    supports_bf16,
)
from potstill.models.pretrained import quiet_transformers
from potstill.train import checkpoints, cpu
from potstill.train.lora import add_adapter, save_adapter
from potstill.train.rows import SignalSource, TrainingData, logit_artifacts, read_caches, read_traces
from potstill.train.settings import TrainSettings
from potstill.train.student import StudentWithLoss
from potstill.train.trainer import DistillationArguments, DistillationTrainer
from potstill.train.watcher import Watcher, history_point

__all__ = ["train"]

# Padded tokens a micro-batch: a CPU's matrix units are busy with fewer than a GPU's.
_CPU_MAX_TOKENS, _GPU_MAX_TOKENS = 2048, 16384


def train(settings: TrainSettings, context: StepContext) -> StepResult:
    """Carry out a train step, from its newest checkpoint where an earlier attempt left one."""
    cpu.tune_memory()
    model_settings = _model_settings(settings, context)
    loaded = _load_student(settings, model_settings, context.derive_seed("lora"))
    renderer = Renderer(loaded.tokenizer)
    _set_generation_config(loaded, renderer)
    data, teacher = _read_data(settings, context, loaded, renderer)
    device = loaded.model.device
    if device.type == "cpu":
        cpu.choose_attention(loaded.model, max([*data.train.lengths, *data.held_out.lengths]))
    elif device.type == "cuda":
        torch.cuda.set_device(device)
    student = StudentWithLoss(
        loaded.model,
        loaded.vocabulary_size,
        alpha=_alpha(settings, teacher),
        temperature=settings.temperature,
        bf16=supports_bf16(device),
    )
    counts = _say_what_is_trained(student, data, context)
    checkpoint = checkpoints.newest(context.scratch)
    arguments = _arguments(settings, context, device)
    arguments.eval_on_start = len(data.held_out) > 0 and checkpoint is None
    watcher = Watcher(settings, context)
    trainer = DistillationTrainer(student, arguments, data.train, data.held_out, teacher, callbacks=[watcher])
    watcher.train(trainer, checkpoint)
    _save(loaded, context)
    history = [point for point in map(history_point, trainer.state.log_history) if point]
    untouched = trainer.untouched()
    if untouched:
        context.say(
            f"{len(untouched):,} trained tensors never received a gradient: {', '.join(untouched[:4])} ..."
        )
    extra: dict[str, Any] = {"precision": _precision(student)}
    if hasattr(loaded.model, "peft_config"):
        extra |= _base_of(model_settings)
    return StepResult(
        counts={**counts, "steps": trainer.state.global_step},
        metrics={**_final_figures(history), "untouched": untouched, "history": history},
        extra=extra,
        tokenizer=renderer.tokenizer_hash,
        model_identity=identity(TransformersModel(path=str(context.folder))),
        tokens=int(sum(point.get("tokens", 0) for point in history)),
    )


def _model_settings(settings: TrainSettings, context: StepContext) -> TransformersModel:
    found = context.model(settings.student)
    if not isinstance(found, TransformersModel):
        raise TrainingError(
            f"{settings.student} is a model of engine {getattr(found, 'engine', type(found).__name__)}",
            expected="a model that transformers loads",
            mend="name a folder, a hub id, an embedded model, or a step that makes a model",
        )
    return found if settings.device is None else found.model_copy(update={"device": settings.device})


def _load_student(settings: TrainSettings, model: TransformersModel, lora_seed: int) -> LoadedModel:
    is_adapter = find_source(model.path).kind == "adapter"
    if is_adapter and settings.lora is not None:
        raise TrainingError(
            f"{settings.student} is an adapter, and lora asks for another one on top of it",
            expected="a base with at most one adapter",
            mend="leave lora out to train the adapter on, or name its base as the student",
        )
    if settings.lora is not None:
        frozen = load(model)
        return dataclasses.replace(frozen, model=add_adapter(frozen.model, settings.lora, lora_seed))
    if is_adapter:
        return load(model, trainable=True)
    if model.quantize is not None:
        raise TrainingError(
            f"{settings.student} is quantised to {model.quantize}, and quantised weights cannot be trained",
            mend="add lora, or leave quantize out",
        )
    return load(model, dtype=torch.float32, trainable=True)


def _base_of(model: TransformersModel) -> dict[str, Any]:
    """What the adapter's manifest says of its base."""
    source = find_source(model.path)
    base = adapter_base(source.folder) if source.kind == "adapter" else model
    stated = base.model_dump(mode="json", exclude={"device", "dtype"}, exclude_none=True)
    return {"base": stated, "base_identity": identity(base)}


def _read_data(
    settings: TrainSettings, context: StepContext, loaded: LoadedModel, renderer: Renderer
) -> tuple[TrainingData, SignalSource | None]:
    context_tokens = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    max_length = min(one for one in (settings.max_length, context_tokens, 2**31) if one is not None)
    caches = logit_artifacts(settings.data, context)
    teacher: SignalSource | None = None
    if caches:
        data, teacher = read_caches(
            caches,
            tokenizer=renderer.tokenizer_hash,
            vocabulary_size=loaded.vocabulary_size,
            temperature=settings.temperature,
            max_length=max_length,
        )
    elif settings.alpha:
        raise TrainingError(
            f"alpha is {settings.alpha:g}, but the data are traces without a teacher's logits",
            expected="the logits of a cache step, or alpha: 0",
            mend="add a cache step and name it as data, or leave alpha out to learn from the responses alone",
        )
    else:
        data = read_traces(settings.data, context, renderer, max_length)
    data.check()
    if data.shortened:
        context.say(f"{data.shortened:,} rows were cut to {max_length:,} tokens")
    if data.left_out:
        context.say(f"{len(data.left_out):,} rows were left out; the first: {data.left_out[0].what}")
    return data, teacher


def _alpha(settings: TrainSettings, teacher: SignalSource | None) -> float:
    if settings.alpha is None:
        return 0.0 if teacher is None else 0.5
    return settings.alpha


def _say_what_is_trained(
    student: StudentWithLoss, data: TrainingData, context: StepContext
) -> dict[str, int]:
    every = sum(one.numel() for one in student.parameters())
    trained = sum(one.numel() for one in student.parameters() if one.requires_grad)
    context.say(
        f"{len(data.train):,} rows, {len(data.held_out):,} held out; trains {trained:,} of {every:,} "
        f"parameters ({trained / every:.2%})"
    )
    return {
        "rows": len(data.train),
        "held_out_rows": len(data.held_out),
        "shortened_rows": data.shortened,
        "left_out_rows": len(data.left_out),
        "parameters": every,
        "trained_parameters": trained,
    }


def _precision(student: StudentWithLoss) -> dict[str, str]:
    """The types of trained and of frozen weights, and the type that autocast multiplies in."""
    found = {}
    for kind, trained in (("trained", True), ("frozen", False)):
        types = {str(one.dtype) for one in student.parameters() if one.requires_grad is trained}
        if types:
            found[kind] = ", ".join(sorted(types)).replace("torch.", "")
    return {**found, "autocast": "bfloat16"} if student.bf16 else found


def _arguments(settings: TrainSettings, context: StepContext, device: torch.device) -> DistillationArguments:
    known = {one.name for one in dataclasses.fields(TrainingArguments) if one.init}
    for name in settings.trainer:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise RecipeError(
                f"trainer: transformers.TrainingArguments has no field {name!r}",
                mend=f"did you mean {near[0]!r}?" if near else None,
            )
    ours: dict[str, Any] = {
        "output_dir": str(context.scratch),
        "batch": settings.batch,
        "max_tokens": settings.max_tokens or (_CPU_MAX_TOKENS if device.type == "cpu" else _GPU_MAX_TOKENS),
        "order_seed": context.derive_seed("order"),
        "schedule": settings.schedule,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.lr,
        "warmup_steps": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "max_grad_norm": settings.max_grad_norm,
        "seed": context.derive_seed("dropout") % 2**32,
        "use_cpu": device.type == "cpu",
    }
    try:
        return DistillationArguments(**{**ours, **settings.trainer})
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"trainer: {error}") from error


def _final_figures(history: list[dict[str, Any]]) -> dict[str, float]:
    """The loss of the last step; of the held-out rows before and after, where there are any."""
    trained = [point for point in history if "loss" in point]
    evaluated = [point for point in history if "eval_loss" in point]
    figures = {"loss": trained[-1]["loss"]}
    if evaluated:
        figures |= {"eval_loss_before": evaluated[0]["eval_loss"], "eval_loss": evaluated[-1]["eval_loss"]}
    return figures


def _set_generation_config(loaded: LoadedModel, renderer: Renderer) -> None:
    """Make the model end a response where training does; done early, for saving may refuse."""
    config = copy.deepcopy(loaded.model.generation_config)
    stated = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted({*renderer.end_of_turn_ids, loaded.tokenizer.eos_token_id, *stated} - {None})
    if config.pad_token_id is None:
        config.pad_token_id = loaded.tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = (
            True  # models on the hub state a temperature without sampling, which cannot be saved
        )
    loaded.model.generation_config = config


def _save(loaded: LoadedModel, context: StepContext) -> None:
    """Write model and tokenizer so that plain transformers loads them."""
    with checkpoints.writing(context.folder), quiet_transformers():
        if hasattr(loaded.model, "peft_config"):
            save_adapter(loaded.model, context.folder)
        else:
            loaded.model.save_pretrained(context.folder)
        loaded.tokenizer.save_pretrained(context.folder)
