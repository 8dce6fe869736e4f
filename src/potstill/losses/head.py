"""The chunked head: from hidden states to per-token quantities, one chunk of logits alive at a time.

Everything that needs a vocabulary-wide row a token goes through here: the training losses, the capture of a
teacher's top-k, perplexity and the comparison of two models.

Shapes: B sequences, T positions, N tokens, C tokens of one chunk, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "CHUNK_TOKENS",
    "Head",
    "TokenFunction",
    "full_precision_logits",
    "per_token",
    "supervised_pairs",
    "weighted_loss",
]

CHUNK_TOKENS = 256

# From a chunk's logits (CV, fp32 or better) and the rows that they stand for to quantities, a row a token.
TokenFunction = Callable[[Tensor, slice], dict[str, Tensor]]


class Head(Protocol):
    """What turns hidden states into logits over the vocabulary, with bias, scale and soft cap."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The tensors that the logits depend on, trained or not."""

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """Logits of hidden states."""


def supervised_pairs(hidden_BTH: Tensor, token_ids_BT: Tensor, loss_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict supervised tokens (NH), and those tokens (N), row by row in order.

    The hidden state at position i - 1 predicts token i; a row's first token is predicted by nothing.
    """
    predicted_BT = loss_mask_BT[:, 1:].bool()
    return hidden_BTH[:, :-1][predicted_BT], token_ids_BT[:, 1:][predicted_BT]


def full_precision_logits(head: Head, hidden_NH: Tensor) -> Tensor:
    """Logits in fp32 at least, whatever autocast and the head do: no softmax is taken in half precision."""
    logits_NV = head(hidden_NH)
    return logits_NV.to(_at_least_fp32(logits_NV.dtype))


def per_token(
    hidden_NH: Tensor, head: Head, quantities: TokenFunction, *, chunk_tokens: int = CHUNK_TOKENS
) -> dict[str, Tensor]:
    """Quantities of every token, without gradients; the first axis of each is N."""

    def chunk(rows: slice) -> dict[str, Tensor]:
        with torch.no_grad():
            return _own(quantities(full_precision_logits(head, hidden_NH[rows]), rows))

    return _joined(chunk, len(hidden_NH), chunk_tokens)


def weighted_loss(
    hidden_NH: Tensor,
    head: Head,
    quantities: TokenFunction,
    weights_N: Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_n weights_n loss_n, where `quantities` names the losses "loss"; also all quantities, detached.

    Gradients for the hidden states and for every head parameter that requires one are computed here, chunk
    by chunk, from the same logits as the value, and summed in fp32; backward only hands them on. No more than
    one chunk of logits exists at a time, and the chunk size changes nothing beyond rounding.

    The weights carry the normalisation: 1 / (supervised tokens of the whole optimiser step, over all its
    micro-batches and ranks). N may be 0: the gradients are then zero, so that a rank without supervised
    tokens still takes part in their exchange.
    """
    trains = torch.is_grad_enabled()
    trained = [one for one in (hidden_NH, *head.parameters) if one.requires_grad and trains]
    # A row of the hidden states belongs to one chunk; only what the chunks share needs a wider sum.
    gradients = [
        torch.zeros_like(one, dtype=one.dtype if one is hidden_NH else _at_least_fp32(one.dtype))
        for one in trained
    ]

    def chunk(rows: slice) -> dict[str, Tensor]:
        hidden_CH = hidden_NH[rows].detach().requires_grad_(hidden_NH.requires_grad and trains)
        with torch.set_grad_enabled(bool(trained)):
            values = quantities(full_precision_logits(head, hidden_CH), rows)
            loss = (values["loss"] * weights_N[rows]).sum()
        if trained:
            inputs = [hidden_CH if one is hidden_NH else one for one in trained]
            for one, total, gradient in zip(
                trained, gradients, torch.autograd.grad(loss, inputs), strict=True
            ):
                (total[rows] if one is hidden_NH else total).add_(gradient)
        return _own(values)

    values = _joined(chunk, len(hidden_NH), chunk_tokens)
    loss = (values["loss"] * weights_N).sum()
    if trained:
        known = [total.to(one.dtype) for one, total in zip(trained, gradients, strict=True)]
        loss = _KnownGradients.apply(loss, known, *trained)  # type: ignore[no-untyped-call]  # torch has no types here
    return loss, values


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _joined(chunk: Callable[[slice], dict[str, Tensor]], tokens: int, chunk_tokens: int) -> dict[str, Tensor]:
    parts = [chunk(rows) for rows in _chunks(tokens, chunk_tokens)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _own(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, since a view or a graph would keep the chunk's logits alive."""
    return {name: value_C.detach().clone() for name, value_C in values.items()}


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """At least one chunk, so that no tokens still give every quantity's name."""
    assert chunk_tokens > 0
    for start in range(0, max(tokens, 1), chunk_tokens):
        yield slice(start, min(start + chunk_tokens, tokens))


class _KnownGradients(torch.autograd.Function):
    """A scalar whose gradients are known; the inputs are named so that autograd and DDP's hooks see them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        gradients = ctx.saved_tensors
        if scale != 1:
            gradients = [(gradient * scale).to(gradient.dtype) for gradient in gradients]
        return None, None, *gradients
