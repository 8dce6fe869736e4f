"""A decoder's sizes in its configuration, read and written; no weights are needed."""

import copy
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from potstill.core.errors import ModelError
from potstill.models import (
    TransformersModel,
    converted_embedded,
    find_source,
    load_tokenizer,
    parameter_count,
)
from potstill.student import InitSettings

__all__ = [
    "Sizes",
    "asked_layers",
    "asked_sizes",
    "keep_block_fields",
    "planned_parameters",
    "queries_a_group",
    "resized",
    "sizes_of",
    "stated_blocks",
]

# Configuration fields that hold one entry a block, that hold numbers of blocks, and that say of how many of
# the first blocks something is true.
_PER_BLOCK_FIELDS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "indexer_types",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "attention_layers",
    "intermediate_size",
    "activation_sparsity_pattern",
)
_BLOCK_NUMBER_FIELDS = (
    "mlp_only_layers",
    "moe_layers",
    "full_attn_idxs",
    "attn_layer_indices",
    "hybrid_layer_ids",
    "local_layer_ids",
    "ple_layer_ids",
    "cross_attention_layers",
)
_FIRST_BLOCKS_FIELDS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_BLOCK_NUMBER = re.compile(r"\.(\d+)\.")
_INTERMEDIATE_FIELDS = ("intermediate_size", "ffn_dim", "n_inner")


@dataclass(frozen=True)
class Sizes:
    """What of a decoder can be made smaller; `groups` are key and value heads with their query heads."""

    layers: int
    hidden_size: int
    intermediate_size: int
    groups: int


def queries_a_group(config: Any) -> int:
    """How many query heads share a key and value head."""
    heads, groups = _heads(config.get_text_config(decoder=True))
    return heads // groups


def _heads(text: Any) -> tuple[int, int]:
    heads = int(text.num_attention_heads)
    return heads, int(getattr(text, "num_key_value_heads", None) or heads)


def _intermediate_field(text: Any) -> str:
    for name in _INTERMEDIATE_FIELDS:
        if hasattr(text, name) and isinstance(getattr(text, name), int | None):
            return name
    raise ModelError(
        f"the configuration of a {text.model_type} model states no one size of its feed-forward layers",
        expected=f"one of: {', '.join(_INTERMEDIATE_FIELDS)}",
        mend="cut its depth alone (layers), or use a model of another family",
    )


def sizes_of(config: Any) -> Sizes:
    """The sizes that a configuration states."""
    text = config.get_text_config(decoder=True)
    inner = getattr(text, _intermediate_field(text)) or 4 * text.hidden_size  # GPT-2's when none is stated
    return Sizes(int(text.num_hidden_layers), int(text.hidden_size), int(inner), _heads(text)[1])


def keep_block_fields(text: Any, kept: Sequence[int]) -> None:
    """Leave in a configuration what belongs to the blocks at the indices `kept`, in place."""
    count = text.num_hidden_layers
    _state_sparse_blocks(text)
    for name in _PER_BLOCK_FIELDS:
        entries = getattr(text, name, None)
        if isinstance(entries, list | tuple) and len(entries) == count:
            setattr(text, name, [entries[index] for index in kept])
    for name in _BLOCK_NUMBER_FIELDS:
        numbers = getattr(text, name, None)
        if isinstance(numbers, list | tuple):
            setattr(text, name, [place for place, index in enumerate(kept) if index in numbers])
    for name in _FIRST_BLOCKS_FIELDS:
        first = getattr(text, name, None)
        if isinstance(first, int):
            setattr(text, name, sum(index < first for index in kept))
    if isinstance(last := getattr(text, "moe_layer_end_index", None), int):
        text.moe_layer_end_index = sum(index <= last for index in kept) - 1
    if hasattr(text, "attention_types"):  # GPT-Neo's attention_layers are made of it
        text.attention_types = [[text.attention_layers, 1]]
    text.num_hidden_layers = len(kept)


def _state_sparse_blocks(text: Any) -> None:
    """Name the dense blocks of a mixture whose experts are in every so many blocks, which cutting ends."""
    step = getattr(text, "decoder_sparse_step", None)
    if isinstance(step, int) and step > 1:
        between = {index for index in range(text.num_hidden_layers) if (index + 1) % step}
        text.mlp_only_layers = sorted({*(text.mlp_only_layers or ()), *between})
        text.decoder_sparse_step = 1


def resized(config: Any, sizes: Sizes, kept_blocks: Sequence[int], *, head_size: int | None) -> Any:
    """A copy of a configuration with other sizes, and with what belongs to some of its blocks.

    `head_size` is stated in it, unless it is None. Raises ModelError for sizes that the family does not
    allow.
    """
    from huggingface_hub.errors import StrictDataclassError

    new = copy.deepcopy(config)
    text = new.get_text_config(decoder=True)
    inner, queries = _intermediate_field(text), queries_a_group(text)
    keep_block_fields(text, kept_blocks)
    if (
        getattr(text, "word_embed_proj_dim", None) == text.hidden_size
    ):  # OPT's, whose embedding has a width too
        text.word_embed_proj_dim = sizes.hidden_size
    text.hidden_size = sizes.hidden_size
    setattr(text, inner, sizes.intermediate_size)
    text.num_attention_heads = sizes.groups * queries
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = sizes.groups
    if head_size is not None:
        text.head_dim = head_size
    try:
        new.validate()
    except StrictDataclassError as error:
        raise ModelError(
            f"no {text.model_type} model has these sizes ({_reason(error)})",
            expected="sizes that fit one another",
            mend=f"take a hidden_size that {text.num_attention_heads} heads divide, for one",
        ) from error
    return new


def _reason(error: Exception) -> str:
    """The last line of a validation error, which says what was wrong."""
    return str(error).strip().splitlines()[-1].strip()


def asked_layers(settings: InitSettings, count: int) -> int:
    """How many of `count` blocks settings keep. Raises ModelError where there are not so many."""
    listed = settings.depth_by if isinstance(settings.depth_by, list) else None
    if listed is not None and listed[-1] >= count:
        raise ModelError(
            f"there is no block {listed[-1]} of {count}",
            where=str(settings.model),
            expected=f"depth_by with blocks between 0 and {count - 1}",
        )
    layers = len(listed) if listed is not None else settings.layers or count
    if layers > count:
        raise ModelError(
            f"{layers} blocks cannot be kept of {count}",
            where=str(settings.model),
            expected=f"layers between 1 and {count}",
        )
    return layers


def stated_blocks(settings: InitSettings, count: int) -> list[int] | None:
    """Which of `count` blocks stay, where nothing has to be measured for that: listed, all, evenly spaced.

    Raises ModelError as `asked_layers` does.
    """
    layers = asked_layers(settings, count)
    if isinstance(settings.depth_by, list):
        return [*settings.depth_by]
    if settings.method == "prune" and layers < count:
        return None
    return [round(place * (count - 1) / max(layers - 1, 1)) for place in range(layers)]


def asked_sizes(settings: InitSettings, have: Sizes, queries: int, head_size: int | None) -> Sizes:
    """The sizes that settings state of a model with `have.layers` blocks; what they leave out stays as it is.

    `queries` heads are in a group. `head_size` is given where the hidden size is heads times head size.
    Raises ModelError for sizes that the model does not have, and for heads and a hidden size that do not fit.
    """
    hidden, heads, where = settings.hidden_size, settings.attention_heads, str(settings.model)
    if head_size is not None:
        hidden, heads = _one_of_two(hidden, heads, head_size, queries, where)
    if heads is not None and heads % queries:
        raise ModelError(
            f"{heads} query heads cannot be kept: {queries} share a key and value head",
            where=where,
            expected=f"attention_heads in multiples of {queries}",
        )
    sizes = Sizes(
        have.layers,
        hidden or have.hidden_size,
        settings.intermediate_size or have.intermediate_size,
        have.groups if heads is None else heads // queries,
    )
    for name, asked, most in (
        ("hidden_size", sizes.hidden_size, have.hidden_size),
        ("intermediate_size", sizes.intermediate_size, have.intermediate_size),
        ("attention_heads", sizes.groups * queries, have.groups * queries),
    ):
        if asked > most:
            raise ModelError(
                f"{name} {asked} cannot be kept of {most}", where=where, expected=f"{name} up to {most}"
            )
    return sizes


def _one_of_two(
    hidden: int | None, heads: int | None, head_size: int, queries: int, where: str
) -> tuple[int | None, int | None]:
    """Hidden size and heads where either follows from the other."""
    if hidden is not None and hidden % (queries * head_size):
        raise ModelError(
            f"a hidden size of {hidden} is no whole number of heads of {head_size}",
            where=where,
            expected=f"a multiple of {queries * head_size}: in this family the heads make up the hidden size",
        )
    if heads is not None and hidden is not None and heads * head_size != hidden:
        raise ModelError(
            f"{heads} heads of {head_size} are not a hidden size of {hidden}",
            where=where,
            expected="one of the two: in this family the heads make up the hidden size",
        )
    heads = heads if hidden is None else hidden // head_size
    return (None if heads is None else heads * head_size), heads


def planned_parameters(settings: InitSettings, model: TransformersModel) -> int | None:
    """How many parameters a student will have, at most those of a target; None where only a run can tell.

    Raises ModelError for sizes that the model does not have, and for a configuration of which none is made.
    """
    whole = parameter_count(model)
    if settings.target_params is not None:
        return settings.target_params
    if settings.target_ratio is not None:
        return None if whole is None else int(whole * settings.target_ratio)
    source, folder = find_source(model.path), None
    if source.kind in ("folder", "embedded"):
        folder = source.folder if source.kind == "folder" else converted_embedded(source.name)
    if folder is None:
        return None
    if settings.method == "from_config":
        from potstill.student.configured import configured_parameters

        return configured_parameters(settings, load_tokenizer(model))
    if settings.method in ("prune", "fresh", "copy"):
        return _cut_parameters(settings, folder)
    return _mixture_parameters(settings, folder)


def _mixture_parameters(settings: InitSettings, folder: Path) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from potstill.models.shared_experts import register_shared_experts
    from potstill.student.moe import empty_student

    register_shared_experts()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return int(empty_student(settings, model).num_parameters())


def _cut_parameters(settings: InitSettings, folder: Path) -> int | None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from potstill.models.shared_experts import register_shared_experts

    register_shared_experts()
    config = AutoConfig.from_pretrained(folder)
    have, queries = sizes_of(config), queries_a_group(config)
    layers = asked_layers(settings, have.layers)
    sizes = replace(asked_sizes(settings, have, queries, None), layers=layers)
    text = config.get_text_config(decoder=True)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kept = stated_blocks(settings, have.layers)
    new = resized(config, sizes, kept or range(layers), head_size=head_size)
    try:
        with torch.device("meta"):
            if kept is None and not _blocks_alike(config):
                return None
            return int(AutoModelForCausalLM.from_config(new).num_parameters())
    except ValueError:  # heads that make up the hidden size, which only the model itself can tell
        return None


def _blocks_alike(config: Any) -> bool:
    """Whether all blocks have as many parameters, so that it does not matter which ones stay."""
    from transformers import AutoModelForCausalLM

    sizes: Counter[str] = Counter()
    for name, parameter in AutoModelForCausalLM.from_config(config).named_parameters():
        if number := _BLOCK_NUMBER.search(name):
            sizes[number[1]] += parameter.numel()
    return len({*sizes.values()}) == 1
