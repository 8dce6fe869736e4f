"""Parameter groups: in order, the first pattern that matches has the weight; 0 freezes."""

from typing import Any

import pytest
from pydantic import ValidationError

from potstill.core.errors import TrainingError
from potstill.train.groups import ParameterGroups
from potstill.train.lora import add_adapter
from potstill.train.settings import LoraSettings, ParameterGroup


def group(match: str, **fields: Any) -> ParameterGroup:
    return ParameterGroup(match=match, **fields)


def of(model: Any, *groups: ParameterGroup, weight_decay: float = 0.1) -> ParameterGroups:
    return ParameterGroups(model, groups, 1e-3, weight_decay)


def rates(model: Any, groups: ParameterGroups) -> dict[str, tuple[float, float]]:
    """Rate and decay of each weight in the optimiser, by name."""
    names = {id(one): name for name, one in model.named_parameters()}
    return {
        names[id(one)]: (made["lr"], made["weight_decay"])
        for made in groups.for_optimiser()
        for one in made["params"]
    }


def test_the_first_match_wins_and_what_none_matches_trains_at_the_rate_itself(tiny_llama: Any) -> None:
    found = rates(
        tiny_llama,
        of(
            tiny_llama,
            group(r"layers\.0\.", lr_multiplier=0.1),
            group("mlp", lr_multiplier=0.5, weight_decay=0.2),
        ),
    )
    assert found["model.layers.0.mlp.up_proj.weight"] == (pytest.approx(1e-4), 0.1)
    assert found["model.layers.1.mlp.up_proj.weight"] == (pytest.approx(5e-4), 0.2)
    assert found["model.layers.1.self_attn.q_proj.weight"] == (1e-3, 0.1)
    assert found.keys() == {name for name, _ in tiny_llama.named_parameters()}


def test_biases_and_norms_never_decay_and_matrices_do(build_tiny_model: Any) -> None:
    model = build_tiny_model("qwen2")
    found = rates(model, of(model, group("layers", weight_decay=0.3)))
    shapes = {name: one.ndim for name, one in model.named_parameters()}
    assert any(name.endswith("bias") for name in found)
    for name, (_, decay) in found.items():
        assert (decay > 0) == (shapes[name] > 1), name


def test_zero_freezes(tiny_llama: Any) -> None:
    groups = of(tiny_llama, group("embed_tokens", lr_multiplier=0.0), group("layers.0", lr_multiplier=0.0))
    frozen = {name for name, one in tiny_llama.named_parameters() if not one.requires_grad}
    assert "model.embed_tokens.weight" in frozen
    assert rates(tiny_llama, groups).keys() == {name for name, _ in tiny_llama.named_parameters()} - frozen


def test_the_table_counts_every_trained_weight_once_in_the_order_of_the_patterns(tiny_llama: Any) -> None:
    every = sum(one.numel() for one in tiny_llama.parameters())
    groups = of(tiny_llama, group("mlp", lr_multiplier=0.5), group("embed", lr_multiplier=0.0))
    assert list(dict.fromkeys(row.match for row in groups.table)) == ["mlp", "embed", "(all others)"]
    assert sum(row.parameters for row in groups.table) == every
    assert sum(row.tensors for row in groups.table) == len(list(tiny_llama.parameters()))
    text = groups.as_text()
    assert len(text) == len(groups.table) + 1
    assert any("embed" in line and "frozen" in line for line in text)
    assert groups.as_json()[0] == {
        "match": "mlp",
        "tensors": 6,
        "parameters": 6 * 32 * 48,
        "lr": 5e-4,
        "weight_decay": 0.1,
    }


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["embed_token$"], r"matches no weight[\s\S]*near it: model\.embed_tokens\.weight"),
        (["layers", "mlp"], "earlier patterns take all it matches, model.layers.0.mlp"),
        (["lm_head"], "lm_head.weight is tied to model.embed_tokens.weight"),
    ],
)
def test_a_pattern_that_gets_nothing_is_an_error_that_says_why(
    tiny_llama: Any, patterns: list[str], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        of(tiny_llama, *map(group, patterns))


def test_a_pattern_for_the_frozen_base_of_an_adapter_is_an_error(tiny_llama: Any) -> None:
    model = add_adapter(tiny_llama, LoraSettings(rank=2), seed=1)
    with pytest.raises(TrainingError, match="only weights that are frozen already"):
        of(model, group("embed_tokens"))
    assert {row.match for row in of(model, group("lora_B", lr_multiplier=16.0)).table} == {
        "lora_B",
        "(all others)",
    }


def test_nothing_left_to_train_is_an_error(tiny_llama: Any) -> None:
    with pytest.raises(TrainingError, match="every weight is frozen"):
        of(tiny_llama, group(".", lr_multiplier=0.0))


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(ValidationError, match="no regular expression"):
        group("layers.(0")
