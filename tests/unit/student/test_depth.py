import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional

from potstill.core.errors import ModelError
from potstill.student.depth import block_importance, bypass, choose_blocks, decoder_blocks, drop_blocks

BLOCKS = 6


@pytest.fixture
def deep_model(build_tiny_model: Any, tiny_family: str) -> Any:
    """A tiny model of each family, with six blocks."""
    return build_tiny_model(
        tiny_family, **{"n_layer" if tiny_family == "gpt2" else "num_hidden_layers": BLOCKS}
    )


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids_BT = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    real_BT = torch.arange(20) < torch.tensor([20, 7, 13])[:, None]
    return ids_BT, real_BT


def test_the_blocks_of_every_family_are_found(deep_model: Any) -> None:
    blocks = decoder_blocks(deep_model)
    assert len(blocks) == BLOCKS
    assert len({type(block) for block in blocks}) == 1


def test_importance_is_what_the_hidden_states_say(deep_model: Any) -> None:
    ids_BT, real_BT = padded_batch()
    with torch.no_grad():
        states = deep_model(ids_BT, use_cache=False, output_hidden_states=True).hidden_states
    # The last entry lies behind the final norm, so the last block is left to the others' evidence.
    expected = [
        (1 - functional.cosine_similarity(before, after, dim=-1))[real_BT].mean().item()
        for before, after in itertools.pairwise(states[:-1])
    ]
    found = block_importance(deep_model, [(ids_BT, real_BT)])
    assert len(found) == BLOCKS
    assert found[:-1] == pytest.approx(expected, abs=1e-5)


def test_importance_is_the_same_in_whatever_batches_the_rows_come(build_tiny_model: Any) -> None:
    model = build_tiny_model(num_hidden_layers=BLOCKS)
    ids_BT, real_BT = padded_batch()
    rubbish_BT = torch.where(real_BT, ids_BT, 299)
    one_by_one = [
        (ids[None, : real.sum()], real[None, : real.sum()]) for ids, real in zip(ids_BT, real_BT, strict=True)
    ]
    together = block_importance(model, [(rubbish_BT, real_BT)])
    assert together == pytest.approx(block_importance(model, one_by_one), abs=1e-6)
    assert together != pytest.approx(block_importance(model, [(ids_BT, torch.ones_like(real_BT))]), abs=1e-6)


def test_a_block_that_does_nothing_has_no_importance(build_tiny_model: Any) -> None:
    model = build_tiny_model(num_hidden_layers=BLOCKS)
    with torch.no_grad():
        for projection in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            projection.weight.zero_()
    importance = block_importance(model, [padded_batch()])
    assert importance[2] == pytest.approx(0, abs=1e-6)
    assert min(value for index, value in enumerate(importance) if index != 2) > 1e-3


@pytest.mark.parametrize("kept", [[0, 2, 3, 5], [1, 4]], ids=str)
def test_a_pruned_model_computes_what_skipping_the_blocks_computes(
    deep_model: Any, kept: list[int], tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM

    ids_BT, _ = padded_batch()
    dropped = [index for index in range(BLOCKS) if index not in kept]
    with torch.no_grad():
        full = deep_model(ids_BT, use_cache=False).logits
        with bypass(deep_model, dropped):
            expected = deep_model(ids_BT, use_cache=False).logits
        assert not torch.allclose(full, expected, atol=0.1)
        torch.testing.assert_close(deep_model(ids_BT, use_cache=False).logits, full)  # the hooks are gone
        drop_blocks(deep_model, kept)
        torch.testing.assert_close(deep_model(ids_BT, use_cache=False).logits, expected)
        deep_model.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        torch.testing.assert_close(loaded(ids_BT, use_cache=False).logits, expected)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.num_hidden_layers == len(kept)
    assert loaded.config.tie_word_embeddings == deep_model.config.tie_word_embeddings


WINDOWED = {"sliding_window": 4, "max_position_embeddings": 64}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"]
# Families whose blocks differ, with how their configuration says so, and what it says without blocks 0 and 3.
UNEVEN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen3_moe", SPARSE | {"mlp_only_layers": [0, 2]}, {"mlp_only_layers": [1]}),
    ("qwen3_moe", SPARSE | {"decoder_sparse_step": 2}, {"mlp_only_layers": [1, 2]}),
    (
        "qwen2_moe",
        SPARSE | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 3, "mlp_only_layers": [2]},
        {"mlp_only_layers": [0, 1, 2], "decoder_sparse_step": 1},
    ),
    (
        "qwen3",
        WINDOWED | {"use_sliding_window": True, "layer_types": KINDS},
        {"layer_types": KINDS[1:3] + KINDS[4:]},
    ),
    ("gemma3_text", WINDOWED | {"layer_types": KINDS}, {"layer_types": KINDS[1:3] + KINDS[4:]}),
    (
        "gpt_oss",
        WINDOWED | {"layer_types": KINDS, "num_local_experts": 4},
        {"layer_types": KINDS[1:3] + KINDS[4:]},
    ),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 0]}, {"no_rope_layers": [0, 1, 0]}),
    (
        "llama4_text",
        {
            "moe_layers": [1, 3, 4],
            "no_rope_layers": [1, 0, 1, 1, 0],
            "num_local_experts": 4,
            "attention_chunk_size": 4,
        },
        {"moe_layers": [0, 2], "no_rope_layers": [0, 1, 0]},
    ),
    (
        "lfm2",
        {"full_attn_idxs": [1, 3], "conv_L_cache": 3},
        {"full_attn_idxs": [0], "layer_types": ["full_attention", "conv", "conv"]},
    ),
    ("glm4_moe", SPARSE | {"n_routed_experts": 4, "first_k_dense_replace": 2}, {"first_k_dense_replace": 1}),
    (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_layer_start_index": 2,
            "moe_layer_end_index": 3,
        },
        {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    ),
    (
        "gpt_neo",
        {"attention_types": [[["global"], 1], [["local", "global"], 2]], "window_size": 4},
        {"attention_layers": ["local", "global", "global"]},
    ),
]


@pytest.mark.parametrize(
    ("family", "fields", "expected"), UNEVEN, ids=lambda one: one if isinstance(one, str) else ""
)
@pytest.mark.usefixtures("_quiet_libraries")
def test_what_a_configuration_says_of_single_blocks_moves_with_them(
    family: str, fields: dict[str, Any], expected: dict[str, Any], tmp_path: Any
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 300,
        "pad_token_id": 0,
        "hidden_size": 32,
        "intermediate_size": 48,
        "intermediate_size_mlp": 40,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    known = AutoConfig.for_model(family)
    sizes = {name: value for name, value in sizes.items() if hasattr(known, name)}
    config = AutoConfig.for_model(family, **sizes, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    ids_BT = padded_batch()[0]
    with torch.no_grad(), bypass(model, [0, 3]):
        expected_BTV = model(ids_BT, use_cache=False).logits
    drop_blocks(model, [1, 2, 4])
    model.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(saved, name) for name in expected} == expected
    naive = AutoModelForCausalLM.from_config(saved).eval()
    naive.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(naive(ids_BT, use_cache=False).logits, expected_BTV)
        torch.testing.assert_close(model(ids_BT, use_cache=False).logits, expected_BTV)


def test_a_pruned_model_generates_with_its_cache(deep_model: Any) -> None:
    drop_blocks(deep_model, [0, 3, 5])
    ids_BT = padded_batch()[0][:1]
    generated = deep_model.generate(ids_BT, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    again = ids_BT
    for _ in range(4):
        logits = deep_model(again, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf  # min_new_tokens keeps the end away
        again = torch.cat([again, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, again)


def test_a_model_without_a_list_of_blocks_is_refused(build_tiny_model: Any) -> None:
    model = build_tiny_model(num_hidden_layers=3)
    model.config.num_hidden_layers = 4
    with pytest.raises(ModelError, match="no list of 4 decoder blocks"):
        decoder_blocks(model)


def test_the_importance_of_a_run_is_what_goes_in_and_what_comes_out(build_tiny_model: Any) -> None:
    model = build_tiny_model(num_hidden_layers=BLOCKS)
    ids_BT, real_BT = padded_batch()
    with torch.no_grad():
        states = model(ids_BT, use_cache=False, output_hidden_states=True).hidden_states[:-1]
    expected = [
        (1 - functional.cosine_similarity(states[first], states[first + 3], dim=-1))[real_BT].mean().item()
        for first in range(BLOCKS - 3)
    ]
    found = block_importance(model, [(ids_BT, real_BT)], run=3)
    assert len(found) == BLOCKS - 2
    assert found[:-1] == pytest.approx(expected, abs=1e-5)


# What leaving out blocks costs: 1 and 3 are each nearly for nothing, but stand in for one another.
COSTS = [9.0, 1.0, 5.0, 1.5, 4.0]


def cost(dropped: Sequence[int], run: int) -> list[float]:
    costs = [each + 8 * (index in {1, 3} and bool({1, 3} & {*dropped})) for index, each in enumerate(COSTS)]
    return [sum(costs[first : first + run]) for first in range(len(costs) - run + 1)]


@pytest.mark.parametrize(
    ("choice", "kept"), [("ranked", [0, 2, 4]), ("greedy", [0, 2, 3]), ("contiguous", [0, 1, 2])]
)
def test_blocks_are_chosen_by_one_measurement_again_and_again_or_as_a_run(
    choice: Any, kept: list[int]
) -> None:
    assert choose_blocks(cost, len(COSTS), 3, choice) == kept
    assert choose_blocks(cost, len(COSTS), 5, choice) == [0, 1, 2, 3, 4]


def test_of_equal_blocks_the_last_goes() -> None:
    assert choose_blocks(lambda dropped, run: [1.0] * 4, 4, 3, "ranked") == [0, 1, 2]
    assert choose_blocks(lambda dropped, run: [1.0] * (5 - run), 4, 2, "contiguous") == [0, 1]
