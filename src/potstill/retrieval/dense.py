"""Dense retrieval: passages embedded once into a plain file of vectors, and searched by Qdrant.

Shapes: N passages, B texts, T tokens, H embedding width.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.core.errors import EngineError
from potstill.core.step import StepContext
from potstill.models import load_encoder
from potstill.retrieval.passages import Passages
from potstill.retrieval.settings import QdrantServer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["VECTORS_FILE", "Dense", "Embedder", "check_qdrant", "write_vectors"]

VECTORS_FILE = "vectors.npy"
_BATCH_TEXTS, _BLOCK_TEXTS = 32, 1024
# Some 10 MB of JSON; a server refuses requests of more than 32, unless told otherwise.
_REQUEST_VALUES = 2**19
_MAX_TOKENS = 256
_TIMEOUT_S = 60


def check_qdrant() -> None:
    """Raise EngineError where qdrant-client is not installed."""
    if importlib.util.find_spec("qdrant_client") is None:
        raise EngineError(
            "method dense and hybrid search by Qdrant, and qdrant-client is not installed",
            mend="pip install 'potstill[qdrant]', or take method bm25",
        )


class Embedder:
    """Texts to unit vectors: the mean of an encoder's last hidden states over a text's tokens."""

    def __init__(self, name: str, context: StepContext, device: str | None) -> None:
        self.model, self.tokenizer = load_encoder(name, task="embedding", device=device, say=context.say)
        self.max_tokens = min(_MAX_TOKENS, self.tokenizer.model_max_length)

    def __call__(self, texts: Sequence[str]) -> "NDArray[np.float32]":
        """Vectors of unit length, [B, H]; of a long text its first 256 tokens count."""
        import torch

        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.model.device)
        with torch.no_grad():
            hidden_BTH = self.model(**inputs).last_hidden_state
            mask_BT1 = inputs["attention_mask"][..., None].to(hidden_BTH)
            mean_BH = (hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
            vectors: NDArray[np.float32] = torch.nn.functional.normalize(mean_BH, dim=-1).cpu().numpy()
        return vectors


def write_vectors(passages: Passages, embed: Embedder, folder: Path, context: StepContext) -> int:
    """Embed passages into a .npy file of [N, H]; an interrupted one goes on behind its last whole block."""
    import numpy as np

    partial, width = folder / "vectors.partial", int(embed.model.config.hidden_size)
    block_bytes = _BLOCK_TEXTS * width * 4
    done = partial.stat().st_size // block_bytes if partial.exists() else 0
    start = done * _BLOCK_TEXTS
    with context.progress("embedding", total=len(passages), unit="passages") as progress:
        progress.advance(start)
        with partial.open("ab") as file:
            file.truncate(done * block_bytes)
            for texts in _blocks(passages.texts(start), _BLOCK_TEXTS):
                context.check_stop()
                # Texts of like length share a batch, so that little is padding.
                order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
                vectors_NH = np.empty((len(texts), width), dtype=np.float32)
                for places in _blocks(order, _BATCH_TEXTS):
                    vectors_NH[places] = embed([texts[place] for place in places])
                    progress.advance(len(places))
                file.write(vectors_NH.tobytes())
                file.flush()
                os.fsync(file.fileno())
    flat = np.memmap(partial, dtype=np.float32, mode="r", shape=(len(passages), width))
    np.save(folder / VECTORS_FILE, flat, allow_pickle=False)
    del flat
    partial.unlink()
    return width


def _blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    block: list[Any] = []
    for item in items:
        block.append(item)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


class Dense:
    """Vectors in a Qdrant collection: in this process's memory, or on a server that keeps it.

    Both are searched exactly, by the cosine, so that the server is no part of what is found. Qdrant's own
    files are not used: where it runs in a process, it writes them by pickle.
    """

    def __init__(self, path: Path, embed: Embedder, name: str, server: QdrantServer | None) -> None:
        import numpy as np
        from qdrant_client import QdrantClient, models

        self._url = "this process" if server is None else server.url
        self._embed, self._name = embed, f"potstill-{name[:24]}"
        # In this process every search is exact, and Qdrant warns of being told so.
        self._parameters = None if server is None else models.SearchParams(exact=True)
        vectors_NH = np.load(path, mmap_mode="r", allow_pickle=False)
        if server is None:
            self._client = QdrantClient(":memory:")
            with warnings.catch_warnings():  # that a server is quicker from 20,000 points on
                warnings.simplefilter("ignore", UserWarning)
                self._fill(vectors_NH)
            return
        key = _key(server)
        with _answering(self._url):
            self._client = QdrantClient(
                url=server.url, api_key=key, timeout=_TIMEOUT_S, check_compatibility=False
            )
            if not self._is_whole(len(vectors_NH)):
                self._fill(vectors_NH)

    def _is_whole(self, count: int) -> bool:
        if not self._client.collection_exists(self._name):
            return False
        return bool(self._client.count(self._name, exact=True).count == count)

    def _fill(self, vectors_NH: "NDArray[np.float32]") -> None:
        from qdrant_client import models
        from qdrant_client.http.exceptions import ApiException

        # Another run may be doing the same, and its points are the same by number: nothing is taken away.
        if not self._client.collection_exists(self._name):
            parameters = models.VectorParams(size=vectors_NH.shape[1], distance=models.Distance.COSINE)
            try:
                self._client.create_collection(self._name, vectors_config=parameters)
            except (ApiException, ValueError):
                if not self._client.collection_exists(self._name):
                    raise
        rows = max(1, _REQUEST_VALUES // vectors_NH.shape[1])
        for start in range(0, len(vectors_NH), rows):
            block_NH = vectors_NH[start : start + rows]
            points = models.Batch(ids=list(range(start, start + len(block_NH))), vectors=block_NH.tolist())
            self._client.upsert(self._name, points, wait=True)

    def search(self, query: str, count: int) -> list[tuple[int, float]]:
        """The passages nearest to a text, and their cosines; of equal ones the first passage comes first."""
        vector = self._embed([query])[0].tolist()
        with _answering(self._url):
            answer = self._client.query_points(
                self._name, query=vector, limit=count, search_params=self._parameters
            )
        return sorted(
            ((int(one.id), float(one.score)) for one in answer.points), key=lambda one: (-one[1], one[0])
        )


@contextmanager
def _answering(url: str) -> Iterator[None]:
    """EngineError for whatever goes wrong between a Qdrant server and its client."""
    from qdrant_client.http.exceptions import ApiException

    try:
        yield
    except (ApiException, OSError, ValueError) as error:
        raise EngineError(
            f"Qdrant gives no answer that can be used ({type(error).__name__}: {str(error)[:200]})",
            where=url,
            expected="a Qdrant server",
            mend="start one, correct the url, or leave `qdrant` out to search in this process",
        ) from error


def _key(server: QdrantServer) -> str | None:
    if server.api_key_env is None:
        return None
    if not (key := os.environ.get(server.api_key_env)):
        raise EngineError(
            f"the environment variable {server.api_key_env} is not set",
            where=server.url,
            expected="the server's key in it",
            mend=f"export {server.api_key_env}=...",
        )
    return key
