"""Where rows come from: `read` makes records of references, sources and mixtures."""

import functools
import importlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from potstill.core.errors import DataError
from potstill.core.events import Reporter
from potstill.core.hashing import derive_seed
from potstill.core.keys import KeyNumbers
from potstill.core.records import RECORDS_FILE, Record, count_records, prompt_identity
from potstill.core.settings import DataRef, InputPath, Reference
from potstill.core.step import StepContext
from potstill.data.chat import split_reasoning
from potstill.data.files import PlacedRow, read_rows
from potstill.data.labels import Labels
from potstill.data.logprob_records import LogprobIndex
from potstill.data.parts import matches, prompts, read_artifacts, read_part
from potstill.data.shapes import (
    BadRow,
    Example,
    Shape,
    describe_shapes,
    nested_columns,
    parse_row,
    recognise,
    scalar_columns,
)
from potstill.data.shuffling import shuffled
from potstill.data.source_settings import (
    Data,
    FileSource,
    HubSource,
    Member,
    Source,
    StepPart,
    TaskSource,
    described_where,
    source_of_path,
)
from potstill.data.tasks import task_rows
from potstill.data.templates import columns_of, fill, template_text

__all__ = [
    "Data",
    "FileSource",
    "HubSource",
    "Source",
    "StepPart",
    "TaskSource",
    "count_rows",
    "first_prompts",
    "label_names",
    "prompts",
    "read",
    "read_beforehand",
    "read_file",
    "source_of_path",
]

_SHOWN_FAULTS = 3
_HUB_SHUFFLE_ROWS = 10_000


def read(data: Data, context: StepContext) -> Iterator[Record]:
    """The records of a reference, a source or a mixture, in order and in constant memory.

    Says and records as an event how many rows each gave and left out. DataError when there is none, when a
    column, file, task or shape is missing, and at a malformed row where the source is `strict`.
    """
    count = 0
    for record in _mixed(data, context) if isinstance(data, list) else _read_one(data, context):
        context.check_stop()
        count += 1
        yield record
    if count == 0:
        members = data if isinstance(data, list) else [data]
        raise DataError(
            "there are no rows", where=", ".join(map(_label, members)), expected="at least one row"
        )


def label_names(data: Data, context: StepContext) -> list[str]:
    """The labels that rows of this data are given or chosen by, here or in the steps that they come from."""
    names: list[str] = []
    for one in data if isinstance(data, list) else [data]:
        if not isinstance(one, DataRef | StepPart):
            names += one.labels
            continue
        names += one.where if isinstance(one, StepPart) else ()
        reference = one.step if isinstance(one, StepPart) else one
        if not (reference.is_path and not Path(reference).is_dir()):
            for artifact, _ in context.artifacts(reference):
                names += artifact.manifest.extra.get("labels", ())
    return list(dict.fromkeys(names))


def count_rows(data: Data, seed: int) -> int | None:
    """How many rows `read` gives under a recipe's seed; None where only a run can tell (steps, the hub).

    Of a data set on the hub it is the most that a stated `limit` lets through.
    Files are read to the end, so that what is wrong with them is raised as in a run.
    """
    if isinstance(data, DataRef) and (records := Path(data) / RECORDS_FILE).is_file():
        return count_records(records)
    if isinstance(data, TaskSource) and not data.where:
        return min(data.size, data.limit or data.size)
    if isinstance(data, HubSource):
        return data.limit
    if _only_a_run_can_tell(data):
        return None
    return sum(1 for _ in read(data, _outside_a_run(seed)))


def read_beforehand(data: Data, seed: int) -> Iterator[Record] | None:
    """The records that `read` gives under a recipe's seed; None where only a run can tell."""
    return None if _only_a_run_can_tell(data) else read(data, _outside_a_run(seed))


def first_prompts(data: Data, seed: int, count: int | None) -> list[Record]:
    """The first prompts, or all of them, that `read` gives; none where only a run can tell."""
    if _only_a_run_can_tell(data):
        return []
    return list(itertools.islice(prompts(read(data, _outside_a_run(seed))), count))


def _only_a_run_can_tell(data: Data) -> bool:
    return any(
        isinstance(one, HubSource | StepPart) or (isinstance(one, DataRef) and not Path(one).is_file())
        for one in (data if isinstance(data, list) else [data])
    )


def read_file(path: str | Path) -> Iterator[Record]:
    """The records of a data file, outside a run: a malformed row is an error."""
    return read(FileSource(path=InputPath(path), strict=True), _outside_a_run(seed=0))


def _outside_a_run(seed: int) -> StepContext:
    return StepContext(
        name="read",
        kind="read",
        folder=Path(),
        seed=seed,
        cache_folder=Path(),
        reporter=Reporter("quiet"),
        resolve_models=_unresolved,
        resolve_data=_unresolved,
    )


def _unresolved(reference: Reference) -> NoReturn:
    raise AssertionError(f"reading a source needs no {reference}")


def _label(member: Member) -> str:
    return str(member) if isinstance(member, str) else member.label


def _read_one(member: Member, context: StepContext) -> Iterator[Record]:
    if isinstance(member, StepPart):
        return read_part(member, context.artifacts(member.step))
    if not isinstance(member, DataRef):
        return _read_source(member, context)
    if member.is_path and not Path(member).is_dir():
        return _read_source(source_of_path(member), context)
    return read_artifacts(member, context.artifacts(member))


def _mixed(members: list[Member], context: StepContext) -> Iterator[Record]:
    """The members' rows without repetitions: one member after the other, or interleaved by weight.

    Rows with a response repeat another when all of the record does, prompts when the prompt does. By weight,
    the member that is furthest behind its share is next, and the mixture ends when that one has no more rows,
    so that the shares hold to the end.
    """
    weights = [getattr(member, "weight", None) for member in members]
    streams = [_read_one(member, context) for member in members]
    taken, repeated, seen = [0] * len(members), [0] * len(members), KeyNumbers()

    def fresh(number: int) -> Iterator[Record]:
        for record in streams[number]:
            key = record.prompt_id if record.response is None else record.id
            if not seen.add(key.encode("utf-8", "surrogatepass")):
                repeated[number] += 1
                continue
            taken[number] += 1
            yield record

    if all(weight is None for weight in weights):
        for number in range(len(members)):
            yield from fresh(number)
    else:
        share = [1.0 if weight is None else weight for weight in weights]
        rows = [fresh(number) for number in range(len(members))]
        while True:
            number = min(range(len(members)), key=lambda one: (taken[one] + 1) / share[one])
            record = next(rows[number], None)
            if record is None:
                break
            yield record
    parts = ", ".join(
        f"{_label(member)} {count:,}" + (f" ({again:,} repeated)" if again else "")
        for member, count, again in zip(members, taken, repeated, strict=True)
    )
    context.say(f"mixture of {sum(taken):,} rows: {parts}")
    context.event("mixture", members=[*map(_label, members)], rows=taken, repeated=repeated)


def _read_source(source: Source, context: StepContext) -> Iterator[Record]:
    """One source's records; malformed rows are left out, told and counted."""
    reading = _Reading(source, context)
    records = reading.records()
    if source.shuffle and not reading.shuffled_at_source:
        folder = None if context.folder == Path() else context.scratch
        seed = derive_seed(context.seed, "shuffle", source.label)
        records = shuffled(records, seed, source.limit, folder)
    count = held_out = 0
    for record in itertools.islice(records, source.limit):
        count, held_out = count + 1, held_out + record.held_out
        yield record
    reading.finish(count, held_out)


class _Reading:
    """One pass over a source: its columns, its faults, and the records in between."""

    def __init__(self, source: Source, context: StepContext) -> None:
        self.source, self.context = source, context
        self.shuffled_at_source = isinstance(source, HubSource) and source.streaming
        self.template = None if source.template is None else template_text(source.template)
        self.shape: Shape | None = None
        self.logprobs = _logprob_index(source)
        self.labels = Labels(source.labels, context, _read_source)
        self.columns: list[str] = []
        self.matched = self.faults = 0
        self.first_fault = ""

    def records(self) -> Iterator[Record]:
        """Records of the usable rows, in the source's order."""
        for place, row in self._rows():
            if isinstance(row, BadRow):
                self._fault(place, row)
                continue
            self.columns = self.columns or [*row]
            try:
                columns = {**nested_columns(row), **row}
                labels = self.labels.of(columns, functools.partial(self._example, columns))
                if not matches(self.source.where, {**columns, **labels}):
                    continue
                self.matched += 1
                yield self._record(row, columns, labels)
            except BadRow as bad:
                self._fault(place, bad)
            except DataError as error:
                if error.where is not None:
                    raise
                raise DataError(error.what, where=place, expected=error.expected, mend=error.mend) from error

    def finish(self, count: int, held_out: int) -> None:
        """Say what was read; DataError when that is nothing."""
        label, faults = self.source.label, self.faults
        self.labels.say(label, self.context)
        self.context.event("source", source=label, rows=count, held_out=held_out, left_out=faults)
        parts = [f"{count:,} rows"]
        if self.source.held_out:
            parts.append(f"{held_out:,} of them held out")
        if faults:
            parts.append(f"{faults:,} malformed rows left out")
        self.context.say(f"{label}: {', '.join(parts)}")
        if count:
            return
        if faults:
            raise DataError(f"none of its rows can be used; the first is {self.first_fault}", where=label)
        if self.columns and self.source.where:
            raise DataError(
                f"no row has {described_where(self.source.where)}",
                where=label,
                expected=f"a row that matches; its columns are {self._found()}",
            )
        raise DataError("there are no rows", where=label, expected="at least one row")

    def _rows(self) -> Iterator[PlacedRow]:
        source = self.source
        if isinstance(source, FileSource):
            return read_rows(Path(source.path))
        if isinstance(source, HubSource):
            return _hub_rows(source, derive_seed(self.context.seed, "shuffle", source.label))
        seed = self.context.derive_seed("task", source.task) if source.seed is None else source.seed
        rows = task_rows(source.task, source.parameters, source.size, seed)
        return ((f"{source.label}, problem {number}", row) for number, row in enumerate(rows, start=1))

    def _fault(self, place: str, bad: BadRow) -> None:
        if self.source.strict:
            raise DataError(
                str(bad), where=place, mend="correct the row, or leave `strict` off to go on without it"
            )
        self.faults += 1
        self.first_fault = self.first_fault or f"{place}: {bad}"
        if self.faults <= _SHOWN_FAULTS:
            self.context.event("row_left_out", source=self.source.label, place=place, reason=str(bad))
            self.context.say(f"{place}: {bad}; left out")

    def _found(self) -> str:
        return ", ".join(self.columns) or "none"

    def _record(
        self, row: Mapping[str, Any], columns: Mapping[str, Any], labels: Mapping[str, Any]
    ) -> Record:
        example = self._example(columns)
        example.meta = {**self._kept(example, row), **example.meta, **self._own(labels, example)}
        messages, system = example.messages, self.source.system
        response = example.response
        if self.template is not None:
            asked = messages[-1]["content"] if messages else ""
            filled = fill(self.template, {**({"prompt": asked} if asked else {}), **columns, **labels})
            messages = [*messages[:-1], {"role": "user", "content": filled}]
            response = response if example.messages else None
        if system is not None:
            if not messages:
                raise DataError(
                    "`system` has no place in plain text",
                    mend="leave it out, or make prompts with a `template`",
                )
            rest = messages[1:] if messages[0]["role"] == "system" else messages
            messages = [{"role": "system", "content": system}, *rest]
        try:
            prompt_id = prompt_identity(example.question)
        except (TypeError, ValueError) as error:
            raise BadRow(f"a column that no JSON can hold ({error})") from error
        share = derive_seed(self.context.seed, "held_out", prompt_id) / 2**63
        reasoning, answer = (None, None) if response is None else split_reasoning(response)
        record = Record(
            prompt_id=prompt_id,
            messages=messages,
            held_out=share < self.source.held_out,
            response=response,
            reasoning=reasoning,
            answer=answer,
            reference=example.reference,
            task=example.task,
            meta=example.meta,
        )
        return record if self.logprobs is None else self.logprobs.join(record, row)

    def _kept(self, example: Example, row: Mapping[str, Any]) -> dict[str, Any]:
        """The short columns that are worth keeping with a record, without those that it is made of.

        A label stays where its word is an option or the answer as well.
        """
        if isinstance(self.source, TaskSource):
            return {}
        spoken = {example.response, example.reference, *(one["content"] for one in example.messages)}
        spoken |= {*example.meta.get("choices", ())}
        return {
            name: value
            for name, value in scalar_columns(row).items()
            if name not in example.read_columns or value not in spoken
        }

    def _own(self, labels: Mapping[str, Any], example: Example) -> Mapping[str, Any]:
        """The labels, once none is known to stand in the way of what a task's scorer reads."""
        taken = sorted({*labels} & {*example.meta}) if isinstance(self.source, TaskSource) else []
        if taken:
            raise DataError(
                f"the task has a figure of its own that is called {taken[0]!r}",
                where=self.source.label,
                mend="give the label another name",
            )
        return labels

    def _example(self, columns: Mapping[str, Any]) -> Example:
        source = self.source
        if isinstance(source, TaskSource):
            question = str(columns["question"])
            messages = [{"role": "user", "content": question}]
            return Example(question, messages, None, columns["answer"], source.label, dict(columns["meta"]))
        if self.shape is None:
            self.shape = recognise(columns, source.shape)
        if self.shape is None and self.template is not None:
            used = {name: columns.get(name) for name in columns_of(self.template)}
            return Example(used)
        if self.shape is None:
            raise DataError(
                f"the columns {self._found()} are not those of "
                + ("a known shape" if source.shape == "auto" else f"the shape {source.shape!r}"),
                where=source.label,
                expected=describe_shapes(),
                mend="rename the columns, or make prompts with a `template` such as 'Summarise: {column}'",
            )
        return parse_row(columns, self.shape)


def _logprob_index(source: Source) -> LogprobIndex | None:
    settings = None if isinstance(source, TaskSource) else source.logprobs
    if settings is None:
        return None
    if settings.file is not None:
        return LogprobIndex(settings, read_rows(Path(settings.file)))
    assert settings.hub is not None
    hub = HubSource(
        dataset=settings.hub,
        config=settings.config,
        split=settings.split,
        revision=settings.revision,
        streaming=True,
    )
    return LogprobIndex(settings, _hub_rows(hub, seed=0))


def _hub_rows(source: HubSource, seed: int) -> Iterator[PlacedRow]:
    datasets = importlib.import_module("datasets")  # without types, and slow to import
    try:
        rows = datasets.load_dataset(
            source.dataset,
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    except Exception as error:  # name, network, access, configuration: the library's sentence says it best
        raise DataError(
            f"the data set cannot be loaded: {error}",
            where=source.label,
            expected="a data set's name on the hub, its config and split",
        ) from error
    if source.streaming and source.shuffle:
        rows = rows.shuffle(seed=seed % 2**32, buffer_size=_HUB_SHUFFLE_ROWS)
    for number, row in enumerate(rows, start=1):
        yield f"{source.label}, row {number}", row
