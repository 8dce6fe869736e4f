"""Arms are compared on the same rows, seed by seed."""

import random

import pytest

from potstill.evaluate.paired import MeasuredRows, PairedArm, paired_arms

Run = tuple[str, int, MeasuredRows]


def rows(
    name: str, shift: float, *, seed: int, prompts: int = 30, samples: int = 2
) -> dict[str, tuple[str, float, float]]:
    """Nats and tokens of rows as difficult as prompt and seed make them, and `shift` nats a token more."""
    chance, found = random.Random(seed), {}
    for prompt in range(prompts):
        hard = chance.uniform(0.5, 4.0)
        for sample in range(samples):
            tokens = chance.randint(20, 90)
            noise = random.Random(f"{name} {prompt} {sample}").gauss(0, 0.05)
            key = f"s{seed} p{prompt} {sample}"
            found[key] = (f"p{prompt}", (hard + shift + noise) * tokens, float(tokens))
    return found


def runs_of(arms: dict[str, float], seeds: tuple[int, ...] = (1, 2, 3)) -> list[Run]:
    return [
        (arm, seed, rows(f"{arm}{seed}", shift, seed=seed)) for arm, shift in arms.items() for seed in seeds
    ]


def width(arm: PairedArm) -> float:
    assert arm.difference is not None
    return arm.difference.high - arm.difference.low


def test_a_small_difference_is_clear_where_prompts_differ_far_more() -> None:
    first, other = paired_arms(runs_of({"rule": 0.0, "random": 0.1}))
    assert (first.difference, first.by_seed) == (None, [])
    assert other.difference is not None
    assert other.difference.low < 0.1 < other.difference.high
    assert other.difference.low > 0.05
    assert other.figure.high - other.figure.low > 4 * width(other)
    assert (other.seeds, len(other.by_seed)) == (3, 3)
    assert other.by_seed == pytest.approx([0.1] * 3, abs=0.05)


def test_the_difference_is_of_sums_over_tokens() -> None:
    found = paired_arms(
        [
            ("a", 0, {"r0": ("p0", 10.0, 10.0), "r1": ("p1", 90.0, 30.0)}),
            ("b", 0, {"r0": ("p0", 20.0, 10.0), "r1": ("p1", 90.0, 30.0)}),
        ]
    )
    assert found[0].figure.value == pytest.approx(100 / 40)
    assert found[1].difference is not None
    assert found[1].difference.value == pytest.approx(10 / 40)
    assert found[1].by_seed == [], "one seed has nothing to add"


def test_only_rows_that_both_were_measured_on_are_compared() -> None:
    whole = ("whole", 1, rows("whole", 0.0, seed=1))
    part = ("part", 1, rows("part", 0.2, seed=1, prompts=10))
    apart = ("apart", 9, rows("apart", 0.0, seed=9))
    _, second, third = paired_arms([whole, part, apart])
    assert second.difference is not None
    assert second.difference.value == pytest.approx(0.2, abs=0.05)
    assert third.difference is None


def test_more_seeds_do_not_pass_for_more_prompts() -> None:
    one = {arm: rows(arm, shift, seed=1) for arm, shift in (("rule", 0.0), ("random", 0.1))}
    seeds = [[(arm, seed, one[arm]) for arm in one for seed in range(n)] for n in (1, 9)]
    (_, alone), (_, repeated) = map(paired_arms, seeds)
    assert repeated.seeds == 9
    assert width(repeated) == pytest.approx(width(alone))
    assert repeated.figure.high - repeated.figure.low == pytest.approx(alone.figure.high - alone.figure.low)


def test_the_same_rows_give_the_same_interval() -> None:
    runs = runs_of({"rule": 0.0, "random": 0.1})
    assert paired_arms(runs) == paired_arms(runs)


def test_shares_have_a_width_within_their_bounds_where_all_prompts_agree() -> None:
    runs = [
        (arm, 1, {f"r{n}": (f"p{n}", right, 1.0) for n in range(9)})
        for arm, right in (("a", 0.0), ("b", 1.0))
    ]
    first, second = paired_arms(runs, within=(0, 1))
    assert 0 == first.figure.low < first.figure.high < 0.5 < second.figure.low < second.figure.high == 1
    assert second.difference is not None
    assert 0 < second.difference.low < second.difference.value == second.difference.high == 1


def test_arms_without_rows_are_left_out() -> None:
    assert paired_arms([("blind", 0, {})]) == []


def test_two_runs_of_one_arm_and_seed_are_not_taken_for_one() -> None:
    run = ("rule", 1, rows("rule", 0.0, seed=1))
    with pytest.raises(ValueError, match="two runs of the arm 'rule' have the seed 1"):
        paired_arms([run, run])
