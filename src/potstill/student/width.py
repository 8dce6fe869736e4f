"""Width pruning: how much channels and heads weigh on calibration traces, and the model without some of them.

A norm over fewer channels would divide by another mean square than the norm over all. Its gain makes up for
that: times the root mean square of the kept channels over that of all, the mean of the calibration tokens.

Shapes: B rows, T tokens, N real tokens, H hidden size, F feed-forward size, G groups of heads, Q query heads
of a group, D size of a head, E entries of a tensor's dimension.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from potstill.core.errors import ModelError
from potstill.losses.head import at_least_fp32
from potstill.models import hidden_states, removing
from potstill.student.anatomy import Anatomy, first_block_input
from potstill.student.sizes import Sizes, resized

__all__ = ["Importance", "Kept", "cut", "evenly_spaced", "masked", "measure", "most_important", "new_model"]

Aggregate = Literal["l2", "mean"]
_SAME = 1e-4


@dataclass(frozen=True)
class Importance:
    """How much each unit weighs: the hidden channels (H), and of each block its channels (F) and groups (G).

    `energy` has for each norm over hidden states, by name, the share of its input's mean square that each
    channel has, the mean over tokens (H).
    """

    hidden: Tensor
    channels: Sequence[Tensor]
    groups: Sequence[Tensor]
    energy: dict[str, Tensor]


@dataclass(frozen=True)
class Kept:
    """The units that stay, in ascending order: hidden channels, and of each block its channels and groups."""

    hidden: Tensor
    channels: Sequence[Tensor]
    groups: Sequence[Tensor]

    @property
    def by_block(self) -> list[dict[str, Tensor]]:
        """Of each block the units of every kind."""
        return [
            {"hidden": self.hidden, "channel": channels, "group": groups}
            for channels, groups in zip(self.channels, self.groups, strict=True)
        ]


class _Mean:
    """The mean over tokens of a quantity's size, or the root of that of its square."""

    def __init__(self, by: Aggregate) -> None:
        self.by, self.total, self.tokens = by, torch.zeros(()), 0

    def add(self, values_NE: Tensor) -> None:
        powers_NE = values_NE.square() if self.by == "l2" else values_NE.abs()
        self.total = self.total + powers_NE.sum(0, dtype=torch.float64).cpu()
        self.tokens += len(values_NE)

    @property
    def value(self) -> Tensor:
        mean = self.total / self.tokens
        return mean.sqrt() if self.by == "l2" else mean


def measure(
    model: Any, anatomy: Anatomy, batches: Iterable[tuple[Tensor, Tensor]], by: Aggregate = "l2"
) -> Importance:
    """Importance by activations, forward only (Muralidharan et al. 2024, Minitron, section 2.2).

    Of a hidden channel the sum over all norms of their output's size there; of a feed-forward channel the
    size of what leads out of the layer; of a group the sum over its heads of the norm of what they hand on.
    Over tokens it is the root mean square ("l2") or the mean. `batches` yields token ids [B, T], padded on
    the right, and a mask [B, T] that is true on real tokens. Raises ModelError where there are no tokens.
    """
    seen = _Seen(anatomy, by)
    tokens = 0
    with seen.watching(), torch.no_grad():
        for input_ids_BT, real_BT in batches:
            seen.real_BT = real_BT
            tokens += int(real_BT.sum())
            hidden_states(model, input_ids_BT)
    if not tokens:
        raise ModelError("no tokens to measure the importance of channels and heads on")
    return Importance(
        torch.stack([one.value for one in seen.hidden.values()]).sum(0),
        [one.value for one in seen.channels],
        [one.value.reshape(anatomy.sizes.groups, -1).sum(1) for one in seen.heads],
        {name: one.value for name, one in seen.energy.items()},
    )


class _Seen:
    """The sums of what norms, attention and feed-forward layers hand on, over real tokens."""

    def __init__(self, anatomy: Anatomy, by: Aggregate) -> None:
        self.anatomy, self.real_BT = anatomy, torch.empty(0)
        self.hidden = {name: _Mean(by) for name in anatomy.norms}
        self.energy = {name: _Mean("mean") for name in anatomy.norms}
        self.channels, self.heads = ([_Mean(by) for _ in anatomy.blocks] for _ in range(2))

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [
            module.register_forward_hook(self._at_norm(name)) for name, module in self.anatomy.norms.items()
        ]
        for place, parts in enumerate(self.anatomy.blocks):
            hooks.append(parts.attention_out.register_forward_pre_hook(self._at_attention(place)))
            hooks.append(parts.feed_out.register_forward_pre_hook(self._at_feed(place)))
        with removing(hooks):
            yield

    def _real(self, values: Tensor) -> Tensor:
        found_NE = values.reshape(-1, values.shape[-1])[self.real_BT.reshape(-1)]
        return found_NE.to(at_least_fp32(found_NE.dtype))

    def _at_norm(self, name: str) -> Callable[..., None]:
        is_centred = _form(self.anatomy.norms[name]).is_centred

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.hidden[name].add(self._real(output))
            given_NH = self._real(args[0])
            if is_centred:
                given_NH = given_NH - given_NH.mean(-1, keepdim=True)
            squares_NH = given_NH.square()
            self.energy[name].add(squares_NH / squares_NH.sum(-1, keepdim=True).clamp_min(1e-30))

        return hook

    def _at_attention(self, place: int) -> Callable[..., None]:
        head_size = self.anatomy.head_size

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            given_NE = self._real(args[0])
            heads_NhD = given_NE.reshape(len(given_NE), -1, head_size)
            self.heads[place].add(torch.linalg.vector_norm(heads_NhD, dim=-1))

        return hook

    def _at_feed(self, place: int) -> Callable[..., None]:
        return lambda module, args: self.channels[place].add(self._real(args[0]))


def most_important(importance: Importance, sizes: Sizes) -> Kept:
    """As many units of each kind as sizes say, those that weigh most; of equal ones the first."""

    def largest(values: Tensor, count: int) -> Tensor:
        order = torch.argsort(values, descending=True, stable=True)
        return order[:count].sort().values

    return Kept(
        largest(importance.hidden, sizes.hidden_size),
        [largest(one, sizes.intermediate_size) for one in importance.channels],
        [largest(one, sizes.groups) for one in importance.groups],
    )


def evenly_spaced(have: Sizes, sizes: Sizes) -> Kept:
    """As many units of each kind as sizes say, from the first to the last; the same in every block."""

    def spread(count: int, kept: int) -> Tensor:
        return torch.linspace(0, count - 1, kept, dtype=torch.float64).round().long()

    return Kept(
        spread(have.hidden_size, sizes.hidden_size),
        [spread(have.intermediate_size, sizes.intermediate_size)] * have.layers,
        [spread(have.groups, sizes.groups)] * have.layers,
    )


@contextmanager
def masked(anatomy: Anatomy, kept: Kept) -> Iterator[None]:
    """While open, heads and feed-forward channels that are not kept lead nowhere, those of all blocks."""

    def only(axis_units: Tensor, units: Tensor) -> Any:
        mask_E = torch.isin(axis_units, units)
        return lambda module, args: (args[0] * mask_E.to(args[0]), *args[1:])

    sizes = anatomy.sizes
    group_units = torch.arange(sizes.groups).repeat_interleave(anatomy.queries_a_group * anatomy.head_size)
    channel_units = torch.arange(sizes.intermediate_size)
    hooks = []
    for parts, channels, groups in zip(anatomy.blocks, kept.channels, kept.groups, strict=True):
        hooks.append(parts.attention_out.register_forward_pre_hook(only(group_units, groups)))
        hooks.append(parts.feed_out.register_forward_pre_hook(only(channel_units, channels)))
    with removing(hooks):
        yield


def cut(model: Any, anatomy: Anatomy, kept: Kept, energy: dict[str, Tensor] | None = None) -> Any:
    """A new model of the same family that has only the units that are kept, and the same blocks.

    By `energy`, that of `measure`, the gains of norms make up for the channels that are gone; without it all
    channels count as having the same. Raises ModelError where the family has no such model, and where a
    weight of either model would have no counterpart in the other.
    """
    sizes = Sizes(len(kept.groups), len(kept.hidden), len(kept.channels[0]), len(kept.groups[0]))
    student = new_model(model, anatomy, sizes)
    targets, by_block = dict(student.named_parameters()), kept.by_block
    sources = dict(model.named_parameters())
    if targets.keys() != sources.keys():
        odd = sorted(targets.keys() ^ sources.keys())
        raise ModelError(f"{len(odd)} weights have no counterpart in the other model: {', '.join(odd[:3])}")
    with torch.no_grad():
        for name, source in sources.items():
            units, part = by_block[anatomy.places[name] or 0], source
            for dimension, axis in enumerate(anatomy.axes[name]):
                if axis is not None and len(units[axis.kind]) < int(axis.units.max()) + 1:
                    entries = axis.entries(units[axis.kind]).to(source.device)
                    part = part.index_select(dimension, entries)
            if part.shape != targets[name].shape:
                raise ModelError(
                    f"{name} would be {[*part.shape]}, and in a {model.config.model_type} model of these "
                    f"sizes it is {[*targets[name].shape]}",
                    mend="use a model of another family, or cut its depth alone (layers)",
                )
            targets[name].copy_(part)
        if sizes.hidden_size < anatomy.sizes.hidden_size:
            _scale_norms(student, anatomy, kept, energy)
            _scale_embedding(model, student, anatomy, kept)
    return student


def new_model(model: Any, anatomy: Anatomy, sizes: Sizes, *, seed: int | None = None) -> Any:
    """A model of the same family and other sizes: random by a seed, else with weights yet to be written.

    Raises ModelError for sizes that the family does not allow.
    """
    # A head size that the configuration does not derive has to be stated once something else changes.
    changes = replace(sizes, layers=anatomy.sizes.layers) != anatomy.sizes
    head_size = anatomy.head_size if changes and not anatomy.heads_fix_width else None
    config = resized(model.config, sizes, range(sizes.layers), head_size=head_size)
    with torch.random.fork_rng(), nullcontext() if seed is not None else no_init_weights():
        if seed is not None:
            torch.manual_seed(seed)
        # The public ways want the name of a class or ignore the type.
        made = type(model)._from_config(config, dtype=model.dtype)  # noqa: SLF001
    made.tie_weights()
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class _Form:
    """What a norm does beside dividing: its gain is offset + weight, and it may subtract the mean first."""

    offset: float
    is_centred: bool


def _form(norm: Any) -> _Form:
    """Found by trying: Gemma's gain is 1 + weight, a LayerNorm subtracts the mean."""
    probe = copy.deepcopy(norm).float()
    given_H = torch.linspace(-1.0, 2.0, probe.weight.numel(), device=probe.weight.device) ** 3
    with torch.no_grad():
        if getattr(probe, "bias", None) is not None:
            probe.bias.zero_()
        probe.weight.zero_()
        bare_H = probe(given_H[None])[0]
        offset = 0.0 if bool((bare_H == 0).all()) else 1.0
        probe.weight.fill_(1.0 - offset)
        shifted = torch.allclose(probe(given_H[None] + 1.0), probe(given_H[None]), atol=1e-3)
    return _Form(offset, shifted)


def _scale_norms(student: Any, anatomy: Anatomy, kept: Kept, energy: dict[str, Tensor] | None) -> None:
    """Give norms the gains with which the kept channels come out about as large as they did among all."""
    share = len(kept.hidden) / anatomy.sizes.hidden_size
    for name, norm in anatomy.norms.items():
        kept_energy = share if energy is None else float(energy[name][kept.hidden].sum())
        factor = (kept_energy / share) ** 0.5
        _multiply_gain(student.get_submodule(name), _form(norm).offset, factor)


def _multiply_gain(norm: Any, offset: float, factor: float) -> None:
    norm.weight.add_(offset).mul_(factor).sub_(offset)


def _scale_embedding(model: Any, student: Any, anatomy: Anatomy, kept: Kept) -> None:
    """Make the first block read what it read: Gemma multiplies embeddings by the root of the hidden size.

    A tied head is made up for in the norm before it.
    """
    expected_TH, found_TH = (
        first_block_input(model)[:, kept.hidden.to(model.device)],
        first_block_input(student),
    )
    factor = float((expected_TH * found_TH).sum() / found_TH.square().sum().clamp_min(1e-30))
    if abs(factor - 1) > _SAME:
        embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
        embedding.weight.mul_(factor)
        if head.weight is embedding.weight:
            name, norm = [*anatomy.norms.items()][-1]
            _multiply_gain(student.get_submodule(name), _form(norm).offset, 1 / factor)
        found_TH = first_block_input(student)
    rounding = max(10 * _SAME, 4 * torch.finfo(model.dtype).eps)
    if not (found_TH - expected_TH).abs().max() <= rounding * expected_TH.abs().max():
        raise ModelError(
            f"the hidden size of a {model.config.model_type} model cannot be cut: what it does before its "
            "first block depends on it",
            expected="an embedding that is at most multiplied by a number",
            mend="leave hidden_size out: depth, heads and feed-forward layers can be cut without it",
        )
