import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from potstill.core.errors import ModelError
from potstill.models import hidden_states, isolates_packed_rows, output_head, removing, vocabulary_size

SIZE = 300
IDS = torch.tensor([[5, 17, 200, 299, 3, 8], [260, 1, 44, 91, 12, 7]])


def whole(model):
    return model(input_ids=IDS, use_cache=False).logits[..., :SIZE]


def halves(model):
    return output_head(model, SIZE)(hidden_states(model, IDS))


def test_the_two_halves_give_the_whole_models_logits(tiny_model):
    assert_close(halves(tiny_model), whole(tiny_model), rtol=0, atol=0)


def test_the_head_leaves_out_the_padded_part_of_the_vocabulary(tiny_model):
    assert tiny_model.config.vocab_size > SIZE
    assert halves(tiny_model).shape == (2, 6, SIZE)


def test_a_final_soft_cap_is_applied(build_tiny_model):
    capped, free = build_tiny_model("gemma3"), build_tiny_model("gemma3", final_logit_softcapping=None)
    assert halves(free).abs().max() > 2.0
    assert halves(capped).abs().max() < 2.0


def other_family(name):
    import transformers

    sizes = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = {
        "phi": lambda: transformers.PhiConfig(**sizes, **ids, num_attention_heads=4),
        "granite": lambda: transformers.GraniteConfig(
            **sizes, **ids, num_attention_heads=4, logits_scaling=8.0
        ),
        "cohere": lambda: transformers.CohereConfig(
            **sizes, **ids, num_attention_heads=4, logit_scale=0.0625
        ),
    }[name]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("name", ["phi", "granite", "cohere"])
def test_a_heads_bias_and_scale_are_applied(name):
    model = other_family(name)
    bare = torch.nn.functional.linear(hidden_states(model, IDS), model.lm_head.weight[:SIZE])
    assert (bare - whole(model)).abs().max() > 0.01
    assert_close(halves(model), whole(model))


def test_right_padding_does_not_change_what_stands_before_it(tiny_model):
    mask = torch.ones_like(IDS)
    mask[:, 4:] = 0
    assert_close(
        hidden_states(tiny_model, IDS, mask)[:, :4],
        hidden_states(tiny_model, IDS[:, :4]),
        rtol=1e-4,
        atol=1e-5,
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_through_the_halves_equal_those_of_the_whole(tiny_model):
    expected = gradients(tiny_model, whole(tiny_model).logsumexp(-1).sum())
    found = gradients(tiny_model, halves(tiny_model).logsumexp(-1).sum())
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_halves_equal_the_whole_under_bf16_autocast(tiny_model):
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(halves(tiny_model), whole(tiny_model), rtol=0, atol=0)
        assert output_head(tiny_model, SIZE)(torch.zeros(1, head_width(tiny_model))).dtype == torch.bfloat16


def head_width(model):
    return model.get_output_embeddings().in_features


def adapted(model, **config):
    peft_model = get_peft_model(model, LoraConfig(r=2, **config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return peft_model.eval()


def test_adapted_layers_stay_adapted_in_the_trunk(tiny_llama):
    before = halves(tiny_llama)
    model = adapted(tiny_llama, target_modules=["q_proj", "down_proj"])
    assert (halves(model) - before).abs().max() > 0.1
    assert_close(halves(model), whole(model), rtol=0, atol=0)


def test_an_adapted_head_stays_adapted(build_tiny_model):
    base = build_tiny_model("qwen2")
    before = halves(base)
    model = adapted(base, target_modules=["lm_head"])
    assert (halves(model) - before).abs().max() > 0.1
    assert_close(halves(model), whole(model), rtol=0, atol=0)
    names = {
        name
        for name, p in model.named_parameters()
        for mine in output_head(model, SIZE).parameters
        if p is mine
    }
    assert sum("lora_" in name for name in names) == 2
    assert len(names) == 3


def test_a_tied_embedding_is_among_the_heads_parameters(tiny_llama):
    [weight] = output_head(tiny_llama, SIZE).parameters
    assert weight is tiny_llama.get_input_embeddings().weight


def test_more_ids_than_rows_is_an_error(tiny_llama):
    with pytest.raises(ModelError, match="304 rows, fewer than the 305"):
        output_head(tiny_llama, 305)


def test_the_vocabulary_ends_where_tokenizer_or_model_does(tiny_tokenizer, build_tiny_model):
    assert vocabulary_size(tiny_tokenizer) == SIZE
    assert vocabulary_size(tiny_tokenizer, build_tiny_model()) == SIZE
    assert vocabulary_size(tiny_tokenizer, build_tiny_model(vocab_size=290)) == 290


def test_no_forward_makes_a_cache(tiny_model):
    seen = []
    trunk = getattr(tiny_model, tiny_model.base_model_prefix)
    trunk.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(out.past_key_values), with_kwargs=True
    )
    hidden_states(tiny_model, IDS)
    assert seen == [None]


@pytest.mark.parametrize("error", [TypeError("no position_ids"), RuntimeError("only fp16 and bf16")])
def test_a_model_that_refuses_packed_rows_does_not_isolate_them(tiny_llama, monkeypatch, error):
    def refuse(*given, **options):
        raise error

    assert isolates_packed_rows(tiny_llama)
    monkeypatch.setattr(tiny_llama.model, "forward", refuse)
    assert not isolates_packed_rows(tiny_llama)


@pytest.mark.parametrize("broken_off", ["while they are put on", "while they are on"])
def test_no_hook_is_left_on_a_model_however_it_ends(tiny_llama, broken_off):
    heard = []

    def hooks():
        for layer in tiny_llama.model.layers:
            if heard and broken_off == "while they are put on":
                raise RuntimeError
            yield layer.register_forward_hook(lambda *given: heard.append(given))
            hidden_states(tiny_llama, IDS)

    with pytest.raises(RuntimeError), removing(hooks()):
        raise RuntimeError
    assert heard
    heard.clear()
    hidden_states(tiny_llama, IDS)
    assert heard == []
