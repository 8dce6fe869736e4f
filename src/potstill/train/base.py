"""What an adapter's student was before training: its base, which needs no second copy of the weights.

Shapes: N supervised tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from potstill.core.errors import TrainingError
from potstill.losses.types import Live
from potstill.models import output_head
from potstill.train.student import supervised_hidden

if TYPE_CHECKING:
    from potstill.train.student import MicroBatch

__all__ = ["Base"]


class Base:
    """A student with its adapter off, without dropout or gradients; also the head of that, to the losses.

    It is the original base, however often the adapter was trained on; `weight` is that of the divergence from
    it. Raises TrainingError for a student without an adapter, whose own weights are trained: what they were
    is gone after the first step.
    """

    def __init__(self, model: Any, vocabulary_size: int, weight: float) -> None:
        if not hasattr(model, "peft_config"):
            raise TrainingError(
                "base_kl compares the student with its base, and here the base itself is trained",
                expected="an adapter as student, or lora: its base is the student with the adapter off",
                mend="add lora, or leave base_kl out",
            )
        self.parameters: tuple[Tensor, ...] = ()
        self.weight = weight
        self._model, self._head = model, output_head(model, vocabulary_size)
        self._adapted = [module for module in model.modules() if hasattr(module, "_disable_adapters")]

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
        was_training = self._model.training
        self._model.eval()
        with torch.no_grad(), self._off():
            hidden_NH, _ = supervised_hidden(self._model, batch)
        self._model.train(was_training)
        return Live(hidden_NH, self)
