"""What steps hold in memory at most: activations, logits, the keys and values of what is decoded."""

from typing import TYPE_CHECKING, Any

from potstill.cache import MEMORY_SHARE, CacheSettings, most_batch_tokens
from potstill.core.settings import ModelRef
from potstill.models import (
    TransformersModel,
    stored_configuration,
    stored_vocabulary_size,
    supports_bf16,
)
from potstill.pipeline.graph import Node
from potstill.pipeline.planner import GB, Planner, memory_limit
from potstill.scale.roofline import WIDTH_TO_DEPTH, hidden_size

if TYPE_CHECKING:
    import torch

__all__ = ["activation_bytes", "decoding_bytes", "loss_bytes", "scoring_bytes"]

_BLOCK_TOKEN_BYTES = 34  # that a block keeps, in multiples of the hidden size (Korthikanti et al. 2022)
_WIDE_VOCABULARY = 152_000  # Qwen's, where a model's own is not known
_LOGITS_COPIES = 3  # of a chunk in fp32: logits, their normalised ones, what is made of them


def activation_bytes(settings: Any, parameters: int, max_tokens: int) -> float:
    """About what a micro-batch's activations take, from the size of the model alone.

    A block keeps 34 H bytes a token in 16 bits; with checkpointing its input alone, and one block is made
    again at a time.
    """
    hidden = hidden_size(parameters)
    blocks = hidden / WIDTH_TO_DEPTH
    if settings.activation_checkpointing:
        token_bytes = 2 * hidden * blocks + _BLOCK_TOKEN_BYTES * hidden
    else:
        token_bytes = _BLOCK_TOKEN_BYTES * hidden * blocks
    return float(token_bytes * max_tokens)


def loss_bytes(planner: Planner, node: Node, device: "torch.device") -> float:
    """What the longest chunk of a training's logits takes, which become their gradient in place."""
    from potstill.losses.head import FUSED_CHUNK_TOKENS, FUSED_CHUNK_TOKENS_GPU

    settings: Any = node.settings
    tokens = FUSED_CHUNK_TOKENS if device.type == "cpu" else FUSED_CHUNK_TOKENS_GPU
    vocabulary = planner.of_model(node, settings.student, stored_vocabulary_size) or _WIDE_VOCABULARY
    return float(tokens * vocabulary * (2 if supports_bf16(device) else 4))


def scoring_bytes(planner: Planner, node: Node, reference: ModelRef) -> float | None:
    """What a model takes that scores rows: its weights, one block's activations, a chunk of logits."""
    from potstill.losses.head import CHUNK_TOKENS

    weights = planner.frozen_bytes(node, reference, getattr(node.settings, "device", None))
    parameters = planner.parameters(node, reference)
    if weights is None or parameters is None:
        return weights
    tokens = _tokens_at_once(planner, node, parameters)
    vocabulary = planner.of_model(node, reference, stored_vocabulary_size) or _WIDE_VOCABULARY
    activations = _BLOCK_TOKEN_BYTES * hidden_size(parameters) * tokens
    return weights + activations + _LOGITS_COPIES * 4 * CHUNK_TOKENS * vocabulary


def _tokens_at_once(planner: Planner, node: Node, parameters: int) -> float:
    """How many tokens go through a model that scores rows; of a cache as many as it finds room for."""
    from potstill.scoring import micro_batch_tokens

    settings: Any = node.settings
    device = planner.device(node)
    if node.kind != CacheSettings.kind:
        return float(settings.max_tokens or micro_batch_tokens(device))
    most, limit = float(most_batch_tokens(device.type)), memory_limit(str(device))
    if limit is not None:
        most = min(most, MEMORY_SHARE * limit[0] * GB / (_BLOCK_TOKEN_BYTES * hidden_size(parameters)))
    return float(settings.batch_tokens or most)


def decoding_bytes(planner: Planner, node: Node, reference: ModelRef, rows: int, tokens: int) -> float | None:
    """What a model takes that decodes so many rows at once, each of so many tokens, its prompt included.

    Where that is more than there is, it is what fewer rows take: on a GPU a batch is cut into pieces then.
    """
    weights = planner.frozen_bytes(node, reference, getattr(node.settings, "device", None))
    parameters = planner.parameters(node, reference)
    if weights is None or parameters is None:
        return weights
    device = planner.device(node)
    kept = planner.of_model(node, reference, _stored_token_values) or _usual_token_values(parameters)
    vocabulary = planner.of_model(node, reference, stored_vocabulary_size) or _WIDE_VOCABULARY
    row_bytes = kept * tokens * (2 if supports_bf16(device) else 4) + _LOGITS_COPIES * 4 * vocabulary
    needed, limit = weights + rows * row_bytes, memory_limit(str(device))
    if limit is not None and needed > limit[0] * GB > weights:
        fitting = max(1, int((limit[0] * GB - weights) / row_bytes))
        then = (
            "fewer are decoded at once where it runs out" if device.type == "cuda" else "decode fewer at once"
        )
        planner.note(
            f"step {node.name}: {rows:,} answers at once may need {needed / GB:.0f} GB, where all become as "
            f"long as they may, and {limit[1]}: {then}, about {fitting:,}"
        )
        needed = weights + fitting * row_bytes
    return needed


def _stored_token_values(model: TransformersModel) -> int | None:
    """Keys and values that a token leaves in all blocks, by the model's configuration."""
    stated = stored_configuration(model)
    layers, heads = stated.get("num_hidden_layers"), stated.get("num_attention_heads")
    if not layers or not heads:
        return None
    width = stated.get("head_dim") or stated.get("hidden_size", 0) // heads
    return int(2 * layers * (stated.get("num_key_value_heads") or heads) * width)


def _usual_token_values(parameters: int) -> int:
    """About the same from the size of the model alone, at most: one key and value a query head."""
    hidden = hidden_size(parameters)
    return int(2 * hidden / WIDTH_TO_DEPTH * hidden)
