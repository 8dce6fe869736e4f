"""The `cache` step: what a teacher gives to every supervised token of some rows, kept on disk for training.

Shapes: B rows, T positions, N supervised tokens, H hidden size, V vocabulary.
"""

import json
import time
from array import array
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from potstill.core.errors import DataError, ModelError
from potstill.core.settings import ModelRef, Settings, execution
from potstill.core.step import StepContext, StepResult
from potstill.core.store import Artifact, Store, write_atomically
from potstill.data.batches import micro_batches
from potstill.data.chat import Rendered, Renderer
from potstill.data.sources import Data, read
from potstill.models import (
    LoadedModel,
    TransformersModel,
    load,
    load_tokenizer,
    output_head,
    vocabulary_size,
)
from potstill.teachers import GivenTokens, OpenAIModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from potstill.logits.codecs import Codec
    from potstill.logits.shards import CachedRow

__all__ = ["CacheSettings", "import_artifact", "run"]

# Past this many tokens a CPU's matrix products get no faster; a GPU's need more of them.
_MOST_CPU_TOKENS, _MOST_GPU_TOKENS, _LEAST_BATCH_TOKENS = 4096, 65_536, 256
# One refused request drops the other answers of its batch.
_SERVER_TOKENS = 16_384


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
    from potstill.logits.shards import LogitCache, ShardWriter, write_index

    with _open_scorer(settings, context) as scorer:
        rows, too_long, conversations = _rows(settings, context, scorer)
        codec = _codec(settings, context, scorer.vocabulary_size)
        writer = ShardWriter(
            context.folder, codec, tokenizer=scorer.renderer.tokenizer_hash, model=scorer.identity
        )
        first = {row.key: number for number, row in reversed(list(enumerate(rows)))}
        lengths = [len(row.token_ids) for row in rows]
        size = _BatchSize(context, settings.batch_tokens or scorer.batch_tokens())
        # Batches are made of all rows, captured or not, so that an interruption changes no numbers.
        plan = micro_batches(lengths, sorted(first.values()), size.tokens)
        total = sum(lengths[number] for number in first.values())
        with context.progress("scoring", total, "tokens") as progress:
            for batch in ([rows[number] for number in numbers] for numbers in plan):
                context.check_stop()
                missing = [row.key not in writer for row in batch]
                if any(missing):
                    scored = size.score(scorer, codec, batch)
                    for row, is_missing, kept in zip(batch, missing, scored, strict=True):
                        if is_missing:
                            writer.append(row, kept)
                progress.advance(sum(len(row.token_ids) for row in batch))
    writer.seal()
    write_index(context.folder, rows)
    cache = LogitCache.open(context.folder)
    return StepResult(
        counts={**cache.counts(), "distinct_rows": len(first), "too_long": too_long},
        metrics=cache.figures(),
        extra=cache.description | (scorer.renderer.described() if conversations else {}),
        tokenizer=cache.tokenizer,
        model_identity=cache.model,
        tokens=total,
    )


class _Scorer(Protocol):
    """A teacher that scores rows."""

    renderer: Renderer
    vocabulary_size: int
    identity: str
    context_tokens: int | None

    def batch_tokens(self) -> int:
        """Padded tokens that a batch should have on this machine."""

    def score(self, codec: "Codec", batch: "list[CachedRow]") -> "Iterable[dict[str, Tensor]]":
        """What the codec keeps of each row's supervised tokens."""


@contextmanager
def _open_scorer(settings: CacheSettings, context: StepContext) -> "Iterator[_Scorer]":
    model = context.model(settings.model)
    if isinstance(model, TransformersModel):
        yield _LocalScorer(load(model, say=context.say))
    elif isinstance(model, OpenAIModel) and model.tokenizer is not None:
        if settings.codec != "topk" or settings.temperatures != [1.0]:
            raise ModelError(
                f"{settings.model!r} is a server, which gives its likeliest ids at temperature 1",
                expected="codec: topk with temperatures: [1.0]",
                mend="let transformers run the teacher here for other temperatures or codec: sampled",
            )
        with closing(_ServerScorer(model, context)) as scorer:
            if scorer.context_tokens is None and settings.max_length is None:
                raise ModelError(
                    f"the server of {settings.model!r} does not say how long a prompt may be",
                    where=model.base_url,
                    expected="`max_model_len` in its list of models, as vLLM gives it, or `max_length`",
                    mend="set the cache step's `max_length` to one token less than the server's context",
                )
            yield scorer
    else:
        raise ModelError(
            f"{settings.model!r} gives no logits over the whole vocabulary",
            expected="a model that transformers runs here, or a vLLM server with a `tokenizer`",
            mend="declare the teacher's weights once more with engine: transformers, and name that here",
        )


class _LocalScorer:
    """A model in memory."""

    def __init__(self, teacher: LoadedModel) -> None:
        self._teacher = teacher
        self.renderer = Renderer(teacher.tokenizer)
        self.vocabulary_size, self.identity = teacher.vocabulary_size, teacher.identity
        config = teacher.model.config.get_text_config()
        self.context_tokens: int | None = getattr(config, "max_position_embeddings", None)

    def batch_tokens(self) -> int:
        """As many as a quarter of the free memory holds the widest layers' activations of, within bounds."""
        import psutil
        import torch

        model = self._teacher.model
        config, on_gpu = model.config.get_text_config(), model.device.type == "cuda"
        width = 16 * config.hidden_size + 4 * getattr(config, "intermediate_size", 4 * config.hidden_size)
        free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
        fits = int(free / 4 / (width * model.dtype.itemsize))
        return max(_LEAST_BATCH_TOKENS, min(fits, _MOST_GPU_TOKENS if on_gpu else _MOST_CPU_TOKENS))

    def score(self, codec: "Codec", batch: "list[CachedRow]") -> "Iterable[dict[str, Tensor]]":
        """From the chunked head: no more than one chunk of logits exists at a time."""
        import torch

        from potstill.losses.head import per_token
        from potstill.scoring import hidden_of_rows

        teacher = self._teacher
        rendered = [Rendered(list(row.token_ids), list(row.mask)) for row in batch]
        with torch.no_grad():
            hidden_NH, _ = hidden_of_rows(teacher.model, rendered)
        head = output_head(teacher.model, teacher.vocabulary_size)
        counts = [row.supervised_tokens for row in rendered]
        kept = per_token(hidden_NH, head, codec.encoder([row.key for row in batch], counts))
        split = {name: torch.split(values, counts) for name, values in kept.items()}
        return [{name: parts[number] for name, parts in split.items()} for number in range(len(batch))]


class _ServerScorer:
    """A server that gives the log-probabilities of a prompt's tokens, asked by token ids."""

    def __init__(self, model: OpenAIModel, context: StepContext) -> None:
        assert model.tokenizer is not None
        self.renderer = Renderer(load_tokenizer(TransformersModel(path=model.tokenizer)))
        self.vocabulary_size = vocabulary_size(self.renderer.tokenizer)
        self.identity = model.known_as()
        self._server = GivenTokens(model, context)
        self.context_tokens = self._server.context_tokens
        self.close = self._server.close

    def batch_tokens(self) -> int:
        """Enough for the server to have many rows at once."""
        return _SERVER_TOKENS

    def score(self, codec: "Codec", batch: "list[CachedRow]") -> "Iterable[dict[str, Tensor]]":
        """The tail is what the kept ids leave over; the logsumexp stays unknown (NaN)."""
        from potstill.logits.codecs import TopK

        assert isinstance(codec, TopK)
        kept: dict[int, dict[str, Tensor]] = {}

        def keep(number: int, found: list[dict[int, float]]) -> None:
            mask = batch[number].mask[1:]
            kept[number] = codec.from_log_probs(
                [likeliest for likeliest, supervised in zip(found, mask, strict=True) if supervised]
            )

        self._server.ask([(f"record {row.record_id}", row.token_ids) for row in batch], codec.k, keep)
        return [kept[number] for number in range(len(batch))]


class _BatchSize:
    """Padded tokens a batch, and into how many pieces a batch must be cut to fit into memory.

    Both stay in the step's scratch folder, so that a capture which is taken up again computes the same
    batches: another shape would round otherwise.
    """

    def __init__(self, context: StepContext, tokens: int) -> None:
        self._context, self._path = context, context.scratch / "batches.json"
        self.tokens, self.pieces = tokens, 1
        if self._path.exists():
            self.tokens, self.pieces = json.loads(self._path.read_text(encoding="utf-8"))
        else:
            self._save()

    def _save(self) -> None:
        write_atomically(self._path, json.dumps([self.tokens, self.pieces]))

    def score(
        self, scorer: _Scorer, codec: "Codec", batch: "list[CachedRow]"
    ) -> "Iterator[dict[str, Tensor]]":
        """Score a batch in as few pieces as fit; that number stays for what comes after."""
        start = 0
        while start < len(batch):
            rows = max(1, -(-len(batch) // self.pieces))
            try:
                scored = list(scorer.score(codec, batch[start : start + rows]))
            except RuntimeError as error:
                from potstill.scoring import is_out_of_memory

                if not is_out_of_memory(error):
                    raise
                if rows == 1:
                    raise ModelError(
                        f"a row of {len(batch[start].token_ids):,} tokens does not fit into memory",
                        mend="lower `max_length`, or use a machine or device with more memory",
                    ) from error
                self.pieces *= 2
                self._save()
                self._context.say(f"out of memory: batches are scored in {self.pieces} pieces from here on")
                continue
            yield from scored
            start += len(scored)


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


def _rows(
    settings: CacheSettings, context: StepContext, scorer: _Scorer
) -> "tuple[list[CachedRow], int, bool]":
    """Every row that fits, in order and in four bytes a token; texts come in windows.

    And how many do not fit, and whether some are conversations.
    """
    from potstill.logits.shards import CachedRow

    renderer, stated = scorer.renderer, (settings.max_length, scorer.context_tokens)
    limit = min((one for one in stated if one is not None), default=None)
    rows, too_long, conversations = [], 0, False
    for number, record in enumerate(read(settings.data, context), start=1):
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
        rows += [
            CachedRow(array("I", one.ids), bytes(one.mask), record.held_out, record.id) for one in windows
        ]
    if too_long:
        context.say(f"{too_long:,} rows of more than {limit:,} tokens left out")
    if not rows:
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
