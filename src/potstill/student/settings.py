"""Settings of the `init` step; nothing heavy is imported here."""

import itertools
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from potstill.core.settings import ModelRef, Settings, execution
from potstill.data.sources import Data
from potstill.models import Quantize

__all__ = ["InitSettings"]

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMB]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}

_WIDTHS = ("hidden_size", "intermediate_size", "attention_heads")
_TARGETS = ("target_params", "target_ratio")
# The methods that a field says something to; fields that are not here say something to all.
_METHODS_OF = {
    "layers": ("prune", "fresh", "copy"),
    **dict.fromkeys(_WIDTHS, ("prune", "fresh")),
    **dict.fromkeys((*_TARGETS, "candidates", "depth_by", "depth_choice", "width_by"), ("prune",)),
    "weights": ("fresh",),
    "experts": ("prune_experts", "to_dense"),
    **dict.fromkeys(("rank", "keep_ratio", "core_by"), ("share_experts",)),
    "config": ("from_config",),
}


def _whole_number(value: Any) -> Any:
    """A count of parameters as people write it: 60M, 1.5B."""
    found = _COUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    return round(float(found[1]) * _UNITS[found[2].upper()]) if found else value


class InitSettings(Settings):
    """Make a smaller student out of a model, and measure at once how far it is from it.

    `prune` keeps the blocks, channels and heads that weigh most on calibration traces: of stated sizes, or
    of the sizes that lose least within a number of parameters. `fresh` is a model of the same family with
    stated sizes, its weights cut out of the model's without measuring, or random. `copy` keeps blocks that
    are evenly spaced. Of a mixture of experts (Qwen3-MoE, Mixtral, OLMoE) `prune_experts` keeps the experts
    that add most, `share_experts` makes them a shared core and a low-rank delta each, and `to_dense` one
    feed-forward layer. `from_config` is a new model of any family, with random weights and the model's
    tokenizer. Quality is measured on held-out traces where there are any.
    """

    kind: ClassVar[str] = "init"
    schema_version: ClassVar[int] = 2

    do: Literal["init"]
    model: ModelRef
    method: Literal["prune", "fresh", "copy", "prune_experts", "share_experts", "to_dense", "from_config"] = (
        Field("prune", description="how the student is made")
    )
    data: Data = Field(description="the traces that importance and quality are measured on")
    layers: int | None = Field(None, ge=1, description="blocks to keep")
    hidden_size: int | None = Field(
        None, ge=1, description="channels between the blocks to keep, those of the embedding as well"
    )
    intermediate_size: int | None = Field(
        None, ge=1, description="channels inside each feed-forward layer to keep"
    )
    attention_heads: int | None = Field(
        None,
        ge=1,
        description="query heads to keep in each block; those that share a key and value head stay together",
    )
    target_params: Annotated[int, Field(ge=1), BeforeValidator(_whole_number)] | None = Field(
        None, description="instead of sizes: the best of several within so many parameters, such as 60M"
    )
    target_ratio: float | None = Field(
        None, gt=0, lt=1, description="instead of sizes: the same, as a share of the model's parameters"
    )
    candidates: int = Field(
        8, ge=1, description="with a target: how many combinations of depth and width are tried"
    )
    depth_by: Literal["block_importance", "drop_one"] | list[Annotated[int, Field(ge=0)]] = Field(
        "block_importance",
        description="what a block is worth: 1 - cos(its input, its output), the loss without it, or a list "
        "of the blocks to keep, counted from 0",
    )
    depth_choice: Literal["ranked", "greedy", "contiguous"] = Field(
        "ranked",
        description="leave out the blocks that are worth least, one after the other with a new measurement "
        "each, or as one run of neighbours",
    )
    width_by: Literal["l2", "mean"] = Field(
        "l2",
        description="over tokens, the root mean square of a channel's activation or the mean of its size",
    )
    weights: Literal["sliced", "random"] = Field(
        "sliced", description="of method fresh: the model's own, evenly spaced, or new ones"
    )
    experts: int | None = Field(
        None,
        ge=1,
        description="of prune_experts: how many to keep in each layer; of to_dense: how many to put side by "
        "side, by default the average of all",
    )
    rank: int | None = Field(None, ge=1, description="of share_experts: the rank of each expert's deltas")
    keep_ratio: float | None = Field(
        None, gt=0, lt=1, description="instead of a rank: the share of the experts' parameters to keep"
    )
    core_by: Literal["frequency", "fisher"] = Field(
        "frequency",
        description="what experts weigh in their core: how often tokens are routed to them, or that times "
        "the mean square of the gradient of their weights",
    )
    config: dict[str, Any] = Field(
        {},
        description="of from_config: fields of transformers' configuration, with model_type; by default the "
        "family's, and a vocabulary as large as the tokenizer's",
    )
    samples: int = Field(
        64,
        ge=1,
        description="calibration traces, and at most so many held-out ones, chosen by the recipe's seed",
    )
    max_length: int = Field(1024, ge=2, description="tokens a calibration trace, the rest is cut off")
    quantize: Quantize | None = Field(
        None, description="how the steps that use the student load it; the weights are kept in full"
    )

    device: str | None = execution(None, description="cpu, cuda, ...; by default the GPU where there is one")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, methods in _METHODS_OF.items():
            if self.method not in methods and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} belongs to method {' or '.join(methods)}, and method is {self.method}"
                )
        sizes = [name for name in ("layers", *_WIDTHS) if getattr(self, name) is not None]
        targets = [name for name in _TARGETS if getattr(self, name) is not None]
        if self.method == "copy" and not sizes:
            raise ValueError("method copy needs layers")
        if self.method == "fresh" and not sizes:
            raise ValueError(f"method fresh needs one size at least: layers, {', '.join(_WIDTHS)}")
        if self.method == "prune":
            self._check_depth()
            if len(targets) > 1 or (targets and sizes):
                raise ValueError(
                    f"states {' and '.join([*targets, *sizes])}; expected one target, which is searched for, "
                    "or sizes"
                )
            if not targets and not sizes and not isinstance(self.depth_by, list):
                names = ", ".join(("layers", *_WIDTHS, *_TARGETS))
                raise ValueError(f"method prune needs what to keep, one of: {names}")
        if self.candidates != type(self).model_fields["candidates"].default and not targets:
            raise ValueError(f"candidates belongs to {' and '.join(_TARGETS)}")
        return self

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        if self.method == "prune_experts" and self.experts is None:
            raise ValueError("method prune_experts needs experts")
        if self.method == "share_experts" and (self.rank is None) == (self.keep_ratio is None):
            raise ValueError("method share_experts needs either rank or keep_ratio")
        return self

    @model_validator(mode="after")
    def _check_config(self) -> Self:
        if self.method == "from_config" and "model_type" not in self.config:
            raise ValueError("method from_config needs config with model_type, such as qwen3_moe")
        return self

    def _check_depth(self) -> None:
        fields = type(self).model_fields
        if isinstance(self.depth_by, list):
            if not self.depth_by or any(two <= one for one, two in itertools.pairwise(self.depth_by)):
                raise ValueError("depth_by is a list of the blocks to keep, each once and in ascending order")
            for name in ("layers", "depth_choice", *_TARGETS):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"depth_by lists the blocks to keep, and {name} would choose others")
            return
        if self.layers is None and not any(getattr(self, name) for name in _TARGETS):
            for name in ("depth_by", "depth_choice"):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"{name} chooses blocks, and neither layers nor a target says how many")
