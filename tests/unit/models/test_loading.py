import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from potstill.core.errors import ModelError
from potstill.core.store import Store
from potstill.models import (
    TransformersModel,
    expert_share,
    frozen_weight_bytes,
    hidden_states,
    identity,
    load,
    output_head,
    parameter_count,
    stored_quantization,
    supports_bf16,
)
from potstill.models.loading import choose_device

IDS = torch.tensor([[5, 17, 200, 299]])
CPU = torch.device("cpu")


def load_folder(folder, **options):
    return load(TransformersModel(path=str(folder), device="cpu"), **options)


def test_a_loaded_folder_gives_the_saved_models_logits(tiny_model_folder, tiny_llama):
    loaded = load_folder(tiny_model_folder, dtype=torch.float32)
    assert torch.equal(loaded.model(IDS, use_cache=False).logits, tiny_llama(IDS, use_cache=False).logits)
    assert loaded.identity == identity(TransformersModel(path=str(tiny_model_folder)))
    assert loaded.vocabulary_size == 300
    assert not loaded.model.training


def test_every_family_loads(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    loaded = load_folder(tmp_path / "m", dtype=torch.float32)
    assert torch.equal(loaded.model(IDS, use_cache=False).logits, tiny_model(IDS, use_cache=False).logits)


def test_frozen_weights_take_no_gradients_and_trained_ones_are_float32(tiny_model_folder):
    frozen, trained = (
        load_folder(tiny_model_folder).model,
        load_folder(tiny_model_folder, trainable=True).model,
    )
    assert not any(p.requires_grad for p in frozen.parameters())
    assert frozen.dtype == (torch.bfloat16 if supports_bf16(CPU) else torch.float32)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in trained.parameters())


def test_a_model_on_a_cpu_keeps_freed_memory(tiny_model_folder, monkeypatch):
    done = []
    monkeypatch.setattr("potstill.models.loading.keep_freed_memory", lambda: done.append("kept"))
    load(TransformersModel(path=str(tiny_model_folder), device="cpu"))
    assert done == ["kept"]


def test_the_callers_type_comes_before_the_stated_one(tiny_model_folder):
    settings = TransformersModel(path=str(tiny_model_folder), device="cpu", dtype="float16")
    assert load(settings).model.dtype == torch.float16
    assert load(settings, dtype=torch.float32).model.dtype == torch.float32


@pytest.fixture
def adapter_folder(tiny_model_folder, tmp_path, build_tiny_model):
    """A sealed adapter over the tiny folder, and the logits that it was saved with."""
    model = get_peft_model(build_tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    base = TransformersModel(path=str(tiny_model_folder))
    Store(tmp_path / "s").seal(
        folder,
        kind="train",
        fingerprint="f",
        settings={},
        seed=0,
        seconds=0.0,
        extra={"base": base.model_dump(), "base_identity": identity(base)},
    )
    return folder, model.eval()(IDS, use_cache=False).logits


def test_an_adapter_is_loaded_over_the_base_that_its_manifest_names(adapter_folder, tiny_llama):
    folder, expected = adapter_folder
    loaded = load_folder(folder, dtype=torch.float32)
    found = loaded.model(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - tiny_llama(IDS, use_cache=False).logits).abs().max() > 0.1
    halves = output_head(loaded.model, 300)(hidden_states(loaded.model, IDS))
    torch.testing.assert_close(halves, expected[..., :300], rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_an_adapter_without_a_tokenizer_has_its_bases(adapter_folder):
    folder, _ = adapter_folder
    assert not (folder / "tokenizer.json").exists()
    assert len(load_folder(folder).tokenizer) == 300


def test_a_trainable_adapter_takes_gradients_in_float32_and_its_base_none(adapter_folder):
    folder, _ = adapter_folder
    parameters = dict(load_folder(folder, trainable=True).model.named_parameters())
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert trained == {name for name in parameters if "lora_" in name}
    assert trained
    assert all(parameters[name].dtype == torch.float32 for name in trained)


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_an_adapter_that_lacks_a_weight_is_refused(adapter_folder):
    folder, _ = adapter_folder
    rewrite(folder / "adapter_model.safetensors", lambda tensors: tensors.pop(min(tensors)))
    with pytest.raises(ModelError, match="does not fit its base"):
        load_folder(folder)


def test_a_model_that_lacks_a_weight_is_refused(tiny_model_folder):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tiny_model_folder / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"1 weights are missing .* would be random: {name}"):
        load_folder(tiny_model_folder)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "lm_head.bias", "score.weight", "model.norm.bias"]
)
def test_a_weight_that_the_model_has_no_place_for_is_refused(tiny_model_folder, name):
    rewrite(tiny_model_folder / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(4)}))
    with pytest.raises(ModelError, match=f"1 weights in the files .* would be dropped: {name}"):
        load_folder(tiny_model_folder)


@pytest.mark.parametrize(
    "name", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq", "decoder.version"]
)
def test_a_buffer_of_older_files_is_none_of_the_weights(tiny_model_folder, name):
    rewrite(tiny_model_folder / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(4)}))
    load_folder(tiny_model_folder)


def test_weights_of_another_shape_are_refused(tiny_model_folder):
    path = tiny_model_folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"intermediate_size": 64}
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError):
        load_folder(tiny_model_folder)


def test_truncated_weights_are_refused(tiny_model_folder):
    path = tiny_model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_folder(tiny_model_folder)


def test_a_model_that_works_on_its_logits_in_an_unknown_way_is_refused(tiny_model_folder, monkeypatch):
    from transformers import LlamaForCausalLM

    original = LlamaForCausalLM.forward

    def doubled(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(ModelError, match="between its hidden states and its logits"):
        load_folder(tiny_model_folder)


def test_a_device_that_is_not_there_is_refused(tiny_model_folder):
    settings = TransformersModel(path=str(tiny_model_folder), device="cuda:99")
    with pytest.raises(ModelError, match="device 'cuda:99' cannot be used here"):
        choose_device(settings)
    with pytest.raises(ModelError, match="device 'fridge'"):
        choose_device(settings.model_copy(update={"device": "fridge"}))


def test_nf4_without_bitsandbytes_names_the_extra(tiny_model_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = TransformersModel(path=str(tiny_model_folder), device="cpu", quantize="nf4")
    with pytest.raises(ModelError) as caught:
        load(settings)
    assert "potstill[bnb]" in str(caught.value.mend)


@pytest.fixture
def in_4_bits(build_tiny_model, tiny_tokenizer, tmp_path):
    """A model in NF4, as wide as one block of 64 weights, and a plain twin with the same values."""
    functional = pytest.importorskip("bitsandbytes.functional")
    build_tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "wide")
    tiny_tokenizer.save_pretrained(tmp_path / "wide")
    settings = TransformersModel(path=str(tmp_path / "wide"), device="cpu", quantize="nf4")
    quantized = load(settings, dtype=torch.float32, trainable=True).model
    plain = load_folder(tmp_path / "wide", dtype=torch.float32).model
    layers = 0
    for name, module in quantized.named_modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            layers += 1
            plain.get_submodule(name).weight.copy_(functional.dequantize_4bit(module.weight.data, state))
    assert layers == 14
    return quantized, plain


def gradient_at_the_input(model):
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False).logits.logsumexp(-1).sum().backward()
    return embeddings.grad


def test_gradients_pass_through_4_bit_layers_even_after_an_evaluation(in_4_bits):
    quantized, plain = in_4_bits
    assert not any(p.requires_grad for p in quantized.parameters())
    with torch.no_grad():
        expected = plain(IDS, use_cache=False).logits
        torch.testing.assert_close(
            quantized.eval()(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
        )
    found, expected = gradient_at_the_input(quantized.train()), gradient_at_the_input(plain.train())
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_cached_hub_model_loads_without_the_hub(tiny_model_folder, tmp_path, monkeypatch):
    import huggingface_hub

    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_model_folder, repository / "snapshots" / "c0ffee")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee", encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load(TransformersModel(path="someone/tiny", device="cpu"))
    assert loaded.vocabulary_size == 300


def test_loading_prints_nothing(tiny_model_folder, capfd):
    load_folder(tiny_model_folder)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def stored(build_tiny_model, tiny_tokenizer, tmp_path):
    """`stored("nf4" or "int8")`: a checkpoint that bitsandbytes quantised, as a hub may have it."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def make(scheme):
        build_tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "wide")
        given = BitsAndBytesConfig(
            load_in_4bit=scheme != "int8", load_in_8bit=scheme == "int8", bnb_4bit_quant_type="nf4"
        )
        read = AutoModelForCausalLM.from_pretrained
        model = read(tmp_path / "wide", quantization_config=given, device_map={"": "cpu"})
        model.save_pretrained(tmp_path / scheme)
        tiny_tokenizer.save_pretrained(tmp_path / scheme)
        return TransformersModel(path=str(tmp_path / scheme), device="cpu")

    return make


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_checkpoint_that_is_quantised_already_is_loaded_as_it_is(stored, build_tiny_model, scheme):
    settings = stored(scheme)
    loaded = load(settings, dtype=torch.float32, trainable=True)
    assert loaded.quantization == scheme == stored_quantization(settings)
    types = {type(module).__name__ for module in loaded.model.modules()}
    assert ("Linear4bit" if scheme == "nf4" else "Linear8bitLt") in types
    assert not any(p.requires_grad for p in loaded.model.parameters())
    wide = build_tiny_model(hidden_size=64, intermediate_size=128)
    assert parameter_count(settings) == wide.num_parameters()
    assert frozen_weight_bytes(settings) == (1.0 if scheme == "int8" else pytest.approx(4.127 / 8))
    full = load(settings, dtype=torch.float32, full_weights=True)
    kinds = {type(module).__name__ for module in full.model.modules()}
    assert not {"Linear4bit", "Linear8bitLt"} & kinds
    found, expected = (one.model(IDS, use_cache=False).logits for one in (loaded, full))
    # In evaluation int8 rounds what goes through its layers as well.
    tolerance = 0.1 if scheme == "int8" else 1e-4
    assert (found - expected).abs().mean() < tolerance * expected.std()


def test_what_is_quantised_already_is_never_quantised_again(stored):
    int8 = stored("int8").model_copy(update={"quantize": "nf4"})
    with pytest.raises(ModelError, match="its weights are in int8 already, and quantize asks for nf4"):
        load(int8)
    nf4 = stored("nf4").model_copy(update={"quantize": "nf4"})
    assert load(nf4).quantization == "nf4"


def test_the_experts_of_a_quantised_mixture_stay_in_full_which_is_said_and_counted(
    tmp_path, build_tiny_model, tiny_tokenizer, moe_family
):
    pytest.importorskip("bitsandbytes")
    mixture = build_tiny_model(moe_family)
    mixture.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    settings = TransformersModel(path=str(tmp_path), device="cpu", quantize="nf4")
    said = []
    loaded = load(settings, say=said.append)
    parameters = dict(loaded.model.named_parameters())
    experts = [one for name, one in parameters.items() if ".experts." in name]
    assert {one.dtype for one in parameters.values() if one.ndim == 2} > {torch.uint8}, (
        "the others are packed"
    )
    assert {one.dtype for one in experts} == {loaded.model.dtype}
    count = sum(one.numel() for one in experts)
    assert [f"its experts ({count:,} weights, 0.0 GB) are no linear layers" in one for one in said] == [True]
    share = count / mixture.num_parameters()
    assert expert_share(settings) == pytest.approx(share)
    size = loaded.model.dtype.itemsize
    assert frozen_weight_bytes(settings) == pytest.approx((1 - share) * 4.127 / 8 + share * size)


def test_nothing_is_said_of_what_is_quantised_whole_or_not_at_all(
    tmp_path, build_tiny_model, tiny_model_folder, tiny_tokenizer
):
    pytest.importorskip("bitsandbytes")
    build_tiny_model("qwen3_moe").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    said = []
    load(TransformersModel(path=str(tiny_model_folder), device="cpu", quantize="nf4"), say=said.append)
    load(TransformersModel(path=str(tmp_path), device="cpu"), say=said.append)
    assert said == []
    assert expert_share(TransformersModel(path=str(tiny_model_folder))) == 0


def test_of_a_mixture_that_is_not_here_the_share_of_experts_is_what_its_name_says():
    assert expert_share(TransformersModel(path="Qwen/Qwen3-30B-A3B-Base")) == pytest.approx(0.9)
    assert expert_share(TransformersModel(path="Qwen/Qwen3-4B")) == 0


def test_nf4_single_keeps_its_scales_in_float32(tiny_model_folder):
    pytest.importorskip("bitsandbytes")
    nested = {}
    for quantize in ("nf4", "nf4_single"):
        settings = TransformersModel(path=str(tiny_model_folder), device="cpu", quantize=quantize)
        states = [getattr(p, "quant_state", None) for p in load(settings).model.parameters()]
        nested[quantize] = {state.nested for state in states if state is not None}
    assert nested == {"nf4": {True}, "nf4_single": {False}}
    assert frozen_weight_bytes(settings) == 4.5 / 8
