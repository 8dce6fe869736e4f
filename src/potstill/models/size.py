"""How large a model is, read from its files' headers without loading weights."""

import math
from pathlib import Path

from potstill.models.embedded import EMBEDDED
from potstill.models.source import TransformersModel, adapter_base, find_source

__all__ = ["parameter_count"]


def parameter_count(settings: TransformersModel) -> int | None:
    """Parameters of a model, an adapter's base included; None for a hub model or weights without safetensors.

    Raises ModelError where the model's path leads nowhere.
    """
    source = find_source(settings.path)
    if source.kind == "embedded":
        return EMBEDDED[source.name].parameters
    if source.kind == "gguf":
        from gguf import GGUFReader

        return sum(int(tensor.n_elements) for tensor in GGUFReader(source.name).tensors)
    if source.kind == "hub":
        return None
    own = _safetensors_elements(source.folder)
    base = parameter_count(adapter_base(source.folder)) if source.kind == "adapter" else 0
    return None if own is None or base is None else own + base


def _safetensors_elements(folder: Path) -> int | None:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    count = 0
    for path in files:
        with safe_open(path, framework="numpy") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    return count if files else None
