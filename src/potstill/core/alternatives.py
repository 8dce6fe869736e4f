"""The likeliest tokens in each place of a response, held in some bytes a token."""

import base64
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["Alternatives"]


@dataclass(frozen=True, slots=True)
class Alternatives:
    """What an engine tells of each place of a response: the likeliest tokens and their log-probabilities.

    The places are those of the response's tokens and, where it ended by itself and the engine tells so much,
    that of the end of the turn. `counts` says how many tokens are told of each place; none where nothing is
    known. The tokens of all places, one after the other, are `ids`, or `texts` (the bytes of each) from
    engines that tell no ids. `logprobs` has a natural logarithm for each of them.
    """

    counts: "array[int]"
    logprobs: "array[float]"
    ids: "array[int] | None" = None
    texts: list[bytes] | None = None

    @classmethod
    def of(cls, places: Iterable[Sequence[tuple[Any, float]]], *, as_ids: bool) -> Self:
        """From the (token, log-probability) pairs of each place; tokens are whole numbers or bytes."""
        counts: array[int] = array("i")
        logprobs: array[float] = array("f")
        tokens: list[Any] = []
        for place in places:
            counts.append(len(place))
            for token, logprob in place:
                tokens.append(token)
                logprobs.append(logprob)
        if as_ids:
            return cls(counts, logprobs, ids=array("i", tokens))
        return cls(counts, logprobs, texts=tokens)

    def __len__(self) -> int:
        return len(self.counts)

    def __iter__(self) -> Iterator[list[tuple[int | bytes, float]]]:
        """The (token, log-probability) pairs of each place."""
        tokens: Sequence[int | bytes] | None = self.ids if self.texts is None else self.texts
        assert tokens is not None
        start = 0
        for count in self.counts:
            part = slice(start, start + count)
            yield list(zip(tokens[part], self.logprobs[part], strict=True))
            start += count

    def behind(self, places: int) -> "Alternatives":
        """The same behind so many places of which nothing is known."""
        return Alternatives(array("i", [0] * places) + self.counts, self.logprobs, self.ids, self.texts)

    def columns(self) -> dict[str, Any]:
        """The numbers as NumPy arrays over the same memory, for the column `alternatives` of records."""
        import numpy as np

        return {
            "counts": np.frombuffer(self.counts, np.int32),
            "logprobs": np.frombuffer(self.logprobs, np.float32),
            "ids": None if self.ids is None else np.frombuffer(self.ids, np.int32),
            "texts": self.texts,
        }

    @classmethod
    def of_columns(cls, struct: Any) -> Self:
        """From a pyarrow scalar of that column."""
        numbers = {}
        for name, code in (("counts", "i"), ("logprobs", "f"), ("ids", "i")):
            if struct[name].is_valid:
                numbers[name] = array(code, struct[name].values.to_numpy().tobytes())
        return cls(**numbers, texts=struct["texts"].as_py())

    def to_json(self) -> dict[str, Any]:
        """As JSON; numbers are base64 of their bytes, a third of their digits and quick to read."""
        found: dict[str, Any] = {
            "counts": _encoded(self.counts),
            "logprobs": _encoded(self.logprobs),
        }
        if self.ids is not None:
            found["ids"] = _encoded(self.ids)
        if self.texts is not None:
            found["texts"] = [text.decode("latin-1") for text in self.texts]
        return found

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Self:
        """From what `to_json` gave."""
        texts = found.get("texts")
        return cls(
            array("i", base64.b64decode(found["counts"])),
            array("f", base64.b64decode(found["logprobs"])),
            array("i", base64.b64decode(found["ids"])) if "ids" in found else None,
            None if texts is None else [text.encode("latin-1") for text in texts],
        )


def _encoded(numbers: "array[Any]") -> str:
    return base64.b64encode(numbers.tobytes()).decode("ascii")
