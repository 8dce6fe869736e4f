"""Hidden states of tokens behind a prefix that went through the model before, once for all that share it.

Tokens meet those before them only through their keys and values in each layer.

Shapes: B sequences, T positions, H hidden width; of keys and values K heads, P positions, D width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from potstill.models.heads import plain_model, trunk

__all__ = ["Prefix", "can_share_prefix", "hidden_states_after", "run_prefixes"]

_FAMILIES = frozenset(
    {"gpt2", "gpt_neox", "granite", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "smollm3"}
)
# Rotary frequencies that change with the longest row of a pass.
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, eq=False)
class Prefix:
    """What tokens behind it see of a prefix: keys and values (KPD) by layer.

    Those of the prefix `before`, which this one goes on from, are kept there.
    """

    layers: list[tuple[Tensor, Tensor]]
    before: "Prefix | None" = None

    @property
    def tokens(self) -> int:
        """How many tokens it has, with those before."""
        return self.layers[0][0].shape[-2] + (0 if self.before is None else self.before.tokens)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of all its tokens."""
        if self.before is None:
            return self.layers[index]
        pairs = zip(self.before.layer(index), self.layers[index], strict=True)
        keys_KPD, values_KPD = (torch.cat(pair, dim=-2) for pair in pairs)
        return keys_KPD, values_KPD


def can_share_prefix(model: Any) -> bool:
    """Whether `hidden_states_after` is right for a model.

    That takes full causal attention, positions that do not depend on other rows, and nothing recomputed.
    """
    plain = plain_model(model)
    layers = getattr(plain.config, "layer_types", None) or ["full_attention"]
    rope = (getattr(plain.config, "rope_parameters", None) or {}).get("rope_type")
    # A layer that is recomputed takes no keys and values from another pass; outside training none is.
    recomputes = plain.training and bool(getattr(plain, "is_activation_checkpointing", False))
    return (
        plain.config.model_type in _FAMILIES
        and set(layers) == {"full_attention"}
        and rope not in _ROPE_BY_LENGTH
        and not recomputes
    )


def run_prefixes(
    model: Any, input_ids_BT: Tensor, lengths: Sequence[int], before: Sequence[Prefix | None]
) -> list[Prefix]:
    """Each row's first tokens, as many as `lengths` says, as a prefix, itself behind another or nothing.

    Either all are behind a prefix or none is. Gradients flow through prefixes. For models of which
    `can_share_prefix` is true.
    """
    _, kept = _run(model, input_ids_BT, before, keep=True)
    return [
        Prefix([(keys[row, :, :length], values[row, :, :length]) for keys, values in kept], before[row])
        for row, length in enumerate(lengths)
    ]


def hidden_states_after(model: Any, input_ids_BT: Tensor, prefixes: Sequence[Prefix]) -> Tensor:
    """`hidden_states` of rows that are each behind a prefix, [B, T, H]; gradients flow into the prefixes.

    Padding on the right, as there. For models of which `can_share_prefix` is true.
    """
    return _run(model, input_ids_BT, prefixes, keep=False)[0]


def _run(
    model: Any, input_ids_BT: Tensor, prefixes: Sequence[Prefix | None], *, keep: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Hidden states, and where they are to be kept the tokens' own keys and values by layer (BKTD)."""
    some = [one for one in prefixes if one is not None]
    assert len(some) in {0, len(prefixes)}
    before = _Before(some, input_ids_BT.device) if some else None
    layers = [_Layer(before, index, keep=keep) for index in range(model.config.num_hidden_layers)]
    options = {} if before is None else before.masks(input_ids_BT.shape[1])
    output = trunk(model)(
        input_ids=input_ids_BT, past_key_values=Cache(layers=[*layers]), use_cache=True, **options
    )
    hidden_BTH: Tensor = output.last_hidden_state
    return hidden_BTH, [one.kept for one in layers if one.kept is not None]


class _Before:
    """The prefixes of the rows of one pass, as their keys and values are put together layer by layer.

    Shorter ones are padded on the left, so that each ends where its row begins.
    """

    def __init__(self, prefixes: list[Prefix], device: torch.device) -> None:
        self._rows = len(prefixes)
        self._distinct = list(dict.fromkeys(prefixes))
        places = {one: place for place, one in enumerate(self._distinct)}
        self._of_B = torch.tensor([places[one] for one in prefixes], device=device)
        self._lengths_B = torch.tensor([one.tokens for one in prefixes], device=device)
        self.tokens = max(one.tokens for one in self._distinct)

    def masks(self, tokens: int) -> dict[str, Tensor]:
        """What the trunk has to be told where prefixes differ in length: padding and positions."""
        if len({one.tokens for one in self._distinct}) == 1:
            return {}
        starts_B1 = self.tokens - self._lengths_B[:, None]
        places_1T = torch.arange(self.tokens + tokens, device=starts_B1.device)[None]
        return {
            "attention_mask": (places_1T >= starts_B1).long(),
            "position_ids": places_1T[:, self.tokens :] - starts_B1,
        }

    def layer(self, index: int) -> list[Tensor]:
        """A layer's keys and values (BKPD)."""
        both = zip(*(one.layer(index) for one in self._distinct), strict=True)
        if len(self._distinct) == 1:
            return [one.expand(self._rows, -1, -1, -1) for (one,) in both]
        return [
            torch.stack(
                [functional.pad(one_KPD, (0, 0, self.tokens - one_KPD.shape[-2], 0)) for one_KPD in several]
            )[self._of_B]
            for several in both
        ]


class _Layer(DynamicLayer):
    """A layer of transformers' cache that puts prefixes before what it is given and holds no copy."""

    def __init__(self, before: _Before | None, index: int, *, keep: bool) -> None:
        super().__init__()
        self._before, self._index, self._keep = before, index, keep
        self.kept: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of prefixes and tokens."""
        if self._keep:
            self.kept = key_states, value_states
        if self._before is None:
            return key_states, value_states
        keys_BKPD, values_BKPD = self._before.layer(self._index)
        return torch.cat([keys_BKPD, key_states], dim=-2), torch.cat([values_BKPD, value_states], dim=-2)

    def get_seq_length(self) -> int:
        """The tokens of the longest prefix."""
        return 0 if self._before is None else self._before.tokens
