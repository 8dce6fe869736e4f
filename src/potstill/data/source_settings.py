"""Settings of sources and mixtures, and how a setting declares its rows; nothing heavy is imported here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, model_validator

from potstill.core.errors import DataError
from potstill.core.hashing import hash_bytes, hash_file
from potstill.core.settings import DataRef, InputPath, Part, Settings, execution, resolve_path
from potstill.data.category_maps import read_category_map
from potstill.data.files import DATA_SUFFIXES, read_rows
from potstill.data.shapes import Shape
from potstill.data.tasks import TASK_PREFIX, check_task
from potstill.data.templates import is_inline, template_text

__all__ = [
    "Data",
    "FileSource",
    "HubSource",
    "LearnedLabel",
    "LogprobRecords",
    "MappedLabel",
    "Member",
    "Source",
    "StepPart",
    "TaskSource",
    "Where",
    "described_where",
    "source_of_path",
]

# Of how a row of a file becomes a record: another reading is another input of the steps that read.
_READING = 2

Scalar = str | int | float | bool
Where = dict[str, Scalar | list[Scalar]]


def _resolve_template(value: str, info: ValidationInfo) -> str:
    return value if is_inline(value) else resolve_path(value, (info.context or {}).get("folders", ()))


class MappedLabel(Settings):
    """A label looked up by another column's value, such as a category by its subject."""

    column: str = Field(min_length=1, description="the column that is looked up; `meta.domain` looks inside")
    file: InputPath = execution(
        ..., description="value and label: a .csv of two columns, or a .yaml or .json mapping"
    )

    def content(self) -> Any:
        """The labels by value."""
        return read_category_map(Path(self.file))


class LearnedLabel(Settings):
    """A label predicted from the prompt's text by a small classifier, learnt from rows that have it.

    A row that has the label already keeps it. How sure the classifier is stays with the row, in the column
    `<label>_confidence`, and how often it was right on labelled rows that it did not learn from is said. Of
    more than 8,000 labelled rows so many are learnt from, drawn by the recipe's seed.
    """

    like: "Source" = Field(description="rows that have the label, as a source")
    min_confidence: float = Field(
        0.0, ge=0, lt=1, description="less sure predictions are left out: the row has no label then"
    )


def _label_kind(value: Any) -> str:
    kinds = {"column": MappedLabel, "like": LearnedLabel}
    if isinstance(value, Mapping):
        return next((key for key in kinds if key in value), "text")
    return next((key for key, kind in kinds.items() if isinstance(value, kind)), "text")


Label = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")]
    | Annotated[MappedLabel, Tag("column")]
    | Annotated[LearnedLabel, Tag("like")],
    Discriminator(_label_kind),
]


class _SourceSettings(Settings):
    """What all sources can state."""

    limit: int | None = Field(default=None, ge=1, description="take at most this many rows")
    system: str | None = Field(default=None, description="the system message of every prompt")
    template: Annotated[str, AfterValidator(_resolve_template)] | None = execution(
        None,
        description="the user message with {column} for a row's values: the text, or a text file's path",
    )
    labels: dict[str, Label] = Field(
        default={},
        description="columns that rows are given, such as category: a text, one looked up by another column "
        "({column, file}), or one predicted from the prompt ({like: labelled rows})",
    )
    where: Where = Field(
        default={},
        description="keep rows whose column or label equals a value, or one of a list of values",
    )
    held_out: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the prompts kept from training, chosen by the hash of the prompt",
    )
    shuffle: bool = Field(default=False, description="shuffle the rows, before `limit`, by the recipe's seed")
    strict: bool = Field(default=False, description="stop at a malformed row instead of leaving it out")
    weight: float | None = Field(
        default=None, gt=0, description="share in a list of sources, relative to the others"
    )

    def content(self) -> Any:
        """How rows are read, and the hash of the template's text."""
        if not self.template:
            return {"reading": _READING}
        return {"reading": _READING, "template": hash_bytes(template_text(self.template).encode())}

    @property
    def label(self) -> str:
        """What messages call the source; each kind of source says it."""
        raise NotImplementedError


class LogprobRecords(Settings):
    """A teacher's log-probabilities that lie apart from its responses, as DASD's were released.

    A record has `sample_uuid`, `token_ids` and `logprobs`, one of each a sampled token. It belongs to the row
    whose column `key` holds the same id; rows without a record are left out.
    """

    file: InputPath | None = execution(None, description="a data file of records")
    hub: str | None = Field(default=None, description="or a data set on the hub")
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    tokenizer: str = Field(min_length=1, description="whose token ids they are: a folder or hub id")
    key: str = Field(default="uuid", description="the rows' column with the id")
    temperature: float | None = Field(
        default=None, gt=0, description="that the log-probabilities are at, where known"
    )

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.file is None) == (self.hub is None):
            raise ValueError("expected a file or a data set on the hub, and not both")
        return self

    def content(self) -> Any:
        """The hash of the file."""
        if self.file is None:
            return None
        read_rows(Path(self.file))
        return {"file": hash_file(Path(self.file)), "suffix": Path(self.file).suffix.lower()}


class FileSource(_SourceSettings):
    """A data file: .jsonl, .json, .csv, .parquet, or .txt (a paragraph a row)."""

    path: InputPath = execution(...)
    shape: Shape = "auto"
    logprobs: LogprobRecords | None = None

    def content(self) -> Any:
        """Hashes of the file and the template; the ending decides how the file is read."""
        path = Path(self.path)
        read_rows(path)
        return {**super().content(), "file": hash_file(path), "suffix": path.suffix.lower()}

    @property
    def label(self) -> str:
        """The file's name."""
        return Path(self.path).name


class HubSource(_SourceSettings):
    """A data set on the hub. Changes there are noticed only through a stated `revision`."""

    dataset: str = Field(min_length=1)
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    shape: Shape = "auto"
    logprobs: LogprobRecords | None = None

    @property
    def label(self) -> str:
        """Data set, configuration and split."""
        return ":".join(filter(None, (self.dataset, self.config, self.split)))


class TaskSource(_SourceSettings):
    """Problems of a reasoning-gym task, made on the spot.

    Without a stated seed the recipe's makes them: the same for all steps of a kind, others for each other
    kind, so that what is evaluated on was not generated from.
    """

    task: str = Field(min_length=1)
    size: int = Field(ge=1, description="how many problems")
    parameters: dict[str, Any] = Field(default={})
    seed: int | None = None

    def content(self) -> Any:
        """The library's version, since problems change with it, once it is known to have the task."""
        from importlib import metadata

        check_task(self.task, self.parameters, self.size)
        return {**super().content(), "reasoning_gym": metadata.version("reasoning-gym")}

    @property
    def label(self) -> str:
        """The task's name as records carry it."""
        return f"{TASK_PREFIX}{self.task}"


class StepPart(Part):
    """Some of the rows of a step: those whose columns hold what `where` says."""

    where: Where = Field(
        default={},
        description="keep rows whose column equals a value, or one of a list of values; columns are those of "
        "the step's own sources, labels among them",
    )
    limit: int | None = Field(default=None, ge=1, description="take at most this many rows")
    weight: float | None = Field(
        default=None, gt=0, description="share in a list of sources, relative to the others"
    )

    @property
    def label(self) -> str:
        """The step, and which of its rows."""
        return f"{self.step} where {described_where(self.where)}" if self.where else str(self.step)


def described_where(where: Where) -> str:
    """The conditions of a `where` in words."""
    return " and ".join(f"{column} = {value!r}" for column, value in where.items())


_KEYS = {"path": "FileSource", "dataset": "HubSource", "task": "TaskSource", "step": "StepPart"}


def _kind(value: Any) -> str | None:
    if isinstance(value, Mapping):
        kinds = [kind for key, kind in _KEYS.items() if key in value]
        return kinds[0] if len(kinds) == 1 else None
    if isinstance(value, str):
        return "DataRef"
    return type(value).__name__


def _check_lone(value: Any) -> Any:
    if isinstance(value, _SourceSettings | StepPart) and value.weight is not None:
        raise ValueError("weight has a meaning only in a list of sources")
    return value


_EXPECTED = (
    "expected a step's name, a path with a '/', or a mapping with exactly one of path, dataset, task and step"
)

_BY_KIND = Discriminator(_kind, custom_error_type="source", custom_error_message=_EXPECTED)
_Source = (
    Annotated[FileSource, Tag("FileSource")]
    | Annotated[HubSource, Tag("HubSource")]
    | Annotated[TaskSource, Tag("TaskSource")]
)
_Member = Annotated[DataRef, Tag("DataRef")] | Annotated[StepPart, Tag("StepPart")] | _Source

Source = Annotated[_Source, _BY_KIND]
LearnedLabel.model_rebuild()
Member = Annotated[_Member, _BY_KIND]
Data = Annotated[
    _Member | Annotated[list[Member], Field(min_length=1), Tag("list")], _BY_KIND, AfterValidator(_check_lone)
]
"""How a settings field declares its rows: a reference, a source, or a list of these (a mixture)."""


def source_of_path(path: str) -> FileSource:
    """The source that a reference to a data file's path stands for. DataError when it is no data file."""
    if Path(path).suffix.lower() not in DATA_SUFFIXES:
        raise DataError(
            "neither an artifact's folder nor a data file",
            where=path,
            expected=f"a folder with manifest.json, or a file ending in {', '.join(DATA_SUFFIXES)}",
        )
    return FileSource(path=InputPath(path))
