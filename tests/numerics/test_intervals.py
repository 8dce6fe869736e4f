"""Intervals against published values and naive computations."""

import itertools
import math
import random

import pytest

from potstill.evaluate.intervals import (
    RESAMPLES,
    bootstrap_ratio,
    bootstrap_ratio_difference,
    clustered_share,
    clustered_share_difference,
    independent_share_difference,
    mcnemar_exact,
    paired_share_difference,
    pass_at_k,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), p. 857, table I: the plain score method.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(
    successes: int, trials: int, low: float, high: float
) -> None:
    found = wilson_interval(successes, trials)
    assert found.value == successes / trials
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize("trials", [1, 7, 100])
def test_a_wilson_interval_ends_where_the_score_test_stops_rejecting(trials: int) -> None:
    for successes in range(trials + 1):
        found = wilson_interval(successes, trials)
        for end in (found.low, found.high):
            if 0 < end < 1:
                score = abs(successes / trials - end) / math.sqrt(end * (1 - end) / trials)
                assert score == pytest.approx(1.959963985, abs=1e-6)
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_wilson_refuses_a_share_of_nothing() -> None:
    with pytest.raises(ValueError, match="0 of 0 is no share"):
        wilson_interval(0, 0)


def _pairs(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    rows = [(True, True)] * both + [(True, False)] * only_first
    rows += [(False, True)] * only_second + [(False, False)] * neither
    random.Random(0).shuffle(rows)
    return [first for first, _ in rows], [second for _, second in rows]


def test_the_paired_interval_is_the_published_one() -> None:
    # Airway hyper-reactivity of 21 children before and after transplantation (Bentur et al. 2009); Fagerland,
    # Lydersen and Laake, Statistical Analysis of Contingency Tables: 28.6 points, from 2.6 to 50.7.
    found = paired_share_difference(*_pairs(1, 1, 7, 12))
    assert found.value == pytest.approx(6 / 21)
    assert found.low == pytest.approx(0.026, abs=5e-4)
    assert found.high == pytest.approx(0.507, abs=5e-4)


def test_the_exact_mcnemar_p_value_is_the_published_one() -> None:
    # The same children: exact conditional p = 0.0703.
    assert mcnemar_exact(*_pairs(1, 1, 7, 12)) == pytest.approx(0.0703, abs=5e-5)


@pytest.mark.parametrize(("one", "other"), [(0, 0), (3, 3), (0, 6), (2, 9)])
def test_mcnemar_counts_the_splits_that_are_no_likelier(one: int, other: int) -> None:
    splits = [sum(toss) for toss in itertools.product((0, 1), repeat=one + other)]
    as_uneven = sum(abs(heads - (one + other) / 2) >= abs(one - other) / 2 for heads in splits)
    assert mcnemar_exact(*_pairs(4, one, other, 5)) == pytest.approx(as_uneven / len(splits))


def test_swapping_the_models_mirrors_the_paired_interval() -> None:
    first, second = _pairs(13, 4, 9, 20)
    forth, back = paired_share_difference(first, second), paired_share_difference(second, first)
    assert forth.value == pytest.approx(-back.value)
    assert (forth.low, forth.high) == (pytest.approx(-back.high), pytest.approx(-back.low))


def test_models_that_agree_on_every_prompt_differ_by_nothing_within_a_narrow_interval() -> None:
    found = paired_share_difference(*_pairs(40, 0, 0, 60))
    unpaired = wilson_interval(40, 100)
    assert found.value == 0
    assert found.low < 0 < found.high
    assert found.high - found.low < 0.5 * (unpaired.high - unpaired.low)


def test_perfect_and_hopeless_models_stay_within_their_range() -> None:
    for cells in ((0, 0, 25, 0), (25, 0, 0, 0), (0, 0, 0, 25), (0, 25, 0, 0)):
        found = paired_share_difference(*_pairs(*cells))
        assert -1 <= found.low <= found.value <= found.high <= 1


def test_the_paired_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    chance, trials, covered = random.Random(3), 60, 0
    rounds = 600
    for _ in range(rounds):
        # Shares of 0.3 and 0.5, dependent: half of the prompts are drawn once for both.
        draws = [(chance.random(), chance.random(), chance.random() < 0.5) for _ in range(trials)]
        first = [a < 0.3 for a, _, _ in draws]
        second = [(a if shared else b) < 0.5 for a, b, shared in draws]
        found = paired_share_difference(first, second)
        covered += found.low <= 0.2 <= found.high
    assert 0.925 <= covered / rounds <= 0.985


@pytest.mark.parametrize(("samples", "right"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 4), (5, 5)])
def test_pass_at_k_is_the_share_of_choices_of_k_answers_with_a_right_one(samples: int, right: int) -> None:
    answers = [number < right for number in range(samples)]
    for k in range(1, samples + 1):
        choices = list(itertools.combinations(answers, k))
        expected = sum(map(any, choices)) / len(choices)
        assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_unbiased_where_guessing_from_the_share_is_not() -> None:
    samples, k, truth = 6, 4, 1 - 0.7**4
    chances = [math.comb(samples, c) * 0.3**c * 0.7 ** (samples - c) for c in range(samples + 1)]
    mean = sum(chance * pass_at_k(samples, c, k) for c, chance in enumerate(chances))
    naive = sum(chance * (1 - (1 - c / samples) ** k) for c, chance in enumerate(chances))
    assert mean == pytest.approx(truth, abs=1e-12)
    assert abs(naive - truth) > 0.01


def test_pass_at_more_than_there_are_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@5 cannot be told from 4 samples"):
        pass_at_k(4, 2, 5)


@pytest.mark.parametrize("right", [0, 1, 13, 20])
def test_with_one_sample_a_prompt_the_clustered_interval_is_wilsons(right: int) -> None:
    found = clustered_share([1.0] * right + [0.0] * (20 - right), samples=1)
    expected = wilson_interval(right, 20)
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )


def test_samples_that_always_agree_are_worth_no_more_than_their_prompt() -> None:
    once = [1.0] * 30 + [0.0] * 20
    many, one = clustered_share(once, samples=16), wilson_interval(30, 50)
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.02)


def test_samples_that_are_independent_are_worth_as_many_prompts() -> None:
    chance = random.Random(5)
    values = [sum(chance.random() < 0.4 for _ in range(16)) / 16 for _ in range(400)]
    found, all_answers = clustered_share(values, samples=16), wilson_interval(round(sum(values) * 16), 6400)
    assert found.high - found.low == pytest.approx(all_answers.high - all_answers.low, rel=0.1)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_prompts_that_are_all_alike_still_leave_doubt(value: float) -> None:
    found = clustered_share([value] * 6, samples=4)
    assert 0 <= found.low <= value <= found.high <= 1
    assert found.high - found.low > 0.15


def _two_models(chance: random.Random, prompts: int, samples: int) -> tuple[list[float], list[float]]:
    """Shares of right answers of two models, by prompts of different difficulty: 0.4 and 0.6 on average."""
    first, second = [], []
    for _ in range(prompts):
        ease = chance.choice([-0.3, -0.1, 0.1, 0.3])
        for values, share in ((first, 0.4 + ease), (second, 0.6 + ease)):
            values.append(sum(chance.random() < share for _ in range(samples)) / samples)
    return first, second


def test_intervals_clustered_by_prompt_cover_the_truth_about_as_often_as_they_say() -> None:
    chance, rounds, alone, apart, flat = random.Random(9), 600, 0, 0, 0
    for _ in range(rounds):
        first, second = _two_models(chance, 40, 4)
        share, gap = clustered_share(first, samples=4), clustered_share_difference(first, second, samples=4)
        alone += share.low <= 0.4 <= share.high
        apart += gap.low <= 0.2 <= gap.high
        pooled = wilson_interval(round(sum(first) * 4), 160)
        flat += pooled.low <= 0.4 <= pooled.high
    assert 0.93 <= alone / rounds <= 0.98
    assert 0.93 <= apart / rounds <= 0.98
    assert flat < alone, "as if all answers were independent"


def test_pairing_by_prompt_narrows_the_interval_of_clustered_shares() -> None:
    first, second = _two_models(random.Random(2), 60, 4)
    paired = clustered_share_difference(first, second, samples=4)
    loose = independent_share_difference(
        clustered_share(first, samples=4), clustered_share(second, samples=4)
    )
    assert paired.value == pytest.approx(loose.value)
    assert paired.high - paired.low < 0.85 * (loose.high - loose.low)


def test_the_independent_interval_is_the_published_one() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), p. 873, table II, method 10: 56/70 - 48/80.
    found = independent_share_difference(wilson_interval(48, 80), wilson_interval(56, 70))
    assert found.value == pytest.approx(0.2)
    assert found.low == pytest.approx(0.0524, abs=5e-5)
    assert found.high == pytest.approx(0.3339, abs=5e-5)


def test_unequal_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        paired_share_difference([True], [True, False])


def _rows(count: int, seed: int = 1) -> tuple[list[float], list[int], list[str]]:
    chance = random.Random(seed)
    tokens = [chance.randint(5, 60) for _ in range(count)]
    sums = [token * chance.gauss(1.3, 0.4) for token in tokens]
    return sums, tokens, [f"prompt {number}" for number in range(count)]


@pytest.mark.parametrize(("prompts", "most"), [(2, 0.12), (3, 0.1), (5, 0.08), (10, 0.08), (30, 0.08)])
def test_a_bootstrap_over_few_prompts_seldom_calls_noise_a_difference(prompts: int, most: float) -> None:
    clear = 0
    for trial in range(200):
        chance = random.Random(trial)
        values = [chance.gauss(0, 1) for _ in range(prompts)]
        found = bootstrap_ratio(values, [1] * prompts, [str(one) for one in range(prompts)], seed=0)
        clear += not found.low <= 0 <= found.high
    assert clear / 200 <= most


def test_one_prompt_has_no_interval_and_a_bounded_ratio_stays_within_its_bounds() -> None:
    alone = bootstrap_ratio([3.0, 1.0], [1, 1], ["p", "p"], seed=0)
    assert (alone.low, alone.high, alone.as_dict()) == (-math.inf, math.inf, {"value": 2.0})
    found = bootstrap_ratio([0.0, 1.0, 1.0], [1] * 3, list("abc"), seed=0, within=(0, 1))
    assert (found.low, found.high) == (0.0, 1.0)


def test_the_bootstrap_of_a_ratio_agrees_with_the_delta_method() -> None:
    sums, tokens, prompts = _rows(300)
    found = bootstrap_ratio(sums, tokens, prompts, seed=7)
    ratio = sum(sums) / sum(tokens)
    residuals = [top - ratio * bottom for top, bottom in zip(sums, tokens, strict=True)]
    error = math.sqrt(sum(one * one for one in residuals)) / sum(tokens)
    assert found.value == pytest.approx(ratio)
    assert found.low == pytest.approx(ratio - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(ratio + 1.96 * error, abs=0.15 * error)


def test_the_bootstrap_agrees_with_plain_resampling_of_rows() -> None:
    sums, tokens, prompts = _rows(25)
    chance, draws = random.Random(11), []
    for _ in range(RESAMPLES):
        chosen = chance.choices(range(25), k=25)
        draws.append(sum(sums[row] for row in chosen) / sum(tokens[row] for row in chosen))
    draws.sort()
    found = bootstrap_ratio(sums, tokens, prompts, seed=7)
    spread = found.high - found.low
    assert found.low == pytest.approx(draws[round(0.025 * RESAMPLES)], abs=0.06 * spread)
    assert found.high == pytest.approx(draws[round(0.975 * RESAMPLES)], abs=0.06 * spread)


def test_samples_of_one_prompt_are_drawn_together() -> None:
    sums, tokens, prompts = _rows(60)
    single = bootstrap_ratio(sums, tokens, prompts, seed=7)
    copies = bootstrap_ratio(sums * 9, tokens * 9, prompts * 9, seed=7)
    assert (copies.low, copies.high) == (pytest.approx(single.low), pytest.approx(single.high))


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    sums, tokens, prompts = _rows(80)
    chance = random.Random(4)
    better = [top - chance.gauss(0.1, 0.01) * bottom for top, bottom in zip(sums, tokens, strict=True)]
    found = bootstrap_ratio_difference((sums, tokens), (better, tokens), prompts, seed=7)
    alone = bootstrap_ratio(sums, tokens, prompts, seed=7)
    assert found.value == pytest.approx(-0.1, abs=0.005)
    # Every row differs by about as much, so the difference is sure, though each model's own figure is not.
    assert 0 < found.high - found.low < 0.01
    assert alone.high - alone.low > 0.05


def _alike(value: float, prompts: int) -> tuple[list[float], list[int], list[str]]:
    return [value] * prompts, [1] * prompts, [str(one) for one in range(prompts)]


@pytest.mark.parametrize("prompts", [1, 2, 3, 10, 300])
@pytest.mark.parametrize("value", [0.0, 0.6, 1.0])
def test_a_bounded_mean_has_a_width_within_its_bounds_where_all_prompts_agree(
    value: float, prompts: int
) -> None:
    found = bootstrap_ratio(*_alike(value, prompts), seed=0, within=(0, 1))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > min(0.5, 1 / prompts)
    assert found.high - found.low < 12 / prompts


@pytest.mark.parametrize(("prompts", "gap"), [(2, 0.1), (2, 1), (4, 1)])
def test_equal_gaps_on_few_prompts_are_no_difference(prompts: int, gap: float) -> None:
    first, ones, names = _alike(0.0, prompts)
    found = bootstrap_ratio_difference((first, ones), ([gap] * prompts, ones), names, seed=0, within=(0, 1))
    assert -1 <= found.low < 0 < found.value == pytest.approx(gap)
    assert found.value <= found.high <= 1


def test_equal_gaps_on_many_prompts_are_a_difference() -> None:
    first, ones, names = _alike(0.5, 300)
    found = bootstrap_ratio_difference((first, ones), ([0.6] * 300, ones), names, seed=0, within=(0, 1))
    assert 0.08 < found.low < 0.1 < found.high < 0.12


def test_without_bounds_prompts_that_are_alike_have_no_interval() -> None:
    first, ones, names = _alike(1234.5, 7)
    gap = bootstrap_ratio_difference((first, ones), ([1234.6] * 7, ones), names, seed=0)
    assert (gap.low, gap.high) == (-math.inf, math.inf)
    assert bootstrap_ratio(first, ones, names, seed=0, within=(0, math.inf)).as_dict() == {"value": 1234.5}


def test_a_mean_of_scores_that_are_mostly_full_covers_the_truth_as_often_as_it_says() -> None:
    # One score in twenty is 0.2: thirty prompts often show none, and a plain bootstrap is sure of 1 then.
    chance, rounds, covered, plain = random.Random(6), 300, 0, 0
    for _ in range(rounds):
        values = [0.2 if chance.random() < 0.05 else 1.0 for _ in range(30)]
        rows = (values, [1] * 30, [str(one) for one in range(30)])
        found, unbounded = bootstrap_ratio(*rows, seed=0, within=(0, 1)), bootstrap_ratio(*rows, seed=0)
        covered += found.low <= 0.96 <= found.high
        plain += math.isfinite(unbounded.low) and unbounded.low <= 0.96 <= unbounded.high
    assert covered / rounds >= 0.94
    assert plain / rounds < 0.85


def test_a_seed_decides_the_interval() -> None:
    sums, tokens, prompts = _rows(30)
    assert bootstrap_ratio(sums, tokens, prompts, seed=1) == bootstrap_ratio(sums, tokens, prompts, seed=1)
    assert bootstrap_ratio(sums, tokens, prompts, seed=1) != bootstrap_ratio(sums, tokens, prompts, seed=2)


def test_many_prompts_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, tokens, prompts = _rows(40)
    whole = bootstrap_ratio(sums, tokens, prompts, seed=5)
    monkeypatch.setattr("potstill.evaluate.intervals._RESAMPLE_CELLS", 40 * 333)
    assert bootstrap_ratio(sums, tokens, prompts, seed=5) == whole
