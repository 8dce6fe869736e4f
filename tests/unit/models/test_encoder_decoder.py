import copy
import json
import shutil

import pytest
import torch
from torch.testing import assert_close

from potstill.core.errors import DataError, ModelError
from potstill.core.records import Record
from potstill.data.batches import collate
from potstill.data.chat import Rendered, Renderer
from potstill.losses.response import cross_entropy
from potstill.models import (
    LoadedModel,
    TransformersModel,
    decoder_start_token,
    hidden_states,
    isolates_packed_rows,
    load,
    load_tokenizer,
    output_head,
)
from potstill.scoring import score_rows, token_logprobs

SIZE = 150
START, END = 0, 1
SOURCES = ([5, 17, 90, END], [60, 11, 44, 91, 12, 7, 33, END], [14, END])
TARGETS = ([9, 140, 3, END], [21, END], [8, 8, 100, 101, 30, 31, END])


def flat(source, target):
    return Rendered([*source, START, *target], [0] * (len(source) + 1) + [1] * len(target))


ROWS = [flat(source, target) for source, target in zip(SOURCES, TARGETS, strict=True)]


def whole(model, source, target):
    """Logits that predict each token of a target, by transformers' own forward of the whole model."""
    given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[START, *target[:-1]]])}
    return model(**given).logits[0, :, :SIZE]


def halves(model, row):
    hidden = hidden_states(model, torch.tensor([row.ids]))
    return output_head(model, SIZE)(hidden)[0, row.mask.index(1) - 1 : -1]


@pytest.mark.parametrize("number", range(3))
def test_the_two_halves_give_the_whole_models_logits(tiny_t5, number):
    assert_close(halves(tiny_t5, ROWS[number]), whole(tiny_t5, SOURCES[number], TARGETS[number]))


def test_what_the_first_t5_scales_before_its_head_is_scaled(build_tiny_t5):
    model = build_tiny_t5("t5")
    bare = output_head(model, SIZE).projection(hidden_states(model, torch.tensor([ROWS[0].ids])))
    scaled = output_head(model, SIZE)(hidden_states(model, torch.tensor([ROWS[0].ids])))
    assert_close(scaled, bare[..., :SIZE] * model.config.d_model**-0.5)
    assert build_tiny_t5("t5_1_1").config.scale_decoder_outputs is False


def test_rows_in_a_batch_are_as_alone_whatever_the_padding_holds(tiny_t5):
    ids_BT = collate(ROWS, pad_id=START)["input_ids"]
    other_BT = collate(ROWS, pad_id=77)["input_ids"]
    together, padded = hidden_states(tiny_t5, ids_BT), hidden_states(tiny_t5, other_BT)
    for number, row in enumerate(ROWS):
        own = slice(row.mask.index(1) - 1, len(row.ids) - 1)
        alone = hidden_states(tiny_t5, torch.tensor([row.ids]))[0, own]
        for found in (together, padded):
            assert_close(found[number, own], alone, rtol=1e-4, atol=1e-5)


def test_gradients_through_the_halves_equal_those_of_the_whole(tiny_t5):
    def gradients(logits):
        tiny_t5.zero_grad()
        logits.logsumexp(-1).sum().backward()
        return {name: p.grad.clone() for name, p in tiny_t5.named_parameters() if p.grad is not None}

    expected = gradients(whole(tiny_t5, SOURCES[1], TARGETS[1]))
    found = gradients(halves(tiny_t5, ROWS[1]))
    assert expected.keys() == found.keys()
    assert any("encoder" in name for name in found)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


def test_log_probabilities_of_rows_equal_a_float64_loop_over_whole_passes(tiny_t5, t5_tokenizer):
    model = tiny_t5.double()
    expected = []
    for source, target in zip(SOURCES, TARGETS, strict=True):
        logits = model(
            input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[START, *target[:-1]]])
        ).logits[0, :, :SIZE]
        expected.append(torch.stack([logits[at].log_softmax(-1)[id_] for at, id_ in enumerate(target)]))
    loaded = LoadedModel(model, t5_tokenizer, "")
    found = score_rows(
        loaded,
        ROWS,
        lambda rows, targets: lambda logits, part: {"logprob": -cross_entropy(logits, targets[part])},
        vocabulary_size=SIZE,
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one["logprob"], other, rtol=1e-9, atol=1e-9)


def test_a_row_without_a_source_is_refused(tiny_t5):
    with pytest.raises(ModelError, match="nothing for the encoder"):
        hidden_states(tiny_t5, torch.tensor([ROWS[0].ids[:4], [9, 9, 9, 9]]))


def test_packed_rows_would_see_one_another(tiny_t5):
    assert not isolates_packed_rows(tiny_t5)


def test_a_decoder_that_starts_with_the_end_of_a_text_is_refused(build_tiny_t5):
    model = build_tiny_t5(decoder_start_token_id=1)
    with pytest.raises(ModelError, match="starts with the token that ends a text"):
        hidden_states(model, torch.tensor([ROWS[0].ids]))


def test_a_decoder_starts_with_the_padding_where_nothing_is_stated(build_tiny_t5):
    model = build_tiny_t5(decoder_start_token_id=None)
    assert hidden_states(model, torch.tensor([ROWS[0].ids])).shape == (1, len(ROWS[0].ids), 32)


@pytest.fixture(params=("t5", "t5_1_1", "mt5"))
def settings(request, build_t5_folder):
    return TransformersModel(path=str(build_t5_folder(request.param)), device="cpu", dtype="float32")


def test_a_folder_loads_as_it_was_saved(settings, build_tiny_t5):
    loaded, family = load(settings), settings.path.rsplit("/", 1)[1]
    saved = build_tiny_t5(family)
    assert_close(whole(loaded.model, SOURCES[0], TARGETS[0]), whole(saved, SOURCES[0], TARGETS[0]))


def test_without_a_template_the_source_is_the_prompt_and_the_target_the_response(settings):
    said = []
    tokenizer = load_tokenizer(settings, say=said.append)
    assert "the one called source" in said[0]
    renderer = Renderer(tokenizer)
    rendered = renderer.render(
        Record("p", [{"role": "user", "content": "What is 12 + 7?"}], response="The answer is 19.")
    )
    source, target = (tokenizer(text).input_ids for text in ("What is 12 + 7?", "The answer is 19."))
    assert source[-1] == target[-1] == END
    assert rendered == flat(source, target)
    assert renderer.end_of_turn_ids == [END]


def test_messages_stand_one_behind_the_other(settings):
    renderer = Renderer(load_tokenizer(settings))
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "12 + 7?"},
    ]
    assert renderer.prompt_text(turns) == "Be brief.\n\n12 + 7?</s><pad>"


def test_a_stated_template_ends_in_the_same_way(settings):
    stated = settings.model_copy(update={"chat_template": "plain"})
    prompt = Renderer(load_tokenizer(stated)).prompt_text([{"role": "user", "content": "12 + 7?"}])
    assert prompt == "User:\n12 + 7?\n\nAssistant:\n</s><pad>"


def test_a_saved_tokenizer_renders_as_it_did(settings, tmp_path):
    tokenizer = load_tokenizer(settings)
    folder = tmp_path / "saved"
    shutil.copytree(settings.path, folder)
    tokenizer.save_pretrained(folder)
    again = load_tokenizer(settings.model_copy(update={"path": str(folder)}))
    assert again.chat_template == tokenizer.chat_template
    assert decoder_start_token(again) == "<pad>"


def test_a_prompt_that_holds_the_start_token_is_refused_by_name(settings):
    renderer = Renderer(load_tokenizer(settings))
    record = Record("p", [{"role": "user", "content": "What is <pad> here?"}], id="r1", response="19.")
    with pytest.raises(DataError, match=r"row 3(.|\n)*prompt holds <pad>"):
        renderer.render(record, row_number=3)


def test_plain_text_is_refused_by_name(settings):
    renderer = Renderer(load_tokenizer(settings))
    with pytest.raises(DataError, match="plain text has no prompt"):
        renderer.render(Record("p", [], id="r1", response="19."))


@pytest.fixture
def far_from_zero(build_tiny_t5, t5_tokenizer, tmp_path):
    """In bf16 a T5 whose logits lie about 50, closer together than bf16 tells apart there."""
    model = build_tiny_t5("t5")
    with torch.no_grad():
        model.shared.weight[:, 0] = 50.0
        model.decoder.final_layer_norm.weight.fill_(1.0)
    model.save_pretrained(tmp_path / "far")
    t5_tokenizer.save_pretrained(tmp_path / "far")
    return TransformersModel(path=str(tmp_path / "far"), device="cpu", dtype="bfloat16")


def test_the_halves_are_compared_as_finely_as_logits_are_stored(far_from_zero):
    """Pitfall: a model trained from nothing is refused because its logits in bf16 are a step apart."""
    loaded = load(far_from_zero)
    logits = whole(loaded.model, SOURCES[0], TARGETS[0]).float()
    apart = (halves(loaded.model, ROWS[0]).float() - logits).abs().max()
    assert logits.abs().min() > 30
    assert apart > 0.05 * logits.std(), "the two ways are told apart here"


def test_logits_that_are_more_than_the_heads_are_refused(far_from_zero, monkeypatch):
    from transformers import T5ForConditionalGeneration

    forward = T5ForConditionalGeneration.forward

    def scaled(self, *args, **given):
        output = forward(self, *args, **given)
        output.logits = output.logits * 1.1
        return output

    monkeypatch.setattr(T5ForConditionalGeneration, "forward", scaled)
    with pytest.raises(ModelError, match="does something between its hidden states and its logits"):
        load(far_from_zero)


def test_a_start_token_that_the_tokenizer_does_not_know_is_refused(build_t5_folder, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(build_t5_folder("t5"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": 303}))
    with pytest.raises(ModelError, match="starts with id 303, which is no special token"):
        load_tokenizer(TransformersModel(path=str(folder)))


def test_the_end_of_a_text_is_the_one_that_the_configuration_states(build_t5_folder, t5_tokenizer, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(build_t5_folder("t5"), folder)
    tokenizer = copy.deepcopy(t5_tokenizer)
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(TransformersModel(path=str(folder))).eos_token == "</s>"


def test_an_added_token_gets_a_row_in_encoder_decoder_and_head(settings):
    loaded = load(settings.model_copy(update={"add_tokens": ["<think>"]}))
    [id_] = loaded.tokenizer("<think>", add_special_tokens=False).input_ids
    assert id_ < loaded.vocabulary_size
    row = loaded.model.get_input_embeddings().weight[id_]
    for part in (loaded.model.encoder.embed_tokens, loaded.model.decoder.embed_tokens):
        assert_close(part.weight[id_], row, rtol=0, atol=0)


def test_log_probabilities_go_through_the_models_own_vocabulary(settings):
    loaded = load(settings)
    row = Renderer(loaded.tokenizer).render(
        Record("p", [{"role": "user", "content": "What is 12 + 7?"}], response="The answer is 19.")
    )
    [found] = token_logprobs(loaded, [row])
    assert len(found) == row.supervised_tokens
    assert (found < 0).all()
