"""KL, agreement and perplexity in one chunked pass against whole logits in float64, row by row."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from potstill.data.chat import Rendered

from .precision import in_float64
from .rows import rendered_rows

if TYPE_CHECKING:
    from potstill.models import LoadedModel
    from potstill.scoring import TraceFigures

CHUNK_TOKENS = 5


def _loaded(model: Any, tokenizer: Any) -> "LoadedModel":
    from potstill.models import LoadedModel

    return LoadedModel(model, tokenizer, "tiny")


def _oracle(model: Any, teacher: Any, row: Rendered, vocabulary: int) -> "TraceFigures":
    """From each model's own whole logits of one unpadded row; no function of ours takes part."""
    import torch

    from potstill.scoring import TraceFigures

    ids = torch.tensor([row.ids])

    def log_probs(one: Any) -> Any:
        with torch.no_grad():
            logits = in_float64(copy.deepcopy(one))(input_ids=ids, use_cache=False).logits[0, :, :vocabulary]
        return torch.log_softmax(logits, -1)

    ours, theirs = log_probs(model), log_probs(teacher)
    cross_entropy = kl = 0.0
    agreed = count = 0
    for position, supervised in enumerate(row.mask):
        if supervised:
            p, q = theirs[position - 1], ours[position - 1]
            cross_entropy -= float(q[row.ids[position]])
            kl += float((p.exp() * (p - q)).sum())
            agreed += int(p.argmax() == q.argmax())
            count += 1
    return TraceFigures(count, cross_entropy, kl, agreed)


def test_one_chunked_pass_gives_what_whole_logits_give(
    tiny_family: str,
    build_tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from potstill import scoring
    from potstill.losses import head

    chunks: list[int] = []
    whole = head.full_precision_logits

    def watched(one: Any, hidden_NH: Any) -> Any:
        chunks.append(len(hidden_NH))
        return whole(one, hidden_NH)

    monkeypatch.setattr(head, "full_precision_logits", watched)
    student, teacher = build_tiny_model(tiny_family, seed=1), build_tiny_model(tiny_family, seed=2)
    rows = rendered_rows(7, vocabulary=len(tiny_tokenizer))

    batches: list[int] = []
    found = scoring.compare_on_traces(
        _loaded(student, tiny_tokenizer),
        _loaded(teacher, tiny_tokenizer),
        rows,
        max_tokens=50,
        chunk_tokens=CHUNK_TOKENS,
        on_batch=batches.append,
    )

    assert len(batches) > 1
    assert sum(batches) == len(rows)
    assert len(chunks) > len(batches)
    assert max(chunks) <= CHUNK_TOKENS
    for row, one in zip(rows, found, strict=True):
        expected = _oracle(student, teacher, row, len(tiny_tokenizer))
        assert one.supervised_tokens == expected.supervised_tokens == sum(row.mask)
        assert one.cross_entropy_nats == pytest.approx(expected.cross_entropy_nats, rel=2e-5)
        assert one.kl_nats == pytest.approx(expected.kl_nats, rel=2e-4, abs=1e-5)
        assert one.agreed_tokens == expected.agreed_tokens


def test_a_padded_vocabulary_does_not_reach_the_normaliser(
    build_tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    import torch

    from potstill.scoring import compare_on_traces

    student = build_tiny_model("qwen2", seed=1)
    padded = student.get_output_embeddings().weight
    assert len(padded) > len(tiny_tokenizer)
    rows = rendered_rows(2, vocabulary=len(tiny_tokenizer))
    before = compare_on_traces(_loaded(student, tiny_tokenizer), None, rows, max_tokens=100)
    with torch.no_grad():
        padded[len(tiny_tokenizer) :] = 50.0
    assert compare_on_traces(_loaded(student, tiny_tokenizer), None, rows, max_tokens=100) == before


def test_a_model_is_at_no_distance_from_itself(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    from potstill.scoring import compare_on_traces

    model = _loaded(tiny_llama, tiny_tokenizer)
    for one in compare_on_traces(model, model, rendered_rows(3, vocabulary=300), max_tokens=100):
        assert one.kl_nats == pytest.approx(0, abs=1e-6)
        assert one.agreed_tokens == one.supervised_tokens


def test_how_rows_are_split_changes_nothing_but_rounding(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    from potstill.scoring import compare_on_traces

    model, rows = _loaded(tiny_llama, tiny_tokenizer), rendered_rows(6, vocabulary=300)
    one_by_one = compare_on_traces(model, None, rows, max_tokens=1, chunk_tokens=1)
    together = compare_on_traces(model, None, rows, max_tokens=10_000)
    assert [one.cross_entropy_nats for one in one_by_one] == pytest.approx(
        [one.cross_entropy_nats for one in together], rel=1e-5
    )
    assert all(one.kl_nats is None and one.agreed_tokens is None for one in together)
