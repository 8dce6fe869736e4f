"""What a run trained on, and how, in the files of another trainer: LLaMA-Factory."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.core.errors import DataError, ModelError, StoreError
from potstill.core.events import Reporter
from potstill.core.records import Record, read_records
from potstill.core.settings import ModelRef
from potstill.core.step import StepContext
from potstill.core.store import Artifact, write_atomically
from potstill.core.yaml_lines import dump_yaml
from potstill.data.chat import Renderer
from potstill.data.shapes import whole_response
from potstill.data.sources import read
from potstill.export.huggingface import new_folder
from potstill.models import TransformersModel, find_source, is_encoder_decoder, load_tokenizer
from potstill.pipeline.fingerprint import Inputs, MissingInput
from potstill.pipeline.graph import Node
from potstill.pipeline.outputs import record_rows
from potstill.pipeline.run_folder import EVENTS_FILE, RECIPE_FILE, linked_artifact
from potstill.recipe import Recipe, load_recipe
from potstill.train import TrainSettings
from potstill.train.rows import logit_artifacts

__all__ = ["Exported", "export_llamafactory", "sharegpt_row"]

_INFO_FILE = "dataset_info.json"
_TRAINED_FOLDER = "saves"
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
# Settings of a train step that LLaMA-Factory has no word for.
_UNKNOWN_THERE = (
    "groups",
    "mask_prefix",
    "early_stopping",
    "base_kl",
    "label_weight",
    "router_aux_loss_coef",  # its moe_aux_loss_coef is that of a loss over a whole micro-batch
    "keep_epochs",
)
_OF_MODEL = ("chat_template", "add_tokens", "reasoning_format")


@dataclass
class Exported:
    """What was written, by file; rows left out, by data set and reason; settings that could not go along."""

    rows: dict[str, int] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    lost: dict[str, list[str]] = field(default_factory=dict)


def export_llamafactory(place: Path, output: Path, *, template: str | None = None) -> Exported:
    """Write ShareGPT files, their dataset_info.json and a YAML a train step into an empty folder.

    `place` is a run's folder (all its train steps), a step in it (a train step with the stages before it, or
    a step of traces alone), or an artifact with records. `template` names a template of LLaMA-Factory; by
    default it takes the tokenizer's own. Raises StoreError for another place, a folder in use and two steps
    that would write one file, DataError where training was not on the text of conversations, ModelError
    where the base is no model for it.
    """
    with new_folder(output) as folder:
        writer = _Writer(folder, template)
        _export(place, writer)
        writer.finish()
    return writer.exported


def _export(place: Path, writer: "_Writer") -> None:
    run = next((one for one in (place, place.parent) if (one / EVENTS_FILE).is_file()), None)
    if run is None:
        writer.data(place.name, read_records(record_rows(Artifact.open(place))))
        return
    recipe = load_recipe(str(run / RECIPE_FILE))
    source = _Run(
        recipe, {name: found for name in recipe.graph.order if (found := linked_artifact(run, name))}
    )
    nodes = recipe.graph.nodes
    wanted = [name for name in recipe.graph.order if nodes[name].kind == "train"]
    if run != place:
        if place.name not in nodes:
            raise StoreError(f"{place.name!r} is no step of the run", where=str(run))
        wanted = source.stages(place.name)
    if not wanted:
        name = place.name
        if name not in source.made:
            raise StoreError(
                "there is nothing to export: no train step, and no step of traces", where=str(place)
            )
        writer.data(name, read_records(record_rows(source.made[name])))
    for name in wanted:
        writer.stage(name, source)


def sharegpt_row(record: Record) -> dict[str, Any] | str:
    """A trace as LLaMA-Factory's ShareGPT row, or why it is none.

    Users and assistants take turns there, a user first and an assistant last, whose turn it always ends: an
    unfinished response would teach to stop in mid-sentence.
    """
    system = "".join(one["content"] for one in record.messages[:1] if one["role"] == "system")
    turns = (
        record.messages[1:] if record.messages and record.messages[0]["role"] == "system" else record.messages
    )
    if not turns:
        return "plain text without a prompt"
    if not record.response:
        return "no response"
    if record.finish_reason == "length":
        return "an unfinished response, whose turn LLaMA-Factory would end"
    if [one["role"] for one in turns] != [("user", "assistant")[at % 2] for at in range(len(turns))] or (
        len(turns) % 2 == 0
    ):
        return "messages that do not alternate between user and assistant"
    spoken = [*((one["role"], one["content"]) for one in turns), ("assistant", whole_response(record))]
    return {
        "conversations": [
            {"from": "human" if role == "user" else "gpt", "value": content} for role, content in spoken
        ],
        "system": system,
    }


@dataclass
class _Run:
    """A run's recipe, and what has been made of it."""

    recipe: Recipe
    made: dict[str, Artifact]

    def stages(self, name: str) -> list[str]:
        """A train step behind those whose adapter or weights it trains on; none for other steps."""
        node = self.recipe.graph.nodes[name]
        if not isinstance(node.settings, TrainSettings):
            return []
        before = self.before(node)
        return [*(self.stages(before) if before else []), name]

    def before(self, node: Node) -> str | None:
        """The train step that a train step goes on from."""
        student = self._student(node)
        if student.is_path or student.target in self.recipe.graph.models:
            return None
        made_by = self.recipe.graph.steps_named(student, node)[0]
        return made_by.name if made_by.kind == "train" else None

    def base(self, node: Node) -> TransformersModel:
        """The model that a chain of train steps began with."""
        if (before := self.before(node)) is not None:
            return self.base(self.recipe.graph.nodes[before])
        try:
            found = Inputs(self.recipe.graph, node, self.made).model(self._student(node))
        except MissingInput as missing:
            raise _unmade(missing.step) from missing
        if not isinstance(found, TransformersModel):
            raise ModelError("is no model that can be trained", where=self._student(node))
        source = find_source(found.path)
        if source.kind in ("folder", "adapter") and is_encoder_decoder(source.folder):
            raise ModelError(
                "is an encoder-decoder, which LLaMA-Factory does not train",
                where=self._student(node),
                expected="a run whose student is a decoder-only model",
            )
        return found

    def beginning(self, node: Node) -> Node:
        """The train step that began what a step trains: its adapter, or the weights where there is none."""
        assert isinstance(node.settings, TrainSettings)
        before = self.before(node)
        if node.settings.lora is not None or before is None:
            return node
        return self.beginning(self.recipe.graph.nodes[before])

    def records(self, node: Node) -> list[Record]:
        """The rows that a train step trains on, held-out ones among them."""
        settings, inputs = node.settings, Inputs(self.recipe.graph, node, self.made)
        assert isinstance(settings, TrainSettings)
        context = StepContext(
            name=node.name,
            kind=node.kind,
            folder=Path(),
            seed=self.recipe.seed,
            cache_folder=Path(),
            reporter=Reporter("quiet"),
            resolve_models=inputs.models,
            resolve_data=inputs.artifacts,
        )
        try:
            if settings.teacher is not None or logit_artifacts(settings.data, context):
                raise DataError(
                    f"{node.name} learns from a teacher's logits, and LLaMA-Factory from text alone",
                    where=f"step {node.name}",
                    mend="export the step of traces that the logits are of",
                )
            return list(read(settings.data, context))
        except MissingInput as missing:
            raise _unmade(missing.step) from missing

    def _student(self, node: Node) -> ModelRef:
        assert isinstance(node.settings, TrainSettings)
        return node.settings.student


def _unmade(step: str) -> StoreError:
    return StoreError(f"{step!r} has not been made yet", mend="run the recipe first, or --only that step")


class _Writer:
    """Writes data sets and stages into one folder."""

    def __init__(self, folder: Path, template: str | None) -> None:
        self.folder, self.template = folder, template
        self.exported = Exported()
        self._info: dict[str, Any] = {}
        self._written_for: dict[str, str] = {}

    def data(self, name: str, records: Iterator[Record] | list[Record]) -> tuple[str, str | None]:
        """A data set of the rows to train on and one of those held out, if any; their names."""
        train, held_out = (f"{_plain(name)}{suffix}" for suffix in ("", "_held_out"))
        found: dict[str, list[str]] = {train: [], held_out: []}
        left_out: Counter[str] = Counter()
        for record in records:
            row = sharegpt_row(record)
            if isinstance(row, str):
                left_out[row] += 1
            else:
                found[held_out if record.held_out else train].append(json.dumps(row, ensure_ascii=False))
        if left_out:
            self.exported.left_out[name] = left_out
        if not found[train]:
            reasons = "; ".join(f"{count:,} x {reason}" for reason, count in left_out.items())
            raise DataError(f"no row can be exported ({reasons or 'there are none'})", where=name)
        for one, lines in found.items():
            if lines:
                if (other := self._written_for.setdefault(one, name)) != name:
                    raise StoreError(
                        f"steps {other} and {name} would both write {one}.jsonl",
                        expected="names of steps that are distinct as names of data sets, without signs",
                        mend="give one of them another name, or name the step to export",
                    )
                path = self.folder / f"{one}.jsonl"
                write_atomically(path, "\n".join(lines) + "\n")
                self.exported.rows[path.name] = len(lines)
                self._info[one] = {
                    "file_name": path.name,
                    "formatting": "sharegpt",
                    "columns": {"messages": "conversations", "system": "system"},
                    "tags": {
                        "role_tag": "from",
                        "content_tag": "value",
                        "user_tag": "human",
                        "assistant_tag": "gpt",
                    },
                }
        return train, held_out if found[held_out] else None

    def stage(self, name: str, run: _Run) -> None:
        """The data of a train step, and the YAML that trains on it."""
        node = run.recipe.graph.nodes[name]
        settings, records, base = node.settings, run.records(node), run.base(node)
        assert isinstance(settings, TrainSettings)
        train, held_out = self.data(name, records)
        steps = settings.max_steps
        if settings.tokens is not None and name in run.made:
            steps = int(run.made[name].manifest.counts["steps"])
        config = {
            **_model_part(base, run, node),
            "dataset_dir": ".",
            "dataset": train,
            "mask_history": True,  # of a conversation's answers the last one alone is learned
            "cutoff_len": _longest(base, records, settings),
            "output_dir": f"{_TRAINED_FOLDER}/{_plain(name)}",
            **_training_part(settings, steps),
            "seed": run.recipe.seed % 2**32,
        }
        if held_out is not None:
            config |= {"eval_dataset": held_out, "eval_strategy": "epoch", "per_device_eval_batch_size": 1}
        if self.template is not None:
            config["template"] = self.template
        lost = _lost(settings, base) + (["tokens"] if settings.tokens is not None and steps is None else [])
        if lost:
            self.exported.lost[name] = lost
        path = self.folder / f"{_plain(name)}.yaml"
        write_atomically(path, "".join(f"# not carried over: {key}\n" for key in lost) + dump_yaml(config))
        self.exported.stages.append(path.name)

    def finish(self) -> None:
        """Write the list of data sets."""
        write_atomically(self.folder / _INFO_FILE, json.dumps(self._info, indent=2) + "\n")


def _model_part(base: TransformersModel, run: _Run, node: Node) -> dict[str, Any]:
    """Which model is trained and how, and the stages whose weights and adapter it goes on from."""
    begun, before = run.beginning(node), run.before(node)
    assert isinstance(begun.settings, TrainSettings)
    lora = begun.settings.lora
    weights = before if lora is None else run.before(begun)
    source = find_source(base.path)
    config: dict[str, Any] = {"model_name_or_path": _name_or_path(base)}
    if source.revision is not None:
        config["model_revision"] = source.revision
    if base.quantize is not None:
        config |= {
            "quantization_bit": 4,
            "quantization_type": "nf4",
            "double_quantization": base.quantize == "nf4",
        }
    config |= {"stage": "sft", "do_train": True, "finetuning_type": "full" if lora is None else "lora"}
    if weights is not None:
        config["model_name_or_path"] = f"{_TRAINED_FOLDER}/{_plain(weights)}"
    if before is not None and before != weights:
        config["adapter_name_or_path"] = f"{_TRAINED_FOLDER}/{_plain(before)}"
    if lora is not None:
        alpha, target = lora.alpha, lora.target
        config |= {
            "lora_rank": lora.rank,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "lora_dropout": lora.dropout,
            "lora_target": "all" if target == "all-linear" else ",".join(target),
            "use_dora": lora.dora,
            "use_rslora": lora.rslora,
        }
    return config


def _training_part(settings: TrainSettings, steps: int | None) -> dict[str, Any]:
    schedule: dict[str, Any] = {"lr_scheduler_type": _SCHEDULES[settings.schedule]}
    if settings.schedule == "cosine" and settings.min_lr_ratio:
        schedule["lr_scheduler_type"] = "cosine_with_min_lr"
        schedule["lr_scheduler_kwargs"] = {"min_lr_rate": settings.min_lr_ratio}
    length = {"num_train_epochs": settings.epochs} if steps is None else {"max_steps": steps}
    return {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": settings.batch,
        "learning_rate": settings.lr,
        **length,
        **schedule,
        "warmup_ratio": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "max_grad_norm": settings.max_grad_norm,
        "bf16": True,
        "logging_steps": 1,
        "plot_loss": True,
        # Activations are checkpointed there by default.
        **settings.trainer,
    }


def _lost(settings: TrainSettings, base: TransformersModel) -> list[str]:
    """The settings in use that LLaMA-Factory has no word for."""
    fields = TrainSettings.model_fields
    lost = [key for key in _UNKNOWN_THERE if getattr(settings, key) != fields[key].default]
    if settings.min_lr_ratio and settings.schedule != "cosine":
        lost.append("min_lr_ratio")
    if not settings.student.is_path and settings.student.view is not None:
        lost.append(f"student: {settings.student}")
    return [*lost, *(key for key in _OF_MODEL if getattr(base, key))]


def _plain(name: str) -> str:
    """A name without the comma and brackets of `each`, since data sets are listed with commas there."""
    return re.sub(r"[^\w.-]+", "+", name).strip("+")


def _name_or_path(base: TransformersModel) -> str:
    source = find_source(base.path)
    if source.kind == "adapter":
        raise ModelError(
            "the run's base is itself an adapter",
            where=base.path,
            expected="a plain model, and the adapter made by a train step of the run",
        )
    return source.name if source.kind == "hub" else str(source.folder.resolve())


def _longest(base: TransformersModel, records: list[Record], settings: TrainSettings) -> int:
    """Tokens of the longest row as potstill renders it, within the step's own limit."""
    renderer = Renderer(load_tokenizer(base))
    longest = max(
        len(renderer.render(record).ids) for record in records if not isinstance(sharegpt_row(record), str)
    )
    return longest if settings.max_length is None else min(longest, settings.max_length)
