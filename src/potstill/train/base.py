"""What a student was before training: an adapter's base, which needs no second copy, or a frozen one.

Shapes: N supervised tokens, H hidden size, V vocabulary.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from potstill.losses.types import Live
from potstill.models import output_head
from potstill.train.student import supervised_hidden

if TYPE_CHECKING:
    from potstill.train.student import MicroBatch

__all__ = ["Base"]


class Base:
    """The model that a student is kept near, without dropout or gradients; also its head, to the losses.

    Of an adapter it is the student with the adapter off, and so the original base, however often the adapter
    was trained on. Where the student's own weights are trained it is `reference`, frozen here, by default a
    copy of the student, in the same type so that the divergence begins at zero. `weight` is that of the
    divergence from it.
    """

    def __init__(
        self, student: Any, vocabulary_size: int, weight: float, reference: Any | None = None
    ) -> None:
        self.parameters: tuple[Tensor, ...] = ()
        self.weight = weight
        if reference is not None and _share_weights(reference, student):
            reference = None  # it would move with the student, and freeze it
        if reference is None and not hasattr(student, "peft_config"):
            reference = copy.deepcopy(student)
        if reference is not None:
            reference.eval().requires_grad_(requires_grad=False)
        self.model = student if reference is None else reference
        self._head = output_head(self.model, vocabulary_size)
        modules = student.modules() if reference is None else ()
        self._adapted = [module for module in modules if hasattr(module, "_disable_adapters")]

    @contextmanager
    def _off(self) -> Iterator[None]:
        # PEFT's own context then turns gradients on for all of the adapter, also for what a group froze.
        for module in self._adapted:
            module._disable_adapters = True  # noqa: SLF001  # the public setter changes requires_grad
        try:
            yield
        finally:
            for module in self._adapted:
                module._disable_adapters = False  # noqa: SLF001  # likewise

    def __call__(self, hidden: Tensor) -> Tensor:
        """The base's logits of its hidden states."""
        with self._off():
            logits: Tensor = self._head(hidden)
        return logits

    def signal(self, batch: "MicroBatch") -> Live:
        """What the base predicts for the micro-batch's supervised tokens, which is on its device."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self._off():
            hidden_NH, _ = supervised_hidden(self.model, batch)
        self.model.train(was_training)
        return Live(hidden_NH, self)


def _share_weights(one: nn.Module, other: nn.Module) -> bool:
    own = {id(parameter) for parameter in other.parameters()}
    return any(id(parameter) in own for parameter in one.parameters())
