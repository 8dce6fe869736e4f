"""The `retrieve` step: passages of a corpus go into the prompts, as KARD has it."""

from potstill.core.step import StepContext, StepResult
from potstill.retrieval.settings import QdrantServer, RerankerSettings, RetrieveSettings

__all__ = ["QdrantServer", "RerankerSettings", "RetrieveSettings", "run"]


def run(settings: RetrieveSettings, context: StepContext) -> StepResult:
    """Retrieve passages; the artifact holds every row with its passages in the prompt, and the reranker."""
    from potstill.retrieval.step import retrieve

    return retrieve(settings, context)
