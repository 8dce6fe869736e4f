"""The `init` step: a smaller student made from a bigger model by leaving out blocks."""

from typing import ClassVar, Literal

from pydantic import Field

from potstill.core.settings import ModelRef, Settings, execution
from potstill.core.step import StepContext, StepResult
from potstill.data.sources import Data
from potstill.models import Quantize

__all__ = ["InitSettings", "run"]


class InitSettings(Settings):
    """Depth pruning: keep the blocks that change their input most, measured on calibration traces."""

    kind: ClassVar[str] = "init"
    schema_version: ClassVar[int] = 1

    do: Literal["init"]
    model: ModelRef
    layers: int = Field(ge=1, description="blocks to keep")
    data: Data
    samples: int = Field(64, ge=1, description="calibration traces, chosen by the recipe's seed")
    max_length: int = Field(1024, ge=2, description="tokens a calibration trace, the rest is cut off")
    quantize: Quantize | None = Field(
        None, description="how the steps that use the student load it; the weights are kept in full"
    )

    device: str | None = execution(None, description="cpu, cuda, ...; by default the GPU where there is one")


def run(settings: InitSettings, context: StepContext) -> StepResult:
    """Prune a model into a Hugging Face folder, checked to compute what the kept blocks computed."""
    from potstill.student.step import initialise

    return initialise(settings, context)
