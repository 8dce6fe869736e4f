"""What a method of making students is given, and what it gives back.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from potstill.core.errors import ModelError
from potstill.core.step import StepContext
from potstill.data.batches import collate, micro_batches
from potstill.data.chat import Rendered
from potstill.models import LoadedModel, forward_inputs
from potstill.scoring import compare_on_traces, micro_batch_tokens
from potstill.student import InitSettings

__all__ = ["PROBE_TOKENS", "Made", "Original", "check_same"]

PROBE_TOKENS = 64
_MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Original:
    """The model that a student is made of, in evaluation mode, and the traces to measure it on.

    `probe_BT` are the token ids that the finished student is checked on. Passes that only measure multiply in
    bfloat16 with `bf16`, over weights that stay as they are.
    """

    settings: InitSettings
    context: StepContext
    loaded: LoadedModel
    rows: Sequence[Rendered]
    probe_BT: Tensor
    bf16: bool = False

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.loaded.model

    def measuring(self) -> AbstractContextManager[Any]:
        """The precision of passes that only measure."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)

    def batches(self, doing: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids [B, T], padded on the right, and a mask [B, T] that is true on real tokens.

        `doing` is shown with the progress. Raises Interrupted between batches.
        """
        rows = self.rows
        lengths = [len(row.ids) for row in rows]
        with self.context.progress(doing, total=sum(lengths), unit="tokens") as progress:
            for group in micro_batches(lengths, range(len(rows)), _MICRO_BATCH_TOKENS):
                self.context.check_stop()
                tensors = collate([rows[number] for number in group], pad_id=0)
                device = self.model.device
                yield tensors["input_ids"].to(device), tensors["attention_mask"].bool().to(device)
                progress.advance(sum(lengths[number] for number in group))

    def loss(self, model: Any, doing: str) -> float:
        """The mean cross-entropy of a student on the calibration traces, in nats a supervised token."""
        with self.context.progress(doing, total=len(self.rows)) as progress:

            def on_batch(count: int) -> None:
                progress.advance(count)
                self.context.check_stop()

            with self.measuring():
                found = compare_on_traces(
                    replace(self.loaded, model=model),
                    None,
                    self.rows,
                    max_tokens=micro_batch_tokens(model.device),
                    on_batch=on_batch,
                )
        return sum(one.cross_entropy_nats for one in found) / sum(one.supervised_tokens for one in found)

    def logits(self, model: Any) -> Tensor:
        """What a model computes of the probe, [B, T, V]."""
        with torch.no_grad():
            logits_BTV: Tensor = model(**forward_inputs(model, self.probe_BT), use_cache=False).logits
        return logits_BTV


@dataclass
class Made:
    """A student in memory: how it was made, for the manifest, and in a sentence for the person watching.

    `expected_BTV` are the logits of the probe, computed in another way than by the student itself, where
    there is one: what was saved has to give them.
    """

    model: Any
    said: str
    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    expected_BTV: Tensor | None = None


def check_same(found_BTV: Tensor, expected_BTV: Tensor, family: str, where: str) -> None:
    """Compare logits of a student with those of the parts it was made of: a part may be tied to its place."""
    apart, spread = (found_BTV - expected_BTV).abs().max(), expected_BTV.std()
    if not apart <= 0.01 * spread:
        raise ModelError(
            f"without some of its parts a {family} model computes something else than the parts that are "
            f"left (logits differ by up to {apart:.3g})",
            where=where,
            expected="blocks, heads and channels that work alike wherever they stand",
            mend="use a model of another family",
        )
