"""The `init` step: a smaller student made from a bigger model."""

from potstill.core.step import StepContext, StepResult
from potstill.student.settings import InitSettings

__all__ = ["InitSettings", "run"]


def run(settings: InitSettings, context: StepContext) -> StepResult:
    """Make a student into a Hugging Face folder, check what was saved, and measure how good it is."""
    from potstill.student.step import initialise

    return initialise(settings, context)
