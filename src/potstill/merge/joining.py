"""Several adapters of one base joined in its weights: linearly, by TIES or by DARE.

Shapes: A adapters; a change has its weight's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from potstill.core.errors import ModelError
from potstill.merge import Method
from potstill.models import (
    LoadedModel,
    SharedWeights,
    TransformersModel,
    adapter_base,
    find_source,
    identity,
    load,
    template_hash,
    tokenizer_hash,
)

__all__ = ["join_adapters", "joined_change", "untie"]

_MEND = "merge adapters of one base, trained by the same recipe"


def join_adapters(
    models: Mapping[str, TransformersModel],
    weights: Sequence[float],
    method: Method,
    density: float,
    seed: Callable[[str], int],
) -> LoadedModel:
    """The base of several adapters as a plain model in fp32, what they change of its weights joined.

    The base is in memory once. What an adapter changes is the whole product of its factors (for DoRA the new
    weight less the old one), so ranks and target modules may differ; a layer that an adapter leaves alone has
    no change by it. `seed` gives the seed of a layer's random choices. Raises ModelError for models that are
    no adapters, that differ in base, tokenizer or chat template, or that change more than linear layers and
    embeddings.
    """
    _check_bases(models)
    shared = SharedWeights()
    adapted = {
        name: load(one, dtype=torch.float32, full_weights=True, shared=shared) for name, one in models.items()
    }
    _check_adapters(adapted)
    [base] = shared.models.values()
    plain = base.requires_grad_(requires_grad=False).eval()
    layers = {name: _adapted_layers(one.model) for name, one in adapted.items()}
    names = list(dict.fromkeys(layer for found in layers.values() for layer in found))
    ends = (plain.get_output_embeddings(), plain.get_input_embeddings())
    if any(plain.get_submodule(layer) in ends for layer in names):
        untie(plain)
    for layer in names:
        changed = [name for name, found in layers.items() if layer in found]
        weight = plain.get_submodule(layer).weight
        own = [factor for name, factor in zip(models, weights, strict=True) if name in changed]
        changes = [_change(layers[name][layer], weight.data, where=name) for name in changed]
        weight.data = weight.data + joined_change(changes, own, method, density, seed(layer))
    first = next(iter(adapted.values()))
    return LoadedModel(plain, first.tokenizer, first.identity)


def joined_change(
    changes: Sequence[Tensor], weights: Sequence[float], method: Method, density: float, seed: int
) -> Tensor:
    """What several changes w - w0 of one tensor come to together.

    linear: sum of weight x change. ties: of each change a share `density` of the entries stays, the largest
    in size; an entry's sign is that of their sum, and the weighted changes of this sign are averaged (Yadav
    et al. 2023, here a tensor at a time). dare_linear and dare_ties: random entries stay, each with a chance
    of `density` and divided by it, for the sum, or for the signs and average of TIES (Yu et al. 2024). What
    is random is drawn on the CPU from `seed`.
    """
    from peft.utils import merge_utils

    device, weights_A = changes[0].device, torch.tensor(weights, dtype=changes[0].dtype)
    joined: Tensor
    if method == "linear":
        joined = merge_utils.task_arithmetic([*changes], weights_A.to(device))
    elif method == "ties":
        joined = merge_utils.ties([*changes], weights_A.to(device), density)
    else:
        join = {"dare_linear": merge_utils.dare_linear, "dare_ties": merge_utils.dare_ties}[method]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            joined = join([one.cpu() for one in changes], weights_A, density).to(device)
    return joined


def _check_bases(models: Mapping[str, TransformersModel]) -> None:
    bases: dict[str, list[str]] = {}
    for name, model in models.items():
        source = find_source(model.path)
        if source.kind != "adapter":
            raise ModelError(
                "is no adapter: what it changed of a base's weights is not known",
                where=name,
                expected="train steps with lora, or adapters' folders",
                mend=_MEND,
            )
        bases.setdefault(identity(adapter_base(source.folder)), []).append(name)
    if len(bases) > 1:
        raise ModelError(
            "adapters of different bases cannot be merged: "
            + "; ".join(f"{', '.join(names)} on {base[:12]}" for base, names in bases.items()),
            expected="one base, whose weights all of them change",
            mend=_MEND,
        )


def _check_adapters(adapted: Mapping[str, LoadedModel]) -> None:
    first, *others = adapted.items()
    for name, one in others:
        for what, hash_of in (("vocabulary", tokenizer_hash), ("chat template", template_hash)):
            if hash_of(one.tokenizer) != hash_of(first[1].tokenizer):
                raise ModelError(
                    f"has another {what} than {first[0]}",
                    where=name,
                    expected="adapters that read and write alike, as their merged model has one tokenizer",
                    mend=_MEND,
                )
    for name, one in adapted.items():
        [config] = one.model.peft_config.values()
        beside = [
            key
            for key in ("modules_to_save", "target_parameters", "trainable_token_indices", "lora_bias")
            if getattr(config, key, None)
        ]
        beside += ["bias"] if getattr(config, "bias", "none") != "none" else []
        if config.peft_type != "LORA" or beside:
            found = ", ".join(beside) or f"a PEFT adapter of type {config.peft_type.value}"
            raise ModelError(
                f"changes more than the weights of linear layers and embeddings by low rank: {found}",
                where=name,
                expected="LoRA, rsLoRA or DoRA on layers alone",
                mend="merge it alone (`model:`), or train it again without that",
            )


def _adapted_layers(adapted: Any) -> dict[str, Any]:
    """The layers that an adapter changes, by their names in the base."""
    from peft.tuners.lora import LoraLayer

    plain = adapted.get_base_model()
    return {name: layer for name, layer in plain.named_modules() if isinstance(layer, LoraLayer)}


def untie(plain: Any) -> None:
    """Part a head from the embedding whose weights it shares, so that each may be changed alone."""
    head, embedding = (
        getattr(module, "base_layer", module)
        for module in (plain.get_output_embeddings(), plain.get_input_embeddings())
    )
    if head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in {id(one): one for one in (plain.config, plain.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def _change(layer: Any, weight: Tensor, *, where: str) -> Tensor:
    """What an adapter changes of the weight of one layer, which stays as it is."""
    base = layer.get_base_layer()
    before = base.weight.data
    base.weight.data = weight
    try:
        layer.merge(safe_merge=True, adapter_names=layer.active_adapters)
    except ValueError as error:
        raise ModelError(
            f"cannot be merged ({error})", where=where, mend="train the adapter again, or leave it out"
        ) from error
    change: Tensor = base.weight.data - weight
    base.weight.data = before
    return change
