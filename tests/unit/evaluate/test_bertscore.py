"""BERTScore against a slow version by its definition, and what its model must be."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import ModelError
from potstill.evaluate.bertscore import BertScorer
from potstill.models import TransformersModel

TEXTS = ["The answer is 4.", "Four is the answer", "How many apples are left?", "three"]


@pytest.fixture
def encoder(tmp_path: Path, tiny_tokenizer: Any) -> TransformersModel:
    """A tiny BERT whose tokenizer puts special tokens around a text."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=304,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=24,
        initializer_range=0.4,
    )
    BertModel(config).eval().save_pretrained(tmp_path / "encoder")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save_pretrained(tmp_path / "encoder")
    return TransformersModel(path=str(tmp_path / "encoder"), device="cpu")


def by_definition(model: Any, tokenizer: Any, layer: int, answer: str, reference: str) -> list[float]:
    """Each token's state compared with every other by plain Python floats."""
    import torch

    def states(text: str) -> list[list[float]]:
        row = tokenizer(text, return_special_tokens_mask=True)
        with torch.no_grad():
            hidden = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[layer]
        kept = zip(hidden[0].tolist(), row["special_tokens_mask"], strict=True)
        return [state for state, special in kept if not special]

    def cosine(one: list[float], other: list[float]) -> float:
        return (
            math.sumprod(one, other) / math.hypot(*one) / math.hypot(*other)
            if hasattr(math, "sumprod")
            else (sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other))
        )

    ours, theirs = states(answer), states(reference)
    precision = sum(max(cosine(one, other) for other in theirs) for one in ours) / len(ours)
    recall = sum(max(cosine(one, other) for one in ours) for other in theirs) / len(theirs)
    return [precision, recall, 2 * precision * recall / (precision + recall)]


@pytest.mark.parametrize("layer", [None, 1, 0])
def test_it_is_the_mean_of_each_tokens_best_cosine(encoder: TransformersModel, layer: int | None) -> None:
    from transformers import AutoModel, AutoTokenizer

    scorer = BertScorer(encoder, layer=layer, batch=2)
    model, tokenizer = AutoModel.from_pretrained(encoder.path), AutoTokenizer.from_pretrained(encoder.path)
    assert tokenizer("x").input_ids[0] == 1, "special tokens are there to be left aside"
    found = scorer.scores(TEXTS[:3], [[TEXTS[1]], [TEXTS[2]], [TEXTS[3]]])
    for number, scores in enumerate(found):
        wanted = by_definition(
            model, tokenizer, 3 if layer is None else layer, TEXTS[number], TEXTS[number + 1]
        )
        assert [*scores.values()] == pytest.approx(wanted, abs=1e-5)
        assert list(scores) == ["bertscore_precision", "bertscore_recall", "bertscore_f1"]


def test_a_text_is_wholly_like_itself_and_of_several_references_the_nearest_counts(
    encoder: TransformersModel,
) -> None:
    found = BertScorer(encoder).scores([TEXTS[0]], [[TEXTS[2], TEXTS[0]]])
    assert [*found[0].values()] == pytest.approx([1, 1, 1], abs=1e-5)


def test_the_batch_changes_nothing(encoder: TransformersModel) -> None:
    references = [[TEXTS[3 - number]] for number in range(4)]
    one = BertScorer(encoder, batch=1).scores(TEXTS, references)
    many = BertScorer(encoder, batch=4).scores(TEXTS, references)
    for first, second in zip(one, many, strict=True):
        assert [*first.values()] == pytest.approx([*second.values()], abs=1e-5)


def test_an_empty_text_scores_nothing(encoder: TransformersModel) -> None:
    found = BertScorer(encoder).scores(["", TEXTS[0]], [[TEXTS[0]], ["  "]])
    assert [set(scores.values()) for scores in found] == [{0.0}, {0.0}]


def test_texts_beyond_the_context_are_cut_and_counted(encoder: TransformersModel) -> None:
    scorer = BertScorer(encoder)
    assert scorer.context == 24
    [scores] = scorer.scores(["answer " * 60], [[TEXTS[0]]])
    assert scorer.cut == 1
    assert scores["bertscore_f1"] > 0


def test_a_decoder_serves_as_well(
    tmp_path: Path, build_tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    build_tiny_model("llama").save_pretrained(tmp_path / "llama")
    tiny_tokenizer.save_pretrained(tmp_path / "llama")
    scorer = BertScorer(TransformersModel(path=str(tmp_path / "llama"), device="cpu"), layer=1)
    assert scorer.scores([TEXTS[0]], [[TEXTS[0]]])[0]["bertscore_f1"] == pytest.approx(1, abs=1e-5)


def test_a_layer_that_the_model_has_not_is_refused(encoder: TransformersModel) -> None:
    with pytest.raises(ModelError, match="the model has 3 layers, and BERTScore is to read layer 4"):
        BertScorer(encoder, layer=4)
