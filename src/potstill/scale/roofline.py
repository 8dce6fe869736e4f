"""How long models of a size take on devices: the roofline of products and memory, times measured shares.

P parameters, L blocks, H hidden size, T tokens of a row. A model of which the size alone is known has the
shape of common ones: a block has 12 H^2 weights, and 1,024 numbers of keys and as many of values a token.
"""

from dataclasses import dataclass
from typing import Literal

from potstill.scale.devices import Cluster, Device

__all__ = [
    "WIDTH_TO_DEPTH",
    "Parallel",
    "Written",
    "attention_flops",
    "generation",
    "hidden_size",
    "key_value_bytes",
    "scoring_seconds",
    "train_flops",
    "training",
]

WIDTH_TO_DEPTH = 70  # hidden size a block of common language models
_KEY_WIDTH = 1024  # eight heads of 128, which the queries share
_SHORT_BYTES = 2  # of a number in bf16, in which keys and values are, and gathered weights
# An fp32 weight, its gradient and AdamW's two moments; of a frozen one with an adapter, bf16 and a hundredth.
_TRAINED_BYTES, _ADAPTED_BYTES = 16, 2.16
_ADAPTER_SHARE = 0.01
_SCORE_SHARE = 0.5  # of the peak: a forward pass of whole rows, a prompt's among them
# What products keep of their speed that are parted over devices, which wait for one another twice a block.
_PARTED_SHARE = 0.75
_MOST_AT_ONCE = 256  # sequences that a server writes at once
_USED_MEMORY = 0.9  # of a device, by weights, keys and values


def hidden_size(parameters: float) -> float:
    """About the hidden size of a model of so many parameters."""
    return float((parameters * WIDTH_TO_DEPTH / 12) ** (1 / 3))


def key_value_bytes(parameters: float) -> float:
    """What a token's keys and values take in bf16."""
    hidden = hidden_size(parameters)
    return 2 * _SHORT_BYTES * hidden / WIDTH_TO_DEPTH * min(hidden, _KEY_WIDTH)


def attention_flops(parameters: float, length: float) -> float:
    """Of a token's causal attention in a row of so many tokens, forward: 2 L H T."""
    hidden = hidden_size(parameters)
    return 2 * hidden / WIDTH_TO_DEPTH * hidden * length


def train_flops(parameters: float, tokens: float, length: float = 0.0, *, passes: float = 3) -> float:
    """2 P a token and pass: forward, to the inputs, and to the weights where they are trained."""
    return passes * tokens * (2 * parameters + attention_flops(parameters, length))


def scoring_seconds(device: Device, parameters: float, tokens: float, length: float = 0.0) -> float:
    """One forward pass over so many tokens on one device."""
    return train_flops(parameters, tokens, length, passes=1) / (_SCORE_SHARE * device.flops_per_s)


@dataclass(frozen=True)
class Written:
    """How a model writes: replicas, sequences that each has at once, and tokens a second of all."""

    replicas: int
    gpus_per_replica: int
    at_once: int
    tokens_per_s: float


def generation(
    cluster: Cluster,
    parameters: float,
    *,
    prompt_tokens: float,
    response_tokens: float,
    rows: int | None = None,
    gpus_per_replica: int | None = None,
) -> Written | None:
    """Responses by replicas of the size that writes the most; None where a node cannot hold one.

    For each token all weights are read, and the keys and values of the sequences that are written at once;
    prompts are products of whole rows. `rows` bounds what can be written at once, `gpus_per_replica` states
    the size.
    """
    sizes = [gpus_per_replica] if gpus_per_replica else []
    while not gpus_per_replica and (size := 2 ** len(sizes)) <= cluster.gpus_per_node:
        sizes.append(size)
    found = (_written(cluster, parameters, prompt_tokens, response_tokens, rows, size) for size in sizes)
    return max(filter(None, found), key=lambda one: one.tokens_per_s, default=None)


def _written(
    cluster: Cluster,
    parameters: float,
    prompt_tokens: float,
    response_tokens: float,
    rows: int | None,
    gpus: int,
) -> Written | None:
    device, context = cluster.device, prompt_tokens + response_tokens / 2
    weights = parameters * device.weight_bytes
    each = key_value_bytes(parameters) * (prompt_tokens + response_tokens)
    room = int((_USED_MEMORY * device.memory_bytes * gpus - weights) / each)
    if room < 1:
        return None
    replicas = cluster.gpus_per_node // gpus * cluster.nodes
    at_once = min(_MOST_AT_ONCE, room)
    if rows is not None:
        replicas = min(replicas, rows)
        at_once = min(at_once, -(-rows // replicas))
    parted = gpus * (_PARTED_SHARE if gpus > 1 else 1.0)
    read = weights + at_once * context * key_value_bytes(parameters)
    reading_s = read / (device.read_share * device.bytes_per_s * parted)
    products = at_once * (2 * parameters + attention_flops(parameters, 2 * context))
    writing_s = max(reading_s, products / (_SCORE_SHARE * device.flops_per_s * parted))
    prompts = at_once * prompt_tokens / response_tokens
    prompts_s = scoring_seconds(device, parameters, prompts, prompt_tokens) / parted
    return Written(replicas, gpus, at_once, replicas * at_once / (writing_s + prompts_s))


@dataclass(frozen=True)
class Parallel:
    """How a training is spread over how many GPUs, its speed, and what a step sends and takes."""

    strategy: Literal["ddp", "fsdp2"]
    gpus: int
    tokens_per_s: float
    network_bytes: float  # a GPU and optimiser step
    memory_bytes: float  # a GPU, without activations
    waits: bool  # for the network, which takes longer than the products


def training(
    cluster: Cluster,
    parameters: float,
    *,
    batch: int,
    length: float,
    adapter: bool = False,
    checkpointing: bool = False,
) -> Parallel | None:
    """Optimiser steps of `batch` rows of about so many tokens; None where all GPUs cannot hold the weights.

    Where a GPU holds everything, gradients are exchanged (DDP); else each gathers all weights for each pass
    and hands on their gradients (FSDP2). A row is one GPU's, so that no more than `batch` of them have work.
    Sending and multiplying overlap.
    """
    device = cluster.device
    passes = 3 - adapter + checkpointing
    whole = parameters * (_ADAPTED_BYTES if adapter else _TRAINED_BYTES)
    gpus = min(cluster.gpus, batch)
    # Half of the memory is left to activations and logits.
    fits = whole <= device.memory_bytes / 2
    if not fits and whole / gpus > device.memory_bytes / 2:
        return None
    trained = parameters * (_ADAPTER_SHARE if adapter else 1)
    sent = 2 * 4 * trained if fits else (2 + (not adapter)) * _SHORT_BYTES * parameters
    alone = gpus == 1
    one_node = gpus <= cluster.gpus_per_node
    network_s = 0.0 if alone else sent / (device.link_bytes_per_s if one_node else device.network_bytes_per_s)
    # The GPU with the most rows is waited for.
    rows = -(-batch // gpus)
    flops = train_flops(parameters, rows * length, length, passes=passes)
    products_s = flops / (device.train_share * device.flops_per_s)
    step_s = max(products_s, network_s)
    return Parallel(
        "ddp" if fits else "fsdp2",
        gpus,
        batch * length / step_s,
        0.0 if alone else sent,
        whole if fits else whole / gpus,
        network_s > products_s,
    )
