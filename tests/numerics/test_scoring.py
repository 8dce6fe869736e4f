"""Log-probabilities of given tokens, batched and chunked, against whole logits in float64 row by row."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from potstill import scoring
from potstill.core.errors import ModelError
from potstill.data.chat import Rendered
from potstill.losses import head
from potstill.models import LoadedModel
from potstill.scoring import score_rows, shared_prefix, token_logprobs

from .rows import rendered_rows

PREFIX = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]


@pytest.fixture
def rows() -> list[Rendered]:
    """Rows of different lengths without anything in common."""
    return rendered_rows(6, vocabulary=300)


def _oracle(model: Any, row: Rendered, vocabulary: int) -> list[float]:
    """From whole float64 logits of one unpadded row."""
    with torch.no_grad():
        logits_TV = (
            copy.deepcopy(model).double()(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        )
    return [
        float(logits_TV[at - 1, :vocabulary].log_softmax(-1)[row.ids[at]])
        for at, supervised in enumerate(row.mask)
        if supervised
    ]


def test_each_token_has_its_log_probability_whatever_stands_beside_its_row(
    tiny_model: Any, tiny_tokenizer: Any, rows: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: list[int] = []
    whole = head.full_precision_logits

    def watched(one: Any, hidden_NH: torch.Tensor) -> torch.Tensor:
        chunks.append(len(hidden_NH))
        return whole(one, hidden_NH)

    monkeypatch.setattr(head, "full_precision_logits", watched)
    found = token_logprobs(LoadedModel(tiny_model, tiny_tokenizer, "tiny"), rows, chunk_tokens=5)
    assert len({len(row.ids) for row in rows}) > 1, "no row was padded"
    assert len(chunks) > 1
    assert max(chunks) == 5
    for row, logprobs_N in zip(rows, found, strict=True):
        assert logprobs_N.dtype == torch.float64
        expected = _oracle(tiny_model, row, len(tiny_tokenizer))
        assert logprobs_N.tolist() == pytest.approx(expected, rel=2e-5, abs=2e-6)
        # The geometric mean of probabilities, as selection takes it.
        mean = math.prod(math.exp(one) ** (1 / len(expected)) for one in expected)
        assert float(logprobs_N.mean().exp()) == pytest.approx(mean, rel=2e-5)


def test_a_prefix_that_rows_share_is_run_once_and_changes_nothing(
    tiny_llama: Any, tiny_tokenizer: Any, rows: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Rendered([*PREFIX, *row.ids], [0] * len(PREFIX) + row.mask) for row in rows]
    assert shared_prefix(rows) >= len(PREFIX)
    passes: list[tuple[int, int]] = []
    trunk = tiny_llama.model

    def watched(module: Any, arguments: Any, options: Any) -> None:
        passes.append(tuple(options["input_ids"].shape))

    trunk.register_forward_pre_hook(watched, with_kwargs=True)
    model = LoadedModel(tiny_llama, tiny_tokenizer, "tiny")
    together = token_logprobs(model, rows)
    assert passes[0][0] == 1, "the prefix was not run alone"
    assert passes[1][0] == len(rows)
    for row, logprobs_N in zip(rows, together, strict=True):
        assert logprobs_N.tolist() == pytest.approx(_oracle(tiny_llama, row, 300), rel=2e-5, abs=2e-6)


def test_rows_that_do_not_fit_into_memory_together_are_scored_in_halves(
    tiny_llama: Any, tiny_tokenizer: Any, rows: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LoadedModel(tiny_llama, tiny_tokenizer, "tiny")
    whole = token_logprobs(model, rows)
    refused: list[int] = []
    hidden: Callable[..., Any] = scoring.hidden_of_rows

    def small_memory(one: Any, part: list[Rendered]) -> Any:
        if len(part) > 2:
            refused.append(len(part))
            raise torch.OutOfMemoryError("out of memory")
        return hidden(one, part)

    monkeypatch.setattr(scoring, "hidden_of_rows", small_memory)
    found = token_logprobs(model, rows)
    assert refused == [6, 3, 3]
    for one, other in zip(found, whole, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), rel=1e-5, abs=1e-6)


def test_a_row_that_fits_into_no_memory_and_other_errors_are_raised(
    tiny_llama: Any, tiny_tokenizer: Any, rows: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LoadedModel(tiny_llama, tiny_tokenizer, "tiny")

    def fails(message: str) -> Callable[..., Any]:
        def hidden(*_: Any) -> Any:
            raise RuntimeError(message)

        return hidden

    monkeypatch.setattr(scoring, "hidden_of_rows", fails("DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(ModelError, match=rf"a row of {len(rows[0].ids)} tokens does not fit into memory"):
        token_logprobs(model, rows)
    monkeypatch.setattr(scoring, "hidden_of_rows", fails("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        score_rows(model, rows, lambda part, targets_N: lambda logits_CV, chunk: {})
