"""What is divided among processes, by which blocks, and what is refused; tests/numerics trains with it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from potstill.core.errors import TrainingError
from potstill.models import TransformersModel, load
from potstill.train.arguments import DistillationArguments
from potstill.train.checks import check_strategy
from potstill.train.lora import add_adapter
from potstill.train.settings import LoraSettings
from potstill.train.sharding import (
    block_classes,
    divide_moments,
    has_shards,
    is_divisible,
    read_shards,
    state_of_parts,
    write_shards,
)

from ...conftest import MOE_FAMILIES, TINY_FAMILIES, TinyModelBuilder


@pytest.mark.parametrize("family", [*TINY_FAMILIES, *MOE_FAMILIES])
def test_every_family_is_gathered_block_by_block(family: str, build_tiny_model: TinyModelBuilder) -> None:
    model = build_tiny_model(family)
    [name] = block_classes(nn.ModuleList([model]))
    assert sum(type(one).__name__ == name for one in model.modules()) == 2
    adapted = add_adapter(model, LoraSettings(rank=2), seed=1)
    assert block_classes(nn.ModuleList([adapted])) == [name]


def test_a_model_whose_blocks_are_not_known_is_refused() -> None:
    with pytest.raises(TrainingError, match="blocks of this model are not known"):
        block_classes(nn.Sequential(nn.Linear(2, 2)))


def test_full_weights_can_be_divided_and_packed_ones_cannot(tiny_model_folder: Path) -> None:
    full, packed = (
        load(TransformersModel(path=str(tiny_model_folder), device="cpu", quantize=quantize)).model
        for quantize in (None, "nf4")
    )
    assert is_divisible(full)
    assert not is_divisible(packed)
    asked = {"divides": True, "strategy": "fsdp2", "optim": "adamw_torch"}
    asked |= dict.fromkeys(("fsdp", "deepspeed", "parallelism_config"))
    arguments = cast("DistillationArguments", SimpleNamespace(**asked))
    check_strategy(arguments, full)
    with pytest.raises(TrainingError, match="weights are quantised"):
        check_strategy(arguments, packed)
    arguments = cast("DistillationArguments", SimpleNamespace(**{**asked, "optim": "adafactor"}))
    with pytest.raises(TrainingError, match="the optimiser adafactor keeps what does not divide"):
        check_strategy(arguments, full)


def test_one_process_has_all_of_the_student_whatever_the_strategy(tmp_path: Path) -> None:
    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True, strategy="fsdp2")
    assert not arguments.divides
    assert state_of_parts(nn.Linear(2, 2), keep=True) is None


def test_an_unknown_strategy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="strategy is 'fsdp'"):
        DistillationArguments(output_dir=str(tmp_path), use_cpu=True, strategy=cast("Any", "fsdp"))


def test_a_checkpoint_that_cannot_be_written_or_read_is_told_as_any_file(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    trained = dict(layer.named_parameters())
    write_shards(tmp_path, trained, torch.optim.AdamW(trained.values()))
    assert has_shards(tmp_path)
    with pytest.raises(TrainingError, match="holds other weights"):
        read_shards(tmp_path, {"weight": layer.weight})
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory|exists"):
        write_shards(tmp_path / "file", trained, torch.optim.AdamW(trained.values()))
    wider = dict(nn.Linear(3, 2).named_parameters())
    with pytest.raises((OSError, ValueError), match="mismatch"):
        read_shards(tmp_path, wider)


def test_moments_that_were_saved_whole_go_to_their_weights_by_order() -> None:
    def train(layer: nn.Linear) -> torch.optim.AdamW:
        optimizer = torch.optim.AdamW([{"params": [layer.bias]}, {"params": [layer.weight]}])
        layer(torch.ones(3)).square().sum().backward()
        return optimizer

    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    trained, fresh = train(one), train(other)
    trained.step()
    divide_moments(trained.state_dict(), fresh)
    for mine, theirs in ((one.weight, other.weight), (one.bias, other.bias)):
        assert trained.state[mine].keys() == fresh.state[theirs].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in trained.state[mine].items():
            torch.testing.assert_close(fresh.state[theirs][key], value)
