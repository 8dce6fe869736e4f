"""What a trainer is given, whatever its form: a student, rows to learn from, a teacher."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from potstill.core.errors import DataError, TrainingError
from potstill.core.records import Record, prompt_identity
from potstill.core.store import MANIFEST_FILE, Artifact
from potstill.data.chat import Rendered, Renderer
from potstill.data.files import DATA_SUFFIXES
from potstill.data.shapes import BadRow, describe_shapes, parse_row, recognise
from potstill.data.sources import read_file
from potstill.logits.logit_cache import LogitCache
from potstill.models import (
    LoadedModel,
    TransformersModel,
    decoder_start_id,
    decoder_start_token,
    load,
    template_hash,
)
from potstill.train.online import OnlineTeacher
from potstill.train.rows import (
    CachedTeacher,
    SignalSource,
    TrainingData,
    length_limit,
    read_caches,
    rows_of_records,
)

__all__ = [
    "DataInput",
    "Examples",
    "ModelInput",
    "TeacherInput",
    "is_model",
    "resolve_inputs",
    "resolve_student",
]

_LONGEST_PATH = 4096

Examples = Sequence[Mapping[str, Any]]
"""Rows of any shape that data files may have, such as {"prompt", "response"} or {"messages"}."""

ModelInput = LoadedModel | nn.Module | str | Path
DataInput = TrainingData | Examples | str | Path
TeacherInput = OnlineTeacher | SignalSource | LoadedModel | nn.Module | str | Path | None


def resolve_student(student: ModelInput, tokenizer: Any | None, device: torch.device) -> LoadedModel:
    """The student with its tokenizer on the device, its weights in float32 where they are loaded here."""
    if isinstance(student, LoadedModel):
        return student
    if isinstance(student, str | Path):
        settings = TransformersModel(path=str(student), device=str(device))
        return load(settings, dtype=torch.float32, trainable=True)
    if tokenizer is None:
        raise TrainingError(
            "the student is a model without its tokenizer",
            expected="tokenizer=, or the model's folder or hub id in place of the model",
        )
    if (decoder_start_id(student.config) is None) != (decoder_start_token(tokenizer) is None):
        raise TrainingError(
            "student and tokenizer are not of one kind: one of them is an encoder-decoder's",
            expected="the tokenizer as potstill.models.load_tokenizer gives it for the student",
            mend="give the model's folder or hub id in place of the model",
        )
    Renderer(tokenizer)  # saving needs to know what ends a turn: better refused now than after training
    return LoadedModel(student.to(device), tokenizer, "")


def resolve_inputs(
    student: LoadedModel,
    data: DataInput,
    held_out: Examples | str | Path | None,
    teacher: TeacherInput,
    *,
    temperature: float,
    top_k: int | None,
    max_length: int | None,
) -> tuple[TrainingData, SignalSource | OnlineTeacher | None]:
    """Rows and the teacher's signal for them.

    Data may be examples, a data file's path, or a folder of cached logits, which brings rows and teacher. A
    teacher may be a model, its path, or a folder with cached logits of the examples. Raises TrainingError for
    held-out examples besides data that say by themselves which rows are held out.
    """
    cached = isinstance(data, str | Path) and not _is_data_file(data)
    if held_out is not None and (cached or isinstance(data, TrainingData)):
        raise TrainingError(
            "held_out is given besides data that say which of their rows are held out",
            expected="held_out beside examples or a data file",
            mend="hold rows out where the logits are cached, or leave held_out out",
        )
    limit = length_limit(student.model, max_length)
    source: SignalSource | OnlineTeacher | None
    if isinstance(data, TrainingData):
        rows = data
        source = _model_teacher(teacher, student)
    elif isinstance(data, str | Path) and cached:
        if teacher is not None:
            raise TrainingError(
                "the data are cached logits, and a teacher is given besides",
                where=str(data),
                expected="one teacher",
                mend="leave teacher out",
            )
        cache = _open(data, student)
        _check_rendering(cache, student)
        rows, source = read_caches(
            [(cache, None)],
            vocabulary_size=student.vocabulary_size,
            temperature=temperature,
            top_k=top_k,
            max_length=limit,
        )
    else:
        renderer = Renderer(student.tokenizer)
        find: Callable[[Rendered], int] | None = None
        if isinstance(teacher, str | Path) and not is_model(teacher):
            cache = _open(teacher, student)
            source = CachedTeacher([cache], temperature, top_k)

            def find(rendered: Rendered) -> int:
                return cache.find(rendered.ids, rendered.mask)

        else:
            source = _model_teacher(teacher, student)
        records = [*_records(data, held_out=False), *_records(held_out or (), held_out=True)]
        rows = rows_of_records(records, renderer, limit, find)
    rows.check()
    return rows, source


def is_model(path: str | Path) -> bool:
    """Whether a path leads to a model: any but a folder that holds something else, such as cached logits."""
    return not Path(path).is_dir() or any(
        (Path(path) / name).is_file() for name in ("config.json", "adapter_config.json")
    )


def _is_data_file(path: str | Path) -> bool:
    return Path(path).suffix.lower() in DATA_SUFFIXES and not Path(path).is_dir()


def _holds_a_path(file: Path) -> bool:
    with file.open("rb") as opened:
        return os.path.isdir(opened.read(_LONGEST_PATH))  # noqa: PTH112  # Path raises for most bytes


def _open(folder: str | Path, student: LoadedModel) -> LogitCache:
    path = Path(folder)
    # Where there are no links, a run folder has a file with the artifact's path instead.
    if path.is_file() and not _holds_a_path(path):
        raise DataError(
            "neither cached logits nor a data file",
            where=str(path),
            expected=f"a cache step's folder, or a file ending in {', '.join(DATA_SUFFIXES)}",
        )
    return LogitCache.open(Path(folder), tokenizer=Renderer(student.tokenizer).tokenizer_hash)


def _check_rendering(cache: LogitCache, student: LoadedModel) -> None:
    if not (cache.folder / MANIFEST_FILE).is_file():
        return
    rendering = Artifact.open(cache.folder).manifest.extra.get("rendering")
    if rendering is not None and rendering["hash"] != template_hash(student.tokenizer):
        raise TrainingError(
            "the cached conversations were rendered by another chat template than the student's",
            where=str(cache.folder),
            expected="one rendering, in the cache, in training and wherever the student serves",
            mend="give the student's tokenizer the cached teacher's chat_template",
        )


def _model_teacher(teacher: TeacherInput, student: LoadedModel) -> SignalSource | OnlineTeacher | None:
    if isinstance(teacher, str | Path):
        teacher = load(TransformersModel(path=str(teacher), device=str(student.model.device)))
    if isinstance(teacher, nn.Module):
        teacher = teacher.to(student.model.device)
    if isinstance(teacher, LoadedModel | nn.Module):
        return OnlineTeacher(teacher, student)
    return teacher


def _records(examples: Examples | str | Path, *, held_out: bool) -> Iterator[Record]:
    if isinstance(examples, str | Path):
        for record in read_file(examples):
            yield replace(record, held_out=held_out)
        return
    for number, example in enumerate(examples, start=1):
        where = f"{'held-out ' if held_out else ''}example {number}"
        shape = recognise(example)
        if shape is None:
            raise DataError(
                f"its keys are {', '.join(example)}", where=where, expected=f"one of {describe_shapes()}"
            )
        try:
            found = parse_row(example, shape)
        except BadRow as error:
            raise DataError(str(error), where=where) from error
        yield Record(
            prompt_identity(found.question),
            found.messages,
            where,
            held_out,
            response=found.response,
        )
