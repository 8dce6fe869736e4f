"""The `merge` step: one adapter, or several joined, in the weights of their base, as a plain model."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from potstill.core.errors import RecipeError
from potstill.core.settings import ModelRef, ModelsRef, Settings, execution
from potstill.core.step import StepContext, StepResult
from potstill.data.sources import Data

__all__ = ["MergeSettings", "Method", "run"]

Method = Literal["linear", "ties", "dare_linear", "dare_ties"]
_DENSITY = 0.2  # Yadav et al. 2023


class MergeSettings(Settings):
    """Put an adapter's weights into those of its base: a model that plain transformers loads, without PEFT.

    With `models` several adapters of one base are joined to one model. The base is taken in full weights,
    also where an adapter was trained on it in 4 bits.
    """

    kind: ClassVar[str] = "merge"
    schema_version: ClassVar[int] = 1

    do: Literal["merge"]
    model: ModelRef | None = Field(None, description="the adapter; either this or `models`")
    models: ModelsRef | list[ModelsRef] | None = Field(
        None,
        description="adapters of one base: a step with `each`, which means all of its own, or a list",
    )
    method: Method = Field(
        "linear",
        description="how `models` are joined, by what each changes of the base's weights. linear: weighted "
        "sum; ties: the largest changes, where signs differ those of the heavier sign, averaged; dare_linear "
        "and dare_ties: random entries alone, scaled up",
    )
    weights: list[float] | None = Field(
        None,
        description="of `models`, in their order; by default 1 / their number for the sums (linear, "
        "dare_linear), and 1 for ties and dare_ties, which average by themselves",
    )
    density: float | None = Field(
        None,
        gt=0,
        lt=1,
        description=f"share of a change's entries that ties and dare keep; {_DENSITY:g} by default",
    )
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.model is None) == (self.models is None):
            raise ValueError("merge needs either model, an adapter, or models, several of one base")
        if self.models is None:
            for name in ("method", "weights", "density"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} says how several are joined: name them by models, not by model")
        elif self.data is not None:
            raise ValueError(
                "data compares a merged model with its one adapter; compare several by an evaluate step"
            )
        if self.models == []:
            raise ValueError("models is empty")
        if self.density is not None and self.method == "linear":
            raise ValueError("density belongs to method ties, dare_linear or dare_ties, and method is linear")
        if isinstance(self.models, list) and len({*self.models}) < len(self.models):
            raise ValueError("models names one twice; weights say how much each counts")
        return self

    @property
    def named_models(self) -> list[ModelsRef]:
        """The references of `models`."""
        return self.models if isinstance(self.models, list) else [*filter(None, [self.models])]

    @property
    def kept_share(self) -> float:
        """Of a change's entries, where the method leaves some out."""
        return _DENSITY if self.density is None else self.density

    def weights_of(self, names: Sequence[str]) -> list[float]:
        """The weight of each model. Raises RecipeError where `weights` are not as many."""
        if self.weights is None:
            return [1.0 if self.method in ("ties", "dare_ties") else 1 / len(names)] * len(names)
        if len(self.weights) != len(names):
            raise RecipeError(
                f"{len(self.weights)} weights are given, and there are {len(names)} models",
                where="merge, weights",
                expected=f"one a model, in this order: {', '.join(names)}",
            )
        return self.weights


def run(settings: MergeSettings, context: StepContext) -> StepResult:
    """Merge an adapter, or several, into a Hugging Face folder.

    One is checked to have the logits of the adapter on its base.
    """
    from potstill.merge.step import merge

    return merge(settings, context)
