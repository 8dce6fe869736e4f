"""Tokens that a student's vocabulary is given: their rows, what trains them, and what is saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from potstill.core.errors import ModelError, TrainingError
from potstill.data.chat import Renderer
from potstill.models import (
    TransformersModel,
    adapter_base,
    hidden_states,
    identity,
    load,
    load_tokenizer,
    output_head,
    vocabulary_size,
)
from potstill.train import TrainSettings, run
from potstill.train.base import Base
from potstill.train.student import make_micro_batch

TOKENS = ["<think>", "</think>"]
THOUGHT = "<think>\nten\n</think>\n\nEleven."
IDS = torch.tensor([[5, 17, 200, 301, 13, 300, 8]])


@pytest.fixture(params=["llama", "qwen2", "gemma3", "gpt2", "opt"])
def student(request: pytest.FixtureRequest, build_family_folder: Callable[[str], Path]) -> TransformersModel:
    """Tied and untied heads, under the names that layers have in different families; new ids 300 and 301."""
    path = str(build_family_folder(request.param))
    return TransformersModel(path=path, add_tokens=TOKENS, device="cpu", dtype="float32")


@pytest.fixture
def llama(build_family_folder: Callable[[str], Path]) -> TransformersModel:
    path = str(build_family_folder("llama"))
    return TransformersModel(path=path, add_tokens=TOKENS, device="cpu", dtype="float32")


def plain(settings: TransformersModel) -> TransformersModel:
    return settings.model_copy(update={"add_tokens": []})


def test_new_rows_are_the_mean_of_all_others_and_nothing_else_changes(student: TransformersModel) -> None:
    before, after = load(plain(student)), load(student)
    assert after.tokenizer.convert_tokens_to_ids(TOKENS) == [300, 301]
    assert after.vocabulary_size == before.vocabulary_size + 2 == 302
    for which in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(one.model, which)().weight for one in (before, after))
        torch.testing.assert_close(new[300:302], old[:300].mean(0).expand(2, -1))
        assert torch.equal(new[:300], old[:300])
    tied = [
        one.model.get_input_embeddings().weight is one.model.get_output_embeddings().weight
        for one in (before, after)
    ]
    assert tied[0] is tied[1]


def test_a_vocabulary_without_room_grows(build_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    for name, options in {"tied": {}, "untied": {"tie_word_embeddings": False}}.items():
        build_tiny_model(vocab_size=300, **options).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        state = torch.get_rng_state()
        loaded = load(TransformersModel(path=str(tmp_path / name), add_tokens=TOKENS, device="cpu"))
        assert torch.equal(torch.get_rng_state(), state)
        assert loaded.model.config.vocab_size == loaded.vocabulary_size == 302
        for layer in (loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()):
            assert layer.weight.shape[0] == 302
            torch.testing.assert_close(layer.weight[300:], layer.weight[:300].mean(0).expand(2, -1))


def test_a_heads_bias_gets_its_mean_too(build_family_folder: Callable[[str], Path]) -> None:
    settings = TransformersModel(path=str(build_family_folder("phi")), add_tokens=TOKENS, dtype="float32")
    bias = load(settings).model.get_output_embeddings().bias
    torch.testing.assert_close(bias[300:302], bias[:300].mean().expand(2))


def test_a_token_that_is_known_keeps_its_row(llama: TransformersModel) -> None:
    settings = llama.model_copy(update={"add_tokens": ["<|eot_id|>", "<think>"]})
    said: list[str] = []
    loaded = load(settings, say=said.append)
    before = load(plain(llama)).model.get_input_embeddings().weight
    assert torch.equal(loaded.model.get_input_embeddings().weight[:300], before[:300])
    known = loaded.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert said == [f"tokens with rows of their own: <|eot_id|> (id {known}), <think> (new id 300)"]
    assert Renderer(loaded.tokenizer).end_of_turn_ids == [known], "it stays a special token"


def test_think_tags_are_single_tokens_that_stay_in_the_text(llama: TransformersModel) -> None:
    tokenizer = load_tokenizer(llama)
    ids = tokenizer(THOUGHT, add_special_tokens=False).input_ids
    assert [ids.count(300), ids.count(301)] == [1, 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == THOUGHT


def test_they_make_another_model_of_it(llama: TransformersModel) -> None:
    assert identity(llama) != identity(plain(llama))
    assert identity(llama) != identity(llama.model_copy(update={"add_tokens": ["<think>"]}))


Training = Callable[..., Path]


@pytest.fixture
def train(step_context: Any, seal: Any, traces: Any) -> Training:
    source: list[Any] = []

    def make(student: TransformersModel, folder: str = "student", **fields: Any) -> Path:
        if not source:
            source.append(traces(6, held_out_every=100, response=THOUGHT))
        context = step_context("train", folder=folder, models={"base": student}, data={"traces": source})
        usual = {"do": "train", "student": "base", "data": "traces", "batch": 6, "max_steps": 3, "lr": 0.05}
        result = run(TrainSettings.model_validate({**usual, "device": "cpu", **fields}), context)
        assert result.metrics["untouched"] == []
        assert any("<think> (new id 300)" in line for line in context.reporter.said) is bool(
            student.add_tokens
        )
        seal(context.folder, "train", result)
        return Path(context.folder)

    return make


def saved_rows(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found = load_file(folder / "adapter_model.safetensors")
    return {name: rows for name, rows in found.items() if "trainable_tokens_delta" in name}


def test_an_adapter_trains_and_keeps_them_and_nothing_else_of_the_vocabulary(
    student: TransformersModel, train: Training
) -> None:
    base = load(student)
    layers = (base.model.get_input_embeddings(), base.model.get_output_embeddings())
    means = [layer.weight[300:302].clone() for layer in layers]
    tied = base.model.get_input_embeddings().weight is base.model.get_output_embeddings().weight
    folder = train(student, lora={"rank": 2})
    rows = saved_rows(folder)
    assert len(rows) == (1 if tied else 2)
    assert all(one.shape[0] == 2 for one in rows.values())
    assert all((one - mean).abs().max() > 1e-3 for one in rows.values() for mean in means)
    loaded = load(TransformersModel(path=str(folder), device="cpu", dtype="float32"))
    assert adapter_base(folder).add_tokens == TOKENS
    assert loaded.tokenizer.convert_tokens_to_ids(TOKENS) == [300, 301]
    assert loaded.vocabulary_size == 302
    with torch.no_grad():
        whole = loaded.model(input_ids=IDS, use_cache=False).logits
        halves = output_head(loaded.model, 302)(hidden_states(loaded.model, IDS))
    torch.testing.assert_close(halves, whole[..., :302])
    base_whole = base.model(input_ids=IDS, use_cache=False).logits
    assert (whole - base_whole)[..., 300:302].abs().max() > 1e-3


def test_merged_into_the_base_it_is_the_same_model(student: TransformersModel, train: Training) -> None:
    loaded = load(
        TransformersModel(path=str(train(student, lora={"rank": 2})), device="cpu", dtype="float32")
    )
    with torch.no_grad():
        expected = loaded.model(input_ids=IDS, use_cache=False).logits
        merged = loaded.model.merge_and_unload()
        torch.testing.assert_close(
            merged(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
        )


def test_an_adapters_gradients_are_those_of_pefts_own_forward(student: TransformersModel) -> None:
    from potstill.losses.head import weighted_loss
    from potstill.losses.response import response_loss
    from potstill.train.lora import add_adapter
    from potstill.train.settings import LoraSettings

    model = add_adapter(
        load(student, dtype=torch.float64).model, LoraSettings(rank=2), 1, [300, 301]
    ).double()
    targets = IDS[0, 1:]

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    logits = model(input_ids=IDS, use_cache=False).logits[0, :-1, :302]
    expected_loss = torch.nn.functional.cross_entropy(logits, targets)
    expected = gradients(expected_loss)
    hidden = hidden_states(model, IDS)[0, :-1]
    weights = torch.full((len(targets),), 1 / len(targets), dtype=torch.float64)
    loss, _ = weighted_loss(hidden, output_head(model, 302), response_loss(targets), weights, chunk_tokens=4)
    found = gradients(loss)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert any("trainable_tokens" in name for name in expected)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)


def test_the_base_of_base_kl_has_the_rows_that_they_began_with(llama: TransformersModel) -> None:
    from potstill.train.lora import add_adapter
    from potstill.train.settings import LoraSettings

    base = load(llama).model
    model = add_adapter(load(llama).model, LoraSettings(rank=2), 1, [300, 301])
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "trainable_tokens" in name:
                one.add_(1.0)
    from potstill.data.chat import Rendered

    row = Rendered(IDS[0].tolist(), [0, 0, 1, 1, 1, 1, 1])
    signal = Base(model, 302, 0.1).signal(make_micro_batch([row]))
    expected = base(input_ids=IDS, use_cache=False).logits[0, 1:-1, :302]
    torch.testing.assert_close(signal.rows(slice(0, 5)).logits_NV, expected)
    assert not torch.allclose(model(input_ids=IDS, use_cache=False).logits[0, 1:-1, :302], expected)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_what_was_trained_outlives_the_file_of_its_template(
    llama: TransformersModel, train: Training, tmp_path: Path, lora: Any
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(str(load_tokenizer(llama).chat_template), encoding="utf-8")
    stated = llama.model_copy(update={"chat_template": str(template)})
    folder = train(stated, lora=lora)
    template.unlink()
    loaded = load(TransformersModel(path=str(folder), device="cpu"))
    assert loaded.tokenizer.convert_tokens_to_ids(TOKENS) == [300, 301]
    assert train(TransformersModel(path=str(folder)), "second", base_kl=0.1).is_dir()


def test_an_adapter_is_known_by_the_same_while_it_is_made_and_afterwards(
    llama: TransformersModel, train: Training
) -> None:
    folder = train(llama, lora={"rank": 2})
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model_identity"] == identity(TransformersModel(path=str(folder)))


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_a_layer_is_not_adapted_and_trained_by_rows_at_once(
    llama: TransformersModel, train: Training, layer: str
) -> None:
    with pytest.raises(TrainingError, match="add_tokens trains rows"):
        train(llama, lora={"rank": 2, "target": [layer, "q_proj"]})


def test_a_token_is_named_once(llama: TransformersModel) -> None:
    with pytest.raises(ValidationError, match="each token once"):
        TransformersModel(path=llama.path, add_tokens=["<think>", "<think>"])


def test_a_second_stage_trains_them_on(llama: TransformersModel, train: Training) -> None:
    first = train(llama, "first", lora={"rank": 2})
    second = train(TransformersModel(path=str(first)), "second")
    [(name, before)], [(_, after)] = saved_rows(first).items(), saved_rows(second).items()
    assert (after - before).abs().max() > 1e-3, name
    assert adapter_base(second).add_tokens == TOKENS


def test_full_training_saves_a_vocabulary_that_plain_transformers_reads(
    llama: TransformersModel, train: Training
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = train(llama)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [300, 301]
    assert model.config.vocab_size >= vocabulary_size(tokenizer) == 302
    assert "<think>" in json.dumps(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))


def test_a_head_with_a_bias_trains_them_in_full_training_only(
    build_family_folder: Callable[[str], Path], train: Training
) -> None:
    phi = TransformersModel(path=str(build_family_folder("phi")), add_tokens=TOKENS)
    with pytest.raises(TrainingError, match="head has a bias"):
        train(phi, lora={"rank": 2})
    assert train(phi, "full").is_dir()


def test_an_adapters_vocabulary_is_its_bases(llama: TransformersModel, train: Training) -> None:
    folder = train(plain(llama), lora={"rank": 2})
    with pytest.raises(ModelError, match="vocabulary is its base's"):
        load(TransformersModel(path=str(folder), add_tokens=TOKENS))


def test_in_four_bits_the_rows_are_trained_beside_the_adapter(
    llama: TransformersModel, train: Training
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = train(llama.model_copy(update={"quantize": "nf4", "dtype": None}), lora={"rank": 2})
    [rows] = saved_rows(folder).values()
    assert rows.dtype == torch.float32
    loaded = load(TransformersModel(path=str(folder), device="cpu"))
    assert loaded.vocabulary_size == 302
