"""Depth pruning: how much each block changes its input, and the model without some of its blocks.

Shapes: B rows, T tokens, H hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from potstill.core.errors import ModelError
from potstill.models import hidden_states

__all__ = ["block_importance", "bypass", "decoder_blocks", "drop_blocks"]

# Configuration fields that hold one entry a block.
_PER_BLOCK_FIELDS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks: its outermost list of as many modules as the configuration has layers."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder: nn.Module = model.get_decoder()
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"no list of {count} decoder blocks in a {type(model).__name__}",
        expected="a decoder-only model with its blocks in one list",
    )


def _hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def block_importance(model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """1 - cos(block input, block output) of each block, the mean over real tokens (ShortGPT, Men 2024).

    `batches` yields token ids [B, T], padded on the right, and a mask [B, T] that is true on real tokens.
    """
    blocks = decoder_blocks(model)
    totals, tokens, real_BT = [0.0] * len(blocks), 0, torch.empty(0)

    def measure(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            after_BTH = output[0] if isinstance(output, tuple) else output
            cosine_BT = functional.cosine_similarity(
                _hidden_in(args, kwargs).float(), after_BTH.float(), dim=-1
            )
            totals[index] += (1 - cosine_BT)[real_BT].sum(dtype=torch.float64).item()

        return hook

    hooks = [
        block.register_forward_hook(measure(index), with_kwargs=True) for index, block in enumerate(blocks)
    ]
    try:
        with torch.no_grad():
            for input_ids_BT, real_BT in batches:
                tokens += int(real_BT.sum())
                hidden_states(model, input_ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise ModelError("no tokens to measure block importance on")
    return [total / tokens for total in totals]


@contextmanager
def bypass(model: PreTrainedModel, indices: Iterable[int]) -> Iterator[None]:
    """While open, the blocks at `indices` hand their input through unchanged."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = _hidden_in(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    blocks = decoder_blocks(model)
    hooks = [blocks[index].register_forward_hook(hook, with_kwargs=True) for index in indices]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def drop_blocks(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave only the blocks at the indices `kept`, in place; configuration and cache indices follow."""
    blocks, config = decoder_blocks(model), model.config.get_text_config(decoder=True)
    count = len(blocks)
    remaining = [blocks[index] for index in kept]
    for position, block in enumerate(remaining):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", position)  # noqa: B010  # modules declare no such attribute
    del blocks[:]
    blocks.extend(remaining)
    for name in _PER_BLOCK_FIELDS:
        entries = getattr(config, name, None)
        if isinstance(entries, list) and len(entries) == count:
            setattr(config, name, [entries[index] for index in kept])
    config.num_hidden_layers = len(remaining)
