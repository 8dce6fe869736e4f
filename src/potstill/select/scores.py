"""How likely a response and its sentences are to a model, from the log-probabilities of its tokens."""

from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.core.replicas import OpenReplicas, Replicas
from potstill.core.step import StepContext
from potstill.data.chat import Rendered, Renderer
from potstill.data.packed_rows import PackedRows
from potstill.data.prefixes import batches_by_prefix, shared_prefix
from potstill.data.responses import bytes_of_tokens
from potstill.logits.shards import row_key
from potstill.models import (
    LoadedModel,
    TransformersModel,
    choose_device,
    identity,
    load,
    load_tokenizer,
    supports_bf16,
)
from potstill.models.prefixes import Prefix
from potstill.scoring import micro_batch_tokens, run_prefix, run_shared_prefix, token_logprobs
from potstill.select.score_store import open_score_store
from potstill.select.sentences import tokens_of_spans
from potstill.teachers import GivenTokens, OpenAIModel, VllmModel
from potstill.teachers.failures import Failures
from potstill.teachers.given_tokens import KEPT
from potstill.teachers.kept_tokens import tokenizer_of
from potstill.teachers.replicated import identity_of_copy, open_copies
from potstill.teachers.transformers import context_tokens

__all__ = [
    "LocalScores",
    "ModelScores",
    "ReplicatedScores",
    "SentenceClass",
    "ServedScores",
    "TokenScores",
    "TokenScoresReplica",
    "probability",
    "sentence_class",
    "sentence_probabilities",
    "stored_scores",
    "without_unknown",
]

_WINDOW_TOKENS = 2**19

SentenceClass = Literal["teacher", "student", "shared", "boosted"]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """log p of each token of a response in nats, NaN where it is not known.

    `token_bytes` says how many bytes of the response each token stands for; None where nobody knows.
    """

    logprobs: NDArray[np.float64]
    token_bytes: list[int] | None = None


def probability(logprobs: NDArray[np.float64]) -> float:
    """exp(mean log p) over the tokens whose log p is known, the geometric mean; NaN where none is."""
    known = logprobs[~np.isnan(logprobs)]
    return float(np.exp(known.mean())) if len(known) else float("nan")


def without_unknown(scores: TokenScores, known: TokenScores) -> TokenScores:
    """Scores with NaN for each token of whose bytes `known` has no log p for the larger part.

    Both say which bytes of one text their tokens stand for; a token of none goes with the byte behind it.
    Raises DataError where those of `known` are more or fewer than the text's.
    """
    assert scores.token_bytes is not None
    assert known.token_bytes is not None
    unknown = np.repeat(np.isnan(known.logprobs), known.token_bytes)
    sizes = np.array(scores.token_bytes)
    if sizes.sum() != len(unknown):
        raise DataError(f"the tokens have {len(unknown):,} bytes, but the text has {sizes.sum():,}")
    before = np.concatenate([[0], np.cumsum(unknown), [unknown[-1:].sum() + unknown.sum()]])
    starts = np.cumsum(sizes) - sizes
    lost = 2 * (before[starts + np.maximum(sizes, 1)] - before[starts]) > np.maximum(sizes, 1)
    return TokenScores(np.where(lost, np.nan, scores.logprobs), scores.token_bytes)


def sentence_probabilities(scores: TokenScores, spans: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """The probability of each sentence from the tokens in it; NaN where the log p of none is known.

    `spans` are (start, end) in bytes and cover the response; a token lies in the one span that holds most of
    it. Raises DataError where the tokens' bytes do not add up to the text.
    """
    assert scores.token_bytes is not None
    places = np.array(tokens_of_spans(spans, scores.token_bytes), dtype=np.int64)
    known = ~np.isnan(scores.logprobs)
    counts = np.bincount(places[known], minlength=len(spans))
    sums = np.bincount(places[known], weights=scores.logprobs[known], minlength=len(spans))
    with np.errstate(invalid="ignore"):
        return np.exp(sums / counts)


def sentence_class(
    teacher: float, student: float, distilled: float | None, *, alpha: float, beta: float
) -> SentenceClass:
    """Whose sentence it is, from its probability to each model (Divergence-Aware Sampling, DASD).

    Shared where no two models differ by more than alpha, the teacher's where P(teacher) - P(student) > beta,
    the student's where it is below -beta, boosted otherwise. Without the distilled model only beta counts,
    and what is neither the teacher's nor the student's is shared.
    """
    gap = teacher - student
    if distilled is not None:
        gaps = (gap, student - distilled, teacher - distilled)
        if all(abs(one) <= alpha for one in gaps):
            return "shared"
    if gap > beta:
        return "teacher"
    if -gap > beta:
        return "student"
    return "shared" if distilled is None else "boosted"


def stored_scores(record: Record, renderer: Renderer) -> TokenScores | str:
    """What a trace's own log-probabilities say, or why they say nothing.

    Where the trace does not say which bytes its tokens stand for, its token ids do, if they are the
    renderer's.
    """
    assert record.logprobs is not None
    logprobs = np.array(record.logprobs, dtype=np.float64)
    if np.isnan(logprobs).all():
        return "the log-probability of none of its tokens is known"
    sizes, ids = record.token_bytes, record.response_token_ids
    if sizes is None and ids is not None and record.tokenizer == renderer.tokenizer_hash:
        sizes = bytes_of_tokens(renderer.bytes_of(ids), record.response or "")
    return TokenScores(logprobs, sizes if sizes is not None and len(sizes) == len(logprobs) else None)


class _Window(NamedTuple):
    """Rows that are in memory together: what errors call them, their tokens, the keys of their scores."""

    names: list[str]
    rows: list[Rendered]
    keys: list[bytes]


class ModelScores(ABC):
    """What one model gives to the tokens of responses: scored once, kept in the store from then on.

    A row is rendered when its scores are filled in, and lies on disk from then on; in memory it costs 20
    bytes. Scores are known by `known_as` (JSON-able) and the token ids of prompt and response. `called` is
    the model in errors and reasons.
    """

    def __init__(self, called: str, renderer: Renderer, known_as: Any, context: StepContext) -> None:
        self.called, self.renderer, self.context = called, renderer, context
        self._store = open_score_store(context.cache_folder, known_as)
        self._refused: dict[bytes, str] = {}
        self._numbers, self._rendered = array("q"), PackedRows(context.scratch)

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def fill(self, records: Iterable[tuple[int, Record]], progress: Callable[[int], None]) -> int:
        """Score each row (its number, its record) that is not in the store; returns the tokens of those.

        `progress` hears how many rows are done. The model is opened when the first row has to be scored, and
        let go at the end.
        """
        total = 0
        try:
            for window, skipped in self._windows(records):
                missing = dict(zip(window.keys, window.rows, strict=True))
                total += sum(len(row.ids) for key, row in missing.items() if key not in self._store)
                self._fill_window(window, progress)
                progress(skipped)
        finally:
            self._let_go()
        return total

    @abstractmethod
    def _fill_window(self, window: _Window, progress: Callable[[int], None]) -> None: ...

    @abstractmethod
    def _let_go(self) -> None: ...

    def _windows(self, records: Iterable[tuple[int, Record]]) -> Iterator[tuple[_Window, int]]:
        """Rendered rows, as many as may be in memory at once, and how many between cannot be rendered."""
        window = _Window([], [], [])
        tokens = skipped = 0
        for number, record in records:
            self.context.check_stop()
            rendered = self._render(number, record)
            if isinstance(rendered, str):
                skipped += 1
                continue
            self._numbers.append(number)
            self._rendered.append(rendered)
            window.names.append(f"row {number} (record {record.id})")
            window.rows.append(rendered)
            window.keys.append(row_key(rendered.ids, rendered.mask))
            tokens += len(rendered.ids)
            if tokens >= _WINDOW_TOKENS:
                yield window, skipped
                window, tokens, skipped = _Window([], [], []), 0, 0
        yield window, skipped

    def of(self, number: int, record: Record, *, with_bytes: bool) -> TokenScores | str:
        """The scores of a row that was filled in, or why it has none.

        What another model wrote before the response goes on has no known log p, as in the trace's own.
        """
        place = bisect_left(self._numbers, number)
        if number not in self._numbers[place : place + 1]:
            unrendered = self._render(number, record)
            assert isinstance(unrendered, str)
            return unrendered
        rendered = self._rendered[place]
        key = row_key(rendered.ids, rendered.mask)
        if (reason := self._refused.get(key)) is not None:
            return f"{self.called} gave no answer: {reason}"
        if key not in self._store or not len(logprobs := self._store[key]):
            return f"its {len(rendered.ids):,} tokens exceed the context of {self.called}"
        if not np.isfinite(logprobs).all():
            return f"{self.called} gives some of its tokens no probability (NaN or infinity)"
        sizes = None
        if with_bytes:
            ids = [id_ for id_, supervised in zip(rendered.ids, rendered.mask, strict=True) if supervised]
            sizes = bytes_of_tokens(self.renderer.bytes_of(ids), record.response or "")
        found = logprobs.astype(np.float64)
        if record.prefix_characters:
            try:
                behind = self.renderer.render(record, mask_prefix=True, row_number=number)
            except DataError as error:
                return error.what
            found[: len(found) - self.renderer.without_end_of_turn(behind).supervised_tokens] = np.nan
        return TokenScores(found, sizes)

    def _render(self, number: int, record: Record) -> Rendered | str:
        try:
            return self.renderer.without_end_of_turn(self.renderer.render(record, row_number=number))
        except DataError as error:
            return error.what


class LocalScores(ModelScores):
    """What a model gives that runs here; its scores are known by its precision, too.

    Rows that begin alike are scored in one batch, in which that beginning is run once. Whole batches are kept
    or lost together, so that an interruption changes no numbers.
    """

    def __init__(self, settings: TransformersModel, context: StepContext, max_tokens: int | None) -> None:
        device = choose_device(settings)
        dtype = settings.dtype or ("bfloat16" if supports_bf16(device) else "float32")
        renderer = Renderer(load_tokenizer(settings, say=context.say))
        super().__init__(settings.path, renderer, [identity(settings), settings.quantize, dtype], context)
        # The scores are known by it, wherever they are computed.
        self._settings = settings.model_copy(update={"dtype": dtype})
        self._max_tokens = max_tokens or micro_batch_tokens(device)
        self._loaded: LoadedModel | None = None

    def _fill_window(self, window: _Window, progress: Callable[[int], None]) -> None:
        keys, nothing = window.keys, np.zeros(0, dtype=np.float32)
        batches = batches_by_prefix(window.rows, self._max_tokens, start=shared_prefix(window.rows))
        for batch, found in self._score(window, batches):
            if found is not None:
                self._store.put((keys[number], found.get(number, nothing)) for number in batch)
            progress(len(batch))

    def _score(
        self, window: _Window, batches: Iterable[list[int]]
    ) -> Iterator[tuple[list[int], dict[int, NDArray[Any]] | None]]:
        """Each batch with the log-probabilities of its rows that fit; None where all are in the store."""
        rows, prefix = window.rows, None
        for batch in batches:
            self.context.check_stop()
            if self._is_kept(window, batch):
                yield batch, None
                continue
            loaded = self._loaded = self._loaded or load(self._settings)
            limit = context_tokens(loaded)
            fits = [number for number in batch if _fits(rows[number], limit)]
            prefix = prefix or run_shared_prefix(loaded.model, [row for row in rows if _fits(row, limit)])
            scored = _logprobs(loaded, [rows[number] for number in fits], self._max_tokens, prefix)
            yield batch, dict(zip(fits, scored, strict=True))

    def _is_kept(self, window: _Window, batch: Sequence[int]) -> bool:
        return all(window.keys[number] in self._store for number in batch)

    def _let_go(self) -> None:
        self._loaded = None


def _fits(row: Rendered, limit: int | None) -> bool:
    return limit is None or len(row.ids) <= limit


def _logprobs(
    loaded: LoadedModel, rows: Sequence[Rendered], max_tokens: int, prefix: Prefix | None
) -> list[NDArray[Any]]:
    if not rows:
        return []
    return [one.numpy() for one in token_logprobs(loaded, rows, max_tokens=max_tokens, prefix=prefix)]


class TokenScoresReplica:
    """A copy of a model in a process of its own, which scores batches of rows."""

    def __init__(self, settings: TransformersModel, max_tokens: int) -> None:
        self._loaded, self._max_tokens = load(settings), max_tokens
        self.identity: dict[str, Any] = {
            **identity_of_copy(self._loaded.identity, Renderer(self._loaded.tokenizer)),
            "context_tokens": context_tokens(self._loaded),
        }
        # One batch waits while another is scored.
        self.capacity = {"concurrency": 2}
        self._prefix_ids: list[int] = []
        self._prefix: Prefix | None = None

    async def work(self, prefix_ids: list[int], rows: list[Rendered]) -> list[NDArray[Any]]:
        """The log-probabilities of each row, all of which begin with the prefix, which is run once."""
        if prefix_ids != self._prefix_ids:
            self._prefix_ids, self._prefix = prefix_ids, run_prefix(self._loaded.model, prefix_ids)
        return _logprobs(self._loaded, rows, self._max_tokens, self._prefix)


class ReplicatedScores(LocalScores):
    """What copies of a model give: the same batches as one would have, whichever copy scores them."""

    def __init__(
        self, settings: TransformersModel, context: StepContext, max_tokens: int | None, replicas: Replicas
    ) -> None:
        super().__init__(settings, context, max_tokens)
        self._replicas = replicas
        self._open: OpenReplicas | None = None

    def _score(
        self, window: _Window, batches: Iterable[list[int]]
    ) -> Iterator[tuple[list[int], dict[int, NDArray[Any]] | None]]:
        batches = list(batches)
        if all(self._is_kept(window, batch) for batch in batches):
            yield from ((batch, None) for batch in batches)
            return
        opened = self._open = self._open or self._start()
        rows, limit = window.rows, opened.identity["context_tokens"]
        fitting = [row for row in rows if _fits(row, limit)]
        prefix_ids = fitting[0].ids[: shared_prefix(fitting)] if fitting else []

        def fits(batch: Sequence[int]) -> list[int]:
            return [number for number in batch if _fits(rows[number], limit)]

        def job(batch: Sequence[int]) -> tuple[Any, ...] | None:
            if self._is_kept(window, batch):
                return None
            return prefix_ids, [rows[number] for number in fits(batch)]

        for batch, found in opened.in_order(batches, job, self.context.check_stop):
            yield batch, None if found is None else dict(zip(fits(batch), found, strict=True))

    def _start(self) -> OpenReplicas:
        arguments = (self._settings, self._max_tokens)
        opening = open_copies(self._replicas, TokenScoresReplica, arguments, self._settings, self.renderer)
        return OpenReplicas(self._replicas.count, opening)

    def _let_go(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


class ServedScores(ModelScores):
    """What a server's model gives, or vLLM here. A row is asked once, and kept as its answer arrives.

    One that is refused has no scores; its reason is a row of a file of the step's folder, by `role`.
    """

    def __init__(
        self,
        settings: OpenAIModel | VllmModel,
        context: StepContext,
        role: str,
        max_failed_share: float,
    ) -> None:
        tokenizer = tokenizer_of(settings)
        assert tokenizer is not None
        renderer = Renderer(load_tokenizer(tokenizer, say=context.say))
        called = settings.known_as()
        known_as: list[Any] = [settings.engine, called]
        if isinstance(settings, VllmModel):
            called = settings.path
            known_as += [settings.dtype, settings.engine_arguments]
        super().__init__(called, renderer, known_as, context)
        self._settings, self._max_failed_share = settings, max_failed_share
        self._failures = Failures(context.folder / f"failures-{role}.jsonl", where=f"the {role} {called}")
        self._server: GivenTokens | None = None

    def fill(self, records: Iterable[tuple[int, Record]], progress: Callable[[int], None]) -> int:
        """As any model does. Raises EngineError where more than `max_failed_share` of the rows failed."""
        rows = 0

        def counted() -> Iterator[tuple[int, Record]]:
            nonlocal rows
            for row in records:
                rows += 1
                yield row

        total = super().fill(counted(), progress)
        self._failures.check(self._max_failed_share, rows, kept=KEPT)
        if self._failures.count:
            self.context.say(f"{self._failures.count:,} rows got no answer: {self._failures.path}")
        return total

    def _fill_window(self, window: _Window, progress: Callable[[int], None]) -> None:
        missing = {key: (name, row) for name, row, key in zip(*window, strict=True) if key not in self._store}
        progress(len(window.rows) - len(missing))
        if not missing:
            return
        if len(missing) < len({*window.keys}):
            self._failures.answered()
        server = self._server = self._server or GivenTokens(self._settings, self.context, self._failures)
        limit = server.context_tokens
        fitting = [
            (key, name, row) for key, (name, row) in missing.items() if limit is None or len(row.ids) <= limit
        ]
        progress(len(missing) - len(fitting))

        def keep(number: int, found: list[dict[int, float]]) -> None:
            key, _, row = fitting[number]
            own = [one[id_] for id_, one in zip(row.ids[1:], found, strict=True)]
            logprobs = [one for one, supervised in zip(own, row.mask[1:], strict=True) if supervised]
            self._store.put([(key, np.array(logprobs, dtype=np.float32))])
            progress(1)

        def refused(number: int, reason: str) -> None:
            self._refused[fitting[number][0]] = reason
            progress(1)

        server.ask([(name, row.ids) for _, name, row in fitting], 1, keep, refused)

    def _let_go(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
