"""Settings of the `select` step; nothing heavy is imported here."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from potstill.core.settings import ModelRef, Settings, execution
from potstill.data.sources import Data
from potstill.select.filters import FilterSettings

__all__ = ["Keep", "SelectSettings"]


class Keep(Settings):
    """How many of the scored traces stay: exactly one of the three."""

    top: float | None = Field(None, gt=0, le=1, description="this share of the rows, the highest scores")
    threshold: float | None = Field(None, description="the rows whose score is at least this")
    per_prompt: int | None = Field(None, ge=1, description="so many rows of each prompt, the highest scores")

    @model_validator(mode="after")
    def _check(self) -> Self:
        stated = sorted(name for name, value in self if value is not None)
        if len(stated) != 1:
            names = " and ".join(stated) or "nothing"
            raise ValueError(f"states {names}; expected exactly one of top, threshold and per_prompt")
        return self


class SelectSettings(Settings):
    """Keep the traces that teach a student most: what its teacher finds likely and it does not (DAS).

    The probability P of a text is exp(mean log p) over its tokens, each model under its own tokenizer, the
    prompt given. At level response a trace's score is P(teacher) - P(student); at level sentence it is how
    many of its sentences are the teacher's (`measure`). Held-out rows are neither scored nor filtered, so
    that whatever is selected is evaluated on the same rows; only those without a response go.
    """

    kind: ClassVar[str] = "select"
    schema_version: ClassVar[int] = 1

    do: Literal["select"]
    data: Data = Field(description="the traces to choose from")
    student: ModelRef | None = Field(None, description="the model to be trained, as it is before training")
    teacher: ModelRef | None = Field(
        None,
        description="scores at temperature 1 the traces whose log-probabilities are missing or at another "
        "temperature: a model that runs here, or on a vLLM server",
    )
    distilled: ModelRef | None = Field(
        None, description="the student after a first training: tells boosted sentences from shared ones"
    )
    rule: Literal["divergence", "none"] = Field("divergence", description="none: only the filters choose")
    level: Literal["response", "sentence"] = Field("response", description="what has a probability")
    keep: Keep | None = Field(None, description="how many of the scored traces stay; needed by a rule")
    measure: Literal["count", "ratio"] = Field(
        "count", description="at level sentence: how many sentences are the teacher's, or which share"
    )
    alpha: float = Field(
        0.1, ge=0, le=1, description="a sentence is shared where no two models differ by more than this"
    )
    beta: float = Field(
        0.1, ge=0, le=1, description="a sentence is the teacher's where the student is this much less sure"
    )
    control: Literal["random", "length"] | None = Field(
        None,
        description="for comparison, keep as many rows as the rule would: at random, or of the same lengths",
    )
    filters: FilterSettings | None = Field(None, description="what drops rows before the rule sees them")
    max_failed_share: float = Field(
        0.0, ge=0, le=1, description="share of the rows that a server may fail to score"
    )

    max_tokens: int | None = execution(
        None, ge=1, description="padded tokens a forward pass; by default by device"
    )
    device: str | None = execution(None, description="cpu, cuda, ...; by default the GPU where there is one")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rule == "none":
            for name in ("student", "teacher", "distilled", "keep", "control"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} belongs to rule divergence, and rule is none")
        else:
            for name in ("student", "keep"):
                if getattr(self, name) is None:
                    raise ValueError(f"rule divergence needs {name}")
        if self.level == "response" or self.rule == "none":
            fields = type(self).model_fields
            for name in ("distilled", "measure", "alpha", "beta"):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"{name} belongs to level sentence of rule divergence")
        return self

    @property
    def models(self) -> dict[str, ModelRef]:
        """The models that score traces, by the role they play."""
        named = {"student": self.student, "teacher": self.teacher, "distilled": self.distilled}
        return {role: reference for role, reference in named.items() if reference is not None}
