"""The one row type of prompts and traces, and its Parquet form."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.core.alternatives import Alternatives
from potstill.core.errors import DataError
from potstill.core.hashing import hash_json

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["RECORDS_FILE", "Record", "count_records", "prompt_identity", "read_records", "write_records"]

RECORDS_FILE = "records.parquet"
_ROW_GROUP_ROWS, _ROW_GROUP_ALTERNATIVES = 1024, 2**20
_READ_ROWS = 64  # as Python objects at once, which take many times what they do in the file


@dataclass(slots=True)
class Record:
    """A prompt, or a prompt with a response (a trace).

    `response` is the raw text; `reasoning` and `answer` are its two parts. `finish_reason` is "stop",
    "length" or, for responses given by a dataset, None (it counts as ended). `tokenizer` is the hash of the
    tokenizer that made the token ids. `task` names the verifier that judges an answer against `reference`.
    `logprobs` are natural logarithms, one a response token, at the temperature that `sampling` states, and
    `token_bytes` says of each how many UTF-8 bytes of `response` its token stands for; they sum to all of it.
    `alternatives` are the likeliest tokens in the place of each, and in that of the end of the turn.
    `prefix_characters` counts the first characters of the response that another model wrote, before `model`
    went on from there; `prefix_tokens` the first of `response_token_ids` that stand for them. Their
    log-probabilities are unknown: one NaN each, a single one where there are no ids.
    """

    prompt_id: str
    messages: list[dict[str, str]]
    id: str = ""
    held_out: bool = False
    response: str | None = None
    reasoning: str | None = None
    answer: str | None = None
    finish_reason: str | None = None
    sample: int = 0
    reference: str | None = None
    task: str | None = None
    prompt_token_ids: list[int] | None = None
    response_token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    token_bytes: list[int] | None = None
    alternatives: Alternatives | None = None
    prefix_characters: int = 0
    prefix_tokens: int = 0
    tokenizer: str | None = None
    model: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    verdicts: dict[str, bool] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            self.id = hash_json([self.prompt_id, self.messages, self.response, self.sample, self.model])[:32]


def prompt_identity(content: Any) -> str:
    """The id of a prompt at its source, before any template or system prompt: 32 hexadecimal digits."""
    return hash_json(content)[:32]


_JSON_COLUMNS = frozenset({"messages", "sampling", "verdicts", "scores", "meta"})


def _schema() -> "pa.Schema":
    import pyarrow as pa

    special: dict[str, Any] = {
        "held_out": pa.bool_(),
        "sample": pa.int32(),
        "prefix_characters": pa.int32(),
        "prefix_tokens": pa.int32(),
        "prompt_token_ids": pa.list_(pa.int32()),
        "response_token_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "token_bytes": pa.list_(pa.int32()),
        "alternatives": pa.struct(
            {
                "counts": pa.list_(pa.int32()),
                "logprobs": pa.list_(pa.float32()),
                "ids": pa.list_(pa.int32()),
                "texts": pa.list_(pa.binary()),
            }
        ),
    }
    return pa.schema([(one.name, special.get(one.name, pa.string())) for one in fields(Record)])


def _to_row(record: Record) -> dict[str, Any]:
    row = {one.name: getattr(record, one.name) for one in fields(Record)}
    for name in _JSON_COLUMNS:
        row[name] = json.dumps(row[name], ensure_ascii=False, sort_keys=name != "messages")
    if record.alternatives is not None:
        row["alternatives"] = record.alternatives.columns()
    return row


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write records to a Parquet file in constant memory, atomically; returns how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, count, partial = _schema(), 0, path.with_name(path.name + ".partial")
    with pq.ParquetWriter(partial, schema, compression="zstd", write_page_checksum=True) as writer:
        group: list[dict[str, Any]] = []
        alternatives = 0
        for record in records:
            group.append(_to_row(record))
            alternatives += 0 if record.alternatives is None else len(record.alternatives.logprobs)
            if len(group) == _ROW_GROUP_ROWS or alternatives >= _ROW_GROUP_ALTERNATIVES:
                writer.write_table(pa.Table.from_pylist(group, schema))
                count, group, alternatives = count + len(group), [], 0
        writer.write_table(pa.Table.from_pylist(group, schema))
    os.replace(partial, path)
    return count + len(group)


def read_records(path: Path) -> Iterator[Record]:
    """Records of a Parquet file in order, a few in memory at a time. DataError where it is damaged."""
    batches = _batches(path)
    while (batch := next(batches, None)) is not None:
        try:
            records = _of_batch(batch)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise _unreadable(path, error) from error
        yield from records


def _batches(path: Path) -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size=_READ_ROWS)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _of_batch(batch: "pa.RecordBatch") -> list[Record]:
    alternatives = None
    if "alternatives" in batch.schema.names:  # as Python objects they would take ten times as much
        alternatives = batch.column("alternatives")
        batch = batch.drop_columns("alternatives")
    records = []
    for number, row in enumerate(batch.to_pylist()):
        row |= {name: json.loads(row[name]) for name in _JSON_COLUMNS}
        if alternatives is not None and alternatives[number].is_valid:
            row["alternatives"] = Alternatives.of_columns(alternatives[number])
        records.append(Record(**row))
    return records


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"cannot be read as records ({error})",
        where=str(path),
        expected="a records file as potstill has written it",
        mend="make the step again with --force, or copy the file again from where it came from",
    )


def count_records(path: Path) -> int:
    """How many records a Parquet file holds, from its footer. DataError where it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return int(file.metadata.num_rows)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
