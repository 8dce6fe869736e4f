"""The `train` step: student and rows in, a Hugging Face folder or an adapter out."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from potstill.core.errors import RecipeError, TrainingError
from potstill.core.records import Record
from potstill.core.step import StepContext, StepResult
from potstill.data.chat import THINK_OPEN, Renderer
from potstill.data.parts import continued
from potstill.data.sources import read
from potstill.logits.logit_cache import LogitCache
from potstill.models import (
    LoadedModel,
    TransformersModel,
    adapter_base,
    find_source,
    identity,
    load,
    original_model,
    recorded_base,
    set_rendering,
    stored_quantization,
    template_hash,
    tokenizer_hash,
    transformers_model,
)
from potstill.train import checkpoints
from potstill.train.agreement import check_agreement
from potstill.train.arguments import DistillationArguments
from potstill.train.loader import EpochPlan
from potstill.train.lora import add_adapter
from potstill.train.online import OnlineTeacher
from potstill.train.rows import (
    SignalSource,
    TrainingData,
    length_limit,
    logit_artifacts,
    read_caches,
    rows_of_records,
)
from potstill.train.saving import kept_epochs, save_student
from potstill.train.settings import Strategy, TrainSettings, default_max_tokens
from potstill.train.step_by_step import ask_for_labels, rows_of_tasks
from potstill.train.student import StudentWithLoss
from potstill.train.throughput import parameter_size
from potstill.train.trackers import check_trackers
from potstill.train.trainer import DistillationTrainer
from potstill.train.watcher import Watcher, expert_load, history_point

__all__ = ["train"]


def train(settings: TrainSettings, context: StepContext, strategy: Strategy = "ddp") -> StepResult:
    """Carry out a train step, from its newest checkpoint where an earlier attempt left one.

    Of several processes each calls it, and the first one's result is the step's; `strategy` says what each
    holds of the student.
    """
    model_settings = transformers_model(context, settings.student, device=settings.device)
    loaded = _load_student(settings, model_settings, context)
    _say_quantization("student", loaded, context)
    tokenizer = _as_cached(settings, model_settings, context, loaded.tokenizer)
    if settings.label_weight is not None:
        ask_for_labels(tokenizer)
    renderer = Renderer(tokenizer)
    if not renderer.takes_system:
        context.say("the chat template has no system role: such messages stand before the first question")
    data, teacher = _read_data(settings, context, loaded, renderer)
    if settings.tokens is not None:
        rows = data.train
        plan = EpochPlan(rows.lengths, settings.batch, context.derive_seed("order"), rows.rows_a_trace)
        settings = settings.model_copy(update={"max_steps": plan.steps_of(settings.tokens)})
    device = loaded.model.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    arguments = _arguments(settings, context, device, strategy)
    with arguments.main_process_first(local=False):  # which clears away what is half written
        checkpoint = checkpoints.newest(context.scratch)
    check_agreement({"checkpoints to go on from": "none" if checkpoint is None else checkpoint.name})
    arguments.eval_on_start = len(data.held_out) > 0 and checkpoint is None
    watcher = Watcher(settings, context)
    callbacks = [watcher, *_tensorboard(settings, context)]
    is_adapter = hasattr(loaded.model, "peft_config")
    base = None if is_adapter else _frozen_base(settings, model_settings)
    trainer = DistillationTrainer(loaded, arguments, data, teacher=teacher, base=base, callbacks=callbacks)
    counts = _say_what_is_trained(trainer, data, context)
    watcher.train(trainer, checkpoint)
    feature = trainer.student.feature
    save_student(loaded, context.folder, feature, writes=arguments.should_save)
    with arguments.main_process_first(local=False):
        pass  # the others stay until all is written
    if not arguments.should_save:
        return StepResult()
    history = [point for point in map(history_point, trainer.state.log_history) if point]
    kept_step = trainer.state.global_step
    if trainer.early_stopping is not None and trainer.early_stopping.kept_step is not None:
        kept_step = trainer.early_stopping.kept_step
        context.say(f"keeps the weights of step {kept_step:,}, whose held-out loss is the lowest")
    experts = expert_load(trainer.state.log_history, kept_step)
    untouched = trainer.untouched()
    if untouched:
        context.say(
            f"{len(untouched):,} trained tensors never received a gradient: {', '.join(untouched[:4])} ..."
        )
    extra = {"precision": _precision(trainer.student), **_base_of(model_settings, is_adapter=is_adapter)}
    if settings.keep_epochs is not None:
        extra["views"] = kept_epochs(context.folder)
        counts["kept_epochs"] = len(extra["views"])
    return StepResult(
        counts={**counts, "steps": trainer.state.global_step},
        metrics={
            **_final_figures(history, kept_step),
            "parameter_groups": trainer.groups.as_json(),
            "untouched": untouched,
            "flops": sum(point.get("flops", 0.0) for point in history),
            **({} if feature is None else {"feature": feature.as_json()}),
            **({} if not experts else {"expert_load": experts}),
            "history": history,
        },
        extra=extra,
        tokenizer=renderer.tokenizer_hash,
        model_identity=identity(
            TransformersModel(path=str(context.folder)),
            base=TransformersModel.model_validate(extra["base"]) if is_adapter else None,
        ),
        tokens=int(sum(point.get("tokens", 0) for point in history)),
    )


def _frozen_base(settings: TrainSettings, model: TransformersModel) -> LoadedModel | None:
    """What a student in full weights is kept near, where that is not the student at its start."""
    if not settings.base_kl or recorded_base(model) is None:
        return None
    return load(original_model(model), dtype=torch.float32)


def _load_student(settings: TrainSettings, model: TransformersModel, context: StepContext) -> LoadedModel:
    is_adapter = find_source(model.path).kind == "adapter"
    if is_adapter and settings.lora is not None:
        raise TrainingError(
            f"{settings.student} is an adapter, and lora asks for another one on top of it",
            expected="a base with at most one adapter",
            mend="leave lora out to train the adapter on, or name its base as the student",
        )
    if settings.lora is not None:
        frozen = load(model, say=context.say)
        token_ids = frozen.tokenizer.convert_tokens_to_ids(model.add_tokens)
        adapted = add_adapter(frozen.model, settings.lora, context.derive_seed("lora"), token_ids)
        return dataclasses.replace(frozen, model=adapted)
    if is_adapter:
        return load(model, trainable=True, say=context.say)
    if (scheme := model.quantize or stored_quantization(model)) is not None:
        raise TrainingError(
            f"{settings.student} is quantised to {scheme}, and quantised weights cannot be trained",
            mend="add lora, or name a model in full weights without quantize",
        )
    return load(model, dtype=torch.float32, trainable=True, say=context.say)


def _as_cached(
    settings: TrainSettings, model: TransformersModel, context: StepContext, tokenizer: Any
) -> Any:
    """The tokenizer with the chat template that cached conversations were rendered by: it is what is learned.

    Raises TrainingError where the student is to have another one, or tokens that the teacher lacks.
    """
    renderings: dict[str, dict[str, Any]] = {}
    for artifact, _ in logit_artifacts(settings.data, context):
        if model.add_tokens and artifact.manifest.tokenizer != tokenizer_hash(tokenizer):
            raise TrainingError(
                f"{settings.student} has added tokens, of which the cached teacher's logits know nothing",
                where=str(artifact.folder),
                expected="one vocabulary for teacher and student: the loss compares them id by id",
                mend=f"leave add_tokens out ({', '.join(model.add_tokens)} are text then), or train on the "
                "teacher's responses alone",
            )
        if (rendering := artifact.manifest.extra.get("rendering")) is not None:  # of conversations alone
            renderings[rendering["hash"]] = rendering
    if renderings.keys() <= {template_hash(tokenizer)}:
        return tokenizer
    if len(renderings) > 1 or model.chat_template is not None or model.reasoning_format is not None:
        raise TrainingError(
            f"{settings.data} was rendered by another chat template or reasoning format than the student's",
            expected="one rendering, in the cache, in training and wherever the student serves",
            mend="give the cached teacher the student's chat_template and reasoning_format, or leave them "
            "out for the student: it takes the teacher's then",
        )
    [rendering] = renderings.values()
    set_rendering(tokenizer, rendering["chat_template"], rendering["reasoning_format"])
    context.say("the student takes the teacher's chat template, by which the cached rows were rendered")
    return tokenizer


def _say_quantization(role: str, loaded: LoadedModel, context: StepContext) -> None:
    if loaded.quantization is not None:
        context.say(f"the {role}'s weights are in {loaded.quantization} already, and are used as they are")


def _base_of(model: TransformersModel, *, is_adapter: bool) -> dict[str, Any]:
    """What the manifest says of the base: what an adapter is put on, what full weights were at first."""
    source = find_source(model.path)
    if not is_adapter and (recorded := recorded_base(model)) is not None:
        return recorded
    base = adapter_base(source.folder) if source.kind == "adapter" else model
    stated = base.model_dump(mode="json", exclude={"device", "dtype"}, exclude_none=True)
    return {"base": stated, "base_identity": identity(base)}


def _read_data(
    settings: TrainSettings, context: StepContext, loaded: LoadedModel, renderer: Renderer
) -> tuple[TrainingData, SignalSource | OnlineTeacher | None]:
    max_length = length_limit(loaded.model, settings.max_length)
    teacher: SignalSource | OnlineTeacher | None = None
    if settings.teacher is not None:
        found = load(transformers_model(context, settings.teacher, device=settings.device))
        _say_quantization("teacher", found, context)
        teacher = OnlineTeacher(found, loaded)
    if caches := logit_artifacts(settings.data, context):
        if settings.label_weight is not None:
            raise TrainingError(
                f"{settings.data} holds a teacher's logits of whole responses, and label_weight parts them",
                expected="traces as data",
                mend="name the traces that were cached, or leave label_weight out",
            )
        if settings.mask_prefix:
            raise TrainingError(
                f"{settings.data} holds a teacher's logits, which have their own mask",
                mend="set mask_prefix in the cache step, and leave it out here",
            )
        if teacher is not None:
            raise TrainingError(
                f"{settings.data} holds a teacher's logits, and teacher: {settings.teacher} is given besides",
                expected="one teacher, cached or in memory",
                mend="leave teacher out, or name the traces as data",
            )
        data, teacher = read_caches(
            [
                (LogitCache.open(artifact.folder, tokenizer=renderer.tokenizer_hash), view)
                for artifact, view in caches
            ],
            vocabulary_size=loaded.vocabulary_size,
            temperature=settings.temperature,
            top_k=settings.top_k,
            max_length=max_length,
            folder=context.scratch,
        )
    else:
        records = _saying_what_tags_are(read(settings.data, context), renderer, context)
        if settings.mask_prefix:
            records = continued(records)
        if settings.label_weight is None:
            data = rows_of_records(
                records, renderer, max_length, mask_prefix=settings.mask_prefix, folder=context.scratch
            )
        else:
            data = rows_of_tasks(records, renderer, max_length, settings.label_weight, context.scratch)
    data.check()
    if data.shortened:
        context.say(f"{data.shortened:,} rows were cut to {max_length:,} tokens")
    if data.left_out:
        context.say(f"{len(data.left_out):,} rows were left out; the first: {data.left_out[0].what}")
    return data, teacher


def _saying_what_tags_are(
    records: Iterator[Record], renderer: Renderer, context: StepContext
) -> Iterator[Record]:
    """The records; before the first one that reasons it is said if think tags are no tokens, but text."""
    told = False
    for record in records:
        if not told and record.reasoning is not None:
            told = True
            ids = renderer.tokenizer(THINK_OPEN, add_special_tokens=False).input_ids
            if len(ids) > 1 and renderer.reasoning_format is None:
                context.say(
                    f"{THINK_OPEN} is no token of the student's: it is written as text, of {len(ids)} tokens "
                    "(add_tokens of the model gives it one of its own)"
                )
        yield record


def _say_what_is_trained(
    trainer: DistillationTrainer, data: TrainingData, context: StepContext
) -> dict[str, int]:
    model = trainer.loaded.model
    every = sum(map(parameter_size, model.parameters()))
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    context.say(
        f"{len(data.train):,} rows, {len(data.held_out):,} held out; trains {trained:,} of {every:,} "
        f"parameters ({trained / every:.2%})"
    )
    if trainer.args.groups:
        for line in trainer.groups.as_text():
            context.say(line)
    if trainer.student.feature is not None:
        context.say(trainer.student.feature.as_text())
    if trainer.student.routing is not None and trainer.student.routing.routers:
        context.say(trainer.student.routing.as_text())
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
        parts = (student.model, student.feature or nn.Module())  # not what is frozen beside the student
        types = {
            str(one.dtype) for part in parts for one in part.parameters() if one.requires_grad is trained
        }
        if types:
            found[kind] = ", ".join(sorted(types)).replace("torch.", "")
    return {**found, "autocast": "bfloat16"} if student.bf16 else found


def _arguments(
    settings: TrainSettings, context: StepContext, device: torch.device, strategy: Strategy
) -> DistillationArguments:
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
        "max_tokens": settings.max_tokens or default_max_tokens(device.type),
        "packing": settings.packing,
        "order_seed": context.derive_seed("order"),
        "schedule": settings.schedule,
        "min_lr_ratio": settings.min_lr_ratio,
        "alpha": settings.alpha,
        "temperature": settings.temperature,
        "divergence": settings.divergence,
        "beta": settings.beta,
        "skew": settings.skew,
        "renormalise": settings.renormalise,
        "kl_reduction": settings.kl_reduction,
        "top_k": settings.top_k,
        "base_kl": settings.base_kl,
        "router_aux_loss_coef": settings.router_aux_loss_coef,
        "activation_checkpointing": settings.activation_checkpointing,
        "groups": [group.model_dump() for group in settings.groups],
        "feature": None if settings.feature is None else settings.feature.model_dump(),
        "early_stopping": None if settings.early_stopping is None else settings.early_stopping.model_dump(),
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
        "report_to": [name for name in settings.report_to if name != "tensorboard"] or "none",
        "project": "potstill",
        "run_name": _run_name(context),
        "strategy": strategy,
    }
    try:
        return DistillationArguments(**{**ours, **settings.trainer})
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"trainer: {error}") from error


def _run_name(context: StepContext) -> str:
    return f"{context.name}-{context.folder.name}"


def _tensorboard(settings: TrainSettings, context: StepContext) -> list[TrainerCallback]:
    """TensorBoard's callback, whose files lie beside the artifacts: in one, their times would change it."""
    check_trackers(settings.report_to)
    if "tensorboard" not in settings.report_to:
        return []
    from transformers.integrations import TensorBoardCallback

    made = TensorBoardCallback()
    if made.logging_dir is None:  # else the environment states it
        made.logging_dir = str(context.cache_folder / "tensorboard" / _run_name(context))
    context.say(f"tensorboard --logdir {made.logging_dir}")
    return [made]


def _final_figures(history: list[dict[str, Any]], kept_step: int) -> dict[str, float]:
    """The loss of the last step; of the held-out rows before and with the kept weights, if there are any."""
    trained = [point for point in history if "loss" in point]
    evaluated = [point for point in history if "eval_loss" in point]
    figures = {"loss": trained[-1]["loss"], "kept_step": kept_step}
    if evaluated:
        kept = next(point for point in evaluated if point["step"] == kept_step)
        figures |= {"eval_loss_before": evaluated[0]["eval_loss"], "eval_loss": kept["eval_loss"]}
    return figures
