"""Depth pruning: how much each block changes its input, and the model without some of its blocks.

Shapes: B rows, T tokens, H hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from potstill.core.errors import ModelError
from potstill.models import hidden_states, removing
from potstill.student.sizes import keep_block_fields

__all__ = ["block_importance", "block_input", "bypass", "choose_blocks", "decoder_blocks", "drop_blocks"]


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


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [B, T, H] among what a block is called with."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def block_importance(
    model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]], *, run: int = 1
) -> list[float]:
    """1 - cos(block input, block output) of each block, the mean over real tokens (ShortGPT, Men 2024).

    With a `run` of more than one block it is 1 - cos of what goes into a run of neighbours and what comes
    out, of each run, by its first block (Gromov 2024). `batches` yields token ids [B, T], padded on the
    right, and a mask [B, T] that is true on real tokens.
    """
    blocks = decoder_blocks(model)
    totals, tokens, real_BT = [0.0] * (len(blocks) - run + 1), 0, torch.empty(0)
    inputs: dict[int, Tensor] = {}

    def measure(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs[index] = block_input(args, kwargs)
            first = index - run + 1
            if first < 0:
                return
            after_BTH = output[0] if isinstance(output, tuple) else output
            cosine_BT = functional.cosine_similarity(inputs.pop(first).float(), after_BTH.float(), dim=-1)
            totals[first] += (1 - cosine_BT)[real_BT].sum(dtype=torch.float64).item()

        return hook

    hooks = (
        block.register_forward_hook(measure(index), with_kwargs=True) for index, block in enumerate(blocks)
    )
    with torch.no_grad(), removing(hooks):
        for input_ids_BT, real_BT in batches:
            tokens += int(real_BT.sum())
            hidden_states(model, input_ids_BT)
    if not tokens:
        raise ModelError("no tokens to measure block importance on")
    return [total / tokens for total in totals]


def choose_blocks(
    worth: Callable[[Sequence[int], int], Sequence[float]],
    count: int,
    layers: int,
    choice: Literal["ranked", "greedy", "contiguous"],
) -> list[int]:
    """Which of `count` blocks stay, so that `layers` do: those whose loss would weigh most.

    `worth(dropped, run)` says of each run of so many neighbours, by its first block, what leaving it out
    costs when the blocks `dropped` are left out already. Ranked: by one measurement; greedy: the cheapest
    block goes, and what is left is measured again; contiguous: the cheapest run goes. Of equals the last
    goes.
    """
    if layers == count:
        return [*range(count)]
    if choice == "contiguous":
        costs = worth([], count - layers)
        first = min(range(len(costs)), key=lambda index: (costs[index], -index))
        return [index for index in range(count) if not first <= index < first + count - layers]
    dropped: list[int] = []
    costs = worth([], 1)
    while len(dropped) < count - layers:
        if choice == "greedy" and dropped:
            costs = worth(dropped, 1)
        left = [index for index in range(count) if index not in dropped]
        dropped.append(min(left, key=lambda index: (costs[index], -index)))
    return [index for index in range(count) if index not in dropped]


@contextmanager
def bypass(model: PreTrainedModel, indices: Iterable[int]) -> Iterator[None]:
    """While open, the blocks at `indices` hand their input through unchanged."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = block_input(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    blocks = decoder_blocks(model)
    with removing(blocks[index].register_forward_hook(hook, with_kwargs=True) for index in indices):
        yield


def drop_blocks(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave only the blocks at the indices `kept`, in place; configuration and cache indices follow."""
    blocks, config = decoder_blocks(model), model.config.get_text_config(decoder=True)
    remaining = [blocks[index] for index in kept]
    for position, block in enumerate(remaining):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", position)  # noqa: B010  # modules declare no such attribute
    del blocks[:]
    blocks.extend(remaining)
    keep_block_fields(config, kept)
