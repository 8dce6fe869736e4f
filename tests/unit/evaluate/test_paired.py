"""Arms are compared on the same held-out traces, seed by seed."""

import random
from pathlib import Path

import pytest

from potstill.evaluate.paired import HeldOutRun, paired_kl
from potstill.evaluate.rows import HELD_OUT_FILE, TraceRow, write_traces


def evaluation(
    folder: Path, shift: float, *, seed: int, prompts: int = 30, samples: int = 2, scale: float = 1.0
) -> Path:
    """Trace rows whose difficulty is the prompt's and the seed's, and `shift` nats a token more."""
    chance = random.Random(seed)
    rows = []
    for prompt in range(prompts):
        hard = chance.uniform(0.5, 4.0) * scale
        for sample in range(samples):
            tokens = chance.randint(20, 90)
            noise = random.Random(f"{folder.name} {prompt} {sample}").gauss(0, 0.05)
            kl = (hard + shift + noise) * tokens
            rows.append(
                TraceRow(f"s{seed} p{prompt} {sample}", f"p{prompt}", tokens, kl + 1, kl, tokens // 2)
            )
    folder.mkdir(parents=True)
    write_traces(folder / HELD_OUT_FILE, {"base": [TraceRow("x", "x", 1, 1.0, 99.0, 0)], "student": rows})
    return folder


def runs_of(root: Path, arms: dict[str, float], seeds: tuple[int, ...] = (1, 2, 3)) -> list[HeldOutRun]:
    return [
        HeldOutRun(arm, seed, evaluation(root / f"{arm}{seed}", shift, seed=seed), "student")
        for arm, shift in arms.items()
        for seed in seeds
    ]


def test_a_small_difference_is_clear_where_prompts_differ_far_more(tmp_path: Path) -> None:
    first, other = paired_kl(runs_of(tmp_path, {"rule": 0.0, "random": 0.1}))
    assert (first.difference, first.by_seed) == (None, [])
    assert other.difference is not None
    assert other.difference.low < 0.1 < other.difference.high
    assert other.difference.low > 0.05
    assert other.kl.high - other.kl.low > 4 * (other.difference.high - other.difference.low)
    assert (other.seeds, len(other.by_seed)) == (3, 3)
    assert other.by_seed == pytest.approx([0.1] * 3, abs=0.05)


def test_the_difference_is_of_sums_over_tokens(tmp_path: Path) -> None:
    for name, kl in (("a", [10.0, 90.0]), ("b", [20.0, 90.0])):
        (tmp_path / name).mkdir()
        rows = [TraceRow(f"r{n}", f"p{n}", tokens, 0.0, kl[n], 0) for n, tokens in enumerate((10, 30))]
        write_traces(tmp_path / name / HELD_OUT_FILE, {"student": rows})
    found = paired_kl([HeldOutRun(name, 0, tmp_path / name, "student") for name in ("a", "b")])
    assert found[0].kl.value == pytest.approx(100 / 40)
    assert found[1].difference is not None
    assert found[1].difference.value == pytest.approx(10 / 40)
    assert found[1].by_seed == [], "one seed has nothing to add"


def test_only_traces_that_both_were_measured_on_are_compared(tmp_path: Path) -> None:
    whole = HeldOutRun("whole", 1, evaluation(tmp_path / "whole", 0.0, seed=1), "student")
    part = HeldOutRun("part", 1, evaluation(tmp_path / "part", 0.2, seed=1, prompts=10), "student")
    apart = HeldOutRun("apart", 9, evaluation(tmp_path / "apart", 0.0, seed=9), "student")
    _, second, third = paired_kl([whole, part, apart])
    assert second.difference is not None
    assert second.difference.value == pytest.approx(0.2, abs=0.05)
    assert third.difference is None


def test_more_seeds_do_not_pass_for_more_prompts(tmp_path: Path) -> None:
    one = {arm: evaluation(tmp_path / arm, shift, seed=1) for arm, shift in (("rule", 0.0), ("random", 0.1))}
    seeds = [[HeldOutRun(arm, seed, one[arm], "student") for arm in one for seed in range(n)] for n in (1, 9)]
    (_, alone), (_, repeated) = map(paired_kl, seeds)
    assert repeated.seeds == 9
    for first, second in ((alone.kl, repeated.kl), (alone.difference, repeated.difference)):
        assert first is not None
        assert second is not None
        assert second.high - second.low == pytest.approx(first.high - first.low)


def test_the_same_seed_gives_the_same_interval(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"rule": 0.0, "random": 0.1})
    assert paired_kl(runs) == paired_kl(runs)


def test_arms_without_a_teacher_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "blind").mkdir()
    write_traces(tmp_path / "blind" / HELD_OUT_FILE, {"student": [TraceRow("r", "p", 3, 1.0)]})
    assert paired_kl([HeldOutRun("blind", 0, tmp_path / "blind", "student")]) == []
