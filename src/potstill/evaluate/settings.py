"""Settings of the `evaluate` step; nothing heavy is imported here."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from potstill.core.settings import ModelRef, Settings, execution
from potstill.data.sources import Data

__all__ = ["EvaluateSettings"]


class EvaluateSettings(Settings):
    """Compare models on the same traces and prompts with the same decoding.

    On held-out traces: KL to the teacher, top-1 agreement and perplexity. On tasks: the share of verified
    answers, and with `rouge` their likeness to given responses.
    """

    kind: ClassVar[str] = "evaluate"
    schema_version: ClassVar[int] = 1

    do: Literal["evaluate"]
    models: dict[str, ModelRef] | list[ModelRef] = Field(
        min_length=1,
        description="models by the role they play, such as base and student; in a list, by their own names",
    )
    baseline: str | None = Field(
        None, description="the model that others are compared with; by default base, else the first"
    )
    teacher: ModelRef | None = Field(
        None, description="the model whose distribution KL and agreement are measured to"
    )
    data: Data | None = Field(None, description="traces kept from training, such as traces:held_out")
    tasks: dict[str, Data] = Field(
        {}, description="prompts with a verifier, by the name the report gives them"
    )
    rouge: bool = Field(
        False, description="compare answers with the responses that the rows of tasks come with, by ROUGE"
    )
    limit: int | None = Field(
        None, ge=1, description="at most so many traces, and prompts of each task; the first ones"
    )
    max_new_tokens: int = Field(512, ge=1)
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token")
    samples_shown: int = Field(
        4, ge=0, description="prompts whose answers the report shows side by side, of each kind"
    )

    batch: int = execution(16, ge=1, description="prompts decoded at once")
    max_tokens: int | None = execution(
        None, ge=1, description="padded tokens of traces at once; by default by device"
    )
    device: str | None = execution(None, description="cpu, cuda, ...; by default the GPU where there is one")

    @property
    def roles(self) -> dict[str, ModelRef]:
        """The models by name."""
        return self.models if isinstance(self.models, dict) else {str(one): one for one in self.models}

    @model_validator(mode="before")
    @classmethod
    def _fill_baseline(cls, value: Any) -> Any:
        # Written out, because which model stands first is not part of a fingerprint.
        if not isinstance(value, dict) or value.get("baseline") is not None:
            return value
        models, teacher = value.get("models"), value.get("teacher")
        if isinstance(models, list):
            models = {name: name for name in models if isinstance(name, str)}
        if not isinstance(models, dict) or not models:
            return value
        others = [role for role, reference in models.items() if reference != teacher]
        return {**value, "baseline": "base" if "base" in models else [*others, *models][0]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data is None and not self.tasks:
            raise ValueError("nothing to evaluate on: give data (held-out traces), tasks, or both")
        if self.rouge and not self.tasks:
            raise ValueError("rouge needs tasks whose rows have responses, such as {name: traces:held_out}")
        if self.baseline not in self.roles:
            raise ValueError(f"baseline {self.baseline!r} is not among the models: {', '.join(self.roles)}")
        if isinstance(self.models, list) and len(self.roles) < len(self.models):
            raise ValueError("models names one twice")
        return self
