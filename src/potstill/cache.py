"""The `cache` step: what a teacher gives to every supervised token of some rows, kept on disk for training.

Shapes: B rows, T positions, N supervised tokens, H hidden size, V vocabulary.
"""

import itertools
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from potstill.core.checked_json import DamagedJsonError, checked_json, read_checked_json
from potstill.core.errors import DataError, ModelError
from potstill.core.keys import KeyNumbers
from potstill.core.records import Record
from potstill.core.replicas import OpenReplicas, Replicas
from potstill.core.settings import ModelRef, Settings, execution
from potstill.core.step import StepContext, StepResult
from potstill.core.store import Artifact, Store, write_atomically
from potstill.data.batches import many_micro_batches
from potstill.data.chat import Rendered, Renderer
from potstill.data.packed_rows import PackedRows
from potstill.data.parts import continued
from potstill.data.sources import Data, read
from potstill.models import (
    LoadedModel,
    TransformersModel,
    load,
    load_tokenizer,
    output_head,
    vocabulary_size,
)
from potstill.teachers import GivenTokens, OpenAIModel, VllmModel
from potstill.teachers.failures import FAILURES_FILE, Failures
from potstill.teachers.given_tokens import KEPT
from potstill.teachers.kept_tokens import kept_alternatives, tokenizer_of
from potstill.teachers.replicated import identity_of_copy, open_copies
from potstill.teachers.transformers import context_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from potstill.logits.codecs import Codec
    from potstill.logits.shards import CachedRow, ShardWriter

__all__ = ["MEMORY_SHARE", "CacheSettings", "ScoringReplica", "import_artifact", "most_batch_tokens", "run"]

# Past this many tokens a CPU's matrix products get no faster; a GPU's need more of them.
_MOST_CPU_TOKENS, _MOST_GPU_TOKENS, _LEAST_BATCH_TOKENS = 4096, 65_536, 256
_SERVER_TOKENS = 16_384
MEMORY_SHARE = 0.25  # of what is free, for the activations of a batch


class CacheSettings(Settings):
    """Keep what a teacher gives to every supervised token of traces or plain text.

    Codec `topk` keeps the likeliest ids with their log-probabilities, `sampled` ids drawn from the teacher's
    distribution at one temperature: about a seventh of the bytes, and unbiased gradients.
    """

    kind: ClassVar[str] = "cache"
    schema_version: ClassVar[int] = 2

    do: Literal["cache"]
    model: ModelRef
    data: Data
    codec: Literal["topk", "sampled"] = Field(
        "topk", description="keep the likeliest ids, or draw ids at random (RS-KD)"
    )
    top_k: int = Field(64, ge=1, description="ids kept a token by codec topk")
    draws: int = Field(50, ge=1, le=65535, description="ids drawn a token by codec sampled, with replacement")
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        [1.0],
        description="temperatures that training may ask for; of topk 1 is always among them, of sampled it "
        "is the one temperature of the draws",
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="longer conversations are left out, longer texts cut into windows; by default the "
        "model's context",
    )
    from_traces: bool = Field(
        False,
        description="take what the traces keep of the model that wrote them (`logprobs` of generate)",
    )
    max_failed_share: float = Field(
        0.0, ge=0, le=1, description="share of the rows that may be left without logits, since they failed"
    )
    mask_prefix: bool = Field(
        False,
        description="of responses that the teacher continued, keep nothing for what the other model wrote",
    )
    batch_tokens: int | None = execution(
        None, ge=1, description="padded tokens a forward pass; by default found from the memory that is free"
    )

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, temperatures: list[float], info: ValidationInfo) -> list[float]:
        if info.data.get("codec") != "sampled":
            return sorted({1.0, *temperatures})
        if len(set(temperatures)) != 1:
            raise ValueError(
                "codec sampled draws at one temperature, the only one that training may then ask for; "
                "name one, or take codec topk"
            )
        return temperatures[:1]

    @model_validator(mode="after")
    def _check_codec(self) -> Self:
        fields = type(self).model_fields
        for codec, name in (("topk", "top_k"), ("sampled", "draws")):
            if self.codec != codec and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} belongs to codec {codec}, and codec is {self.codec}")
        return self


def run(settings: CacheSettings, context: StepContext) -> StepResult:
    """Score every row with the teacher and seal what is kept; resumes after the last sealed shard.

    Raises DataError, by row number or record, for a row with nothing to learn, with another tokenizer's ids
    or with a token that the teacher gives no distribution for, and ModelError for a model whose logits are
    out of reach.
    """
    from potstill.logits.logit_cache import LogitCache
    from potstill.logits.shards import ShardWriter, write_index

    with _open_scorer(settings, context) as scorer:
        rows, too_long, conversations = _rows(settings, context, scorer)
        first = _first_of_each(rows)
        codec = _codec(settings, context, scorer.vocabulary_size)
        writer = ShardWriter(
            context.folder, codec, tokenizer=scorer.renderer.tokenizer_hash, model=scorer.identity
        )
        size = _BatchSize(context, settings.batch_tokens or scorer.batch_tokens())
        # Batches are made of all rows, captured or not, so that an interruption changes no numbers: what a
        # model in memory gives to a row depends on the rows beside it in the last bits.
        plan = scorer.plan(rows.lengths, first, size.tokens)
        total = sum(rows.lengths[number] for number in first)
        batches = ([rows[number] for number in numbers] for numbers in plan)
        failed: set[bytes] = set()
        with context.progress("scoring", total, "tokens") as progress:
            for batch, asked, scored in scorer.score_batches(codec, batches, writer, size):
                for row, kept in zip(asked, scored, strict=True):
                    if kept is None:
                        failed.add(row.key)
                    elif row.key not in writer:
                        writer.append(row, kept)
                progress.advance(sum(len(row.token_ids) for row in batch))
        writer.seal()
        del writer  # its keys, before the index has them too
        scorer.failures.check(settings.max_failed_share, len(first), kept=scorer.kept)
        if failed:
            context.say(f"{len(failed):,} rows left out: {scorer.failures.path}")
    indexed = (row for row in rows if row.key not in failed)
    write_index(context.folder, indexed, scratch=context.scratch)
    cache = LogitCache.open(context.folder)
    return StepResult(
        counts={
            **cache.counts(),
            "distinct_rows": len(first) - len(failed),
            "too_long": too_long,
            "failed": len(failed),
        },
        metrics=cache.figures(),
        extra=cache.description | (scorer.renderer.described() if conversations else {}),
        tokenizer=cache.tokenizer,
        model_identity=cache.model,
        tokens=total,
    )


_Batch = list["CachedRow"]
_Kept = dict[str, "Tensor"] | None
"""What the codec keeps of a row's supervised tokens; None for a row that failed."""


class _Rows:
    """The rows of a cache in order, on disk; in memory a row costs 13 bytes."""

    def __init__(self, folder: Path) -> None:
        self._packed, self._held_out = PackedRows(folder), bytearray()
        self.lengths = self._packed.lengths

    def append(self, rendered: Rendered, record: Record) -> None:
        self._packed.append(rendered, record.id)
        self._held_out.append(record.held_out)

    def __len__(self) -> int:
        return len(self._packed)

    def __iter__(self) -> "Iterator[CachedRow]":
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> "CachedRow":
        from potstill.logits.shards import CachedRow

        rendered, record_id = self._packed[number], self._packed.id(number)
        return CachedRow(rendered.ids, rendered.mask, bool(self._held_out[number]), record_id)


def _first_of_each(rows: _Rows) -> "array[int]":
    """The numbers of the rows that no earlier one equals."""
    keys = KeyNumbers()
    return array("i", (number for number, row in enumerate(rows) if keys.add(row.key)))


class _Scorer(Protocol):
    """A teacher that scores rows, and what it says of rows that it cannot score."""

    renderer: Renderer
    vocabulary_size: int
    identity: str
    context_tokens: int | None
    failures: Failures
    kept: str

    def plan(self, lengths: "array[int]", numbers: "array[int]", tokens: int) -> Iterable[list[int]]:
        """The numbers of the rows of each batch."""

    def batch_tokens(self) -> int:
        """Padded tokens that a batch should have on this machine."""

    def score_batches(
        self, codec: "Codec", batches: Iterable[_Batch], done: "ShardWriter", size: "_BatchSize"
    ) -> "Iterator[tuple[_Batch, _Batch, list[_Kept]]]":
        """Each batch in order, the rows of it that were asked for, and what the codec keeps of each of these.

        None is asked for where all rows are `done`.
        """


class _OneScorer(ABC):
    """A teacher that scores one batch after the other, rows of like length together.

    `row_by_row` says that nothing depends on the batches.
    """

    failures: Failures
    kept = KEPT
    row_by_row = False

    def plan(self, lengths: "array[int]", numbers: "array[int]", tokens: int) -> Iterable[list[int]]:
        """Batches of at most so many padded tokens."""
        return many_micro_batches(lengths, numbers, tokens)

    def score_batches(
        self, codec: "Codec", batches: Iterable[_Batch], done: "ShardWriter", size: "_BatchSize"
    ) -> "Iterator[tuple[_Batch, _Batch, list[_Kept]]]":
        """Each batch in order, the rows of it that were asked for, and what the codec keeps of each of these.

        None is asked for where all rows are `done`.
        """
        for batch in batches:
            size.context.check_stop()
            missing = [row.key not in done for row in batch]
            if not all(missing):
                self.failures.answered()
            asked = list(itertools.compress(batch, missing)) if self.row_by_row or not any(missing) else batch
            scored = size.pieces.run(lambda rows: list(self.score(codec, rows)), asked, _too_large)
            yield batch, asked, list(scored)

    @abstractmethod
    def score(self, codec: "Codec", batch: "Sequence[CachedRow]") -> Iterable[_Kept]:
        """What the codec keeps of each row."""


@contextmanager
def _open_scorer(settings: CacheSettings, context: StepContext) -> "Iterator[_Scorer]":
    model = context.model(settings.model)
    failures = Failures(context.folder / FAILURES_FILE, where=f"model {settings.model}")
    if settings.from_traces:
        yield _TraceScorer(settings, model, context, failures)
    elif isinstance(model, TransformersModel):
        if context.replicas is None:
            yield _LocalScorer(load(model, say=context.say), failures)
        else:
            with closing(_ReplicatedScorer(model, context.replicas, failures)) as replicated:
                yield replicated
    elif isinstance(model, VllmModel) or (isinstance(model, OpenAIModel) and model.tokenizer is not None):
        what = "is a server, which" if isinstance(model, OpenAIModel) else "is run by vLLM, which"
        _check_likeliest(
            settings,
            f"{settings.model!r} {what} gives its likeliest ids at temperature 1",
            mend="let transformers run the teacher here for other temperatures or codec: sampled",
        )
        with closing(_ServerScorer(model, context, failures)) as scorer:
            if scorer.context_tokens is None and settings.max_length is None:
                raise ModelError(
                    f"the server of {settings.model!r} does not say how long a prompt may be",
                    where=model.known_as(),
                    expected="`max_model_len` in its list of models, as vLLM gives it, or `max_length`",
                    mend="set the cache step's `max_length` to one token less than the server's context",
                )
            yield scorer
    else:
        raise ModelError(
            f"{settings.model!r} gives no logits over the whole vocabulary",
            expected="a model that transformers or vLLM runs here, or a vLLM server with a `tokenizer`",
            mend="declare the teacher's weights once more with engine: transformers, and name that here",
        )


def _check_likeliest(settings: CacheSettings, what: str, mend: str) -> None:
    if settings.codec != "topk" or settings.temperatures != [1.0]:
        raise ModelError(what, expected="codec: topk with temperatures: [1.0]", mend=mend)


class _LocalScorer(_OneScorer):
    """A model in memory."""

    def __init__(self, teacher: LoadedModel, failures: Failures) -> None:
        self._teacher, self.failures = teacher, failures
        self.renderer = Renderer(teacher.tokenizer)
        self.vocabulary_size, self.identity = teacher.vocabulary_size, teacher.identity
        self.context_tokens = context_tokens(teacher)

    def batch_tokens(self) -> int:
        """As many as fit."""
        return _batch_tokens(self._teacher)

    def score(self, codec: "Codec", batch: "Sequence[CachedRow]") -> Iterable[_Kept]:
        """From the chunked head."""
        return _score_rows(self._teacher, codec, batch)


def most_batch_tokens(device_type: str) -> int:
    """The most padded tokens that a batch is given by itself on a kind of device."""
    return _MOST_GPU_TOKENS if device_type == "cuda" else _MOST_CPU_TOKENS


def _batch_tokens(teacher: LoadedModel) -> int:
    """As many as a share of the free memory holds the widest layers' activations of, within bounds."""
    import psutil
    import torch

    model = teacher.model
    config, on_gpu = model.config.get_text_config(), model.device.type == "cuda"
    width = 16 * config.hidden_size + 4 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    fits = int(free * MEMORY_SHARE / (width * model.dtype.itemsize))
    return max(_LEAST_BATCH_TOKENS, min(fits, most_batch_tokens(model.device.type)))


def _score_rows(
    teacher: LoadedModel, codec: "Codec", batch: "Sequence[CachedRow]"
) -> list[dict[str, "Tensor"]]:
    """What the codec keeps of each row: no more than one chunk of logits exists at a time."""
    import torch

    from potstill.losses.head import per_token
    from potstill.scoring import hidden_of_rows

    rendered = [Rendered(list(row.token_ids), list(row.mask)) for row in batch]
    with torch.no_grad():
        hidden_NH, _ = hidden_of_rows(teacher.model, rendered)
    head = output_head(teacher.model, teacher.vocabulary_size)
    counts = [row.supervised_tokens for row in rendered]
    kept = per_token(hidden_NH, head, codec.encoder([row.key for row in batch], counts))
    split = {name: torch.split(values, counts) for name, values in kept.items()}
    return [{name: parts[number] for name, parts in split.items()} for number in range(len(batch))]


class ScoringReplica:
    """A copy of the teacher in a process of its own, for batches of rows."""

    def __init__(self, model: TransformersModel) -> None:
        self._loaded = load(model)
        self.identity: dict[str, Any] = {
            **identity_of_copy(self._loaded.identity, Renderer(self._loaded.tokenizer)),
            "vocabulary_size": self._loaded.vocabulary_size,
            "context_tokens": context_tokens(self._loaded),
        }
        # One batch waits while another is scored.
        self.capacity = {"concurrency": 2, "batch_tokens": _batch_tokens(self._loaded)}

    async def work(
        self, header: dict[str, Any], batch: _Batch, pieces: int
    ) -> "tuple[list[dict[str, NDArray[Any]]], int]":
        """What the codec keeps of each row, and into how many pieces the batch was cut."""
        from potstill.logits.codecs import codec_of
        from potstill.scoring import Pieces

        codec, held = codec_of(header, where="the step that asks"), Pieces(pieces)
        scored = held.run(lambda rows: _score_rows(self._loaded, codec, rows), batch, _too_large)
        kept = [{name: values.numpy(force=True) for name, values in one.items()} for one in scored]
        return kept, held.count


class _ReplicatedScorer:
    """Copies of a model, each with batches of its own."""

    plan, kept = _OneScorer.plan, KEPT

    def __init__(self, model: TransformersModel, replicas: Replicas, failures: Failures) -> None:
        self.renderer, self.failures = Renderer(load_tokenizer(model)), failures
        opening = open_copies(replicas, ScoringReplica, (model,), model, self.renderer)
        self._replicas = OpenReplicas(replicas.count, opening)
        self.close = self._replicas.close
        found = self._replicas.identity
        self.vocabulary_size: int = found["vocabulary_size"]
        self.identity: str = found["model"]
        self.context_tokens: int | None = found["context_tokens"]

    def batch_tokens(self) -> int:
        """What the first copy's machine has room for."""
        return self._replicas.first_capacity["batch_tokens"]

    def score_batches(
        self, codec: "Codec", batches: Iterable[_Batch], done: "ShardWriter", size: "_BatchSize"
    ) -> "Iterator[tuple[_Batch, _Batch, list[_Kept]]]":
        """As one copy would, in the batches' order."""
        import torch

        from potstill.logits.codecs import describe

        header = describe(codec)

        def job(batch: _Batch) -> tuple[Any, ...] | None:
            return None if all(row.key in done for row in batch) else (header, batch, size.pieces.count)

        for batch, found in self._replicas.in_order(batches, job, size.context.check_stop):
            if found is None:
                yield batch, [], []
                continue
            kept, pieces = found
            if pieces > size.pieces.count:
                size.cut(pieces)
            # A copy: Ray's own memory is not to be written to.
            yield batch, batch, [{name: torch.tensor(values) for name, values in one.items()} for one in kept]


class _ServerScorer:
    """A server, or vLLM here, that gives the log-probabilities of a prompt's tokens, asked by token ids."""

    plan, kept = _OneScorer.plan, KEPT

    def __init__(self, model: OpenAIModel | VllmModel, context: StepContext, failures: Failures) -> None:
        tokenizer = tokenizer_of(model)
        assert tokenizer is not None
        self.renderer = Renderer(load_tokenizer(tokenizer))
        self.vocabulary_size = vocabulary_size(self.renderer.tokenizer)
        self.identity, self.failures = model.known_as(), failures
        self._server = GivenTokens(model, context, failures)
        self.context_tokens = self._server.context_tokens
        self.close = self._server.close

    def batch_tokens(self) -> int:
        """Enough for each copy to have many rows at once."""
        return _SERVER_TOKENS * self._server.copies

    def score_batches(
        self, codec: "Codec", batches: Iterable[_Batch], done: "ShardWriter", size: "_BatchSize"
    ) -> "Iterator[tuple[_Batch, _Batch, list[_Kept]]]":
        """Rows that are not done yet, each asked for by itself.

        Where asking ends by an error or a stop, the rows that were answered come before it, and are sealed:
        they were paid for.
        """
        for batch in batches:
            asked = [row for row in batch if row.key not in done]
            if len(asked) < len(batch):
                self.failures.answered()
            kept: dict[int, _Kept] = {}
            try:
                size.context.check_stop()
                if asked:
                    self._ask(codec, asked, kept)
            except Exception:  # whatever ends the asking, a stop too: it goes on once the answers are sealed
                yield [], [asked[number] for number in kept], [*kept.values()]
                done.seal()
                raise
            yield batch, asked, [kept[number] for number in range(len(asked))]

    def _ask(self, codec: "Codec", rows: _Batch, kept: dict[int, _Kept]) -> None:
        """The tail is what the kept ids leave over; the logsumexp stays unknown (NaN)."""
        from potstill.logits.codecs import TopK

        assert isinstance(codec, TopK)

        def keep(number: int, found: list[dict[int, float]]) -> None:
            mask = rows[number].mask[1:]
            kept[number] = codec.from_log_probs(
                [likeliest for likeliest, supervised in zip(found, mask, strict=True) if supervised]
            )

        def refused(number: int, reason: str) -> None:
            kept[number] = None

        named = [(f"record {row.record_id}", row.token_ids) for row in rows]
        self._server.ask(named, codec.k, keep, refused)


class _TraceScorer(_OneScorer):
    """What traces hold of the model that wrote them: the alternatives to their tokens, at temperature 1.

    Rows are gone through in their order, beside the records that they come from.
    """

    kept = "Rows that hold enough of their teacher are kept"
    row_by_row = True

    def __init__(
        self, settings: CacheSettings, model: Settings, context: StepContext, failures: Failures
    ) -> None:
        _check_likeliest(
            settings,
            "traces hold the likeliest ids at temperature 1",
            mend="leave from_traces out, and let transformers run the teacher here",
        )
        tokenizer = tokenizer_of(model)
        if tokenizer is None:
            raise ModelError(
                f"no tokenizer of {settings.model!r} is known, whose ids the traces would have to hold",
                mend="state the model's `tokenizer`, in the step that makes the traces as well",
            )
        self.renderer = Renderer(load_tokenizer(tokenizer))
        self.vocabulary_size = vocabulary_size(self.renderer.tokenizer)
        self.identity, self.failures = str((model.content() or {})["identity"]), failures
        self.context_tokens: int | None = None
        self._records = read(settings.data, context)
        self._record: Record | None = None

    def plan(self, lengths: "array[int]", numbers: "array[int]", tokens: int) -> Iterable[list[int]]:
        """One row after the other."""
        return ([number] for number in numbers)

    def batch_tokens(self) -> int:
        """A row a batch."""
        return 1

    def score(self, codec: "Codec", batch: "Sequence[CachedRow]") -> Iterable[_Kept]:
        """As of a server; the token itself is one of its place's ids, whether it is among the likeliest."""
        from potstill.logits.codecs import TopK

        assert isinstance(codec, TopK)
        for row in batch:
            if self._record is None or self._record.id != row.record_id:
                self._record = next(one for one in self._records if one.id == row.record_id)
            record = self._record
            try:
                likeliest = kept_alternatives(record, row.token_ids, row.mask, codec.k, model=self.identity)
            except DataError as error:
                self.failures.add({"row": f"record {record.id}"}, error, kept=self.kept)
                yield None
            else:
                self.failures.answered()
                yield codec.from_log_probs(likeliest)


class _BatchSize:
    """Padded tokens a batch, and into how many pieces a batch must be cut to fit into memory.

    Both stay in the step's scratch folder, so that a capture which is taken up again computes the same
    batches: another shape would round otherwise.
    """

    def __init__(self, context: StepContext, tokens: int) -> None:
        from potstill.scoring import Pieces

        self.context, self._path = context, context.scratch / "batches.json"
        self.tokens, pieces = tokens, 1
        if self._path.exists():
            try:
                kept = read_checked_json(self._path.read_bytes())
                self.tokens, pieces = kept["tokens"], kept["pieces"]
            except (DamagedJsonError, KeyError) as error:
                raise DataError(
                    f"is damaged ({error})",
                    where=str(self._path),
                    expected="how many rows the interrupted capture scored at once",
                    mend="make the step again with --force",
                ) from error
        else:
            self._save(pieces)
        self.pieces = Pieces(pieces, self.cut)

    def _save(self, pieces: int) -> None:
        write_atomically(self._path, checked_json({"tokens": self.tokens, "pieces": pieces}))

    def cut(self, pieces: int) -> None:
        """Cut batches into more pieces from here on."""
        self.pieces.count = pieces
        self._save(pieces)
        self.context.say(f"out of memory: batches are scored in {pieces} pieces from here on")


def _too_large(row: "CachedRow") -> ModelError:
    return ModelError(
        f"a row of {len(row.token_ids):,} tokens does not fit into memory",
        mend="lower `max_length`, or use a machine or device with more memory",
    )


def import_artifact(path: Path, folder: Path) -> Artifact:
    """A cache made of an HDF5 file (`logits.hdf5` has its layout), sealed as a step's artifact is.

    Raises as `import_hdf5` does.
    """
    from potstill.logits.hdf5 import import_hdf5

    started = time.monotonic()
    cache = import_hdf5(path, folder)
    assert cache.imported is not None
    return Store(folder.parent).seal(
        folder,
        kind=CacheSettings.kind,
        fingerprint=cache.imported,
        settings={"imported": path.name},
        seed=0,
        seconds=round(time.monotonic() - started, 3),
        counts=cache.counts(),
        metrics=cache.figures(),
        extra=cache.description,
        tokenizer=cache.tokenizer,
        model_identity=cache.model,
    )


def _codec(settings: CacheSettings, context: StepContext, vocabulary_size: int) -> "Codec":
    from potstill.logits.codecs import Draws, TopK

    temperatures = tuple(settings.temperatures)
    if settings.codec == "topk":
        return TopK(settings.top_k, vocabulary_size, temperatures)
    return Draws(settings.draws, vocabulary_size, temperatures, context.derive_seed("draws"))


def _rows(settings: CacheSettings, context: StepContext, scorer: _Scorer) -> tuple[_Rows, int, bool]:
    """Every row that fits, in order; texts come in windows.

    And how many do not fit, and whether some are conversations.
    """
    renderer, stated = scorer.renderer, (settings.max_length, scorer.context_tokens)
    limit = min((one for one in stated if one is not None), default=None)
    rows, too_long, conversations = _Rows(context.scratch), 0, False
    records = read(settings.data, context)
    if settings.mask_prefix:
        records = continued(records)
    for number, record in enumerate(records, start=1):
        if record.response_token_ids is not None and record.tokenizer != renderer.tokenizer_hash:
            raise DataError(
                f"its token ids are another tokenizer's than that of {settings.model!r}",
                where=f"row {number} (record {record.id})",
                expected="the ids that the cached teacher itself would read",
                mend="cache the model that wrote these rows, or another of its family",
            )
        rendered = renderer.render(record, mask_prefix=settings.mask_prefix, row_number=number)
        conversations = conversations or bool(record.messages)
        windows = [rendered]
        if limit is not None and len(rendered.ids) > limit:
            windows = [] if record.messages else _windows(rendered, limit)
            too_long += bool(record.messages)
        for one in windows:
            rows.append(one, record)
    if too_long:
        context.say(f"{too_long:,} rows of more than {limit:,} tokens left out")
    if not len(rows):
        raise DataError(
            f"each of the {too_long:,} rows has more than {limit:,} tokens",
            expected="rows that fit into `max_length` and the model's context",
            mend="raise max_length, or shorten the rows",
        )
    return rows, too_long, conversations


def _windows(text: Rendered, length: int) -> list[Rendered]:
    """A long text in pieces, each from the last token of the one before: every token is scored once."""
    windows = []
    for start in range(0, len(text.ids) - 1, length - 1):
        part = slice(start, start + length)
        windows.append(Rendered(text.ids[part], [0, *text.mask[part][1:]]))
    return windows
