from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from potstill.core.errors import ModelError
from potstill.models.shared_experts import expert_blocks
from potstill.student.moe_pruning import choose_experts, drop_experts
from potstill.student.moe_routing import Routing

KEPT = {0: [0, 2, 5], 1: [1, 6, 7]}


def ids() -> Tensor:
    return torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def test_the_experts_that_add_most_to_their_own_tokens_are_kept() -> None:
    routing = Routing(
        tokens_E=torch.tensor([10.0, 1.0, 0.0, 5.0]),
        gates_E=torch.ones(4),
        contributions_E=torch.tensor([10.0, 4.0, 0.0, 15.0]),  # a mean of 1, 4, nothing, and 3
        total_tokens=16,
    )
    assert choose_experts({7: routing}, 1) == {7: [1]}
    assert choose_experts({7: routing}, 2) == {7: [1, 3]}
    assert choose_experts({7: routing}, 3) == {7: [0, 1, 3]}


def test_a_pruned_model_routes_as_if_the_others_were_closed(
    moe_family: str, build_tiny_model: Any, tmp_path: Path
) -> None:
    """The oracle is the whole model whose router never chooses a dropped expert."""
    model = build_tiny_model(moe_family)
    hooks = []
    for number, block in expert_blocks(model).items():
        closed = [expert for expert in range(8) if expert not in KEPT[number]]

        def route(
            module: Any, args: tuple[Tensor, ...], output: Any, closed: list[int] = closed
        ) -> tuple[Tensor, Tensor, Tensor]:
            logits_NE = (args[0] @ module.weight.T).index_fill(1, torch.tensor(closed), float("-inf"))
            weights_NK, index_NK = logits_NE.softmax(-1).topk(module.top_k)
            if getattr(module, "norm_topk_prob", True):
                weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
            return logits_NE, weights_NK, index_NK

        hooks.append(block.gate.register_forward_hook(route))
    with torch.no_grad():
        whole = build_tiny_model(moe_family)(ids()).logits
        expected = model(ids()).logits
        assert not torch.allclose(whole, expected, atol=0.01)
        for hook in hooks:
            hook.remove()
        drop_experts(model, KEPT, "some-model")
        torch.testing.assert_close(model(ids()).logits, expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert saved.config.num_experts == 3
    with torch.no_grad():
        output = saved(ids(), labels=ids(), output_router_logits=True)
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            output.aux_loss, model(ids(), labels=ids(), output_router_logits=True).aux_loss
        )
        assert saved.generate(ids(), max_new_tokens=2, do_sample=False).shape == (2, 14)


@pytest.mark.parametrize("count", [1, 9])
def test_fewer_experts_than_a_token_needs_or_more_than_there_are_are_refused(
    count: int, build_tiny_model: Any
) -> None:
    model = build_tiny_model("mixtral")
    with pytest.raises(ModelError, match=f"{count} experts cannot be kept of 8.*\n.*between 2 and 8"):
        drop_experts(model, {number: list(range(count)) for number in (0, 1)}, "some-model")
