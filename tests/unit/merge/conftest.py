"""Adapters as a train step leaves them, sealed, without a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.models import TransformersModel, load
from potstill.train.lora import add_adapter, save_adapter
from potstill.train.settings import LoraSettings


@pytest.fixture
def adapter(
    build_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, seal: Any
) -> Callable[..., TransformersModel]:
    """`adapter(family, *, base_fields=, config=, **lora)`: a sealed adapter that changes its base a lot."""

    def make(
        family: str = "llama",
        *,
        base_fields: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        **lora: Any,
    ) -> TransformersModel:
        folder = tmp_path / "base"
        if not folder.exists():
            build_tiny_model(family, **(config or {})).to(dtype).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
        base = TransformersModel(path=str(folder), device="cpu", **(base_fields or {}))
        model = add_adapter(load(base, dtype=torch.float32).model, LoraSettings(rank=4, **lora), seed=3)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, one in model.named_parameters():
                if "lora_B" in name or "lora_embedding_A" in name:
                    one.normal_(std=0.05, generator=generator)
                if "lora_magnitude_vector" in name:
                    one.mul_(1 + 0.2 * torch.rand(one.shape, generator=generator))
        save_adapter(model, tmp_path / "adapter")
        sealed = seal(tmp_path / "adapter", "train")
        manifest = sealed.manifest.model_copy(
            update={"extra": {"base": base.model_dump(mode="json", exclude={"device"}, exclude_none=True)}}
        )
        (sealed.folder / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")
        return TransformersModel(path=str(sealed.folder), device="cpu")

    return make
