"""The rows an evaluation keeps: one a model and trace, one a model and answer; and their Parquet form."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "HELD_OUT_FILE",
    "SAMPLES_FILE",
    "SCORES_FILE",
    "AnswerRow",
    "TraceRow",
    "read_traces",
    "write_answers",
    "write_traces",
]

SCORES_FILE, HELD_OUT_FILE, SAMPLES_FILE = "scores.parquet", "held_out.parquet", "samples.json"


@dataclass(frozen=True)
class TraceRow:
    """A model on one held-out trace: sums over its supervised tokens, in nats and tokens."""

    record_id: str
    prompt_id: str
    supervised_tokens: int
    cross_entropy_nats: float
    kl_nats: float | None = None
    agreed_tokens: int | None = None


@dataclass(frozen=True)
class AnswerRow:
    """A model's answer to one prompt. `prompt` holds the messages as JSON, `scores` lie in 0..1."""

    record_id: str
    prompt_id: str
    prompt: str
    response: str
    finish_reason: str
    prompt_tokens: int
    response_tokens: int
    verdicts: dict[str, bool] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


def write_traces(path: Path, rows: Mapping[str, Sequence[TraceRow]]) -> None:
    """All models' trace rows as one Parquet table, with the model's name first."""
    import pyarrow as pa

    schema = pa.schema(
        [
            ("model", pa.string()),
            ("record_id", pa.string()),
            ("prompt_id", pa.string()),
            ("supervised_tokens", pa.int64()),
            ("cross_entropy_nats", pa.float64()),
            ("kl_nats", pa.float64()),
            ("agreed_tokens", pa.int64()),
        ]
    )
    table = [{"model": model, **dataclasses.asdict(row)} for model, traces in rows.items() for row in traces]
    _write(path, pa.Table.from_pylist(table, schema))


def read_traces(path: Path, model: str) -> list[TraceRow]:
    """One model's trace rows of a table, in order."""
    import pyarrow.parquet as pq

    names = [one.name for one in dataclasses.fields(TraceRow)]
    table = pq.read_table(path, columns=names, filters=[("model", "=", model)])
    return [TraceRow(**row) for row in table.to_pylist()]


def write_answers(path: Path, rows: Mapping[str, Mapping[str, Sequence[AnswerRow]]]) -> None:
    """All models' answers by task as one Parquet table; verdicts and scores are JSON."""
    import pyarrow as pa

    schema = pa.schema(
        [
            ("model", pa.string()),
            ("task", pa.string()),
            ("record_id", pa.string()),
            ("prompt_id", pa.string()),
            ("prompt", pa.string()),
            ("response", pa.string()),
            ("finish_reason", pa.string()),
            ("prompt_tokens", pa.int64()),
            ("response_tokens", pa.int64()),
            ("verdicts", pa.string()),
            ("scores", pa.string()),
        ]
    )
    table = [
        {
            "model": model,
            "task": task,
            **dataclasses.asdict(row),
            "verdicts": json.dumps(row.verdicts),
            "scores": json.dumps(row.scores),
        }
        for model, tasks in rows.items()
        for task, answers in tasks.items()
        for row in answers
    ]
    _write(path, pa.Table.from_pylist(table, schema))


def _write(path: Path, table: "pa.Table") -> None:
    import pyarrow.parquet as pq

    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, path)
