"""Log-probabilities that a model gave to tokens, kept the moment they are there."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.core.database import CheckedValues
from potstill.core.hashing import hash_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ScoreStore", "open_score_store"]


class ScoreStore(CheckedValues):
    """One model's log-probabilities by a row's key. A key's first value stays."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "scores", "key BLOB", "logprobs BLOB")

    def __getitem__(self, key: bytes) -> "NDArray[np.float32]":
        import numpy as np

        values = self.value(key)
        if values is None:
            raise KeyError(key.hex())
        return np.frombuffer(values, dtype="<f4")

    def put(self, scores: "Iterable[tuple[bytes, NDArray[np.float32]]]") -> None:
        """Keep a batch, whole or not at all; a key that is there already keeps what it has."""
        self.keep((key, logprobs.astype("<f4").tobytes()) for key, logprobs in scores)


def open_score_store(cache_folder: Path, model: Any) -> ScoreStore:
    """The store of one model's scores; `model` is what they are known by (JSON-able)."""
    return ScoreStore(cache_folder / "scores" / f"{hash_json(model)[:24]}.sqlite")
