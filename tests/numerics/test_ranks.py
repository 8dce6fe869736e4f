"""Two processes over gloo train as one: the same losses, gradient norms and weights, whatever the signal.

Whether each holds the whole student (DDP) or a part of every weight (FSDP2).
"""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from potstill.logits.codecs import Codec, Draws, TopK
from potstill.logits.shards import CachedRow, ShardWriter, write_index
from potstill.train.watcher import history_point

from ..conftest import _build
from .ranks import (
    BROKEN,
    BY_ACCELERATE,
    CASES,
    FAULTY_ROW,
    ON_GPUS,
    RESUMED,
    STEPS,
    STRATEGIES,
    cases_of,
    checkpoint_of,
    train,
)
from .test_training_invariance import ROWS, TEMPERATURE, VOCABULARY, teacher_signal

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BY_STRATEGY = [(strategy, name) for strategy in STRATEGIES for name in cases_of(strategy)]


def write_cache(folder: Path, codec: Codec, seed: int = 1) -> None:
    folder.mkdir()
    teacher = _build(seed=seed)
    writer = ShardWriter(folder, codec, tokenizer="t", model=f"m{seed}")
    rows = [CachedRow(row.ids, row.mask, held_out=False, record_id=f"r{n}") for n, row in enumerate(ROWS)]
    for row, rendered in zip(rows, ROWS, strict=True):
        logits_NV = teacher_signal(teacher, [rendered]).logits_NV
        encode = codec.encoder([row.key], [len(logits_NV)])
        writer.append(row, encode(logits_NV, slice(0, len(logits_NV))))
    writer.seal()
    write_index(folder, rows)


@dataclass
class Trainings:
    """By name of the case what one process did, and by strategy and name what each of two did."""

    folder: Path
    one: dict[str, Any]
    two: list[dict[str, dict[str, Any]]]

    def weights(self, name: str, strategy: str | None = None, rank: int = 0) -> dict[str, Tensor]:
        """Of one process, or of a rank of two."""
        if strategy is None:
            return load_file(self.folder / "one" / f"{name}-0-of-1.safetensors")
        return load_file(self.folder / "two" / strategy / f"{name}-{rank}-of-2.safetensors")


def in_two_processes(*folders: Path) -> list[dict[str, dict[str, Any]]]:
    """What each rank did, by strategy and name of the case."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "--module", "tests.numerics.ranks", *map(str, folders)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folders[0] / f"rank-{rank}.json").read_text("utf-8")) for rank in range(2)]


def prepare(folder: Path, base: Path) -> None:
    """Put a base and caches into a folder."""
    folder.mkdir(parents=True)
    shutil.copytree(base, folder / "base")
    write_cache(folder / "topk", TopK(8, VOCABULARY, (1.0, TEMPERATURE)))
    write_cache(folder / "other", TopK(8, VOCABULARY, (1.0, TEMPERATURE)), seed=2)
    write_cache(folder / "sampled", Draws(20, VOCABULARY))


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory, shared_model_folder: Path) -> Trainings:
    folder = tmp_path_factory.mktemp("ranks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    places = {name: folder / "two" / name for name in (*STRATEGIES, "accelerate")}
    for place in (folder / "one", *places.values()):
        prepare(place, shared_model_folder)
    one = {name: train(case, name, folder / "one") for name, case in CASES.items()}
    two = in_two_processes(folder / "two", folder / "one")
    for name, case in RESUMED.items():
        for strategy in STRATEGIES:
            given = checkpoint_of(name, places[strategy])
            one[f"{name} from {strategy}"] = train(case, f"{name} from {strategy}", folder / "one", given)
    torch.set_num_threads(threads)
    return Trainings(folder, one, two)


def figures(training: dict[str, Any]) -> list[dict[str, float]]:
    """Every figure of each step and evaluation but times."""
    return [point for point in map(history_point, training["log"]) if point]


def assert_alike(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    found_points, expected_points = figures(found), figures(expected)
    assert len(found_points) == len(expected_points) > 0
    for point, wanted in zip(found_points, expected_points, strict=True):
        assert point == pytest.approx(wanted, rel=tolerance)


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("strategy", "name"), [one for one in BY_STRATEGY if one[1] != "stopped"])
def test_two_ranks_train_as_one_process(trainings: Trainings, strategy: str, name: str) -> None:
    tolerance = 1e-3 if name == "nf4" else 1e-6  # in float32, through the bits of a few numbers
    expected = trainings.one[name]
    steps = [point for point in figures(expected) if "grad_norm" in point]
    assert [point["step"] for point in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"]
    for rank in range(2):
        assert_alike(trainings.two[rank][strategy][name], expected, tolerance)
        found = trainings.weights(name, strategy, rank)
        assert_same_weights(found, trainings.weights(name), 10 * tolerance)


@pytest.mark.parametrize("name", BY_ACCELERATE)
def test_it_is_the_same_where_accelerate_divides_the_student(trainings: Trainings, name: str) -> None:
    for rank in range(2):
        found = trainings.two[rank]["accelerate"]
        assert_alike(found[name], trainings.one[name])
        assert found[name]["held"] == pytest.approx(0.5, abs=0.02)
        weights = trainings.weights(name, "accelerate", rank)
        assert_same_weights(weights, trainings.weights(name), 1e-5)
        assert_alike(found["response from two"], trainings.one["response"])


def test_each_rank_holds_the_whole_student_or_half_of_all_weights_frozen_ones_too(
    trainings: Trainings,
) -> None:
    for strategy, name in BY_STRATEGY:
        held = [trainings.two[rank][strategy][name]["held"] for rank in range(2)]
        assert sum(held) == (2 if strategy == "ddp" else 1)
        assert max(held) == pytest.approx(1 if strategy == "ddp" else 0.5, abs=0.02)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_count_the_experts_of_one_process(trainings: Trainings, strategy: str) -> None:
    def counts(training: dict[str, Any]) -> list[Any]:
        return [entry["expert_counts"] for entry in training["log"] if "expert_counts" in entry]

    expected = counts(trainings.one["mixture"])
    assert sum(expected[0]["model.layers.0.mlp.gate"]) == 2 * sum(
        len(ROWS[number].ids) for number in (7, 0, 1)
    )
    assert [counts(trainings.two[rank][strategy]["mixture"]) for rank in range(2)] == [expected, expected]


@pytest.mark.parametrize(("strategy", "name"), [(one, name) for one in STRATEGIES for name in BROKEN[one]])
def test_a_broken_exchange_would_be_seen(trainings: Trainings, strategy: str, name: str) -> None:
    with pytest.raises(AssertionError):
        assert_alike(trainings.two[0][strategy][name], trainings.one["response"], 1e-2)


def test_weights_stay_the_same_to_the_last_bit_on_all_ranks(trainings: Trainings) -> None:
    for name in CASES:
        first, second = (trainings.weights(name, "ddp", rank) for rank in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)
    first, second = (trainings.weights("unsynchronised", "ddp", rank) for rank in range(2))
    assert not all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_stop_early_alike_and_keep_the_weights_of_one_process(
    trainings: Trainings, strategy: str
) -> None:
    expected = figures(trainings.one["stopped"])
    losses = {point["step"]: point["eval_loss"] for point in expected if "eval_loss" in point}
    assert 0 < min(losses, key=losses.__getitem__) < max(losses) < STEPS
    for rank in range(2):
        assert_alike(trainings.two[rank][strategy]["stopped"], trainings.one["stopped"], 1e-4)
        found = trainings.weights("stopped", strategy, rank)
        assert_same_weights(found, trainings.weights("stopped"), 1e-4)


def test_one_rank_writes_what_is_whole(trainings: Trainings) -> None:
    for name in ("adapter", "stopped"):
        assert trainings.one[name]["written"] > 0
        assert trainings.two[0]["ddp"][name]["written"] == trainings.one[name]["written"]
        assert trainings.two[1]["ddp"][name]["written"] == 0
    assert trainings.two[0]["fsdp2"]["stopped"]["written"] == trainings.one["stopped"]["written"]
    assert trainings.two[1]["fsdp2"]["stopped"]["written"] == 0


def test_every_rank_writes_its_part_of_a_checkpoint_and_nothing_in_it_is_pickled_but_states_of_numbers(
    trainings: Trainings,
) -> None:
    folder = checkpoint_of("response", trainings.folder / "two" / "fsdp2")
    assert len([*(folder / "shards").iterdir()]) == 2
    assert all(one.suffix == ".safetensors" for one in (folder / "shards").iterdir())
    sizes = [one.stat().st_size for one in (folder / "shards").iterdir()]
    assert max(sizes) < 1.1 * min(sizes)
    others = {one.name for one in folder.iterdir() if one.is_file()}
    assert others == {"rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "trainer_state.json"}


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_resumes_in_any_number_of_processes_and_with_either_strategy(
    trainings: Trainings, name: str
) -> None:
    expected = trainings.weights(name)
    for strategy in STRATEGIES:  # one process goes on
        again = f"{name} from {strategy}"
        assert_alike(trainings.one[again], trainings.one[name])
        assert_same_weights(trainings.weights(again), expected, 1e-5)
    for strategy, origin in (
        ("ddp", "one"),
        ("ddp", "two"),
        ("ddp", "parts"),
        ("fsdp2", "one"),
        ("fsdp2", "two"),
    ):
        again = f"{name} from {origin}"
        for rank in range(2):
            assert_alike(trainings.two[rank][strategy][again], trainings.one[name])
            assert_same_weights(trainings.weights(again, strategy, rank), expected, 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_its_rows(
    trainings: Trainings, strategy: str
) -> None:
    first, second = (trainings.two[rank][strategy]["faulty"] for rank in range(2))
    assert first["failure"] == second["failure"]
    assert FAULTY_ROW in first["failure"]
    assert "the loss is nan" in first["failure"]
    assert all(math.isfinite(point["loss"]) for point in figures(first))


def test_ranks_that_hold_something_else_refuse_to_train(trainings: Trainings) -> None:
    first, second = (
        {what: one["failure"] for what, one in told["disagreements"].items()} for told in trainings.two
    )
    assert first == second, "each process is told the same"
    assert first.pop("nothing") is None
    for what, named in {
        "order of rows": "rows",
        "weights": "weights",
        "one weight": "weights",
        "cache": "cached logits",
        "checkpoint": "checkpoints to go on from",
    }.items():
        message = first.pop(what)
        assert f"different {named}, by rank: " in message
        assert "in 0; " in message
        assert message.index("in 0; ") < message.index(" in 1")
    assert not first


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path: Path, shared_model_folder: Path) -> None:
    """Accelerate divides what is in parts there; four-bit weights, which cannot be, are whole on both."""
    for name in ("one", *(f"two/{strategy}" for strategy in ON_GPUS)):
        prepare(tmp_path / name, shared_model_folder)
    two = in_two_processes(tmp_path / "two")
    for strategy, names in ON_GPUS.items():
        for name in names:
            tolerance = 1e-3 if name == "nf4" else 1e-6
            expected = train(CASES[name], name, tmp_path / "one", on_gpu=True)
            weights = load_file(tmp_path / "one" / f"{name}-0-of-1.safetensors")
            for rank in range(2):
                found = two[rank][strategy][name]
                assert_alike(found, expected, tolerance)
                assert found["held"] == pytest.approx(1 if strategy == "ddp" else 0.5, abs=0.02)
                place = tmp_path / "two" / strategy / f"{name}-{rank}-of-2.safetensors"
                assert_same_weights(load_file(place), weights, 10 * tolerance)
