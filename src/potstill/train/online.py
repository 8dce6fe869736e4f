"""A teacher in memory beside the student: it reads the student's own micro-batches.

Shapes: N supervised tokens, H hidden size.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from potstill.core.errors import ModelError
from potstill.losses.types import Live
from potstill.models import LoadedModel, check_same_vocabulary, output_head
from potstill.train.features import FeatureLoss, Passed, counted
from potstill.train.student import supervised_hidden

if TYPE_CHECKING:
    from potstill.train.student import MicroBatch

__all__ = ["OnlineTeacher"]


class OnlineTeacher:
    """A frozen teacher that answers for a micro-batch with one pass of its trunk, without gradients.

    Its head runs where the loss asks for logits: on supervised tokens, chunk by chunk. A model that is given
    without its tokenizer is taken to have the student's. Raises ModelError where the vocabularies differ.
    """

    def __init__(self, teacher: LoadedModel | nn.Module, student: LoadedModel) -> None:
        self.model: Any = teacher.model if isinstance(teacher, LoadedModel) else teacher
        size = student.vocabulary_size
        if isinstance(teacher, LoadedModel):
            check_same_vocabulary(teacher.tokenizer, student.tokenizer)
            if teacher.vocabulary_size != size:
                raise ModelError(
                    f"the teacher's head is over {teacher.vocabulary_size} ids, the student's over {size}",
                    expected="one vocabulary for both: the loss compares them id by id",
                    mend="choose models of one family, or distil through responses alone",
                )
        self.model.eval().requires_grad_(requires_grad=False)
        self.head = output_head(self.model, size)

    def answer(self, batch: "MicroBatch", feature: FeatureLoss | None = None) -> "MicroBatch":
        """The micro-batch, which is on its device, with the teacher's signal for its supervised tokens.

        And with those of its inner states that `feature` compares, out of the same pass.
        """
        listening: AbstractContextManager[Passed] = (
            nullcontext({}) if feature is None else feature.listening(self.model, teacher=True)
        )
        with torch.no_grad(), listening as passed:
            hidden_NH, _ = supervised_hidden(self.model, batch)
        states = None
        if feature is not None:
            states = feature.joined(passed, counted(batch, feature.settings.tokens))
        return replace(batch, teacher=Live(hidden_NH, self.head), teacher_states=states)
