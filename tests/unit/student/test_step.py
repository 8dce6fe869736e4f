from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import DataError, ModelError
from potstill.core.step import StepContext, StepResult
from potstill.core.store import Artifact
from potstill.models import TransformersModel, identity
from potstill.student import InitSettings, run

Pruning = Callable[..., tuple[StepResult, StepContext]]


@pytest.fixture
def deep_folder(tmp_path: Path, build_tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """A model of six blocks, the third of which does nothing."""
    model = build_tiny_model(num_hidden_layers=6)
    with torch.no_grad():
        for projection in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            projection.weight.zero_()
    model.save_pretrained(tmp_path / "deep")
    tiny_tokenizer.save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


@pytest.fixture
def prune(step_context: Any, deep_folder: Path, traces: Any) -> Pruning:
    """`prune(folder="artifact", data=None, model=None, **settings)`."""

    def make(
        folder: str = "artifact", *, data: Artifact | None = None, model: Any = None, **fields: Any
    ) -> tuple[StepResult, StepContext]:
        source = data or traces(name=f"traces-{folder}")
        chosen = model or TransformersModel(path=str(deep_folder))
        context = step_context("init", folder=folder, models={"base": chosen}, data={"traces": [source]})
        usual = {"do": "init", "model": "base", "data": "traces", "layers": 4, "device": "cpu"}
        return run(InitSettings.model_validate({**usual, **fields}), context), context

    return make


def test_the_least_important_blocks_are_left_out(prune: Pruning) -> None:
    result, context = prune()
    importance, kept = result.metrics["block_importance"], result.metrics["kept_blocks"]
    assert len(importance) == 6
    assert len(kept) == 4
    assert 2 not in kept
    assert kept == sorted(kept)
    assert min(importance[index] for index in kept) >= max(
        importance[index] for index in range(6) if index not in kept
    )
    assert result.counts["parameters"] < result.metrics["parameters_before"]
    assert any("4 of 6 blocks" in line for line in context.reporter.said)


def test_the_student_is_a_plain_folder_with_tokenizer_and_template(
    prune: Pruning, tiny_tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result, context = prune()
    model, tokenizer = (
        kind.from_pretrained(context.folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert model.num_parameters() == result.counts["parameters"]
    assert model.config.num_hidden_layers == 4
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert result.model_identity == identity(TransformersModel(path=str(context.folder)))


def test_leaving_out_a_block_that_does_nothing_changes_no_logit(prune: Pruning, deep_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, context = prune(layers=5)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (deep_folder, context.folder))
    ids = torch.arange(10, 40)[None]
    torch.testing.assert_close(after(ids, use_cache=False).logits, before(ids, use_cache=False).logits)


def test_calibration_takes_so_many_traces_by_seed_and_none_that_are_held_out(
    prune: Pruning, traces: Any
) -> None:
    source = traces(30, name="many")
    some, again, every = (
        prune(name, data=source, samples=samples)[0] for name, samples in (("a", 8), ("b", 8), ("c", 99))
    )
    assert some.counts["calibration_rows"] == 8
    assert some.metrics == again.metrics
    assert every.counts["calibration_rows"] == 24  # six of thirty are held out
    assert some.metrics["block_importance"] != every.metrics["block_importance"]


def test_more_blocks_than_there_are_is_an_error(prune: Pruning) -> None:
    with pytest.raises(ModelError, match="7 blocks cannot be kept of 6"):
        prune(layers=7)


def test_nothing_but_held_out_rows_is_an_error(prune: Pruning, traces: Any) -> None:
    with pytest.raises(DataError, match="held out"):
        prune(data=traces(3, name="held-out", held_out_every=1))


def test_blocks_that_work_by_their_number_are_noticed(
    prune: Pruning, build_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    numbered = build_tiny_model("gpt2", n_layer=6, scale_attn_by_inverse_layer_idx=True)
    with torch.no_grad():
        for projection in (numbered.transformer.h[1].attn.c_proj, numbered.transformer.h[1].mlp.c_proj):
            projection.weight.zero_()
            projection.bias.zero_()
    numbered.save_pretrained(tmp_path / "numbered")
    tiny_tokenizer.save_pretrained(tmp_path / "numbered")
    with pytest.raises(ModelError, match="computes something else"):
        prune(model=TransformersModel(path=str(tmp_path / "numbered")), layers=5)


def test_a_quantised_model_is_refused(prune: Pruning, deep_folder: Path) -> None:
    with pytest.raises(ModelError, match="quantised to nf4"):
        prune(model=TransformersModel(path=str(deep_folder), quantize="nf4"))


def test_a_student_to_be_loaded_in_four_bits_keeps_its_weights_in_full(prune: Pruning) -> None:
    plain, whole = prune()
    quantised, packed = prune("packed", quantize="nf4")
    assert (plain.extra, quantised.extra) == ({}, {"quantize": "nf4"})
    assert (whole.folder / "model.safetensors").read_bytes() == (
        packed.folder / "model.safetensors"
    ).read_bytes()
