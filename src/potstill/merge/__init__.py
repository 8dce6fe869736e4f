"""The `merge` step: an adapter's weights put into those of its base, as a plain model."""

from typing import ClassVar, Literal

from pydantic import Field

from potstill.core.settings import ModelRef, Settings, execution
from potstill.core.step import StepContext, StepResult
from potstill.data.sources import Data

__all__ = ["MergeSettings", "run"]


class MergeSettings(Settings):
    """Put an adapter's weights into those of its base: a model that plain transformers loads, without PEFT.

    The base is taken in full weights, also where the adapter was trained on it in 4 bits.
    """

    kind: ClassVar[str] = "merge"
    schema_version: ClassVar[int] = 1

    do: Literal["merge"]
    model: ModelRef
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the saved weights; by default the type that the base's files have"
    )
    data: Data | None = Field(
        None,
        description="traces on which the merged model is compared with the adapter as it is used, on a base "
        "in 4 bits, say",
    )
    limit: int = Field(64, ge=1, description="at most so many of them, the first ones")
    max_length: int = Field(1024, ge=2, description="tokens of such a trace, the rest is cut off")

    device: str | None = execution(None, description="cpu, cuda, ...; by default the GPU where there is one")


def run(settings: MergeSettings, context: StepContext) -> StepResult:
    """Merge an adapter into a Hugging Face folder, checked to have the logits of the adapter on its base."""
    from potstill.merge.step import merge

    return merge(settings, context)
