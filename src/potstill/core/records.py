"""The one row type of prompts and traces, and its Parquet form."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.core.errors import DataError
from potstill.core.hashing import hash_json

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["RECORDS_FILE", "Record", "count_records", "prompt_identity", "read_records", "write_records"]

RECORDS_FILE = "records.parquet"
_ROW_GROUP_ROWS = 1024
_READ_ROWS = 64  # as Python objects at once, which take many times what they do in the file


@dataclass(slots=True)
class Record:
    """A prompt, or a prompt with a response (a trace).

    `response` is the raw text; `reasoning` and `answer` are its two parts. `finish_reason` is "stop",
    "length" or, for responses given by a dataset, None (it counts as ended). `tokenizer` is the hash of the
    tokenizer that made the token ids. `task` names the verifier that judges an answer against `reference`.
    `logprobs` are natural logarithms, one a response token, at the temperature that `sampling` states, and
    `token_bytes` says of each how many UTF-8 bytes of `response` its token stands for; they sum to all of it.
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
    }
    return pa.schema([(one.name, special.get(one.name, pa.string())) for one in fields(Record)])


def _to_row(record: Record) -> dict[str, Any]:
    row = {one.name: getattr(record, one.name) for one in fields(Record)}
    for name in _JSON_COLUMNS:
        row[name] = json.dumps(row[name], ensure_ascii=False, sort_keys=name != "messages")
    return row


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write records to a Parquet file in constant memory, atomically; returns how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, count, partial = _schema(), 0, path.with_name(path.name + ".partial")
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        group: list[dict[str, Any]] = []
        for record in records:
            group.append(_to_row(record))
            if len(group) == _ROW_GROUP_ROWS:
                writer.write_table(pa.Table.from_pylist(group, schema))
                count, group = count + len(group), []
        writer.write_table(pa.Table.from_pylist(group, schema))
    os.replace(partial, path)
    return count + len(group)


def read_records(path: Path) -> Iterator[Record]:
    """Records of a Parquet file in order, a few in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"cannot be read as records ({error})",
            where=str(path),
            expected="a records file written by potstill",
        ) from error
    with file:
        for batch in file.iter_batches(batch_size=_READ_ROWS):
            for row in batch.to_pylist():
                for name in _JSON_COLUMNS:
                    row[name] = json.loads(row[name])
                yield Record(**row)


def count_records(path: Path) -> int:
    """How many records a Parquet file holds, from its footer."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return int(file.metadata.num_rows)
