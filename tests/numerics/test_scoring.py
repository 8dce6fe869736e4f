"""Log-probabilities of given tokens, batched and chunked, against whole logits in float64 row by row."""

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from potstill import scoring
from potstill.core.errors import ModelError
from potstill.data.chat import Rendered
from potstill.data.prefixes import batches_by_prefix, shared_prefix
from potstill.losses import head
from potstill.models import LoadedModel
from potstill.models.prefixes import can_share_prefix
from potstill.scoring import run_shared_prefix, score_rows, token_logprobs

from .precision import in_float64
from .rows import rendered_rows

PREFIX = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]


@pytest.fixture
def rows() -> list[Rendered]:
    """Rows of different lengths without anything in common."""
    return rendered_rows(6, vocabulary=300)


def _oracle(model: Any, row: Rendered, vocabulary: int) -> list[float]:
    """From whole float64 logits of one unpadded row."""
    with torch.no_grad():
        logits_TV = in_float64(copy.deepcopy(model))(
            input_ids=torch.tensor([row.ids]), use_cache=False
        ).logits[0]
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


@pytest.fixture
def pool() -> list[Rendered]:
    """Four answers each to three questions of different lengths, behind one system prompt, in no order."""
    chance = random.Random(5)

    def draw(tokens: int) -> list[int]:
        return [chance.randrange(3, 300) for _ in range(tokens)]

    found = []
    for question in (draw(9), draw(20), draw(31)):
        for answer in (draw(3), draw(17), draw(6), draw(11)):
            context = [*PREFIX, *PREFIX, *question]
            found.append(Rendered([*context, *answer], [0] * len(context) + [1] * len(answer)))
    chance.shuffle(found)
    return found


@contextmanager
def _passes(model: Any) -> Iterator[list[tuple[int, int]]]:
    """The shape of each pass through the trunk."""
    shapes: list[tuple[int, int]] = []
    hook = getattr(model, model.base_model_prefix).register_forward_pre_hook(
        lambda module, given, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


def test_what_several_rows_begin_with_is_run_once_for_any_model(
    tiny_model: Any, tiny_tokenizer: Any, pool: list[Rendered]
) -> None:
    with _passes(tiny_model) as passes:
        found = token_logprobs(LoadedModel(tiny_model, tiny_tokenizer, "tiny"), pool)
    run, whole = sum(rows * tokens for rows, tokens in passes), sum(len(row.ids) for row in pool)
    if can_share_prefix(tiny_model):
        # The token before an answer predicts it, so it is each row's own; the rest is padding.
        distinct = 20 + (8 + 19 + 30) + sum(row.supervised_tokens + 1 for row in pool)
        assert distinct <= run < 1.25 * distinct < whole / 1.5
    else:
        assert run >= whole
    for row, logprobs_N in zip(pool, found, strict=True):
        assert logprobs_N.tolist() == pytest.approx(_oracle(tiny_model, row, 300), rel=2e-5, abs=2e-6)


def test_batches_go_on_from_the_prefix_of_all_rows_which_is_run_once(
    tiny_llama: Any, tiny_tokenizer: Any, pool: list[Rendered]
) -> None:
    model = LoadedModel(tiny_llama, tiny_tokenizer, "tiny")
    found: dict[int, torch.Tensor] = {}
    with _passes(tiny_llama) as passes:
        prefix = run_shared_prefix(tiny_llama, pool)
        assert prefix is not None
        batches = batches_by_prefix(pool, 70, start=prefix.tokens)
        assert len(batches) > 2
        for batch in batches:
            some = [pool[number] for number in batch]
            found.update(zip(batch, token_logprobs(model, some, max_tokens=70, prefix=prefix), strict=True))
    assert passes[0] == (1, prefix.tokens) == (1, shared_prefix(pool))
    assert prefix.tokens >= 20
    assert max(tokens for _, tokens in passes[1:]) <= max(len(row.ids) for row in pool) - prefix.tokens
    assert all(rows * tokens <= 70 for rows, tokens in passes[1:])
    for number, logprobs_N in found.items():
        expected = _oracle(tiny_llama, pool[number], 300)
        assert logprobs_N.tolist() == pytest.approx(expected, rel=2e-5, abs=2e-6)


def test_few_rows_share_a_pass_behind_a_prefix_that_is_long(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """Pitfall: many answers of two tokens are few tokens, and as many copies of a long prompt's keys."""
    context = [3 + n * 7 % 290 for n in range(400)]
    rows = [Rendered([*context, 5, 3 + n], [0] * 401 + [1]) for n in range(60)]
    with _passes(tiny_llama) as passes:
        found = token_logprobs(LoadedModel(tiny_llama, tiny_tokenizer, "tiny"), rows, max_tokens=140)
    assert passes[0] == (1, 400)
    assert all(number * 402 <= 64 * 140 for number, _ in passes[1:])
    assert max(number for number, _ in passes) == 20
    for row, logprobs_N in zip(rows[::20], found[::20], strict=True):
        assert logprobs_N.tolist() == pytest.approx(_oracle(tiny_llama, row, 300), rel=2e-5, abs=2e-6)


def test_a_response_that_is_long_for_its_prompt_is_run_whole(
    tiny_llama: Any, tiny_tokenizer: Any, pool: list[Rendered]
) -> None:
    long = [*range(3, 203)]
    context = pool[0].ids[: len(pool[0].ids) - pool[0].supervised_tokens]
    rows = [*pool, Rendered([*context, *long], [0] * len(context) + [1] * len(long))]
    with _passes(tiny_llama) as passes:
        found = token_logprobs(LoadedModel(tiny_llama, tiny_tokenizer, "tiny"), rows)
    assert passes[-1] == (1, len(rows[-1].ids)), "attention with a mask would cost more than the prompt"
    assert found[-1].tolist() == pytest.approx(_oracle(tiny_llama, rows[-1], 300), rel=2e-5, abs=2e-6)


def test_rows_that_do_not_fit_into_memory_together_are_scored_in_pieces(
    tiny_llama: Any, tiny_tokenizer: Any, rows: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LoadedModel(tiny_llama, tiny_tokenizer, "tiny")
    whole = token_logprobs(model, rows)
    refused: list[int] = []
    hidden: Callable[..., Any] = scoring.hidden_of_rows

    def small_memory(one: Any, part: list[Rendered], **options: Any) -> Any:
        if len(part) > 2:
            refused.append(len(part))
            raise torch.OutOfMemoryError("out of memory")
        return hidden(one, part, **options)

    monkeypatch.setattr(scoring, "hidden_of_rows", small_memory)
    found = token_logprobs(model, rows)
    assert refused == [6, 3]  # then two at once
    for one, other in zip(found, whole, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), rel=1e-5, abs=1e-6)


def test_a_row_that_fits_into_no_memory_and_other_errors_are_raised(
    tiny_llama: Any, tiny_tokenizer: Any, rows: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LoadedModel(tiny_llama, tiny_tokenizer, "tiny")

    def fails(message: str) -> Callable[..., Any]:
        def hidden(*_: Any, **options: Any) -> Any:
            raise RuntimeError(message)

        return hidden

    monkeypatch.setattr(scoring, "hidden_of_rows", fails("DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(ModelError, match=rf"a row of {len(rows[0].ids)} tokens does not fit into memory"):
        token_logprobs(model, rows)
    monkeypatch.setattr(scoring, "hidden_of_rows", fails("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        score_rows(model, rows, lambda part, targets_N: lambda logits_CV, chunk: {})
