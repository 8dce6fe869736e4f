"""What a server's log-probabilities are: asked before a step relies on them.

Shapes: T tokens of a text but its first.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal

from potstill.core.errors import EngineError
from potstill.data.chat import Rendered
from potstill.models import TransformersModel, load, parameter_count

__all__ = [
    "KNOWN_TEXT",
    "PROBE_BEGINNING",
    "PROBE_QUESTION",
    "PROBE_TEMPERATURE",
    "Reported",
    "check_prompt_logprobs",
    "check_scores",
    "known_here",
    "own_logprobs",
    "reported",
    "turned",
]

Reported = Literal["at 1", "at the sampling temperature"]
"""Whether log-probabilities of sampled tokens are those of temperature 1 or of the request's own."""

PROBE_QUESTION = "Name a colour."
PROBE_BEGINNING = "Of all the colours that there are I name"
PROBE_TEMPERATURE = 0.5
"""Below 1, since some servers take no higher one; gaps between log-probabilities are twice as wide there."""

# Long enough for several blocks of a server's prefix cache, of 16 tokens each in vLLM.
KNOWN_TEXT = (
    "A pot still is filled with a wash, and heat drives the spirit out of it. The first run is weak and "
    "rough; it goes back into the still, and the second run is cut into heads, heart and tails. Only the "
    "heart is kept. The 2 cuts are made by taste, at about 72 % and 63 %."
)

_LEAST_GAP = 0.1
_RATIO_TOLERANCE = 0.2
_SAME_NATS = 0.05
_LIKE_NATS = 0.2
_FEW_PARAMETERS = 1e9  # whose probabilities of one short text take seconds, and no more than 4 GB


def reported(at_one: Mapping[str, float], at_half: Mapping[str, float]) -> Reported | None:
    """At what temperature log-probabilities of one place in a text are, from requests at 1 and at 0.5.

    They are by token. The gaps of the likeliest to the others stay as they are, or double. None where there
    are too few tokens or too small gaps to tell, or they do neither.
    """
    known = sorted(at_one.keys() & at_half.keys(), key=at_one.__getitem__)
    if len(known) < 2:
        return None
    one, half = (sum(found[known[-1]] - found[token] for token in known[:-1]) for found in (at_one, at_half))
    if not (math.isfinite(one) and math.isfinite(half)) or one < _LEAST_GAP:
        return None
    if math.isclose(half, one, rel_tol=_RATIO_TOLERANCE):
        return "at 1"
    if math.isclose(half, one / PROBE_TEMPERATURE, rel_tol=_RATIO_TOLERANCE):
        return "at the sampling temperature"
    return None


def turned(token_ids: Sequence[int]) -> list[int]:
    """Another text that begins as this one does."""
    half = len(token_ids) // 2
    return [*token_ids[:half], *reversed(token_ids[half:])]


def own_logprobs(found: Sequence[Mapping[int, float]], token_ids: Sequence[int]) -> list[float]:
    """The log-probability of each token but the first, T of them."""
    return [values[id_] for values, id_ in zip(found, token_ids[1:], strict=True)]


async def check_prompt_logprobs(
    ask: Callable[[Sequence[int]], Awaitable[Sequence[Mapping[int, float]]]],
    token_ids: Sequence[int],
    *,
    where: str,
    expected: Callable[[], Sequence[float] | None],
) -> None:
    """Ask for a known text twice, with one between that begins alike, and check both as `check_scores` does.

    `expected` computes the model's own log-probabilities, where it lies here.
    """
    first = await ask(token_ids)
    await ask(turned(token_ids))
    again = await ask(token_ids)
    check_scores(first, again, token_ids, where=where, expected_T=await asyncio.to_thread(expected))


def known_here(source: TransformersModel, token_ids: Sequence[int]) -> list[float] | None:
    """What a model's weights give to each token but the first, where they are few."""
    from potstill.scoring import token_logprobs

    if (parameter_count(source) or math.inf) > _FEW_PARAMETERS:
        return None
    row = Rendered([*token_ids], [0] + [1] * (len(token_ids) - 1))
    [found] = token_logprobs(load(source.model_copy(update={"device": "cpu"})), [row])
    return [float(one) for one in found]


def check_scores(
    first: Sequence[Mapping[int, float]],
    again: Sequence[Mapping[int, float]],
    token_ids: Sequence[int],
    *,
    where: str,
    expected_T: Sequence[float] | None = None,
) -> None:
    """Raise EngineError unless what a server says of a known text can be what the text's tokens are worth.

    `first` and `again` are two answers for the same token ids, with another text in between that begins
    alike; each has the likeliest ids of every place. `expected_T` are the model's own log-probabilities where
    it lies here.
    """
    most = max(math.fsum(math.exp(min(one, 100.0)) for one in values.values()) for values in first)
    if most > 1.01:
        raise EngineError(
            f"what the server gives are no log-probabilities: in one token's place they add up to {most:.3g}",
            where=where,
            expected="natural logarithms of probabilities, which are 1 together at the most",
            mend="serve by vLLM with --logprobs-mode raw_logprobs",
        )
    own, own_again = own_logprobs(first, token_ids), own_logprobs(again, token_ids)
    if (apart := _apart(own, own_again)) > _SAME_NATS:
        raise EngineError(
            "the server scores a text differently once it has scored another that begins alike: by "
            f"{apart:.2g} nats a token",
            where=where,
            expected="the same log-probabilities whatever was asked before",
            mend="serve by vLLM with --no-enable-prefix-caching",
        )
    if expected_T is not None and (apart := _apart(own, expected_T)) > _LIKE_NATS:
        raise EngineError(
            f"the server's log-probabilities of a known text are {apart:.2g} nats a token from those that "
            "the same weights give here",
            where=where,
            expected="log-probabilities at temperature 1 of each token, given those before it",
            mend="see that the server runs this model, with --logprobs-mode raw_logprobs where it is vLLM",
        )


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Nats a token; tokens to which both give no probability are alike."""
    return sum(0.0 if a == b else abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
