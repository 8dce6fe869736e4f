"""Models in float64."""

from typing import Any

from potstill.models import find_routers

__all__ = ["in_float64"]


def in_float64(model: Any) -> Any:
    """The model in float64, of which transformers' grouped products of experts know nothing."""
    if find_routers(model):
        model.set_experts_implementation("eager")
    return model.double()
