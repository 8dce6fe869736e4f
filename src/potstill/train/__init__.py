"""The `train` step: one trainer on transformers.Trainer, for traces and for cached teacher logits."""

from potstill.core.step import StepContext, StepResult
from potstill.train.settings import LoraSettings, Strategy, TrainSettings

__all__ = ["LoraSettings", "Strategy", "TrainSettings", "run"]


def run(settings: TrainSettings, context: StepContext, strategy: Strategy = "ddp") -> StepResult:
    """Train a student on traces or cached logits; the artifact is a Hugging Face folder or a PEFT adapter.

    `strategy` says what each of several processes holds of it.
    """
    from potstill.train.step import train

    return train(settings, context, strategy)
