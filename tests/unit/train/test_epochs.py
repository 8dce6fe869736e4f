"""The models of single epochs: written as training comes to them, and the same after an interruption."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import Interrupted, StoreError
from potstill.models import TransformersModel, adapter_base, identity, load

Training = Callable[..., Any]
LORA = {"rank": 4, "dropout": 0.2}
STEPS_AN_EPOCH = 3


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*.safetensors")
        if "scratch" not in path.parts
    }


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "adapter"])
def test_every_epoch_is_a_model_of_its_own(train: Training, seal: Any, lora: Any) -> None:
    result, folder, _ = train(epochs=3, keep_epochs="all", lora=lora)
    assert result.extra["views"] == ["epoch1", "epoch2", "epoch3"]
    assert result.counts["kept_epochs"] == 3
    artifact = seal(folder, "train", result)
    ids = torch.arange(10, 30)[None]
    logits = []
    for name in (*result.extra["views"], "."):
        loaded = load(TransformersModel(path=str(folder / name), device="cpu"), dtype=torch.float32)
        assert len(loaded.tokenizer) == 300
        logits.append(loaded.model(ids, use_cache=False).logits)
    assert torch.equal(logits[2], logits[3])
    assert not torch.equal(logits[0], logits[1])
    if lora is not None:
        assert adapter_base(folder / "epoch1") == adapter_base(folder)
    held_out = [point["eval_loss"] for point in result.metrics["history"] if "eval_loss" in point]
    on, _, _ = train("on", student=TransformersModel(path=str(folder / "epoch1")), max_steps=1)
    assert on.metrics["eval_loss_before"] == pytest.approx(held_out[1], rel=1e-5)
    assert artifact.content_of("epoch1") != artifact.content_of("epoch2")


def test_what_is_kept_besides_changes_neither_the_weights_nor_what_stands_for_them(
    train: Training, seal: Any
) -> None:
    kept, kept_folder, _ = train("kept", epochs=2, keep_epochs="all", lora=LORA)
    plain, plain_folder, _ = train("plain", epochs=2, lora=LORA)
    assert kept.metrics == plain.metrics
    contents = [
        seal(folder, "train", result).content_of(None)
        for folder, result in ((kept_folder, kept), (plain_folder, plain))
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(("epochs", "keep", "names"), [(3, 2, ["epoch2", "epoch3"]), (2.5, 1, ["epoch2"])])
def test_of_many_epochs_the_last_ones_are_kept(
    train: Training, epochs: float, keep: int, names: list[str]
) -> None:
    result, folder, _ = train(epochs=epochs, keep_epochs=keep, lora=LORA)
    assert result.extra["views"] == names
    assert sorted(path.name for path in folder.glob("epoch*")) == names


@pytest.mark.parametrize("stop_at", [STEPS_AN_EPOCH - 1, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 2])
@pytest.mark.parametrize("keep", ["all", 2])
def test_after_an_interruption_the_epochs_are_those_of_a_whole_training(
    train: Training, stop_at: int, keep: Any
) -> None:
    fields = {"epochs": 4, "keep_epochs": keep, "lora": LORA}
    expected, expected_folder, _ = train("whole", **fields)
    with pytest.raises(Interrupted):
        train("parted", stop_at=stop_at, **fields)
    found, folder, context = train("parted", **fields)
    assert f"goes on after step {stop_at} of 12" in context.reporter.said
    assert files(folder) == files(expected_folder)
    assert found.extra == expected.extra
    assert len(found.extra["views"]) == (4 if keep == "all" else 2)


def test_an_epoch_that_an_earlier_attempt_came_to_is_written_again(train: Training) -> None:
    _, expected_folder, _ = train("whole", epochs=2, keep_epochs="all", lora=LORA)
    left = expected_folder.parent / "again" / "epoch7"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"of another training")
    found, folder, _ = train("again", epochs=2, keep_epochs="all", lora=LORA)
    assert found.extra["views"] == ["epoch1", "epoch2"]
    assert files(folder) == files(expected_folder)


def test_epochs_are_kept_beside_the_best_weights_where_training_stops_early(train: Training) -> None:
    result, folder, _ = train(
        epochs=30, lr=3e-2, schedule="constant", early_stopping={"patience": 2}, keep_epochs="all"
    )
    kept = result.metrics["kept_step"]
    epochs = result.counts["steps"] // STEPS_AN_EPOCH
    assert result.extra["views"] == [f"epoch{number}" for number in range(1, epochs + 1)]
    best = folder / f"epoch{kept // STEPS_AN_EPOCH}"
    assert (best / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert kept < result.counts["steps"]
    assert identity(TransformersModel(path=str(best))) == result.model_identity


def test_a_disk_that_is_full_at_an_epochs_end_stops_with_what_to_do(
    train: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def no_room(source: Any, target: Any) -> None:
        if Path(target).name == "epoch1":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("potstill.train.saving.os.replace", no_room)
    with pytest.raises(StoreError, match="No space left on device"):
        train(epochs=1, keep_epochs="all")
