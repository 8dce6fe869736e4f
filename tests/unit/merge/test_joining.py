"""Adapters of one base are joined in its weights, each by all that it changes of them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from potstill.core.errors import ModelError, RecipeError
from potstill.core.step import StepContext, StepResult
from potstill.merge import MergeSettings, run
from potstill.merge.joining import join_adapters
from potstill.models import SharedWeights, TransformersModel, load, tokenizer_hash

Joining = Callable[..., tuple[StepResult, Path, StepContext]]
METHODS = ["linear", "ties", "dare_linear", "dare_ties"]


@pytest.fixture
def join(step_context: Any) -> Joining:
    """`join(models, **settings)`: as a step with each gives them."""

    def make(
        models: Sequence[TransformersModel], *, folder: str = "joined", seed: int = 1, **fields: Any
    ) -> tuple[StepResult, Path, StepContext]:
        named = {f"specialist[{number}]": one for number, one in enumerate(models)}
        context = step_context("merge", folder=folder, seed=seed, models={"specialist": named})
        settings = {"do": "merge", "models": "specialist", "device": "cpu", **fields}
        return run(MergeSettings.model_validate(settings), context), context.folder, context

    return make


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one.double() for name, one in load_file(folder / "model.safetensors").items()}


def base_weights(adapter: TransformersModel) -> dict[str, torch.Tensor]:
    return weights_of(Path(adapter.path).parent / "base")


def changes_of(adapter: TransformersModel) -> dict[str, torch.Tensor]:
    """The product of an adapter's factors, from its files, in float64."""
    config = json.loads((Path(adapter.path) / "adapter_config.json").read_text(encoding="utf-8"))
    factors = load_file(Path(adapter.path) / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    return {
        name.removeprefix("base_model.model.").replace("lora_A.", ""): scale
        * (factors[name.replace("lora_A", "lora_B")].double() @ one.double())
        for name, one in factors.items()
        if "lora_A" in name
    }


def test_linear_adds_the_weighted_products_of_all_adapters(adapter: Any, join: Joining) -> None:
    models = [adapter(name=f"a{seed}", seed=seed) for seed in (1, 2, 3)]
    result, folder, _ = join(models, weights=[0.5, 0.25, 1.0])
    found, expected = weights_of(folder), base_weights(models[0])
    for model, weight in zip(models, (0.5, 0.25, 1.0), strict=True):
        for name, change in changes_of(model).items():
            expected[name] = expected[name] + weight * change
    assert found.keys() == expected.keys()
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-6, atol=1e-6)
    assert result.extra["merged"]["weights"] == {
        "specialist[0]": 0.5,
        "specialist[1]": 0.25,
        "specialist[2]": 1.0,
    }
    assert result.metrics["logit_difference"] < 1e-6


@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"rslora": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_adapter_alone_is_merged_as_it_is(
    adapter: Any, join: Joining, step_context: Any, family: str, lora: dict[str, Any]
) -> None:
    model = adapter(family, **lora)
    _, folder, _ = join([model])
    alone = step_context("merge", folder="alone", models={"student": model})
    run(MergeSettings.model_validate({"do": "merge", "model": "student", "device": "cpu"}), alone)
    expected, before = weights_of(alone.folder), base_weights(model)
    for name, one in weights_of(folder).items():
        torch.testing.assert_close(one, expected[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(one, before[name]) for name, one in expected.items())


def test_without_weights_sums_are_means_and_ties_averages_by_itself(adapter: Any, join: Joining) -> None:
    model, again = adapter(), adapter(name="again")
    alone = weights_of(join([model], folder="alone")[1])
    for method in ("linear", "ties"):
        density = {} if method == "linear" else {"density": 0.999999}
        result, folder, _ = join([model, again], folder=method, method=method, **density)
        for name, one in weights_of(folder).items():
            torch.testing.assert_close(one, alone[name], rtol=1e-3, atol=2e-3)
    assert set(result.extra["merged"]["weights"].values()) == {1.0}


def test_ranks_and_layers_may_differ(adapter: Any, join: Joining) -> None:
    narrow = adapter(name="narrow", target=["q_proj"], rank=2)
    wide = adapter(name="wide", target=["q_proj", "up_proj"], rank=8, seed=2)
    _, folder, _ = join([narrow, wide], weights=[1.0, 1.0])
    changes, base = [changes_of(narrow), changes_of(wide)], base_weights(narrow)
    changed = set()
    for name, one in weights_of(folder).items():
        expected = base[name] + sum(change[name] for change in changes if name in change)
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-6)
        if not torch.equal(one, base[name]):
            changed.add(name.split(".")[-2])
    assert changed == {"q_proj", "up_proj"}


@pytest.mark.parametrize("method", METHODS[1:])
def test_ties_and_dare_change_no_more_than_their_share_of_a_layer(
    adapter: Any, join: Joining, method: str
) -> None:
    models = [adapter(name=f"a{seed}", seed=seed, target=["up_proj"]) for seed in (1, 2)]
    result, folder, _ = join(models, method=method, density=0.1)
    base = base_weights(models[0])
    shares = [
        (one != base[name]).double().mean().item()
        for name, one in weights_of(folder).items()
        if "up_proj" in name
    ]
    assert all(0.05 < share < 0.3 for share in shares)
    assert result.extra["merged"] | {"method": method, "density": 0.1} == result.extra["merged"]


def test_dare_is_the_same_for_a_seed_and_differs_between_seeds_and_layers(
    adapter: Any, join: Joining
) -> None:
    models = [adapter(name=f"a{seed}", seed=seed, target=["up_proj"]) for seed in (1, 2)]
    found = [
        weights_of(join(models, folder=f"seed{number}", method="dare_linear", seed=seed)[1])
        for number, seed in enumerate((1, 1, 2))
    ]
    name, other = (f"model.layers.{number}.mlp.up_proj.weight" for number in (0, 1))
    base = base_weights(models[0])
    assert torch.equal(found[0][name], found[1][name])
    assert not torch.equal(found[0][name], found[2][name])
    assert not torch.equal(found[0][name] != base[name], found[0][other] != base[other])


def test_a_head_that_shares_the_embedding_s_weights_parts_from_it_where_one_is_changed(
    adapter: Any, join: Joining
) -> None:
    head = adapter(name="head", target=["lm_head", "q_proj"])
    embedding = adapter(name="embedding", target=["embed_tokens"], seed=2)
    _, folder, _ = join([head, embedding], weights=[1.0, 1.0], dtype="float32")
    found, base = weights_of(folder), base_weights(head)["model.embed_tokens.weight"]
    torch.testing.assert_close(
        found["lm_head.weight"], base + changes_of(head)["lm_head.weight"], rtol=1e-6, atol=1e-6
    )
    assert not torch.equal(found["model.embed_tokens.weight"], base)
    assert not torch.equal(found["model.embed_tokens.weight"], found["lm_head.weight"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_base_is_in_memory_once_and_keeps_its_adapters_apart(adapter: Any, quantize: str | None) -> None:
    fields: dict[str, Any] = {"config": {"hidden_size": 64, "intermediate_size": 128}}
    if quantize is not None:
        pytest.importorskip("bitsandbytes")
        fields["base_fields"] = {"quantize": quantize}
    models = [adapter(name=f"a{seed}", seed=seed, **fields) for seed in (1, 2)]
    shared = SharedWeights()
    one, other = (load(model, dtype=torch.float32, shared=shared) for model in models)
    base_of = [
        {name: tensor.data_ptr() for name, tensor in each.model.named_parameters() if "lora" not in name}
        for each in (one, other)
    ]
    assert base_of[0]
    assert base_of[0] == base_of[1]
    ids = torch.tensor([[5, 17, 200]])
    for model, together in zip(models, (one, other), strict=True):
        alone = load(model, dtype=torch.float32).model(ids, use_cache=False).logits
        assert torch.equal(together.model(ids, use_cache=False).logits, alone)


def test_from_4_bits_adapters_are_joined_in_the_full_weights(adapter: Any, join: Joining) -> None:
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    fields = {"base_fields": {"quantize": "nf4"}, "config": wide}
    models = [adapter(name=f"a{seed}", seed=seed, **fields) for seed in (1, 2)]
    result, folder, _ = join(models, weights=[1.0, 0.0])
    found, base, change = weights_of(folder), base_weights(models[0]), changes_of(models[0])
    for name, one in change.items():
        torch.testing.assert_close(found[name], base[name] + one, rtol=1e-6, atol=1e-6)
    assert result.extra["merged"]["base_in_use"] == "nf4"


def test_adapters_of_different_bases_are_refused(adapter: Any, join: Joining) -> None:
    models = [adapter(), adapter("gpt2", name="other", base_name="other-base")]
    with pytest.raises(ModelError, match=r"adapters of different bases .*specialist\[0\] on .*specialist"):
        join(models)


def test_a_model_in_full_weights_is_refused(adapter: Any, join: Joining) -> None:
    model = adapter()
    base = TransformersModel(path=str(Path(model.path).parent / "base"), device="cpu")
    with pytest.raises(ModelError, match=r"specialist\[1\]: is no adapter"):
        join([model, base])


def test_adapters_that_read_by_different_templates_are_refused(adapter: Any, join: Joining) -> None:
    models = [adapter(), adapter(name="other").model_copy(update={"chat_template": "chatml"})]
    with pytest.raises(ModelError, match=r"specialist\[1\]: has another chat template than specialist\[0\]"):
        join(models)


def test_an_adapter_that_replaces_whole_layers_is_refused(adapter: Any, join: Joining) -> None:
    models = [adapter(target=["q_proj"]), adapter(name="other", target=["q_proj"])]
    folder = Path(models[1].path)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["modules_to_save"] = ["lm_head"]
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(folder / "adapter_model.safetensors")
    head = base_weights(models[0])["model.embed_tokens.weight"].float()
    save_file({**tensors, "base_model.model.lm_head.weight": head}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"specialist\[1\]: changes more than .*modules_to_save"):
        join(models)


def test_an_adapter_with_weights_that_are_not_finite_is_refused_by_name(adapter: Any, join: Joining) -> None:
    models = [adapter(), adapter(name="broken", seed=2)]
    path = Path(models[1].path) / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"broken: .*nan"):
        join(models)


def test_the_joined_model_has_the_tokenizer_of_its_adapters(
    adapter: Any, join: Joining, tiny_tokenizer: Any
) -> None:
    result, folder, context = join([adapter(), adapter(name="other", seed=2)], method="ties")
    saved = load(TransformersModel(path=str(folder)))
    assert tokenizer_hash(saved.tokenizer) == tokenizer_hash(tiny_tokenizer) == result.tokenizer
    assert any("2 adapters joined by ties" in said for said in context.reporter.said)  # type: ignore[attr-defined]


def test_a_weight_is_given_for_each_adapter_or_for_none(adapter: Any, join: Joining) -> None:
    with pytest.raises(RecipeError, match="1 weights are given, and there are 2 models") as raised:
        join([adapter(), adapter(name="other")], weights=[1.0])
    assert "specialist[0], specialist[1]" in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "either model, an adapter, or models"),
        ({"model": "a", "models": "b"}, "either model, an adapter, or models"),
        ({"model": "a", "method": "ties"}, "method says how several are joined"),
        ({"model": "a", "weights": [1.0]}, "weights says how several are joined"),
        ({"models": "a", "density": 0.5}, "density belongs to method ties"),
        ({"models": "a", "method": "ties", "density": 0.0}, "greater than 0"),
        ({"models": "a", "method": "tied"}, "'linear', 'ties', 'dare_linear' or 'dare_ties'"),
        ({"models": []}, "models is empty"),
        ({"models": ["a", "a"]}, "models names one twice"),
        ({"models": ["a", "b"], "data": "traces"}, "compare several by an evaluate step"),
    ],
    ids=str,
)
def test_settings_that_say_nothing_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        MergeSettings.model_validate({"do": "merge", **fields})


def test_a_layer_s_random_choices_have_its_own_seed(adapter: Any) -> None:
    asked: list[str] = []

    def seed(layer: str) -> int:
        asked.append(layer)
        return len(asked)

    model = adapter(target=["q_proj"])
    join_adapters({"a": model}, [1.0], "dare_linear", 0.5, seed)
    assert asked == [f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)]
