"""The routers of a mixture-of-experts model: where they are, which experts they chose, how evenly.

Shapes: N tokens, E experts, K experts a token.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from potstill.models.heads import plain_model, removing

if TYPE_CHECKING:
    import torch

__all__ = ["Routed", "dead_experts", "find_routers", "listen_to_routers", "load_entropy"]

_DEAD_SHARE = 0.01


class Routed(NamedTuple):
    """What a router gave in one pass: its logits (NE), and the experts that it chose for each token (NK)."""

    logits_NE: "torch.Tensor"
    experts_NK: "torch.Tensor"


def find_routers(model: Any) -> dict[str, Any]:
    """The routers by their modules' names, in order of the layers; empty for a dense model.

    They are known by what they are and not by their family: a weight with a row an expert, `top_k`, and an
    output of logits (NE), scores and numbers of the chosen experts (both NK).
    """
    return {name: module for name, module in plain_model(model).named_modules() if _is_router(module)}


def _is_router(module: Any) -> bool:
    import torch

    weight, experts, chosen = (getattr(module, name, None) for name in ("weight", "num_experts", "top_k"))
    if not (isinstance(weight, torch.Tensor) and isinstance(experts, int) and isinstance(chosen, int)):
        return False
    if weight.ndim != 2 or weight.shape[0] != experts or not chosen <= experts:
        return False
    try:
        with torch.no_grad():
            logits_NE, _, experts_NK = module(weight.new_zeros(2, weight.shape[1]))
    except (TypeError, ValueError, RuntimeError):  # another kind of module that happens to have these fields
        return False
    shapes = tuple(logits_NE.shape), tuple(experts_NK.shape)
    return shapes == ((2, experts), (2, chosen)) and not experts_NK.is_floating_point()


@contextmanager
def listen_to_routers(routers: Mapping[str, Any]) -> Iterator[dict[str, Routed]]:
    """While open, what each router gave in its last pass, by its name.

    Only while open: activations that are recomputed in the backward pass go through the same routers again.
    """
    given: dict[str, Routed] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            given[name] = Routed(output[0], output[2])

        return hook

    with removing(router.register_forward_hook(keep(name)) for name, router in routers.items()):
        yield given


def load_entropy(counts: Sequence[int]) -> float:
    """The entropy of a router's choices by expert over that of even ones: 1 is even, 0 is one expert alone.

    0 as well where nothing was chosen.
    """
    total = sum(counts)
    shares = [count / total for count in counts if count]
    return (
        -sum(share * math.log(share) for share in shares) / math.log(len(counts)) if len(shares) > 1 else 0.0
    )


def dead_experts(counts: Sequence[int]) -> list[int]:
    """The experts that were chosen less than a hundredth as often as if all were chosen alike."""
    least = _DEAD_SHARE * sum(counts) / len(counts)
    return [expert for expert, count in enumerate(counts) if count <= 0 or count < least]
