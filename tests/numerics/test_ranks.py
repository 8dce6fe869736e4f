"""Two processes over gloo train as one: the same losses, gradient norms and weights, whatever the signal."""

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
from .ranks import BROKEN, CASES, FAULTY_ROW, RESUMED, SAVED_STEP, STEPS, train
from .test_training_invariance import ROWS, TEMPERATURE, VOCABULARY, teacher_signal

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHECKPOINT = Path("output-adapter") / f"checkpoint-{SAVED_STEP}"


def write_cache(folder: Path, codec: Codec) -> None:
    folder.mkdir()
    teacher = _build(seed=1)
    writer = ShardWriter(folder, codec, tokenizer="t", model="m")
    rows = [CachedRow(row.ids, row.mask, held_out=False, record_id=f"r{n}") for n, row in enumerate(ROWS)]
    for row, rendered in zip(rows, ROWS, strict=True):
        logits_NV = teacher_signal(teacher, [rendered]).logits_NV
        encode = codec.encoder([row.key], [len(logits_NV)])
        writer.append(row, encode(logits_NV, slice(0, len(logits_NV))))
    writer.seal()
    write_index(folder, rows)


@dataclass
class Trainings:
    """By name of the case: what one process did, and what each of two did."""

    folder: Path
    one: dict[str, Any]
    two: list[dict[str, Any]]

    def weights(self, name: str, ranks: int, rank: int = 0) -> dict[str, Tensor]:
        folder = self.folder / ("one" if ranks == 1 else "two")
        return load_file(folder / f"{name}-{rank}-of-{ranks}.safetensors")


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory, shared_model_folder: Path) -> Trainings:
    folder = tmp_path_factory.mktemp("ranks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for place in (folder / "one", folder / "two"):
        place.mkdir()
        shutil.copytree(shared_model_folder, place / "base")
        write_cache(place / "topk", TopK(8, VOCABULARY, (1.0, TEMPERATURE)))
        write_cache(place / "sampled", Draws(20, VOCABULARY))
    one = {name: train(case, name, folder / "one") for name, case in CASES.items()}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given = [str(folder / "two"), str(folder / "one" / CHECKPOINT)]
    done = subprocess.run(
        [*launch, "--module", "tests.numerics.ranks", *given],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = [json.loads((folder / "two" / f"rank-{rank}.json").read_text("utf-8")) for rank in range(2)]
    one["resumed"] = train(RESUMED, "resumed", folder / "one", folder / "two" / CHECKPOINT)
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


@pytest.mark.parametrize("name", [name for name in CASES if name != "stopped"])
def test_two_ranks_train_as_one_process(trainings: Trainings, name: str) -> None:
    tolerance = 1e-3 if name == "nf4" else 1e-6  # in float32, through the bits of a few numbers
    expected = trainings.one[name]
    steps = [point for point in figures(expected) if "grad_norm" in point]
    assert [point["step"] for point in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"]
    for rank in range(2):
        assert_alike(trainings.two[rank][name], expected, tolerance)
        assert_same_weights(trainings.weights(name, 2, rank), trainings.weights(name, 1), 10 * tolerance)


def test_all_ranks_count_the_experts_of_one_process(trainings: Trainings) -> None:
    def counts(training: dict[str, Any]) -> list[Any]:
        return [entry["expert_counts"] for entry in training["log"] if "expert_counts" in entry]

    expected = counts(trainings.one["mixture"])
    assert sum(expected[0]["model.layers.0.mlp.gate"]) == 2 * sum(
        len(ROWS[number].ids) for number in (7, 0, 1)
    )
    assert [counts(trainings.two[rank]["mixture"]) for rank in range(2)] == [expected, expected]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_exchange_would_be_seen(trainings: Trainings, name: str) -> None:
    with pytest.raises(AssertionError):
        assert_alike(trainings.two[0][name], trainings.one["response"], 1e-2)


def test_weights_stay_the_same_to_the_last_bit_on_all_ranks(trainings: Trainings) -> None:
    for name in CASES:
        first, second = (trainings.weights(name, 2, rank) for rank in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)
    first, second = (trainings.weights("unsynchronised", 2, rank) for rank in range(2))
    assert not all(torch.equal(first[key], second[key]) for key in first)


def test_all_ranks_stop_early_alike_and_keep_the_weights_of_one_process(trainings: Trainings) -> None:
    expected = figures(trainings.one["stopped"])
    losses = {point["step"]: point["eval_loss"] for point in expected if "eval_loss" in point}
    assert 0 < min(losses, key=losses.__getitem__) < max(losses) < STEPS
    for rank in range(2):
        assert_alike(trainings.two[rank]["stopped"], trainings.one["stopped"], 1e-4)
        assert_same_weights(trainings.weights("stopped", 2, rank), trainings.weights("stopped", 1), 1e-4)


def test_one_rank_writes(trainings: Trainings) -> None:
    for name in ("adapter", "stopped"):
        assert trainings.one[name]["written"] > 0
        assert trainings.two[0][name]["written"] == trainings.one[name]["written"]
        assert trainings.two[1][name]["written"] == 0


def test_a_checkpoint_of_one_process_resumes_in_two_and_the_other_way(trainings: Trainings) -> None:
    expected = trainings.weights("adapter", 1)
    for training, ranks in ((trainings.two[0], 2), (trainings.two[1], 2), (trainings.one, 1)):
        assert_alike(training["resumed"], trainings.one["adapter"])
        assert_same_weights(trainings.weights("resumed", ranks), expected, 1e-5)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_its_rows(trainings: Trainings) -> None:
    first, second = (trainings.two[rank]["faulty"] for rank in range(2))
    assert first["failure"] == second["failure"]
    assert FAULTY_ROW in first["failure"]
    assert "the loss is nan" in first["failure"]
    assert all(math.isfinite(point["loss"]) for point in figures(first))
