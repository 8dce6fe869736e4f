"""What is kept of a teacher's next-token distributions, and the teacher signals made of that.

Shapes: N tokens, C tokens of one chunk, V vocabulary, K kept ids, D draws, T declared temperatures. Every log
is natural.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from potstill.core.errors import DataError
from potstill.logits.packing import Array, Stream
from potstill.losses.divergences import log1mexp
from potstill.losses.head import TokenFunction
from potstill.losses.types import Sampled, Sparse

__all__ = ["Codec", "Draws", "ReadStream", "TopK", "codec_of", "describe", "id_type", "tail_odds_left"]

ReadStream = Callable[[str, slice], Array]
"""Some of the numbers of a block's stream, by name."""

# A log-probability -x is kept as the whole number nearest to _LEVELS_A_LOG log(1 + x).
_LEVELS_A_LOG = 256
_LOG_PROBS = -np.expm1(np.arange(4096) / _LEVELS_A_LOG).astype(np.float32)
_PROBABILITIES = np.exp(_LOG_PROBS)
# The log-odds of the tail, in int16: +-64, and the smallest number for a tail that is empty.
_ODDS_A_LOG, _MOST_ODDS, _NO_TAIL = 512, 2**15 - 1, -(2**15)
_SAMPLING_TOKENS = 64


def id_type(vocabulary_size: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest unsigned integer that holds every token id: two bytes up to 65,536 ids, else four."""
    return np.uint16 if vocabulary_size <= 1 << 16 else np.uint32


def tail_odds_left(log_probs_NK: Tensor) -> Tensor:
    """log(tail / kept), N1, where the tail is what the kept probabilities leave over."""
    # Rounded probabilities may sum past 1.
    log_kept_N1 = log_probs_NK.logsumexp(-1, keepdim=True).clamp(max=-1e-12)
    return log1mexp(log_kept_N1) - log_kept_N1


def _id_stream(vocabulary_size: int, columns: int | None) -> Stream:
    return Stream(np.dtype(id_type(vocabulary_size)).str, columns)


@dataclass(frozen=True)
class TopK:
    """The k most probable ids of each token, the most probable first, and what is needed to temper them.

    Kept are the ids, their log-probabilities at T = 1 and, for each declared temperature, the log-odds
    log(tail / kept) of the mass of all other ids, and the logsumexp of logits / T. A log-probability l that
    is stored is off by at most (1 + |l|) / 512, and on reading all kept ones are shifted so that their sum is
    the kept mass. Tail and kept mass are off by a factor of at most exp(1/1024) while both exceed exp(-64).
    Temperature 1 is always declared, being that of the log-probabilities. The normaliser at another
    temperature does not follow from the one at 1, so only declared ones can be read.
    """

    name: ClassVar[str] = "topk"
    version: ClassVar[int] = 2

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

    @property
    def streams(self) -> dict[str, Stream]:
        """How a packed row's arrays are stored."""
        return {
            "ids": _id_stream(self.vocabulary_size, self.k),
            "level_steps": Stream("<u2", self.k),
            "tail_odds": Stream("<i2", len(self.temperatures)),
            "logsumexp": Stream("<f2", len(self.temperatures)),
        }

    def encoder(self, keys: Sequence[bytes], tokens: Sequence[int]) -> TokenFunction:
        """`encode` for the rows with these keys and so many supervised tokens each, in order."""
        return lambda logits_CV, rows: self.encode(logits_CV)

    def encode(self, logits_CV: Tensor) -> dict[str, Tensor]:
        """What is kept of full logits: "ids" CK, "log_probs" CK, "logsumexp" CT and "tail_odds" CT."""
        top_logits_CK, ids_CK = logits_CV.topk(self.k, -1)
        log_probs, logsumexp, tail_odds = [], [], []
        for temperature in self.temperatures:
            log_probs_CV = (logits_CV / temperature).log_softmax(-1)
            log_probs.append(log_probs_CV.gather(-1, ids_CK))
            logsumexp.append(top_logits_CK[:, 0] / temperature - log_probs[-1][:, 0])
            # Whichever of kept mass and tail is the smaller is summed itself, not taken as 1 minus the other.
            log_kept_C = log_probs[-1].logsumexp(-1)
            log_others_C = log_probs_CV.exp_().scatter_(-1, ids_CK, 0.0).sum(-1).log()
            tail_odds.append(
                torch.where(
                    log_kept_C < math.log(0.5),
                    log1mexp(log_kept_C) - log_kept_C,
                    log_others_C - log1mexp(log_others_C),
                )
            )
        return {
            "ids": ids_CK,
            "log_probs": log_probs[self.temperatures.index(1.0)],
            "logsumexp": torch.stack(logsumexp, -1),
            "tail_odds": torch.stack(tail_odds, -1),
        }

    def from_log_probs(self, likeliest: Sequence[Mapping[int, float]]) -> dict[str, Tensor]:
        """What `encode` gives at T = 1, from the log-probabilities of each token's k likeliest ids or more.

        An id past the vocabulary is left to the tail, and one without probability stands in its place. The
        logsumexp of logits that nobody saw is NaN.
        """
        assert self.temperatures == (1.0,)
        kept = []
        for token in likeliest:
            others = ((id_, -math.inf) for id_ in range(self.vocabulary_size) if id_ not in token)
            first = sorted(token.items(), key=lambda pair: -pair[1])[: self.k]
            known = [(id_, one) for id_, one in first if id_ < self.vocabulary_size]
            kept.append([*known, *itertools.islice(others, self.k - len(known))])
        ids_NK = torch.tensor([[id_ for id_, _ in token] for token in kept])
        log_probs_NK = torch.tensor([[one for _, one in token] for token in kept], dtype=torch.float64)
        return {
            "ids": ids_NK,
            "log_probs": log_probs_NK,
            "logsumexp": torch.full((len(kept), 1), math.nan, dtype=torch.float64),
            "tail_odds": tail_odds_left(log_probs_NK),
        }

    def pack(self, quantities: Mapping[str, Tensor], *, where: str = "logits") -> dict[str, Array]:
        """Encoded quantities as the whole numbers that are stored. Raises DataError for a NaN."""
        found = {name: value.cpu().numpy() for name, value in quantities.items()}
        nan_N = np.isnan(found["log_probs"]).any(-1) | np.isnan(found["tail_odds"]).any(-1)
        _check_distributions(nan_N, where)
        levels = np.rint(_LEVELS_A_LOG * np.log1p(-found["log_probs"].astype(np.float64)))
        levels = np.clip(levels, 0, len(_LOG_PROBS) - 1).astype(np.int32)
        odds = found["tail_odds"].astype(np.float64)
        stored_odds = np.clip(np.rint(_ODDS_A_LOG * odds), -_MOST_ODDS, _MOST_ODDS)
        return {
            "ids": found["ids"].astype(id_type(self.vocabulary_size)),
            "level_steps": np.diff(levels, axis=1, prepend=0).astype(np.uint16),
            "tail_odds": np.where(np.isneginf(odds), _NO_TAIL, stored_odds).astype(np.int16),
            "logsumexp": found["logsumexp"].astype(np.float16),
        }

    def select(self, read: ReadStream, tokens: slice) -> dict[str, Array]:
        """What `decode` needs of some tokens of a block."""
        return {name: read(name, tokens) for name in ("ids", "level_steps", "tail_odds")}

    def decode(
        self, stored: Mapping[str, Array], temperature: float, k: int | None = None, *, where: str = "logits"
    ) -> Sparse:
        """The signal at one declared temperature with the k most probable ids (all by default).

        Kept probabilities and tail sum to 1: what was rounded is put right by giving the kept ids 1 - tail
        together. Raises DataError for a temperature that was not declared and for more ids than there are.
        """
        _check_declared(self.temperatures, temperature, where)
        if k is not None and not 1 <= k <= self.k:
            raise DataError(
                f"top {k} asked for", where=where, expected=f"1 to {self.k}, which the cache step kept"
            )
        levels_NK = stored["level_steps"].cumsum(1, dtype=np.int32)
        log_probs_NK = torch.from_numpy(_LOG_PROBS.take(levels_NK, mode="clip"))
        if temperature == 1.0:
            log_mass_N = torch.from_numpy(_PROBABILITIES.take(levels_NK, mode="clip").sum(1)).log()
        else:
            log_probs_NK /= temperature
            log_mass_N = log_probs_NK.logsumexp(-1)  # at a small temperature every probability may underflow
        odds_N = self._tail_odds(stored)[:, self.temperatures.index(temperature)]
        log_tail_N = functional.logsigmoid(odds_N)
        log_probs_NK += (functional.logsigmoid(-odds_N) - log_mass_N)[:, None]
        ids_NK = torch.from_numpy(stored["ids"].astype(np.int64))
        if k is not None and k < self.k:
            log_tail_N = torch.logaddexp(log_tail_N, log_probs_NK[:, k:].logsumexp(-1))
            ids_NK, log_probs_NK = ids_NK[:, :k], log_probs_NK[:, :k]
        return Sparse(ids_NK, log_probs_NK, log_tail_N, temperature)

    def token_figures(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Of each token: "kept_mass" at T = 1, and "distinct_ids"."""
        odds_N = self._tail_odds(stored)[:, self.temperatures.index(1.0)]
        return {
            "kept_mass": torch.sigmoid(-odds_N.double()).numpy(),
            "distinct_ids": np.full(len(odds_N), self.k),
        }

    def _tail_odds(self, stored: Mapping[str, Array]) -> Tensor:
        levels_NT = stored["tail_odds"]
        odds_NT = levels_NT.astype(np.float32) / _ODDS_A_LOG
        odds_NT[levels_NT == _NO_TAIL] = -np.inf
        return torch.from_numpy(odds_NT)


@dataclass(frozen=True)
class Draws:
    """Ids drawn from softmax(logits / T), with replacement, and how often each was (arXiv 2503.16870).

    Kept are each token's distinct ids, the most drawn first, and their counts, which sum to `draws`. The
    chances behind a row's draws come from `seed` and the row's key, whatever batch it is scored in.
    A sample stands for the distribution at its own temperature only.
    """

    name: ClassVar[str] = "sampled"
    version: ClassVar[int] = 2
    k: ClassVar[None] = None

    draws: int
    vocabulary_size: int
    temperatures: tuple[float, ...] = (1.0,)
    seed: int = 0

    def __post_init__(self) -> None:
        assert len(self.temperatures) == 1
        assert self.temperatures[0] > 0
        assert 1 <= self.draws < 1 << 16

    @property
    def streams(self) -> dict[str, Stream]:
        """How a packed row's arrays are stored."""
        return {
            "ids": _id_stream(self.vocabulary_size, None),
            "counts": Stream("|u1" if self.draws < 1 << 8 else "<u2", None),
        }

    def encoder(self, keys: Sequence[bytes], tokens: Sequence[int]) -> TokenFunction:
        """`encode` for the rows with these keys and so many supervised tokens each, in order."""
        chances_ND = np.concatenate(
            [
                self._chances(key, count * self.draws).reshape(count, self.draws)
                for key, count in zip(keys, tokens, strict=True)
            ]
        )
        return lambda logits_CV, rows: self.encode(logits_CV, torch.from_numpy(chances_ND[rows]))

    def _chances(self, key: bytes, count: int) -> Array:
        # The generator's raw bits: what NumPy makes of them may change between its versions.
        bits = np.random.Philox([self.seed, *np.frombuffer(key, dtype="<u8").tolist()]).random_raw(count)
        chances: Array = (bits >> 11) * 2.0**-53
        return chances

    def encode(self, logits_CV: Tensor, chances_CD: Tensor) -> dict[str, Tensor]:
        """What is drawn from full logits by inversion of chances in [0, 1): "drawn" CD, ids in order.

        A token whose logits have no softmax gets -1, which `pack` refuses.
        """
        drawn = []
        for start in range(0, len(logits_CV), _SAMPLING_TOKENS):
            part = slice(start, start + _SAMPLING_TOKENS)
            # Sums in float64: in float32 the last ids of a large vocabulary would be drawn by rounding.
            cumulated = (logits_CV[part] / self.temperatures[0]).softmax(-1).cumsum(-1, dtype=torch.float64)
            wanted = chances_CD[part].to(cumulated) * cumulated[:, -1:]
            ids = torch.searchsorted(cumulated, wanted, right=True)
            ids = ids.clamp(max=self.vocabulary_size - 1).sort(-1).values
            drawn.append(torch.where(cumulated[:, -1:].isfinite(), ids, -1))
        return {"drawn": torch.cat(drawn)}

    def pack(self, quantities: Mapping[str, Tensor], *, where: str = "logits") -> dict[str, Array]:
        """Drawn ids as distinct ids and counts, token by token. Raises DataError for a NaN."""
        drawn_ND = quantities["drawn"].cpu().numpy()
        _check_distributions(drawn_ND.min(-1) < 0, where)
        begins_ND = np.ones(drawn_ND.shape, dtype=bool)
        begins_ND[:, 1:] = drawn_ND[:, 1:] != drawn_ND[:, :-1]
        begins = np.flatnonzero(begins_ND)
        counts = np.diff(begins, append=drawn_ND.size)
        order = np.lexsort((-counts, begins // self.draws))
        return {
            "ids": drawn_ND.ravel()[begins][order].astype(id_type(self.vocabulary_size)),
            "counts": counts[order].astype(self.streams["counts"].dtype),
        }

    def select(self, read: ReadStream, tokens: slice) -> dict[str, Array]:
        """What `decode` needs of some tokens of a block: a token ends where its counts sum to `draws`."""
        counts = read("counts", slice(None))
        ends = counts.cumsum(dtype=np.int64)
        first, last = 0, len(counts)
        if tokens.start is not None:
            first, last = np.searchsorted(
                ends, (tokens.start * self.draws, tokens.stop * self.draws), "right"
            )
        return {"ids": read("ids", slice(first, last)), "counts": counts[first:last]}

    def decode(
        self, stored: Mapping[str, Array], temperature: float, k: int | None = None, *, where: str = "logits"
    ) -> Sampled:
        """The signal at the temperature of the draws. Raises DataError for another one, and for a `k`."""
        _check_declared(self.temperatures, temperature, where)
        if k is not None:
            raise DataError(
                f"top {k} asked for",
                where=where,
                expected="no k: these ids were drawn, not the most probable",
            )
        counts = stored["counts"].astype(np.int64)
        tokens = (counts.cumsum() - 1) // self.draws
        distinct_N = np.bincount(tokens)
        columns = np.arange(len(counts)) - (distinct_N.cumsum() - distinct_N)[tokens]
        shape = (len(distinct_N), int(distinct_N.max()))
        ids_NK, shares_NK = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        ids_NK[tokens, columns] = stored["ids"]
        shares_NK[tokens, columns] = counts / self.draws
        return Sampled(torch.from_numpy(ids_NK), torch.from_numpy(shares_NK), temperature)

    def token_figures(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Of each token: "distinct_ids"."""
        tokens = (stored["counts"].cumsum(dtype=np.int64) - 1) // self.draws
        return {"distinct_ids": np.bincount(tokens)}


Codec = TopK | Draws


def describe(codec: Codec) -> dict[str, Any]:
    """The settings that a reader needs, as JSON."""
    return {
        "codec": codec.name,
        "codec_version": codec.version,
        **asdict(codec),
        "temperatures": list(codec.temperatures),
    }


def codec_of(description: Mapping[str, Any], *, where: str) -> Codec:
    """The codec of a cache. Raises DataError, by name, for one that this version does not know."""
    kinds: tuple[type[TopK], type[Draws]] = (TopK, Draws)
    for kind in kinds:
        if (description.get("codec"), description.get("codec_version")) == (kind.name, kind.version):
            try:
                settings = {name: description[name] for name in (field.name for field in fields(kind))}
                return kind(**{**settings, "temperatures": tuple(description["temperatures"])})
            except (AssertionError, KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"says of codec {kind.name!r} what no version of it wrote ({error})", where=where
                ) from error
    raise DataError(
        f"the logits are stored by codec {description.get('codec')!r}, "
        f"version {description.get('codec_version')}",
        where=where,
        expected=" or ".join(f"{kind.name!r}, version {kind.version}" for kind in kinds),
        mend="read them with the version of potstill that wrote them, or run the cache step again",
    )


def _check_distributions(nan_N: Array, where: str) -> None:
    if nan_N.any():
        raise DataError(
            f"token {int(nan_N.argmax())} of those kept has no distribution (NaN)",
            where=where,
            expected="finite logits, or -inf for an id that cannot come",
            mend="run the teacher in bfloat16 or float32 where float16 overflows, or leave the row out",
        )


def _check_declared(temperatures: Sequence[float], temperature: float, where: str) -> None:
    if temperature not in temperatures:
        raise DataError(
            f"temperature {temperature:g} was not declared when the teacher's logits were cached",
            where=where,
            expected="one of " + ", ".join(f"{one:g}" for one in temperatures),
            mend=f"add {temperature:g} to the cache step's `temperatures` and run it again: what is kept "
            "of a distribution cannot be tempered anew",
        )
