"""Passages and their indexes as sealed artifacts of the store: made once a corpus, whichever step asks."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from potstill.core.hashing import hash_json
from potstill.core.records import Record
from potstill.core.settings import DataRef, Part, Reference, meaning
from potstill.core.step import StepContext
from potstill.core.store import Artifact, Store
from potstill.data.parts import part_content
from potstill.data.sources import Data, FileSource, HubSource, StepPart, TaskSource, read, source_of_path
from potstill.models import encoder_identity, tokenizer_hash
from potstill.retrieval.bm25 import Bm25, build_bm25
from potstill.retrieval.dense import VECTORS_FILE, Dense, Embedder, check_qdrant, write_vectors
from potstill.retrieval.passages import PASSAGES_FILE, Passages, write_passages
from potstill.retrieval.settings import RetrieveSettings

__all__ = ["Retriever", "Search", "fused", "open_retriever"]

_SCHEMA_VERSION = 2
_FUSION_RANKS = 60  # Cormack, Clarke and Buettcher 2009
_DEPTH = 100  # of each ranking that is fused
_FAR = 1000  # ranks that a passage's score is looked for in


class Search(Protocol):
    """Finds passages for a text."""

    def search(self, query: str, count: int) -> list[tuple[int, float]]:
        """The best passages' numbers and scores, best first; fewer than `count` where fewer fit at all."""


class Retriever:
    """The passages of a corpus and one or two ways to search them."""

    def __init__(self, passages: Passages, searches: list[Search], described: dict[str, str]) -> None:
        self.passages, self._searches, self.described = passages, searches, described

    def search(self, query: str, count: int) -> list[tuple[int, float]]:
        """The best passages' numbers and scores, best first; of two ways the fused ranking."""
        if len(self._searches) == 1:
            return self._searches[0].search(query, count)
        depth = max(count, _DEPTH)
        return fused([one.search(query, depth) for one in self._searches])[:count]

    def scores(self, query: str, numbers: list[int]) -> list[float]:
        """The scores of given passages; 0 for one that is not among the first thousand."""
        found = dict(self.search(query, _FAR))
        return [found.get(number, 0.0) for number in numbers]


def fused(rankings: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Reciprocal rank fusion: a passage's score is the sum of 1 / (60 + rank) over the rankings it is in.

    Of equal scores the lowest number comes first (Cormack, Clarke and Buettcher 2009).
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, (number, _) in enumerate(ranking, start=1):
            scores[number] = scores.get(number, 0.0) + 1 / (_FUSION_RANKS + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def open_retriever(settings: RetrieveSettings, context: StepContext, tokenizer: Any) -> Retriever:
    """Passages and indexes of a step's corpus, made where the store does not have them yet.

    Raises DataError for a corpus without text, and what opening the encoder or Qdrant raises.
    """
    store = Store(context.cache_folder)

    def write(folder: Path) -> dict[str, int]:
        articles, count = write_passages(
            folder / PASSAGES_FILE, _articles(settings, context), tokenizer, settings.passage_tokens
        )
        return {"articles": articles, "passages": count}

    tokens = settings.passage_tokens
    seed = context.seed if _is_drawn(settings.corpus) else None
    key = [_corpus(settings, context), seed, tokens, tokenizer_hash(tokenizer)]
    cut = _sealed(store, context, "passages", key, write)
    passages = Passages(cut.folder / PASSAGES_FILE)
    described, searches = {"passages": cut.manifest.fingerprint}, list[Search]()
    if settings.method in ("bm25", "hybrid"):
        built = _sealed(
            store,
            context,
            "bm25",
            cut.manifest.content,
            lambda folder: {"words": build_bm25(passages.texts(), folder)},
        )
        searches.append(Bm25(built.folder))
        described["bm25"] = built.manifest.fingerprint
    if settings.method in ("dense", "hybrid"):
        check_qdrant()
        embed = Embedder(settings.encoder, context, settings.device)
        key = [cut.manifest.content, encoder_identity(settings.encoder)]
        vectors = _sealed(
            store,
            context,
            "vectors",
            key,
            lambda folder: {"width": write_vectors(passages, embed, folder, context)},
        )
        fingerprint = described["vectors"] = vectors.manifest.fingerprint
        searches.append(Dense(vectors.folder / VECTORS_FILE, embed, fingerprint, settings.qdrant))
    return Retriever(passages, searches, described)


def _articles(settings: RetrieveSettings, context: StepContext) -> Any:
    def told(record: Record) -> Record:
        progress.advance()
        return record

    with context.progress("cutting articles", unit="articles") as progress:
        yield from map(told, read(settings.corpus, context))


def _is_drawn(corpus: Data) -> bool:
    """Whether the recipe's seed may decide which articles a corpus has."""
    return any(
        isinstance(one, TaskSource)
        or (isinstance(one, FileSource | HubSource) and bool(one.shuffle or one.labels))
        for one in (corpus if isinstance(corpus, list) else [corpus])
    )


def _corpus(settings: RetrieveSettings, context: StepContext) -> Any:
    """What stands for the corpus in a fingerprint: the content that it leads to."""

    def identify(reference: Reference | Part) -> Any:
        if isinstance(reference, StepPart):
            return [part_content(reference, context.artifacts(reference.step)), reference.weight]
        assert isinstance(reference, DataRef)
        if reference.is_path and Path(reference).is_file():
            return meaning(source_of_path(reference))
        return [[artifact.manifest.content, view] for artifact, view in context.artifacts(reference)]

    return meaning(settings.corpus, identify)


def _sealed(
    store: Store, context: StepContext, kind: str, key: Any, make: Callable[[Path], dict[str, int]]
) -> Artifact:
    """The sealed artifact of a key, made by `make` where the store lacks it; one process makes it."""
    fingerprint = hash_json([kind, _SCHEMA_VERSION, key])
    if (found := store.find(kind, fingerprint)) is not None:
        found.check_content()
        context.event("index_reused", index=kind, folder=str(found.folder))
        return found
    with store.lock(fingerprint, on_wait=lambda pid: context.say(f"waiting for process {pid}: {kind}")):
        if (found := store.find(kind, fingerprint)) is None:
            folder, started = store.prepare(kind, fingerprint), time.monotonic()
            counts = make(folder)
            seconds = round(time.monotonic() - started, 3)
            found = store.seal(
                folder,
                kind=kind,
                fingerprint=fingerprint,
                settings={"key": key},
                seed=context.seed,
                counts=counts,
                seconds=seconds,
            )
            told = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            context.say(f"{kind}: {told} ({seconds:.1f} s)")
    return found
