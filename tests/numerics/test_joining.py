"""Joined changes against the papers' definitions, entry by entry in float64."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from potstill.merge import Method
from potstill.merge.joining import joined_change

SHAPE = (7, 11)
WEIGHTS = [[1.0, 1.0, 1.0], [0.5, 0.2, 1.7]]


def some_changes(count: int = 3, *, shape: tuple[int, ...] = SHAPE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def naive_ties(changes: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Yadav et al. 2023, section 3: trim, elect signs, average those that agree."""
    trimmed = []
    for change in changes:
        flat = change.double().flatten().tolist()
        kept = sorted(range(len(flat)), key=lambda place: -abs(flat[place]))[: int(density * len(flat))]
        trimmed.append([value if place in kept else 0.0 for place, value in enumerate(flat)])
    joined = []
    for values in zip(*trimmed, strict=True):
        elected = math.copysign(1.0, sum(values))
        agreeing = [
            weight * value for weight, value in zip(weights, values, strict=True) if value * elected > 0
        ]
        joined.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(joined, dtype=torch.float64).reshape(changes[0].shape)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_linear_is_the_weighted_sum(weights: list[float]) -> None:
    changes = some_changes()
    expected = sum(weight * one.double() for weight, one in zip(weights, changes, strict=True))
    found = joined_change(changes, weights, "linear", 0.2, seed=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_trims_elects_signs_and_averages_what_agrees(weights: list[float], density: float) -> None:
    changes = some_changes()
    found = joined_change(changes, weights, "ties", density, seed=1).double()
    torch.testing.assert_close(found, naive_ties(changes, weights, density), rtol=1e-6, atol=1e-6)
    # Each of its three parts matters here.
    assert ((found == 0) & (changes[0] != 0)).any()
    clashing = torch.stack(changes).sign().sum(0).abs() < 3
    assert ((found != 0) & clashing).any()
    assert not torch.allclose(found, sum(changes).double() / 3)


def test_ties_by_hand() -> None:
    changes = [torch.tensor([3.0, -2.0, 0.1, 0.2]), torch.tensor([1.0, 5.0, 0.3, -0.1])]
    found = joined_change(changes, [1.0, 1.0], "ties", 0.5, seed=1)
    assert found.tolist() == [2.0, 5.0, 0.0, 0.0]


def test_dare_keeps_each_entry_with_the_stated_chance_and_scales_it_by_its_inverse() -> None:
    density = 0.3
    [change] = some_changes(1, shape=(200, 500))
    found = joined_change([change], [1.0], "dare_linear", density, seed=9)
    kept = found != 0
    torch.testing.assert_close(found[kept], change[kept] / density, rtol=1e-6, atol=0.0)
    spread = math.sqrt(density * (1 - density) / change.numel())
    assert abs(kept.double().mean().item() - density) < 5 * spread


def test_dare_leaves_the_change_as_it_is_in_the_mean_over_seeds() -> None:
    changes, weights, draws = some_changes(2, shape=(40,)), [0.5, 0.5], 2000
    found = torch.stack(
        [joined_change(changes, weights, "dare_linear", 0.5, seed=seed) for seed in range(draws)]
    ).double()
    expected = sum(0.5 * one.double() for one in changes)
    error = (found.mean(0) - expected) / (found.std(0) / math.sqrt(draws))
    assert error.abs().max() < 5


def test_dare_ties_elects_signs_among_the_entries_that_stayed() -> None:
    changes, ones = some_changes(2), [1.0, 1.0]
    found = joined_change(changes, ones, "dare_ties", 0.5, seed=3).double()
    alone = [
        joined_change(changes, weights, "dare_linear", 0.5, seed=3).double()
        for weights in ([1.0, 0.0], [0.0, 1.0])
    ]
    expected = naive_ties(alone, ones, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (torch.stack(alone).sign().prod(0) < 0).any(), "no signs clash"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_drawn_from_its_seed_alone(method: Method) -> None:
    changes = some_changes(2)
    found = []
    for seed, noise in itertools.product((1, 2), (10, 20)):
        torch.manual_seed(noise)
        found.append(joined_change(changes, [1.0, 1.0], method, 0.5, seed=seed))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert not torch.equal(found[0], found[2])
