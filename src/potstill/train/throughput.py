"""How well training uses the machine: model FLOPs a second as a share of what its matrix products reach."""

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from potstill.models import output_projection

__all__ = ["StepCost", "parameter_size", "peak_flops_per_s"]

_CPU_SIZES, _GPU_SIZES = (256, 1024), (1024, 8192)
_REPEATS = 4
_LONG_S = 0.005


@functools.cache
def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product, the best of a few; cached."""
    peak = 0.0
    for size in _CPU_SIZES if device.type == "cpu" else _GPU_SIZES:
        try:
            best_s = _product_s(size, device, dtype)
        except torch.OutOfMemoryError:  # the training has filled the GPU: a figure must not end it
            break
        peak = max(peak, 2.0 * size * size * size / best_s)
        if best_s > _LONG_S:  # where a type is emulated the next size would take seconds
            break
    return peak or math.inf


def _product_s(size: int, device: torch.device, dtype: torch.dtype) -> float:
    one, other = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(_REPEATS):
        _finish(device)
        started = time.perf_counter()
        torch.mm(one, other)
        _finish(device)
        best_s = min(best_s, time.perf_counter() - started)
    return best_s


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parameter_size(parameter: nn.Parameter) -> int:
    """How many weights a parameter holds; in four bits two are packed in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


class StepCost:
    """Model FLOPs of an optimiser step (Chowdhery et al. 2022, appendix B): what the mathematics needs.

    A matrix of P weights costs a token 2 P forward, 2 P for the gradient of its input where a trained weight
    lies before or in it, and 2 P for its own gradient where it is trained: 6 P where all is. The head counts
    for supervised tokens alone. Attention adds 2 T^2 D a layer for a row of T tokens forward (causal; D is
    heads times their width) and twice that backward. Work that is done again (checkpointed activations) does
    not count, work that is saved (shared prefixes) does.
    """

    def __init__(self, model: Any) -> None:
        plain = model.get_base_model() if hasattr(model, "peft_config") else model
        config = plain.config.get_text_config()
        lookups = [one.weight for one in plain.modules() if isinstance(one, nn.Embedding)]
        head: nn.Parameter = output_projection(plain).weight
        backward = any(one.requires_grad for one in lookups)  # embeddings lie before everything
        no_product = {id(one) for one in (*lookups, head)}
        self.per_token = 0
        for one in model.parameters():
            if one.ndim < 2 or id(one) in no_product:
                continue
            backward = backward or one.requires_grad
            self.per_token += parameter_size(one) * (2 + 2 * backward + 2 * one.requires_grad)
        self.per_supervised_token = parameter_size(head) * (2 + 2 * backward + 2 * head.requires_grad)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.per_squared_length = config.num_hidden_layers * heads * width * (6 if backward else 2)

    def flops(self, lengths: Sequence[int], supervised: int) -> float:
        """Of a step over rows of these lengths, with so many supervised tokens."""
        return float(
            self.per_token * sum(lengths)
            + self.per_supervised_token * supervised
            + self.per_squared_length * sum(length**2 for length in lengths)
        )
