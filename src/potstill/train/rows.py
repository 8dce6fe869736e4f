"""The rows of a train step, packed: from traces, rendered once, or from cached logits."""

import bisect
import itertools
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.core.errors import DataError, ModelError, TrainingError
from potstill.core.hashing import hash_json
from potstill.core.records import Record
from potstill.core.settings import DataRef
from potstill.core.step import StepContext
from potstill.core.store import Artifact
from potstill.data.chat import Rendered, Renderer, fit
from potstill.data.packed_rows import PackedRows
from potstill.data.sources import Data
from potstill.logits.logit_cache import LogitCache
from potstill.losses.types import Sampled, Sparse, TeacherSignal, concatenate

__all__ = [
    "CachedTeacher",
    "Rows",
    "SignalSource",
    "TrainingData",
    "length_limit",
    "logit_artifacts",
    "read_caches",
    "rows_of_records",
]


class Rows(PackedRows):
    """Packed rows with what training counts of them; in memory a row costs 24 bytes.

    `sources` holds for each row its number where it came from. Where there are `shares`, as many neighbours
    are the tasks that one trace was made into, and each task has its share of the loss.
    """

    def __init__(self, shares: Sequence[float] = (), folder: Path | None = None) -> None:
        super().__init__(folder)
        self.shares = tuple(shares)
        self.sources, self._supervised = array("q"), array("i")

    def append(self, rendered: Rendered, record_id: str = "", source: int = 0) -> None:
        """Add one row."""
        super().append(rendered, record_id)
        self.sources.append(source)
        self._supervised.append(rendered.supervised_tokens)

    @property
    def rows_a_trace(self) -> int:
        """How many neighbours were made of one trace."""
        return max(1, len(self.shares))

    def supervised(self, number: int) -> int:
        """Tokens of a row that the loss counts."""
        return self._supervised[number]

    def factors(self, numbers: Sequence[int]) -> dict[int, float] | None:
        """What the tokens of some rows weigh, so that their mean is the tasks' means, each with its share.

        None where tokens weigh alike.
        """
        if not self.shares:
            return None
        tokens = [0] * len(self.shares)
        for number in numbers:
            tokens[number % len(tokens)] += self.supervised(number)
        by_task = [
            share * sum(tokens) / max(1, count) for share, count in zip(self.shares, tokens, strict=True)
        ]
        return {number: by_task[number % len(by_task)] for number in numbers}

    @property
    def supervised_tokens(self) -> int:
        """How many tokens the loss counts, of all rows."""
        return sum(self._supervised)


SignalSource = Callable[[Rows, Sequence[int]], TeacherSignal]
"""The teacher's signal for the supervised tokens of some rows, given by number, row by row in order."""


@dataclass
class TrainingData:
    """Rows to train on and held-out rows to evaluate on.

    `shortened` counts rows whose end was cut off at the length limit; `left_out` has an error for each row
    that is missing because its prompt alone fills it.
    """

    train: Rows = field(default_factory=Rows)
    held_out: Rows = field(default_factory=Rows)
    shortened: int = 0
    left_out: list[DataError] = field(default_factory=list)

    def add(
        self,
        rendered: Rendered,
        record_id: str,
        *,
        held_out: bool,
        max_length: int,
        row_number: int,
        source: int,
    ) -> None:
        """Add a row, its end cut off at `max_length` tokens, unless nothing would be left of it to learn."""
        try:
            fitted = fit(rendered, max_length, row_number=row_number)
        except DataError as error:
            self.left_out.append(error)
            return
        self.shortened += len(fitted.ids) < len(rendered.ids)
        (self.held_out if held_out else self.train).append(fitted, record_id, source)

    def check(self) -> None:
        """Raise unless there are rows to train on."""
        if not len(self.train):
            if self.left_out:
                raise self.left_out[0]
            held_out = f": all {len(self.held_out)} are held out" if len(self.held_out) else ""
            raise TrainingError(
                f"there are no rows to train on{held_out}",
                expected="traces that are not held out",
                mend="add data, or lower its held-out share",
            )


def length_limit(model: Any, max_length: int | None) -> int:
    """Tokens that a row may have: as stated, and never more than the model's context."""
    context_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(one for one in (max_length, context_tokens, 2**31) if one is not None)


def rows_of_records(
    records: Iterable[Record],
    renderer: Renderer,
    max_length: int,
    find: Callable[[Rendered], int] | None = None,
    *,
    mask_prefix: bool = False,
    folder: Path | None = None,
) -> TrainingData:
    """Render every trace once; `find` gives each rendered row its number where the teacher's signal is.

    With `mask_prefix` the loss leaves out what another model wrote before the response was continued.
    """
    rows = TrainingData(Rows(folder=folder), Rows(folder=folder))
    for number, record in enumerate(records, start=1):
        rendered = renderer.render(record, mask_prefix=mask_prefix, row_number=number)
        rows.add(
            rendered,
            record.id,
            held_out=record.held_out,
            max_length=max_length,
            row_number=number,
            source=number if find is None else find(rendered),
        )
    return rows


def logit_artifacts(data: Data, context: StepContext) -> list[tuple[Artifact, str | None]]:
    """The caches of logits that data refers to; none where it leads to prompts or traces."""
    if not isinstance(data, DataRef) or (data.is_path and not Path(data).is_dir()):
        return []
    found = context.artifacts(data)
    caches = [(artifact, view) for artifact, view in found if artifact.kind == "cache"]
    if caches and len(caches) < len(found):
        raise TrainingError(
            f"{data} leads to cached logits and to {len(found) - len(caches)} other artifacts",
            expected="logits for all rows or for none",
        )
    return caches


def read_caches(
    caches: Sequence[tuple[LogitCache, str | None]],
    *,
    vocabulary_size: int,
    temperature: float,
    top_k: int | None,
    max_length: int,
    folder: Path | None = None,
) -> tuple[TrainingData, "CachedTeacher"]:
    """The rows of caches, each with its view, and the teacher that answers for them at one temperature.

    Raises DataError as `CachedTeacher` does, ModelError for another vocabulary.
    """
    teacher = CachedTeacher([cache for cache, _ in caches], temperature, top_k)
    rows, source = TrainingData(Rows(folder=folder), Rows(folder=folder)), 0
    for cache, view in caches:
        if view == "prompts":
            raise TrainingError("prompts have no responses to learn from", where=str(cache.folder))
        if cache.codec.vocabulary_size != vocabulary_size:
            raise ModelError(
                f"the logits are over {cache.codec.vocabulary_size} ids, the student has {vocabulary_size}",
                where=str(cache.folder),
                expected="one vocabulary for teacher and student: the loss compares them id by id",
                mend="cache the logits of a teacher of the student's family, or train on its responses alone",
            )
        for number in range(len(cache)):
            row = cache.row(number)
            if row.held_out or view is None:
                rows.add(
                    Rendered(list(row.token_ids), list(row.mask)),
                    row.record_id,
                    held_out=row.held_out,
                    max_length=max_length,
                    row_number=number + 1,
                    source=source,
                )
            source += 1
    return rows, teacher


class CachedTeacher:
    """A teacher whose answers were cached: no teacher is in memory. A `SignalSource`.

    It gives the `top_k` most probable ids, by default as many as the smallest of the caches kept; the others
    join the tail. Raises DataError for a temperature that was not declared, for more ids than a cache kept or
    any of drawn ones, and for caches of different codecs.
    """

    def __init__(self, caches: Sequence[LogitCache], temperature: float, top_k: int | None = None) -> None:
        for cache in caches:
            self.signal_type = type(cache.signal(0, temperature, top_k))  # refuses what was not kept
        if len(names := {cache.codec.name for cache in caches}) > 1:
            raise DataError(
                f"logits of codecs {' and '.join(sorted(names))} cannot be mixed",
                where=", ".join(str(cache.folder) for cache in caches),
                expected="caches of one codec, whose signals are of one kind",
            )
        ks = [cache.codec.k for cache in caches if cache.codec.k is not None]
        self.temperature, self.k = temperature, top_k or min(ks, default=None)
        self._caches, self._starts = [*caches], [0, *itertools.accumulate(map(len, caches))]

    def __call__(self, rows: Rows, numbers: Sequence[int]) -> Sparse | Sampled:
        """The signal of rows that were read from the caches."""
        # Of a row that was cut, the cache has more signals than tokens are left: the first are theirs.
        signals: list[Any] = [  # of one kind, as the caches are of one codec
            self._caches[which].signals(
                [rows.sources[number] - self._starts[which] for number in part],
                self.temperature,
                self.k,
                tokens=[*map(rows.supervised, part)],
            )
            for which, part in (
                (which, list(group))
                for which, group in itertools.groupby(numbers, key=lambda one: self._cache_of(rows, one))
            )
        ]
        signal: Sparse | Sampled = concatenate(signals)
        return signal

    @property
    def digest(self) -> str:
        """What tells this teacher from others of the same rows."""
        return hash_json([cache.digest for cache in self._caches])[:12]

    def _cache_of(self, rows: Rows, number: int) -> int:
        return bisect.bisect_right(self._starts, rows.sources[number]) - 1
