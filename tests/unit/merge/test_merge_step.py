"""A merged model is plain, and answers as the adapter on its base in full weights does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import DataError, ModelError
from potstill.core.records import RECORDS_FILE, Record, write_records
from potstill.core.step import StepContext, StepResult
from potstill.merge import MergeSettings, run
from potstill.models import TransformersModel, identity, load

IDS = torch.tensor([[5, 17, 200, 299, 40, 3]])
METHODS: list[dict[str, Any]] = [{}, {"dora": True}, {"rslora": True}, {"dora": True, "rslora": True}]
Merging = Callable[..., tuple[StepResult, Path, StepContext]]


@pytest.fixture
def merge(step_context: Any) -> Merging:
    """`merge(model, data=, **settings)`."""

    def make(model: Any, *, data: Any = None, **fields: Any) -> tuple[StepResult, Path, StepContext]:
        if data is not None:
            fields["data"] = "traces"
        context = step_context(
            "merge", folder="merged", models={"student": model}, data={"traces": [data]} if data else {}
        )
        settings = {"do": "merge", "model": "student", "device": "cpu", **fields}
        return run(MergeSettings.model_validate(settings), context), context.folder, context

    return make


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(IDS, use_cache=False).logits[..., :300].float()
    return found


def plain(folder: Path) -> Any:
    """What transformers alone makes of a folder."""
    from transformers import AutoModelForCausalLM

    assert not (folder / "adapter_config.json").exists()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_same(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    assert (expected - base).abs().max() > 0.1 * expected.std(), "the adapter changes nothing"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def base_of(adapter: TransformersModel) -> TransformersModel:
    return TransformersModel(path=str(Path(adapter.path).parent / "base"), device="cpu")


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_logits_are_those_of_the_adapter_on_its_base(
    adapter: Any, merge: Merging, family: str, method: dict[str, Any]
) -> None:
    made = adapter(family, **method)
    expected = logits(load(made, dtype=torch.float32).model)
    result, folder, _ = merge(made)
    assert_same(logits(plain(folder)), expected, logits(load(base_of(made), dtype=torch.float32).model))
    assert result.metrics["logit_difference"] < 1e-4
    assert result.counts["parameters"] > 0
    assert result.extra["merged"]["base_in_use"] == "full weights"


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_head_and_an_embedding_that_share_weights_part_where_one_is_adapted(
    adapter: Any, merge: Merging, target: str
) -> None:
    made = adapter(target=[target, "q_proj"])
    expected = logits(load(made, dtype=torch.float32).model)
    assert load(base_of(made)).model.config.tie_word_embeddings
    _, folder, _ = merge(made)
    model = plain(folder)
    assert_same(logits(model), expected, logits(load(base_of(made), dtype=torch.float32).model))
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_a_head_that_is_not_adapted_goes_on_sharing(adapter: Any, merge: Merging) -> None:
    _, folder, _ = merge(adapter())
    model = plain(folder)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("method", METHODS[:2], ids=str)
def test_from_4_bits_it_is_merged_into_the_full_weights_and_the_difference_is_told(
    adapter: Any, merge: Merging, traces: Any, method: dict[str, Any]
) -> None:
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    made = adapter(base_fields={"quantize": "nf4"}, config=wide, **method)
    in_full = load(made, dtype=torch.float32, full_weights=True).model
    packed = load(made, dtype=torch.float32).model
    assert any(hasattr(one, "quant_state") for one in packed.modules())
    assert not any(hasattr(one, "quant_state") for one in in_full.modules())
    result, folder, context = merge(made, data=traces(), limit=5)
    assert_same(
        logits(plain(folder)), logits(in_full), logits(load(base_of(made), dtype=torch.float32).model)
    )
    assert not torch.allclose(logits(in_full), logits(packed), rtol=1e-3, atol=1e-3)
    assert result.extra["merged"]["base_in_use"] == "nf4"
    found = result.metrics["compared"]
    assert found["rows"] == 5
    assert 0 < found["mean_kl"] < found["largest_kl"]
    assert 0 < found["agreement"] <= 1
    assert any(
        "KL from the adapter on its base in nf4 to the merged model" in one for one in context.reporter.said
    )


def test_an_adapter_on_a_checkpoint_in_4_bits_is_merged_into_its_dequantised_weights(
    adapter: Any, merge: Merging, tiny_tokenizer: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wide = {"hidden_size": 64, "intermediate_size": 128}
    made = adapter(config=wide)
    given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    folder = Path(base_of(made).path)
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=given, device_map={"": "cpu"})
    (folder / "model.safetensors").unlink()
    packed.save_pretrained(folder)
    expected = logits(load(made, dtype=torch.float32).model)
    _, merged, _ = merge(made, dtype="float32")
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    torch.testing.assert_close(logits(plain(merged)), expected, rtol=1e-3, atol=1e-3)


def test_weights_are_saved_in_the_type_of_the_base_s_files_unless_another_is_asked_for(
    adapter: Any, merge: Merging
) -> None:
    made = adapter(dtype="bfloat16")
    result, folder, _ = merge(made)
    assert result.extra["merged"]["dtype"] == "bfloat16"
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert 1e-3 < result.metrics["logit_difference"] < 0.5
    in_full, folder, _ = merge(made, dtype="float32")
    assert in_full.metrics["logit_difference"] < 1e-4
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


def test_the_folder_has_the_tokenizer_its_template_and_the_end_of_a_turn(
    adapter: Any, merge: Merging, tiny_tokenizer: Any
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    _, folder, _ = merge(adapter())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [
        tokenizer.convert_tokens_to_ids("<|im_end|>")
    ]


def test_what_is_no_adapter_cannot_be_merged(adapter: Any, merge: Merging) -> None:
    made = adapter()
    with pytest.raises(ModelError, match="student: is no adapter"):
        merge(base_of(made))


def test_weights_that_are_not_finite_are_refused(adapter: Any, merge: Merging) -> None:
    from safetensors.torch import load_file, save_file

    made = adapter()
    path = Path(made.path) / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ModelError, match="nan"):
        merge(made)


def test_a_merge_that_went_wrong_is_refused(
    adapter: Any, merge: Merging, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter()
    monkeypatch.setattr("potstill.merge.step.merged_model", lambda model, name: model.unload())
    with pytest.raises(ModelError, match="the logits of the merged model differ by"):
        merge(made)


def test_data_without_responses_are_refused(adapter: Any, merge: Merging, traces: Any) -> None:
    with pytest.raises(DataError, match="no responses to compare"):
        merge(adapter(), data=traces(3, name="prompts", response=None))


def test_a_trace_that_is_too_long_is_left_out_of_the_comparison_and_said(
    adapter: Any, merge: Merging, tmp_path: Path, seal: Any
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    asked = [{"role": "user", "content": "1 + 1?"}]
    long = [{"role": "user", "content": "1 + " * 200 + "1?"}]
    records = [Record(f"p{n}", turns, response="2") for n, turns in enumerate([long, asked, asked])]
    write_records(folder / RECORDS_FILE, records)
    result, _, context = merge(adapter(), data=seal(folder, "generate"), limit=2, max_length=64)
    assert result.metrics["compared"]["rows"] == 2
    assert any("1 rows are not compared; the first: the prompt has" in one for one in context.reporter.said)


def test_weights_that_the_saved_type_cannot_hold_are_refused(adapter: Any, merge: Merging) -> None:
    from safetensors.torch import load_file, save_file

    made = adapter()
    path = Path(made.path) / "adapter_model.safetensors"
    tensors = {name: one * (1e7 if "v_proj.lora_B" in name else 1) for name, one in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ModelError, match="too large for float16"):
        merge(made, dtype="float16")


def test_an_adapter_on_four_bits_is_another_model_than_the_same_on_full_weights(adapter: Any) -> None:
    pytest.importorskip("bitsandbytes")
    packed = adapter(base_fields={"quantize": "nf4"})
    before = identity(packed)
    (Path(packed.path) / "manifest.json").unlink()  # what is left is PEFT's own note of the base
    config = Path(packed.path) / "adapter_config.json"
    stated = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(
        json.dumps(stated | {"base_model_name_or_path": base_of(packed).path}), encoding="utf-8"
    )
    assert identity(packed) != before
