import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import DataError, ModelError
from potstill.core.records import RECORDS_FILE, read_records
from potstill.core.step import StepContext, StepResult
from potstill.core.store import Artifact
from potstill.data.chat import Renderer
from potstill.models import TransformersModel, identity, load_tokenizer
from potstill.student import InitSettings, run
from potstill.student.depth import drop_blocks

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


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden_size": 16, "intermediate_size": 32, "attention_heads": 2},
        {"layers": None, "target_ratio": 0.5, "candidates": 2},
        {"method": "copy"},
        {"method": "fresh", "hidden_size": 16},
        {"method": "fresh", "weights": "random"},
    ],
    ids=str,
)
def test_a_student_made_in_any_way_is_whole_and_generates_in_plain_transformers(
    prune: Pruning, fields: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    _, context = prune(**fields)
    model, info = AutoModelForCausalLM.from_pretrained(context.folder, output_loading_info=True)
    assert not any(info.values())
    found = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert found.shape == (1, 6)


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


def test_rows_whose_prompts_fill_max_length_are_not_measured_on(prune: Pruning, traces: Any) -> None:
    # Prompts are sums of two to five terms, the shortest of 25 tokens.
    result, context = prune(data=traces(30, name="long"), max_length=30, samples=99)
    assert 0 < result.counts["calibration_rows"] < 24
    assert any("fill max_length (30)" in line for line in context.reporter.said)
    with pytest.raises(DataError, match="the context holds 3"):
        prune("none", data=traces(6, name="longer"), max_length=3)


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


# --- width, targets and other methods


def loaded_from(context: StepContext) -> Any:
    """The student as anyone loads it, every tensor in its place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(context.folder, output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def test_depth_and_width_are_cut_in_one_step(prune: Pruning) -> None:
    result, context = prune(layers=5, hidden_size=24, attention_heads=2, intermediate_size=40)
    config = loaded_from(context).config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (5, 24, 40)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert {name: result.counts[name] for name in ("blocks", "hidden_size", "attention_heads")} == {
        "blocks": 5,
        "hidden_size": 24,
        "attention_heads": 2,
    }
    width = result.metrics["width"]
    importance = width["hidden_importance"]
    assert min(importance[one] for one in width["kept_hidden"]) >= max(
        importance[one] for one in range(32) if one not in width["kept_hidden"]
    )
    assert len(width["kept_groups"]) == len(width["kept_channel_importance"]) == 5
    assert any("hidden size 24 of 32" in line for line in context.reporter.said)


def test_the_quality_of_the_student_is_measured_at_once_on_held_out_traces(prune: Pruning) -> None:
    from math import exp

    whole, _ = prune("whole", layers=6)
    pruned, context = prune("pruned", layers=2)
    for result in (whole, pruned):
        quality = result.metrics["quality"]
        assert (quality["rows"], quality["measured_on"]) == (2, "held-out")
    assert whole.metrics["quality"]["kl_nats_per_token"] == pytest.approx(0, abs=1e-6)
    assert whole.metrics["quality"]["agreement"] == 1
    assert pruned.metrics["quality"]["kl_nats_per_token"] > 0.01
    assert pruned.metrics["quality"]["perplexity"] > exp(1)
    assert any("before training: KL" in line for line in context.reporter.said)


@pytest.mark.parametrize(("dtype", "fast"), [(None, True), ("float32", False)])
def test_passes_that_only_measure_multiply_in_bf16_unless_a_type_is_stated(
    prune: Pruning, deep_folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None, fast: bool
) -> None:
    from torch.nn import functional

    from potstill.student import step

    multiplied: set[torch.dtype] = set()
    compared: set[torch.dtype] = set()
    linear, check_same = functional.linear, step.check_same

    def watched(given: torch.Tensor, *args: Any) -> torch.Tensor:
        made: torch.Tensor = linear(given, *args)
        if len(given) > 1:  # more rows than a probe has
            multiplied.add(made.dtype)
        return made

    def watched_check(found_BTV: torch.Tensor, expected_BTV: torch.Tensor, *args: str) -> None:
        compared.update({found_BTV.dtype, expected_BTV.dtype})
        check_same(found_BTV, expected_BTV, *args)

    for place in ("student.step", "models.loading"):
        monkeypatch.setattr(f"potstill.{place}.supports_bf16", lambda device: True)
    monkeypatch.setattr(functional, "linear", watched)
    monkeypatch.setattr(step, "check_same", watched_check)
    _, context = prune(hidden_size=24, model=TransformersModel(path=str(deep_folder), dtype=dtype))
    assert multiplied == {torch.bfloat16 if fast else torch.float32}
    assert compared == {torch.float32}
    assert loaded_from(context).dtype == torch.float32


def test_without_held_out_traces_it_is_measured_on_those_of_the_calibration_and_said(
    prune: Pruning, traces: Any
) -> None:
    result, context = prune(data=traces(6, name="all-train", held_out_every=100))
    assert (result.metrics["quality"]["rows"], result.metrics["quality"]["measured_on"]) == (6, "calibration")
    assert any("no traces are held out" in line for line in context.reporter.said)


@pytest.mark.parametrize("choice", ["ranked", "greedy", "contiguous"])
def test_the_block_that_does_nothing_goes_however_blocks_are_chosen(prune: Pruning, choice: str) -> None:
    result, _ = prune(layers=5, depth_by="block_importance", depth_choice=choice)
    assert result.metrics["kept_blocks"] == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("choice", ["ranked", "greedy", "contiguous"])
def test_by_drop_one_a_block_is_worth_the_loss_of_a_model_that_was_saved_without_it(
    prune: Pruning, deep_folder: Path, traces: Any, choice: str
) -> None:
    from transformers import AutoModelForCausalLM

    source = traces(name="dropped")
    model = TransformersModel(path=str(deep_folder), dtype="float32")
    result, _ = prune(data=source, model=model, layers=4, depth_by="drop_one", depth_choice=choice)
    renderer = Renderer(load_tokenizer(model))
    rows = [renderer.render(one) for one in read_records(source.folder / RECORDS_FILE) if not one.held_out]

    def loss_without(*dropped: int) -> float:
        student = AutoModelForCausalLM.from_pretrained(deep_folder, dtype=torch.float64)
        drop_blocks(student, [block for block in range(6) if block not in dropped])
        losses = []
        for row in rows:
            log_probs_TV = (
                student(torch.tensor([row.ids]), use_cache=False).logits[0, :, :300].log_softmax(-1)
            )
            targets_T = torch.tensor(row.ids[1:])
            supervised_T = torch.tensor(row.mask[1:]).bool()
            losses.append(-log_probs_TV[:-1].gather(-1, targets_T[:, None])[supervised_T, 0])
        return float(torch.cat(losses).mean())

    with torch.no_grad():
        single = [loss_without(block) for block in range(6)]
        pairs = {pair: loss_without(*pair) for pair in itertools.combinations(range(6), 2)}
    if choice != "contiguous":
        assert result.metrics["block_importance"] == pytest.approx(single, rel=1e-4)
    first = min(range(6), key=single.__getitem__)
    best = {
        "ranked": tuple(sorted(sorted(range(6), key=single.__getitem__)[:2])),
        "greedy": min((pair for pair in pairs if first in pair), key=pairs.__getitem__),
        "contiguous": min(((block, block + 1) for block in range(5)), key=pairs.__getitem__),
    }
    assert result.metrics["kept_blocks"] == [block for block in range(6) if block not in best[choice]]


def test_listed_blocks_are_kept(prune: Pruning) -> None:
    result, _ = prune(layers=None, depth_by=[0, 3, 5])
    assert result.metrics["kept_blocks"] == [0, 3, 5]
    with pytest.raises(ModelError, match="no block 6 of 6"):
        prune("missing", layers=None, depth_by=[0, 6])


def test_a_target_is_searched_and_its_candidates_are_kept(prune: Pruning) -> None:
    result, context = prune(layers=None, target_ratio=0.6, candidates=5)
    tried, chosen = result.metrics["candidates"], result.metrics["chosen_candidate"]
    budget = 0.6 * result.metrics["parameters_before"]
    assert 3 <= len(tried) <= 5
    assert all(one["parameters"] <= budget for one in tried)
    assert tried[chosen]["loss"] == min(one["loss"] for one in tried)
    assert loaded_from(context).num_parameters() == tried[chosen]["parameters"] == result.counts["parameters"]
    assert len({(one["blocks"], one["hidden_size"], one["intermediate_size"]) for one in tried}) == len(tried)


@pytest.mark.parametrize(
    ("target", "message"),
    [("900", "too small for any student"), ("9M", "no smaller than the model itself")],
)
def test_a_target_that_cannot_be_met_is_refused(prune: Pruning, target: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        prune(layers=None, target_params=target)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_heads": 3}, "2 share a key and value head"),
        ({"hidden_size": 40}, "hidden_size 40 cannot be kept of 32"),
        ({"intermediate_size": 49}, "intermediate_size 49 cannot be kept of 48"),
        ({"attention_heads": 6}, "attention_heads 6 cannot be kept of 4"),
        ({"hidden_size": 30}, "no llama model has these sizes"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_kept_are_refused(prune: Pruning, fields: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        prune(layers=None, **fields)


def test_where_heads_make_up_the_hidden_size_either_says_the_other(
    prune: Pruning, build_family_folder: Any
) -> None:
    model = TransformersModel(path=str(build_family_folder("gpt2")))
    by_heads, by_size = (
        prune(name, model=model, layers=None, **{name: size})[0].counts
        for name, size in (("attention_heads", 3), ("hidden_size", 24))
    )
    assert by_heads == by_size
    assert (by_heads["attention_heads"], by_heads["hidden_size"]) == (3, 24)
    with pytest.raises(ModelError, match="3 heads of 8 are not a hidden size of 16"):
        prune("both", model=model, layers=None, attention_heads=3, hidden_size=16)
    with pytest.raises(ModelError, match="no whole number of heads of 8"):
        prune("part", model=model, layers=None, hidden_size=20)


def test_copied_blocks_are_evenly_spaced_from_the_first_to_the_last(prune: Pruning) -> None:
    from transformers import AutoModelForCausalLM

    result, context = prune(method="copy", layers=3)
    assert result.metrics["kept_blocks"] == [0, 2, 5]
    whole = AutoModelForCausalLM.from_pretrained(context.model("base").path)
    copied = loaded_from(context)
    for place, block in enumerate((0, 2, 5)):
        torch.testing.assert_close(
            copied.model.layers[place].mlp.up_proj.weight, whole.model.layers[block].mlp.up_proj.weight
        )


def test_a_fresh_model_has_cut_out_or_random_weights_by_the_recipes_seed(prune: Pruning) -> None:
    sizes = {"method": "fresh", "layers": 3, "hidden_size": 16, "intermediate_size": 32}
    (sliced, first), (random, second), (again, third) = (
        prune(name, **sizes, weights=weights)
        for name, weights in (("sliced", "sliced"), ("random", "random"), ("again", "random"))
    )
    assert sliced.counts["parameters"] == random.counts["parameters"]
    assert "block_importance" not in sliced.metrics
    weights = [loaded_from(context).model.layers[0].mlp.up_proj.weight for context in (first, second, third)]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])
    assert random.model_identity == again.model_identity != sliced.model_identity


def test_a_family_with_experts_is_refused_by_name(
    prune: Pruning, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3}
    config = Qwen3MoeConfig(vocab_size=304, num_experts_per_tok=2, **sizes, **heads)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "experts")
    tiny_tokenizer.save_pretrained(tmp_path / "experts")
    model = TransformersModel(path=str(tmp_path / "experts"))
    with pytest.raises(ModelError, match="width of a qwen3_moe model cannot be cut"):
        prune(model=model, layers=None, hidden_size=16)
    with pytest.raises(
        ModelError, match="a target is searched for over depth and width, and the width"
    ) as told:
        prune("searched", model=model, layers=None, target_ratio=0.5)
    assert "method share_experts, prune_experts or to_dense" in str(told.value)
    assert prune("deep", model=model, layers=2)[0].counts["blocks"] == 2
