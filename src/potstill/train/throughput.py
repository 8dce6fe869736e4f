"""How well training uses the machine: model FLOPs a second as a share of what its matrix products reach."""

import functools
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from potstill.models import decoder_start_id, output_projection, plain_model

__all__ = ["StepCost", "parameter_size", "peak_flops_per_s"]

_CPU_SIZES, _GPU_SIZES = (256, 1024), (1024, 8192)
_REPEATS = 4
_LONG_S = 0.005
# What a decoder multiplies with its own input; keys and values of the source are made of the source.
_TARGET_WEIGHT = re.compile(r"\bdecoder\.(?!.*EncDecAttention\.[kv]\b)")


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
    for supervised tokens alone, an expert for those that are routed to it. Attention adds 2 T^2 D a layer for
    a row of T tokens forward (causal; D is heads times their width) and twice that backward. Work that is
    done again (checkpointed activations) does not count, work that is saved (shared prefixes) does.

    An encoder-decoder's encoder, and what its decoder makes of the source, cost a token of the source; the
    rest of the decoder one of the target. The encoder's attention is not causal, and costs twice as much.
    """

    def __init__(self, model: Any) -> None:
        plain = plain_model(model)
        config = plain.config.get_text_config()
        lookups = [one.weight for one in plain.modules() if isinstance(one, nn.Embedding)]
        head: nn.Parameter = output_projection(plain).weight
        backward = any(one.requires_grad for one in lookups)  # embeddings lie before everything
        no_product = {id(one) for one in (*lookups, head)}
        self.is_encoder_decoder = decoder_start_id(config) is not None
        self.per_token = self.per_target_token = 0
        for name, one in model.named_parameters():
            if one.ndim < 2 or id(one) in no_product:
                continue
            backward = backward or one.requires_grad
            cost = parameter_size(one) * (2 + 2 * backward + 2 * one.requires_grad)
            # Three dimensions are those of all experts' weights in one, of which a token goes through some.
            routed = one.ndim == 3 and hasattr(config, "num_experts_per_tok")
            cost = cost * config.num_experts_per_tok // len(one) if routed else cost
            if self.is_encoder_decoder and _TARGET_WEIGHT.search(name):
                self.per_target_token += cost
            else:
                self.per_token += cost
        self.per_supervised_token = parameter_size(head) * (2 + 2 * backward + 2 * head.requires_grad)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        per_pair = heads * width * (6 if backward else 2)
        self.per_squared_length = config.num_hidden_layers * per_pair
        self.per_squared_target = getattr(config, "num_decoder_layers", 0) * per_pair

    def flops(self, lengths: Sequence[int], supervised: Sequence[int]) -> float:
        """Of a step over rows of these lengths, with so many supervised tokens each."""
        if self.is_encoder_decoder:
            sources = [length - written for length, written in zip(lengths, supervised, strict=True)]
            pairs = zip(sources, supervised, strict=True)
            return float(
                self.per_token * sum(sources)
                + (self.per_target_token + self.per_supervised_token) * sum(supervised)
                + 2 * self.per_squared_length * sum(source**2 for source in sources)
                + self.per_squared_target * sum(target * (target + 2 * source) for source, target in pairs)
            )
        return float(
            self.per_token * sum(lengths)
            + self.per_supervised_token * sum(supervised)
            + self.per_squared_length * sum(length**2 for length in lengths)
        )
