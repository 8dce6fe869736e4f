"""What traces keep of their teacher for every token: a sparse teacher that need not be asked again."""

import itertools
import math
from collections.abc import Sequence

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.core.settings import Settings
from potstill.models import TransformersModel
from potstill.teachers.llama_cpp import LlamaCppModel
from potstill.teachers.vllm import VllmModel

__all__ = ["kept_alternatives", "tokenizer_of"]


def tokenizer_of(model: Settings) -> TransformersModel | None:
    """Where the tokenizer of a teacher of any engine comes from; None where nobody says."""
    if isinstance(model, TransformersModel):
        return model
    if isinstance(model, LlamaCppModel | VllmModel):
        return model.as_transformers()
    stated = getattr(model, "tokenizer", None)
    return None if stated is None else TransformersModel(path=stated)


def kept_alternatives(
    record: Record, row_ids: Sequence[int], mask: Sequence[int], k: int, *, model: str
) -> list[dict[int, float]]:
    """At least k ids with log p at T = 1 in the place of each supervised token of a trace's row.

    A token whose log p is known is among them, whether it is one of the likeliest or not. Raises DataError
    where the trace does not hold them: it has none, or those of another model, of another temperature, of
    other tokens, fewer than k, or none of the place where its response ended.
    """
    again = f"generate the traces again with `logprobs: {k}`, by this model"
    alternatives, ids = record.alternatives, record.response_token_ids
    if alternatives is None or record.model != model:
        whose = "no alternatives" if alternatives is None else f"those of {record.model}"
        raise DataError(f"the trace holds {whose} to its tokens", mend=again)
    if record.sampling.get("logprob_temperature") != 1.0:
        raise DataError(
            "nobody states that its log-probabilities are at temperature 1",
            mend="state the server's `logprob_temperature: 1` on its model where that is known",
        )
    start = None if ids is None else _start(list(row_ids), ids)
    if start is None or alternatives.ids is None:
        raise DataError("the trace holds texts, or other ids than those that are learnt", mend=again)
    if len(row_ids) - start > len(alternatives):
        raise DataError("the trace holds no alternatives in the place where its response ended")
    found: list[dict[int, float]] = []
    logprobs = itertools.chain(record.logprobs or (), itertools.repeat(math.nan))
    rows = zip(row_ids[start:], mask[start:], logprobs, alternatives, strict=False)
    for id_, is_supervised, logprob, place in rows:
        if not is_supervised:
            continue
        if len(place) < k:
            raise DataError(
                f"the trace holds {len(place)} ids in the place of a token, and top_k is {k}", mend=again
            )
        own = {} if math.isnan(logprob) else {id_: logprob}
        found.append(own | {int(token): one for token, one in place})
    return found


def _start(row_ids: list[int], response_ids: list[int]) -> int | None:
    """Where a response begins in its row, which may have the end of the turn behind it; None if it is not."""
    last = len(row_ids) - len(response_ids)
    starts = (at for at in (last, last - 1) if row_ids[at : at + len(response_ids)] == response_ids)
    return next(starts, None)
