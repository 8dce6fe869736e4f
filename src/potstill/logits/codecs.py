"""What is kept of a teacher's next-token distributions, and the teacher signals made of that.

Shapes: N tokens, C tokens of one chunk, V vocabulary, K kept ids, T declared temperatures. Every log is
natural.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.core.errors import DataError
from potstill.losses.divergences import log1mexp
from potstill.losses.types import Sparse

__all__ = ["Array", "TopK", "id_type"]

Array = np.ndarray[Any, np.dtype[Any]]
_NAME, _VERSION = "topk", 1


def id_type(vocabulary_size: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest unsigned integer that holds every token id: two bytes up to 65,536 ids, else four."""
    return np.uint16 if vocabulary_size <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class TopK:
    """The k most probable ids of each token, the most probable first, and what is needed to temper them.

    Kept are the ids, their log-probabilities at T = 1 (fp16) and, for each declared temperature, the
    logsumexp of logits / T and the log of the mass of all other ids (fp32).
    Temperature 1 is always declared, being that of the log-probabilities. The normaliser at another
    temperature does not follow from the one at 1, so only declared ones can be read.
    """

    k: int
    vocabulary_size: int
    temperatures: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        assert 1.0 in self.temperatures
        assert min(self.temperatures) > 0
        if not 1 <= self.k <= self.vocabulary_size:
            raise DataError(
                f"top_k is {self.k}, but the vocabulary has {self.vocabulary_size} ids",
                expected=f"1 to {self.vocabulary_size}",
            )

    def describe(self) -> dict[str, Any]:
        """The settings that a reader needs, as JSON."""
        return {
            "codec": _NAME,
            "codec_version": _VERSION,
            **asdict(self),
            "temperatures": list(self.temperatures),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], *, where: str) -> "TopK":
        """The codec of a cache. Raises DataError, by name, for one that this version does not know."""
        name, version = description.get("codec"), description.get("codec_version")
        if (name, version) != (_NAME, _VERSION):
            raise DataError(
                f"the logits are stored by codec {name!r}, version {version}",
                where=where,
                expected=f"{_NAME!r}, version {_VERSION}",
                mend="read them with the version of potstill that wrote them, or run the cache step again",
            )
        return cls(description["k"], description["vocabulary_size"], tuple(description["temperatures"]))

    def encode(self, logits_CV: Tensor) -> dict[str, Tensor]:
        """What is kept of full logits: "ids" CK, "log_probs" CK, "logsumexp" CT and "log_tail" CT."""
        top_logits_CK, ids_CK = logits_CV.topk(self.k, -1)
        log_probs, logsumexp, log_tail = [], [], []
        for temperature in self.temperatures:
            log_probs_CV = (logits_CV / temperature).log_softmax(-1)
            log_probs.append(log_probs_CV.gather(-1, ids_CK))
            logsumexp.append(top_logits_CK[:, 0] / temperature - log_probs[-1][:, 0])
            # Whichever of kept mass and tail is the smaller is summed itself, not taken as 1 minus the other.
            log_kept_C = log_probs[-1].logsumexp(-1)
            log_others_C = log_probs_CV.exp_().scatter_(-1, ids_CK, 0.0).sum(-1).log()
            log_tail.append(torch.where(log_kept_C < math.log(0.5), log1mexp(log_kept_C), log_others_C))
        return {
            "ids": ids_CK,
            "log_probs": log_probs[self.temperatures.index(1.0)],
            "logsumexp": torch.stack(logsumexp, -1),
            "log_tail": torch.stack(log_tail, -1),
        }

    def pack(self, quantities: Mapping[str, Tensor]) -> dict[str, Array]:
        """Encoded quantities as they are stored."""
        types = {"ids": id_type(self.vocabulary_size), "log_probs": np.float16}
        return {
            name: value.cpu().numpy().astype(types.get(name, np.float32))
            for name, value in quantities.items()
        }

    def decode(
        self, stored: Mapping[str, Array], temperature: float, k: int | None = None, *, where: str = "logits"
    ) -> Sparse:
        """The signal at one declared temperature with the k most probable ids (all by default).

        Kept probabilities and tail sum to 1: what fp16 rounded is put right by giving the kept ids 1 - tail
        together. Raises DataError for a temperature that was not declared and for more ids than there are.
        """
        if temperature not in self.temperatures:
            raise DataError(
                f"temperature {temperature:g} was not declared when the teacher's logits were cached",
                where=where,
                expected="one of " + ", ".join(f"{one:g}" for one in self.temperatures),
                mend=f"add {temperature:g} to the cache step's `temperatures` and run it again: what is kept "
                "of a distribution cannot be tempered anew",
            )
        if k is not None and not 1 <= k <= self.k:
            raise DataError(
                f"top {k} asked for", where=where, expected=f"1 to {self.k}, which the cache step kept"
            )
        log_probs_NK = torch.from_numpy(stored["log_probs"].astype(np.float32)) / temperature
        log_tail_N = torch.from_numpy(stored["log_tail"][:, self.temperatures.index(temperature)].copy())
        log_probs_NK += (log1mexp(log_tail_N) - log_probs_NK.logsumexp(-1))[:, None]
        ids_NK = torch.from_numpy(stored["ids"].astype(np.int64))
        if k is not None and k < self.k:
            log_tail_N = torch.logaddexp(log_tail_N, log_probs_NK[:, k:].logsumexp(-1))
            ids_NK, log_probs_NK = ids_NK[:, :k], log_probs_NK[:, :k]
        return Sparse(ids_NK, log_probs_NK, log_tail_N, temperature)
