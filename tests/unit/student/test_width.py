"""In every family what does nothing is cut without a trace, and what is left is a plain model of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from potstill.core.errors import ModelError
from potstill.student.anatomy import Anatomy, dissect
from potstill.student.sizes import Sizes
from potstill.student.width import Importance, Kept, cut, evenly_spaced, masked, measure, most_important

# By name, so that what is tested is not what finds them: the layers that write into the hidden states.
WRITERS = {
    "o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "dense_4h_to_h", "project_in",
}  # fmt: skip
HEADS_FIX_WIDTH = {"gpt2", "opt", "gpt_neox"}
HIDDEN = 32


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids_BT = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    return ids_BT, torch.arange(20) < torch.tensor([20, 7, 13])[:, None]


@pytest.fixture
def model(build_tiny_model: Any, dense_family: str) -> Any:
    """A tiny model of each family in float64, whose norms add nothing to the mean square."""
    made = build_tiny_model(dense_family).double()
    return without_epsilon(made)


def without_epsilon(model: Any) -> Any:
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 1e-30)  # not 0, by which the norm of a silenced head would be NaN
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(batch()[0], use_cache=False).logits
    return found


def rows_of(module: nn.Module) -> torch.Tensor:
    """A layer's weight as [outputs, inputs]; the columns of an embedding are outputs."""
    weight: Any = module.weight
    return weight.T if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D" else weight


@torch.no_grad()
def silence_hidden(model: Any, removed: torch.Tensor) -> None:
    """Keep some channels of the hidden states at zero, and the others' mean, which LayerNorms subtract."""
    kept = torch.tensor([one for one in range(HIDDEN) if one not in removed])
    for name, module in model.named_modules():
        writes = name.rpartition(".")[2] in WRITERS
        if writes or (isinstance(module, nn.Embedding) and module.weight.shape[1] == HIDDEN):
            for part in [rows_of(module), getattr(module, "bias", None)]:
                if part is not None:
                    part[removed] = 0
                    part[kept] -= part[kept].mean(0)
        elif (
            getattr(module, "bias", None) is not None
            and len(module.bias) == HIDDEN
            and module.weight.ndim == 1
        ):
            module.bias[removed] = 0


@torch.no_grad()
def silence_inside(anatomy: Anatomy, group: int, channels: torch.Tensor) -> None:
    """Let a group of heads and some channels of each block lead nowhere."""
    width = anatomy.queries_a_group * anatomy.head_size
    for parts in anatomy.blocks:
        rows_of(parts.attention_out)[:, group * width : (group + 1) * width] = 0
        rows_of(parts.feed_out)[:, channels] = 0


def kept_without(have: Sizes, removed: torch.Tensor, group: int | None, channels: torch.Tensor) -> Kept:
    def rest(count: int, gone: Any) -> torch.Tensor:
        return torch.tensor([one for one in range(count) if one not in gone])

    return Kept(
        rest(have.hidden_size, removed),
        [rest(have.intermediate_size, channels)] * have.layers,
        [rest(have.groups, [] if group is None else [group])] * have.layers,
    )


def test_channels_and_heads_that_do_nothing_are_cut_without_a_trace(model: Any, dense_family: str) -> None:
    anatomy = dissect(model)
    have = anatomy.sizes
    channels = torch.tensor([0, 5, 6, 30, have.intermediate_size - 1])
    removed = torch.tensor([1, 2, 9, 14, 17, 20, 27, 31])
    silence_hidden(model, removed)
    silence_inside(anatomy, 1, channels)
    before = logits(model)
    assert before.std() > 0.01
    importance = measure(model, anatomy, [batch()])
    student = cut(model, anatomy, kept_without(have, removed, 1, channels), importance.energy)
    assert student.num_parameters() < model.num_parameters()
    torch.testing.assert_close(logits(without_epsilon(student)), before, rtol=1e-5, atol=1e-5)
    unaware = cut(model, anatomy, kept_without(have, removed, 1, channels))
    assert (logits(unaware) - before).abs().max() > 1e-3, "gains that are not made up for"


@pytest.mark.parametrize("part", ["heads", "channels"])
def test_cutting_heads_or_channels_computes_what_silencing_them_computes(
    model: Any, dense_family: str, part: str
) -> None:
    if part == "heads" and dense_family in HEADS_FIX_WIDTH:
        pytest.skip("heads make up the hidden size")
    anatomy, nothing = dissect(model), torch.tensor([])
    kept = kept_without(
        anatomy.sizes,
        nothing,
        0 if part == "heads" else None,
        nothing if part == "heads" else torch.tensor([3, 40]),
    )
    with masked(anatomy, kept):
        expected = logits(model)
    assert (expected - logits(model)).abs().max() > 1e-3, "they do something"
    student = cut(model, anatomy, kept)
    torch.testing.assert_close(logits(without_epsilon(student)), expected, rtol=1e-5, atol=1e-5)


def test_the_student_is_a_plain_model_of_its_family_to_the_last_tensor(
    build_tiny_model: Any, dense_family: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = build_tiny_model(dense_family)
    anatomy = dissect(model)
    fixed = dense_family in HEADS_FIX_WIDTH
    sizes = Sizes(2, 24, 40, 3 if fixed else 1)
    student = cut(model, anatomy, evenly_spaced(anatomy.sizes, sizes))
    assert student.num_parameters() == anatomy.parameters(sizes)
    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.hidden_size == 24
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    expected = dict(student.named_parameters())
    assert dict(loaded.named_parameters()).keys() == expected.keys()
    for name, tensor in loaded.named_parameters():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(logits(loaded), logits(student))
    generated = loaded.generate(batch()[0][:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 23)


def test_the_count_of_parameters_needs_no_student(model: Any) -> None:
    anatomy = dissect(model)
    assert anatomy.parameters(anatomy.sizes) == model.num_parameters()


def test_families_whose_heads_make_up_the_hidden_size_are_told_apart(model: Any, dense_family: str) -> None:
    assert dissect(model).heads_fix_width is (dense_family in HEADS_FIX_WIDTH)


@pytest.mark.parametrize("by", ["l2", "mean"])
def test_importance_is_what_the_activations_of_each_token_say(build_tiny_model: Any, by: str) -> None:
    model = build_tiny_model("llama").double()
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, *, output: bool) -> Any:
        def hook(module: nn.Module, args: Any, made: torch.Tensor) -> None:
            seen.setdefault(name, []).extend((made if output else args[0])[0])

        return hook

    hooks = [
        module.register_forward_hook(watch(name, output="norm" in name))
        for name, module in model.named_modules()
        if name.endswith(("norm", "o_proj", "down_proj"))
    ]
    ids_BT, real_BT = batch()
    with torch.no_grad():
        for ids, real in zip(ids_BT, real_BT, strict=True):  # one row at a time, and no padding
            model(ids[None, : real.sum()], use_cache=False)
    for one in hooks:
        one.remove()

    def size(values: list[float]) -> float:
        if by == "l2":
            return float((sum(one * one for one in values) / len(values)) ** 0.5)
        return sum(map(abs, values)) / len(values)

    found = measure(model, dissect(model), [(torch.where(real_BT, ids_BT, 299), real_BT)], by)
    norms = [name for name in seen if name.endswith("norm")]
    assert len(norms) == 5
    for channel in (0, 7, 31):
        expected = sum(size([float(token[channel]) for token in seen[name]]) for name in norms)
        assert float(found.hidden[channel]) == pytest.approx(expected, rel=1e-9)
    for channel in (0, 47):
        tokens = [float(token[channel]) for token in seen["model.layers.1.mlp.down_proj"]]
        assert float(found.channels[1][channel]) == pytest.approx(size(tokens), rel=1e-9)
    heads = [
        size(
            [
                float(token[8 * head : 8 * head + 8].norm())
                for token in seen["model.layers.0.self_attn.o_proj"]
            ]
        )
        for head in range(4)
    ]
    assert found.groups[0].tolist() == pytest.approx([heads[0] + heads[1], heads[2] + heads[3]], rel=1e-9)


def test_no_tokens_are_an_error(build_tiny_model: Any) -> None:
    model = build_tiny_model("llama")
    with pytest.raises(ModelError, match="no tokens to measure"):
        measure(model, dissect(model), [])


def test_the_most_important_units_stay_in_order_and_the_first_of_equal_ones() -> None:
    importance = Importance(
        torch.tensor([3.0, 1.0, 3.0, 2.0]),
        [torch.tensor([0.0, 5.0, 4.0]), torch.tensor([1.0, 1.0, 1.0])],
        [torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])],
        {},
    )
    kept = most_important(importance, Sizes(2, 3, 2, 1))
    assert kept.hidden.tolist() == [0, 2, 3]
    assert [one.tolist() for one in kept.channels] == [[1, 2], [0, 1]]
    assert [one.tolist() for one in kept.groups] == [[1], [0]]


def test_heads_that_do_not_stand_where_they_are_looked_for_are_refused(build_tiny_model: Any) -> None:
    model = build_tiny_model("phi3")
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))
    with pytest.raises(ModelError, match="width of a phi3 model cannot be cut: its heads do not stand"):
        dissect(model)


def test_a_norm_over_all_heads_at_once_is_refused() -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    config = Olmo2Config(vocab_size=64, hidden_size=32, intermediate_size=48, pad_token_id=0, **heads)
    with pytest.raises(ModelError, match="width of a olmo2 model cannot be cut"):
        dissect(Olmo2ForCausalLM(config).eval())
