"""The rows of steps: all of them, their views, and parts by the columns that rows carry."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

from potstill.core.errors import DataError
from potstill.core.keys import KeyNumbers
from potstill.core.records import RECORDS_FILE, Record, read_records
from potstill.core.settings import DataRef
from potstill.core.store import Artifact
from potstill.data.source_settings import StepPart, Where, described_where

__all__ = ["continued", "matches", "part_content", "prompts", "read_artifacts", "read_part"]

Views = Sequence[tuple[Artifact, str | None]]
_SHOWN_VALUES = 12
# A step's fingerprint is asked for several times a run, and sealed rows never change.
_CONTENTS: dict[tuple[Any, ...], str] = {}


def matches(where: Where, columns: Mapping[str, Any]) -> bool:
    """Whether each column of a `where` is there and holds its value, or one of its values."""
    for column, wanted in where.items():
        values = map(str, wanted if isinstance(wanted, list) else [wanted])
        if column not in columns or str(columns[column]) not in values:
            return False
    return True


def continued(records: Iterable[Record]) -> Iterator[Record]:
    """The records, and at their end a DataError where none has a beginning for `mask_prefix` to leave out."""
    found = False
    for record in records:
        found = found or record.prefix_characters > 0 or record.prefix_tokens > 0
        yield record
    if not found:
        raise DataError(
            "mask_prefix leaves nothing out: no response has a beginning that another model wrote",
            expected="traces of a generate step with continue:",
            mend="leave mask_prefix out, or name the continued traces as data",
        )


def prompts(records: Iterable[Record]) -> Iterator[Record]:
    """Each prompt once, without the response and what was found out about it; plain text is no prompt."""
    seen = KeyNumbers()
    for record in records:
        if record.messages and seen.add(record.prompt_id.encode("utf-8", "surrogatepass")):
            yield Record(
                prompt_id=record.prompt_id,
                messages=record.messages,
                held_out=record.held_out,
                reference=record.reference,
                task=record.task,
                meta=record.meta,
            )


def read_artifacts(reference: DataRef, artifacts: Views) -> Iterator[Record]:
    """The rows of a step's artifacts in order, or those of a view. DataError where they hold no records."""
    for artifact, _ in artifacts:
        if not (artifact.folder / RECORDS_FILE).is_file():
            raise DataError(
                f"an artifact of kind {artifact.kind!r} holds no records",
                where=str(reference),
                expected="prompts or traces",
            )
    records = (record for artifact, _ in artifacts for record in read_records(artifact.folder / RECORDS_FILE))
    if reference.view == "prompts":
        yield from prompts(records)
    elif reference.view == "held_out":
        none = True
        for record in records:
            if record.held_out:
                none = False
                yield record
        if none:
            raise DataError(
                "no row is held out",
                where=str(reference),
                mend="state a share where the rows come from, such as held_out: 0.1",
            )
    else:
        yield from records


def read_part(part: StepPart, artifacts: Views) -> Iterator[Record]:
    """The rows of a step that a part means. DataError, with the values that there are, where none matches."""
    values: dict[str, dict[str, None]] = {column: {} for column in part.where}

    def matching() -> Iterator[Record]:
        none = True
        for record in read_artifacts(part.step, artifacts):
            if matches(part.where, record.meta):
                none = False
                yield record
            elif none:
                for column, seen in values.items():
                    if column in record.meta and len(seen) < _SHOWN_VALUES:
                        seen.setdefault(str(record.meta[column]))
        if none and part.where:
            raise DataError(
                f"no row has {described_where(part.where)}",
                where=str(part.step),
                expected="; ".join(
                    f"{column}: {', '.join(seen)}" if seen else f"a row with the column {column!r}"
                    for column, seen in values.items()
                ),
                mend="correct the value, or give the step's sources `labels`",
            )

    return islice(matching(), part.limit)


def part_content(part: StepPart, artifacts: Views) -> str:
    """The hash of the rows that a part means, which other rows of the same step do not change."""
    contents = tuple(artifact.manifest.content for artifact, _ in artifacts)
    key = (part.step.view, json.dumps(part.where, sort_keys=True), part.limit, contents)
    if key not in _CONTENTS:
        found = hashlib.sha256()
        for record in read_part(part, artifacts):
            found.update(json.dumps(_content(record), sort_keys=True).encode() + b"\n")
        _CONTENTS[key] = found.hexdigest()
    return _CONTENTS[key]


def _content(record: Record) -> dict[str, Any]:
    """A record as JSON."""
    content = {one.name: getattr(record, one.name) for one in fields(record)}
    del content["alternatives"]
    if record.alternatives is not None:
        content["alternatives"] = record.alternatives.to_json()
    return content
