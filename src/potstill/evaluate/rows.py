"""The rows an evaluation keeps: one a model and trace, one a model and answer; and their Parquet form."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.data.chat import split_reasoning

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "FAILED",
    "FORGETTING_FILE",
    "HELD_OUT_FILE",
    "JUDGED_FILE",
    "SAMPLES_FILE",
    "SCORED",
    "SCORES_FILE",
    "AnswerRow",
    "TraceRow",
    "answer_row",
    "read_traces",
    "write_answers",
    "write_forgetting",
    "write_judged",
    "write_traces",
]

SCORES_FILE, HELD_OUT_FILE, SAMPLES_FILE = "scores.parquet", "held_out.parquet", "samples.json"
FORGETTING_FILE, JUDGED_FILE = "forgetting.parquet", "judged.parquet"
SCORED, FAILED = "scored", "failed"
"""What stands in the place of a finish reason: options were scored, a server gave no answer."""


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
    """A model's answer to one prompt, the `sample`-th of them.

    `prompt` holds the messages as JSON. `scores` lie in 0..1, `counts` are lengths. Tokens are None where a
    server does not count them. `choice_logprobs` are an option's log-probability each, where options were
    scored; `response` is then the likeliest option. `note` is the verifier's on why the answer is wrong.
    """

    record_id: str
    prompt_id: str
    prompt: str
    response: str
    finish_reason: str
    prompt_tokens: int | None
    response_tokens: int | None
    verdicts: dict[str, bool] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    sample: int = 0
    choice_logprobs: list[float] | None = None
    note: str | None = None

    @property
    def final_answer(self) -> str:
        """What follows the think block; nothing where the prompt had opened it and it was never closed."""
        reasoning, answer = split_reasoning(self.response)
        return "" if reasoning is None and self.verdicts.get("tagged") else answer.strip()


_JSON_COLUMNS = ("verdicts", "scores", "counts")


def _trace_schema(*first: str) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        [
            *((name, pa.string()) for name in first),
            ("record_id", pa.string()),
            ("prompt_id", pa.string()),
            ("supervised_tokens", pa.int64()),
            ("cross_entropy_nats", pa.float64()),
            ("kl_nats", pa.float64()),
            ("agreed_tokens", pa.int64()),
        ]
    )


def write_traces(path: Path, rows: Mapping[str, Sequence[TraceRow]]) -> None:
    """All models' trace rows as one Parquet table, with the model's name first."""
    table = ({"model": model, **dataclasses.asdict(row)} for model, traces in rows.items() for row in traces)
    _write(path, table, _trace_schema("model"))


def write_forgetting(path: Path, rows: Mapping[str, Mapping[str, Sequence[TraceRow]]]) -> None:
    """All models' trace rows of the sets for forgetting, with the model's and the set's names first."""
    table = (
        {"model": model, "task": name, **dataclasses.asdict(row)}
        for model, sets in rows.items()
        for name, traces in sets.items()
        for row in traces
    )
    _write(path, table, _trace_schema("model", "task"))


def write_judged(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """What a judge said of each pair of answers in each order, as one Parquet table."""
    import pyarrow as pa

    columns = {"model_first": pa.bool_(), "asked": pa.bool_()}
    names = ("task", "model", "prompt_id", "model_first", "asked", "choice", "response")
    schema = pa.schema([(name, columns.get(name, pa.string())) for name in names])
    _write(path, (dict(row) for row in rows), schema)


def read_traces(path: Path, model: str) -> list[TraceRow]:
    """One model's trace rows of a table, in order."""
    import pyarrow.parquet as pq

    names = [one.name for one in dataclasses.fields(TraceRow)]
    table = pq.read_table(path, columns=names, filters=[("model", "=", model)])
    return [TraceRow(**row) for row in table.to_pylist()]


def answer_row(columns: Mapping[str, Any]) -> AnswerRow:
    """An answer by the columns of its row in the table that `write_answers` makes."""
    names = [one.name for one in dataclasses.fields(AnswerRow)]
    parsed = {name: json.loads(columns[name]) for name in _JSON_COLUMNS}
    return AnswerRow(**{name: columns[name] for name in names} | parsed)


def write_answers(path: Path, rows: Mapping[str, Mapping[str, Sequence[AnswerRow]]]) -> None:
    """All models' answers by task as one Parquet table; verdicts, scores and counts are JSON."""
    import pyarrow as pa

    schema = pa.schema(
        [
            ("model", pa.string()),
            ("task", pa.string()),
            ("record_id", pa.string()),
            ("prompt_id", pa.string()),
            ("sample", pa.int32()),
            ("prompt", pa.string()),
            ("response", pa.string()),
            ("finish_reason", pa.string()),
            ("prompt_tokens", pa.int64()),
            ("response_tokens", pa.int64()),
            *((name, pa.string()) for name in _JSON_COLUMNS),
            ("choice_logprobs", pa.list_(pa.float64())),
            ("note", pa.string()),
        ]
    )
    table = (
        {
            "model": model,
            "task": task,
            **dataclasses.asdict(row),
            **{name: json.dumps(getattr(row, name)) for name in _JSON_COLUMNS},
        }
        for model, tasks in rows.items()
        for task, answers in tasks.items()
        for row in answers
    )
    _write(path, table, schema)


def _write(path: Path, rows: Iterable[dict[str, Any]], schema: "pa.Schema") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.Table.from_pylist([*rows], schema), partial, compression="zstd")
    os.replace(partial, path)
