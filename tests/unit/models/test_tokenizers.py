import copy

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from potstill.core.errors import ModelError
from potstill.data.chat import Renderer
from potstill.models import (
    DEFAULT_CHAT_TEMPLATE,
    TransformersModel,
    check_same_vocabulary,
    load_tokenizer,
    reasoning_format,
    template_hash,
    token_bytes,
    tokenizer_hash,
    vocabulary_size,
)

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]


def test_token_bytes_put_together_are_the_texts_bytes(tiny_tokenizer):
    text = "12 + 7\n\n naïve 知 🙂<|im_end|>"
    of_id = token_bytes(tiny_tokenizer)
    assert len(of_id) == vocabulary_size(tiny_tokenizer) == 300
    assert b"".join(of_id[index] for index in tiny_tokenizer(text).input_ids) == text.encode()


def sentencepiece_like() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<0x0A>": 1, "▁the": 2, "cat": 3}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_a_sentencepiece_vocabularys_spaces_and_byte_tokens_are_bytes():
    assert token_bytes(sentencepiece_like()) == [b"<unk>", b"\n", b" the", b"cat"]


def test_the_hash_survives_saving_and_loading(tiny_tokenizer, tiny_model_folder):
    loaded = load_tokenizer(TransformersModel(path=str(tiny_model_folder)))
    assert tokenizer_hash(loaded) == tokenizer_hash(tiny_tokenizer)
    assert template_hash(loaded) == template_hash(tiny_tokenizer)


def test_the_template_does_not_enter_the_tokenizers_hash(tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    other.chat_template = "{{ messages }}"
    assert tokenizer_hash(other) == tokenizer_hash(tiny_tokenizer)
    assert template_hash(other) != template_hash(tiny_tokenizer)


def with_another_token(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<think>"])
    return other


def with_digits_parted(tokenizer):
    from tokenizers import pre_tokenizers

    other, backend = copy.deepcopy(tokenizer), tokenizer.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, backend])
    return other


def with_two_ids_swapped(tokenizer):
    import json

    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (with_another_token, "the base has 300 ids, the student 301"),
        (with_digits_parted, "they split the text"),
        (with_two_ids_swapped, "is b'A' for the base and b'B' for the student"),
    ],
)
def test_vocabularies_that_differ_are_refused_with_the_first_difference(tiny_tokenizer, change, difference):
    other = change(tiny_tokenizer)
    assert tokenizer_hash(other) != tokenizer_hash(tiny_tokenizer)
    with pytest.raises(ModelError, match="do not match") as caught:
        check_same_vocabulary(tiny_tokenizer, other, names=("base", "student"))
    assert difference in str(caught.value)


def test_equal_vocabularies_pass(tiny_tokenizer):
    check_same_vocabulary(tiny_tokenizer, copy.deepcopy(tiny_tokenizer))


def test_a_model_folder_without_tokenizer_says_so_and_how_to_mend_it(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="has no tokenizer") as caught:
        load_tokenizer(TransformersModel(path=str(tmp_path / "bare")))
    assert "save_pretrained" in str(caught.value.mend)


def test_a_damaged_tokenizer_says_so(tiny_model_folder):
    (tiny_model_folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(TransformersModel(path=str(tiny_model_folder)))


def test_a_stated_template_comes_before_the_models_own(tiny_model_folder, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    settings = TransformersModel(path=str(tiny_model_folder), chat_template=str(tmp_path / "own.jinja"))
    assert load_tokenizer(settings).apply_chat_template(MESSAGES, tokenize=False) == "Be brief."
    with pytest.raises(ModelError, match="no such chat template"):
        load_tokenizer(TransformersModel(path=str(tiny_model_folder), chat_template="missing.jinja"))


def test_a_base_model_without_template_gets_the_default_one(tiny_model_folder):
    (tiny_model_folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(TransformersModel(path=str(tiny_model_folder)))
    assert tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE
    prompt = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "System:\nBe brief.\n\nUser:\nHi\n\nAssistant:\n"
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert whole == prompt + "Hello<|im_end|>\n\n"


def test_the_default_template_begins_as_the_tokenizer_begins_a_text(tiny_model_folder, tiny_tokenizer):
    from tokenizers import processors

    beginning = copy.deepcopy(tiny_tokenizer)
    beginning.chat_template = None
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    (tiny_model_folder / "chat_template.jinja").unlink()
    beginning.save_pretrained(tiny_model_folder)
    tokenizer = load_tokenizer(TransformersModel(path=str(tiny_model_folder)))
    assert tokenizer.apply_chat_template(MESSAGES[1:2], tokenize=False) == "<|im_start|>User:\nHi\n\n"


def without_template(folder, **settings):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return TransformersModel(path=str(folder), **settings)


def test_the_default_template_is_said_and_a_models_own_is_not(tiny_model_folder):
    said = []
    load_tokenizer(TransformersModel(path=str(tiny_model_folder)), say=said.append)
    assert said == []
    load_tokenizer(without_template(tiny_model_folder), say=said.append)
    assert len(said) == 1
    assert "has no chat template: it takes the one called plain" in said[0]


def test_a_template_that_comes_along_is_named(tiny_model_folder):
    settings = TransformersModel(path=str(tiny_model_folder), chat_template="chatml")
    tokenizer = load_tokenizer(settings)
    prompt = tokenizer.apply_chat_template(MESSAGES[1:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    named = TransformersModel(path=str(tiny_model_folder), chat_template="plain")
    assert load_tokenizer(named).chat_template == DEFAULT_CHAT_TEMPLATE
    assert named.content()["chat_template"] != settings.content()["chat_template"]


def without_chatml_tokens():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab={"<eos>": 0, "H": 1, "i": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_control_tokens_that_do_not_exist_are_refused_unless_they_are_added(tmp_path, tiny_llama):
    tiny_llama.save_pretrained(tmp_path / "base")
    without_chatml_tokens().save_pretrained(tmp_path / "base")
    path = str(tmp_path / "base")
    assert load_tokenizer(TransformersModel(path=path)).chat_template == DEFAULT_CHAT_TEMPLATE
    with pytest.raises(ModelError, match=r"chatml writes <\|im_start\|>, which is no token") as caught:
        load_tokenizer(TransformersModel(path=path, chat_template="chatml"))
    assert "add_tokens" in str(caught.value.mend)
    tokens = ["<|im_start|>", "<|im_end|>", "<think>"]
    tokenizer = load_tokenizer(TransformersModel(path=path, chat_template="chatml", add_tokens=tokens))
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert special == {"<eos>", "<|im_start|>", "<|im_end|>"}, "think tags are text"
    assert Renderer(tokenizer).end_of_turn_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_template_with_mistakes_is_refused_by_its_name(tiny_model_folder, tmp_path):
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}{{ m['content'] }}", encoding="utf-8")
    settings = TransformersModel(path=str(tiny_model_folder), chat_template=str(tmp_path / "bad.jinja"))
    with pytest.raises(ModelError, match="cannot be used") as caught:
        load_tokenizer(settings)
    assert "bad.jinja" in str(caught.value)


@pytest.mark.parametrize("stated", ["strip", "openthoughts", ["<r>", "</r>"]])
def test_a_reasoning_format_is_saved_and_loaded_with_the_tokenizer(tiny_model_folder, tmp_path, stated):
    tokenizer = load_tokenizer(TransformersModel(path=str(tiny_model_folder), reasoning_format=stated))
    tokenizer.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved twice")
    (tmp_path / "saved" / "config.json").write_text("{}", encoding="utf-8")
    loaded = load_tokenizer(TransformersModel(path=str(tmp_path / "saved")))
    assert reasoning_format(loaded) == stated
    assert template_hash(loaded) == template_hash(tokenizer)
    assert reasoning_format(load_tokenizer(TransformersModel(path=str(tiny_model_folder)))) is None


@pytest.mark.parametrize("stated", [["<r>"], ["a", "b", "c"], ["<r>", "<r>"], ["<r>", ""], "own"])
def test_marks_that_part_nothing_are_refused(stated):
    with pytest.raises(ValidationError, match=r"reasoning_format"):
        TransformersModel(path="x/y", reasoning_format=stated)
