"""A new model out of a configuration alone, and what is refused of it."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from potstill.core.errors import ModelError
from potstill.models import TransformersModel, tokenizer_hash
from potstill.student import InitSettings, run

from ..mixtures import NEW_MIXTURE

SMALL = {**NEW_MIXTURE, "max_position_embeddings": 512}


@pytest.fixture
def make(step_context: Any, traces: Any, tiny_model_folder: Any) -> Any:
    """`make(config, folder=, seed=)`: result and folder of an init step whose model is a tiny Llama."""
    data = {"traces": [traces()]}

    def build(config: dict[str, Any], *, folder: str = "made", seed: int = 1) -> Any:
        models = {"llama": TransformersModel(path=str(tiny_model_folder), device="cpu")}
        context = step_context("init", folder=folder, seed=seed, models=models, data=data)
        stated = {"do": "init", "method": "from_config", "model": "llama", "data": "traces", "config": config}
        return run(InitSettings.model_validate(stated), context), context.folder

    return build


def test_it_is_a_plain_model_of_the_stated_family_with_the_lenders_tokenizer(
    make: Any, tiny_tokenizer: Any
) -> None:
    result, folder = make(SMALL)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert (config.model_type, config.num_experts, config.head_dim) == ("qwen3_moe", 6, 8)
    assert config.vocab_size == len(tiny_tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (tiny_tokenizer.eos_token_id,) * 2
    assert result.tokenizer == tokenizer_hash(tiny_tokenizer)
    assert result.counts["parameters"] == model.num_parameters()
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 300)


def test_the_same_seed_makes_the_same_weights_and_another_one_others(make: Any) -> None:
    def weights(folder: str, seed: int) -> bytes:
        _, made = make(SMALL, folder=folder, seed=seed)
        return bytes((made / "model.safetensors").read_bytes())

    assert weights("one", 1) == weights("again", 1) != weights("other", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen9"}, "transformers knows no family 'qwen9'"),
        ({"num_expert": 6}, r"has no field 'num_expert'[\s\S]*did you mean 'num_experts'"),
        ({"hidden_size": "wide"}, "cannot be made of this configuration"),
        ({"vocab_size": 100}, r"a vocabulary of 100 has no room[\s\S]*at least 300"),
    ],
)
def test_what_makes_no_model_is_told(make: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make({**SMALL, **change})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "from_config"}, "needs config with model_type"),
        ({"method": "copy", "layers": 2, "config": SMALL}, "config belongs to method from_config"),
    ],
)
def test_a_configuration_and_its_method_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        InitSettings.model_validate({"do": "init", "model": "llama", "data": "traces", **fields})
