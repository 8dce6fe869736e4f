"""The chunked head: from hidden states to per-token quantities, one chunk of logits alive at a time.

Everything that needs a vocabulary-wide row a token goes through here: the training losses, the capture of a
teacher's top-k, perplexity and the comparison of two models.

Shapes: B sequences, T positions, N tokens, C tokens of one chunk, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = [
    "CHUNK_TOKENS",
    "FUSED_CHUNK_TOKENS",
    "FUSED_CHUNK_TOKENS_GPU",
    "Head",
    "TokenFunction",
    "WithGradient",
    "at_least_fp32",
    "full_precision_logits",
    "per_token",
    "supervised_pairs",
    "weighted_loss",
]

CHUNK_TOKENS = 256
# With its own gradient a token function needs little beside the logits, and matrix products like long chunks.
# On a GPU a chunk's products must outlast reading and writing the fp32 sum of the head's gradient: 8 bytes a
# weight against 6 operations a weight and token, or 267 tokens at 600 TFLOP/s and 3 TB/s.
FUSED_CHUNK_TOKENS, FUSED_CHUNK_TOKENS_GPU = 512, 2048

# What of a head's gradient is made at a time where it is summed in another type than its product's.
_PRODUCT_BYTES = 8 << 20

# From a chunk's logits (CV, fp32 or better) and the rows that they stand for to quantities, a row a token.
TokenFunction = Callable[[Tensor, slice], dict[str, Tensor]]


@runtime_checkable
class WithGradient(Protocol):
    """A token function that knows the gradient of its loss, so that no graph of its operations is needed."""

    def __call__(self, logits_CV: Tensor, rows: slice, /) -> dict[str, Tensor]:
        """The quantities, by plain differentiable operations."""

    def overwrite(self, logits_CV: Tensor, rows: slice, weights_C: Tensor | None, /) -> dict[str, Tensor]:
        """The same quantities; the logits, of any type, become d(sum_n weights_n loss_n) / d logits.

        Without weights only the quantities count, and what the logits become does not matter.
        """


class Head(Protocol):
    """What turns hidden states into logits over the vocabulary, with bias, scale and soft cap.

    The logits are in memory of their own, since they may be overwritten with their gradient; the last
    operation that makes them must not need its result for its gradient (autograd refuses it by name).
    """

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
    return logits_NV.to(at_least_fp32(logits_NV.dtype))


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of a type are summed."""
    return torch.promote_types(dtype, torch.float32)


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
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_n weights_n loss_n, where `quantities` names the losses "loss"; also all quantities, detached.

    Gradients for the hidden states and for every head parameter that requires one are computed here, chunk
    by chunk, from the same logits as the value, and summed in fp32; backward only hands them on. Quantities
    that are `WithGradient` overwrite a chunk's logits with their gradient; all others go through autograd in
    fp32. No more than one chunk of logits exists at a time, and the chunk size (`FUSED_CHUNK_TOKENS`,
    `FUSED_CHUNK_TOKENS_GPU`, `CHUNK_TOKENS` through autograd) changes nothing beyond rounding.

    The weights carry the normalisation: 1 / (supervised tokens of the whole optimiser step, over all its
    micro-batches and ranks). N may be 0: the gradients are then zero, so that a rank without supervised
    tokens still takes part in their exchange.
    """
    fused = quantities if isinstance(quantities, WithGradient) else None
    if chunk_tokens is None:
        longest = FUSED_CHUNK_TOKENS_GPU if hidden_NH.is_cuda else FUSED_CHUNK_TOKENS
        chunk_tokens = longest if fused else CHUNK_TOKENS
    trains = torch.is_grad_enabled()
    trained = [one for one in (hidden_NH, *head.parameters) if one.requires_grad and trains]
    # A row of the hidden states belongs to one chunk; only what the chunks share needs a wider sum.
    sums = [
        torch.zeros_like(one, dtype=one.dtype if one is hidden_NH else at_least_fp32(one.dtype))
        for one in trained
    ]
    linear = _SummedWeights(
        {one: total for one, total in zip(trained, sums, strict=True) if one is not hidden_NH}
    )

    def chunk(rows: slice) -> dict[str, Tensor]:
        hidden_CH = hidden_NH[rows].detach().requires_grad_(hidden_NH.requires_grad and trains)
        with torch.set_grad_enabled(bool(trained)):
            with linear:
                logits_CV = head(hidden_CH)
            if fused:
                gradient_CV = logits_CV.detach()
                values = fused.overwrite(gradient_CV, rows, weights_N[rows] if trained else None)
            else:
                values = quantities(logits_CV.to(at_least_fp32(logits_CV.dtype)), rows)
                loss = (values["loss"] * weights_N[rows]).sum()
        values = _own(values)
        if trained:
            output, seed = (logits_CV, gradient_CV) if fused else (loss, None)
            inputs = [hidden_CH if one is hidden_NH else one for one in trained]
            gradients = torch.autograd.grad(output, inputs, seed, allow_unused=True)
            for one, total, gradient in zip(trained, sums, gradients, strict=True):
                if gradient is not None:
                    (total[rows] if one is hidden_NH else total).add_(gradient)
        return values

    values = _joined(chunk, len(hidden_NH), chunk_tokens)
    loss = (values["loss"] * weights_N).sum()
    if trained:
        known = [total.to(one.dtype) for one, total in zip(trained, sums, strict=True)]
        loss = _KnownGradients.apply(loss, known, *trained)  # type: ignore[no-untyped-call]  # torch has no types here
    return loss, values


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


class _SummedWeights(TorchFunctionMode):
    """Within it, a linear layer adds the gradient of its weight to a sum, in place, and reports none.

    Through autograd each chunk would make a gradient as large as the head only to have it added. Layers with
    other weights, and other uses of these, are left to autograd.
    """

    def __init__(self, sums: dict[Tensor, Tensor]) -> None:
        super().__init__()
        self._sums = sums
        self._cast: dict[Tensor, Tensor] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        summed = self._summed(*args, **kwargs or {}) if function is functional.linear else None
        return function(*args, **kwargs or {}) if summed is None else summed

    def _summed(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:  # noqa: A002  # torch's name
        # A subclass of Tensor may be quantised or spread over devices: its own gradient is not a plain sum.
        plain = type(weight) in {Tensor, torch.nn.Parameter} and input.ndim == 2
        if not plain or weight not in self._sums or not torch.is_grad_enabled():
            return None
        device, input_CH, product = weight.device.type, input, weight
        if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            if weight not in self._cast:
                self._cast[weight] = weight.detach().to(dtype)
            input_CH, product = input.to(dtype), self._cast[weight]
            bias = None if bias is None else bias.to(dtype)
        output: Tensor = _SummedLinear.apply(input_CH, weight, bias, product, self._sums[weight])  # type: ignore[no-untyped-call]  # torch has no types here
        return output


def _parts(vocabulary: int, input_CH: Tensor) -> Iterator[slice]:
    """Ranges of ids whose rows of a head stay in cache between their product and the sum that it joins."""
    ids = max(1, _PRODUCT_BYTES // (input_CH.shape[1] * input_CH.element_size()))
    for start in range(0, vocabulary, ids):
        yield slice(start, start + ids)


class _SummedLinear(torch.autograd.Function):
    """A linear layer of 2-D input; `product` is the weight in the type of the matrix products."""

    @staticmethod
    def forward(
        ctx: Any, input_CH: Tensor, weight: Tensor, bias: Tensor | None, product: Tensor, total: Tensor
    ) -> Tensor:
        ctx.save_for_backward(input_CH, product.detach())
        ctx.total = total
        return functional.linear(input_CH, product, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_CV: Tensor) -> Any:
        input_CH, product = ctx.saved_tensors
        with torch.autocast(gradient_CV.device.type, enabled=False):
            if ctx.total.dtype == gradient_CV.dtype:
                ctx.total.addmm_(gradient_CV.T, input_CH)
            elif ctx.total.is_cuda and ctx.total.dtype == torch.float32 and len(gradient_CV):
                # Added within the product, in fp32: no second matrix of the head's size, rounded to half.
                torch.addmm(ctx.total, gradient_CV.T, input_CH, out_dtype=torch.float32, out=ctx.total)
            else:
                for part in _parts(len(ctx.total), input_CH):
                    ctx.total[part].add_(gradient_CV[:, part].T @ input_CH)
            gradient_CH = gradient_CV @ product if ctx.needs_input_grad[0] else None
            bias = gradient_CV.sum(0, dtype=ctx.total.dtype) if ctx.needs_input_grad[2] else None
        return gradient_CH, None, None if bias is None else bias.to(gradient_CV.dtype), None, None


class _KnownGradients(torch.autograd.Function):
    """A scalar whose gradients are known; the inputs are named so that autograd and DDP's hooks see them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        # A parameter takes an alias as its gradient, where it would copy a tensor held elsewhere. Aliases
        # share their version counter, so that torch refuses a second backward after a change.
        gradients = [gradient.detach() for gradient in ctx.saved_tensors]
        if scale != 1:
            gradients = [(gradient * scale).to(gradient.dtype) for gradient in gradients]
        return None, None, *gradients
