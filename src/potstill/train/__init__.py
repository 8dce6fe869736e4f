"""The `train` step: one trainer on transformers.Trainer, for traces and for cached teacher logits."""

from potstill.core.step import StepContext, StepResult
from potstill.train.settings import LoraSettings, TrainSettings

__all__ = ["LoraSettings", "TrainSettings", "run"]


def run(settings: TrainSettings, context: StepContext) -> StepResult:
    """Train a student on traces or cached logits; the artifact is a Hugging Face folder or a PEFT adapter."""
    from potstill.train.step import train

    return train(settings, context)
