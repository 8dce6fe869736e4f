"""The `select` step: of many traces those that are worth training on, and why the others are not."""

from potstill.core.step import StepContext, StepResult
from potstill.select.settings import Keep, SelectSettings

__all__ = ["Keep", "SelectSettings", "run"]


def run(settings: SelectSettings, context: StepContext) -> StepResult:
    """Select traces; the artifact holds those that stay, with scores, and a line for each that does not."""
    from potstill.select.step import select

    return select(settings, context)
