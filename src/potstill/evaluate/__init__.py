"""The `evaluate` step: models side by side on held-out traces and tasks, each figure with its interval."""

from potstill.core.step import StepContext, StepResult
from potstill.evaluate.settings import EvaluateSettings

__all__ = ["EvaluateSettings", "run"]


def run(settings: EvaluateSettings, context: StepContext) -> StepResult:
    """Compare models; the artifact holds rows a trace and an answer, samples, and its manifest a summary."""
    from potstill.evaluate.step import evaluate

    return evaluate(settings, context)
