"""Where a decoder's sizes stand in its tensors, found out by running it and by the shapes, not by names.

Three kinds of units are kept or cut as wholes: channels of the hidden states, channels inside a block's
feed-forward layer, and a block's groups of query heads that share a key and value head.

Shapes: T tokens, H hidden size, F feed-forward size, D size of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from potstill.core.errors import ModelError
from potstill.models import removing
from potstill.student.depth import block_input, decoder_blocks
from potstill.student.sizes import Sizes, queries_a_group, resized, sizes_of

__all__ = ["Anatomy", "Axis", "BlockParts", "dissect", "first_block_input"]

UnitKind = Literal["hidden", "channel", "group"]

_PROBE_TOKENS = 5


@dataclass(frozen=True)
class Axis:
    """A tensor's dimension whose entries belong to units; `units` says for each entry to which."""

    kind: UnitKind
    units: Tensor

    def entries(self, kept_units: Tensor) -> Tensor:
        """The places of the entries that belong to some units, in order."""
        return torch.isin(self.units, kept_units).nonzero()[:, 0]


@dataclass(frozen=True)
class BlockParts:
    """A block's linear layers: into attention and out of it, into the feed-forward layer and out of it."""

    attention_in: Sequence[nn.Module]
    attention_out: nn.Module
    feed_in: Sequence[nn.Module]
    feed_out: nn.Module


@dataclass(frozen=True)
class Anatomy:
    """A decoder's sizes, and what each dimension of each parameter belongs to, by the parameter's name.

    `places` says in which block a parameter is, None where it is in none. `norms` are those over whole hidden
    states, by name, the last one before the head at the end. Where `heads_fix_width` is true, the family has
    no head size of its own: its hidden size is heads times head size.
    """

    sizes: Sizes
    queries_a_group: int
    head_size: int
    heads_fix_width: bool
    blocks: Sequence[BlockParts]
    axes: dict[str, tuple[Axis | None, ...]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    places: dict[str, int | None] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)

    def parameters(self, sizes: Sizes) -> int:
        """How many parameters a student of some sizes has; tied ones count once."""
        kept = {"hidden": sizes.hidden_size, "channel": sizes.intermediate_size, "group": sizes.groups}
        have = {
            "hidden": self.sizes.hidden_size,
            "channel": self.sizes.intermediate_size,
            "group": self.sizes.groups,
        }
        total = 0
        for name, axes in self.axes.items():
            place = self.places[name]
            if place is not None and place >= sizes.layers:
                continue
            count = 1
            for size, axis in zip(self.shapes[name], axes, strict=True):
                count *= size if axis is None else size // have[axis.kind] * kept[axis.kind]
            total += count
        return total


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _in_out(module: Any) -> tuple[int, int]:
    """The sizes of a linear layer's input and output; a Conv1D's weight lies the other way round."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _cannot(model: Any, why: str) -> ModelError:
    is_mixture = any(".experts" in name for name, _ in model.named_modules())
    return ModelError(
        f"the width of a {model.config.model_type} model cannot be cut: {why}",
        expected="a decoder of attention and dense feed-forward layers, with norms over whole hidden states "
        "or over single heads",
        mend="make a mixture of experts smaller by its experts (method share_experts, prune_experts or "
        "to_dense), or cut its depth alone (layers)"
        if is_mixture
        else "cut its depth alone (layers), or use a model of another family",
    )


def dissect(model: Any) -> Anatomy:
    """Find the parts of a decoder. Raises ModelError, with the family's name, where one is not understood."""
    blocks, sizes, queries = decoder_blocks(model), sizes_of(model.config), queries_a_group(model.config)
    parts, groups = _parts_of_blocks(model, blocks), sizes.groups
    width = _in_out(parts[0].attention_out)[0]
    if width % (groups * queries) or _in_out(parts[0].feed_out)[0] != sizes.intermediate_size:
        raise _cannot(model, "its layers have other sizes than its configuration states")
    head_size = width // (groups * queries)
    fused = (queries + 2) * groups * head_size
    # Of queries, keys and values in one layer: one behind the other, or group by group.
    behind = torch.cat([_groups_of(queries, groups, head_size), *[_groups_of(1, groups, head_size)] * 2])
    for order in (behind, torch.arange(fused) // ((queries + 2) * head_size)):
        units = {
            width: _groups_of(queries, groups, head_size),
            groups * head_size: _groups_of(1, groups, head_size),
        }
        units.setdefault(fused, order)
        if _attention_follows(model, parts[0], units):
            break
    else:
        raise _cannot(model, "its heads do not stand where they were looked for")
    if not _feed_forward_follows(model, parts[0], sizes.intermediate_size):
        raise _cannot(model, "its feed-forward channels do not stand where they were looked for")
    anatomy = Anatomy(sizes, queries, head_size, heads_fix_width=False, blocks=parts)
    _place_parameters(model, anatomy, blocks, units)
    return replace(anatomy, heads_fix_width=_heads_fix_width(model, anatomy))


def _groups_of(heads_a_group: int, groups: int, head_size: int) -> Tensor:
    return torch.arange(groups).repeat_interleave(heads_a_group * head_size)


def _probe_ids(model: Any) -> Tensor:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return (torch.arange(_PROBE_TOKENS, device=model.device) * 37 % vocabulary)[None]


def _run(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=_probe_ids(model), use_cache=False)


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Callable[[int, Any, Any], Any]) -> Iterator[None]:
    """While open, `hook(place, input, output)` runs behind each module; what it returns is the output."""

    def at(place: int) -> Any:
        return lambda module, args, output: hook(place, args[0], output)

    with removing(module.register_forward_hook(at(place)) for place, module in enumerate(modules)):
        yield


def first_block_input(model: Any) -> Tensor:
    """What the first block reads of a few tokens, [T, H]."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(block_input(args, kwargs))

    with decoder_blocks(model)[0].register_forward_pre_hook(hook, with_kwargs=True):
        _run(model)
    return seen[0][0]


def _parts_of_blocks(model: Any, blocks: nn.ModuleList) -> list[BlockParts]:
    """Of each block the linear layers in the order in which they run: the last of a part leads out of it."""
    modules = [module for block in blocks for module in block.modules() if _is_linear(module)]
    order: list[nn.Module] = []

    def note(place: int, given: Any, output: Any) -> None:
        order.append(modules[place])

    with _hooked(modules, note):
        _run(model)
    if len(order) != len(modules) or len({*order}) != len(order):
        raise _cannot(model, "not all its linear layers run once for every token")
    found = []
    for block in blocks:
        attentions = [
            module
            for module in block.modules()
            if module is not block and hasattr(module, "layer_idx") and any(map(_is_linear, module.modules()))
        ]
        if len(attentions) != 1:
            raise _cannot(model, f"a block has {len(attentions)} attention layers")
        inside, members = {*attentions[0].modules()}, {*block.modules()}
        attention = [module for module in order if module in inside]
        feed = [module for module in order if module in members and module not in inside]
        if len(attention) < 2 or len(feed) < 2:
            raise _cannot(model, "a block has no dense feed-forward layer")
        found.append(BlockParts(attention[:-1], attention[-1], feed[:-1], feed[-1]))
    return found


def _attention_follows(model: Any, parts: BlockParts, units: dict[int, Tensor]) -> bool:
    """Whether without a group's queries, keys and values just that group's part of attention is zero."""
    # The first group: the last one's values stand at the end in either order.
    return _silences_only(model, parts.attention_in, parts.attention_out, units)


def _feed_forward_follows(model: Any, parts: BlockParts, channels: int) -> bool:
    sizes = {_in_out(module)[1] for module in parts.feed_in}
    units = {size: torch.arange(size) % channels for size in {*sizes, channels} if size % channels == 0}
    return _silences_only(model, parts.feed_in, parts.feed_out, units)


def _silences_only(model: Any, into: Sequence[nn.Module], out: nn.Module, units: dict[int, Tensor]) -> bool:
    """Whether zeros in the first unit's outputs of `into` become zeros in its inputs of `out` alone."""
    seen: list[Tensor] = []

    def silence(place: int, given: Any, output: Any) -> Any:
        if place == len(into):
            seen.append(given.reshape(-1, given.shape[-1]))
            return output
        if output.shape[-1] not in units:
            return output
        return output.masked_fill(units[output.shape[-1]].to(output.device) == 0, 0.0)

    with _hooked([*into, out], silence):
        _run(model)
    with _hooked([out], lambda place, given, output: silence(len(into), given, output)):
        _run(model)
    silenced_TE, whole_TE = seen
    is_first_E = units[whole_TE.shape[-1]].to(whole_TE.device) == 0
    changed = (silenced_TE - whole_TE)[:, ~is_first_E].abs().max() if not is_first_E.all() else 0.0
    return bool((silenced_TE[:, is_first_E] == 0).all() and changed <= 1e-5 * whole_TE.abs().max())


_Ends = tuple[Axis | None, Axis | None]


def _ends_of_linear_layers(
    model: Any, parts: Sequence[BlockParts], sizes: Sizes, group_units: dict[int, Tensor]
) -> dict[nn.Module, _Ends]:
    """What the inputs and the outputs of each linear layer belong to."""
    hidden, feed = Axis("hidden", torch.arange(sizes.hidden_size)), sizes.intermediate_size
    ends: dict[nn.Module, _Ends] = {}
    for module in filter(_is_linear, model.modules()):
        inputs, outputs = _in_out(module)
        # Outside of the blocks: the head, whose outputs are tokens, and OPT's projections of its embedding.
        leads_on = outputs == sizes.hidden_size and module is not model.get_output_embeddings()
        ends[module] = hidden if inputs == sizes.hidden_size else None, hidden if leads_on else None
    for block in parts:
        for module in block.attention_in:
            units = group_units.get(_in_out(module)[1])
            if units is None:
                raise _cannot(model, f"{_in_out(module)[1]} outputs of a layer into attention are no heads")
            ends[module] = hidden, Axis("group", units)
        for module in block.feed_in:
            outputs = _in_out(module)[1]
            if outputs % feed:
                raise _cannot(model, f"a feed-forward layer of {feed} channels has {outputs} inputs")
            ends[module] = hidden, Axis("channel", torch.arange(outputs) % feed)
        ends[block.attention_out] = Axis("group", group_units[_in_out(block.attention_out)[0]]), hidden
        ends[block.feed_out] = Axis("channel", torch.arange(feed)), hidden
    return ends


def _place_parameters(
    model: Any, anatomy: Anatomy, blocks: nn.ModuleList, group_units: dict[int, Tensor]
) -> None:
    """Fill in what each dimension of each parameter belongs to."""
    ends = _ends_of_linear_layers(model, anatomy.blocks, anatomy.sizes, group_units)
    places = {module: place for place, block in enumerate(blocks) for module in block.modules()}
    inside_attention = {
        module
        for block, parts in zip(blocks, anatomy.blocks, strict=True)
        for child in block.children()
        if parts.attention_out in {*child.modules()}
        for module in child.modules()
    }
    names = {name for name, _ in model.named_parameters()}  # a tied weight has one of its names
    for module_name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False)]
        if _is_norm(module) and not own:
            raise _cannot(model, f"{module_name} has no weight to make up for fewer channels with")
        for name, parameter in own:
            full_name = f"{module_name}.{name}" if module_name else name
            if full_name not in names:
                continue
            axes = _axes(module, parameter, anatomy, ends, in_attention=module in inside_attention)
            if axes is None:
                raise _cannot(model, f"{full_name} {[*parameter.shape]} is no part that is known")
            anatomy.axes[full_name], anatomy.shapes[full_name] = axes, tuple(parameter.shape)
            anatomy.places[full_name] = places.get(module)
            if _is_norm(module) and module not in inside_attention:
                anatomy.norms[module_name] = module


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _axes(
    module: nn.Module,
    parameter: nn.Parameter,
    anatomy: Anatomy,
    ends: dict[nn.Module, _Ends],
    *,
    in_attention: bool,
) -> tuple[Axis | None, ...] | None:
    """What each dimension of a parameter belongs to; None for a parameter of an unknown kind of module."""
    hidden = Axis("hidden", torch.arange(anatomy.sizes.hidden_size))
    if module in ends:
        inputs, outputs = ends[module]
        if parameter.ndim == 1:
            return (outputs,)
        return (inputs, outputs) if isinstance(module, Conv1D) else (outputs, inputs)
    if isinstance(module, nn.Embedding):
        return None, hidden if parameter.shape[1] == len(hidden.units) else None
    if not _is_norm(module) or parameter.ndim != 1:
        return None
    if in_attention:  # over one head at a time, and the same for all of them
        return (None,) if len(parameter) == anatomy.head_size else None
    return (hidden,) if len(parameter) == len(hidden.units) else None


def _heads_fix_width(model: Any, anatomy: Anatomy) -> bool:
    """Whether attention grows with the hidden size though the number and size of heads are stated."""
    sizes = replace(anatomy.sizes, layers=1, hidden_size=2 * anatomy.sizes.hidden_size)
    path = next(name for name, module in model.named_modules() if module is anatomy.blocks[0].attention_out)
    config = resized(model.config, sizes, [0], head_size=anatomy.head_size)
    with torch.device("meta"):
        other = dict(type(model)(config).named_modules())
    return _in_out(other[path])[0] != _in_out(anatomy.blocks[0].attention_out)[0]
