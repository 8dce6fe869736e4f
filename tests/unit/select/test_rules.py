"""Which rows a rule keeps, and which its controls keep, whatever order they come in."""

import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.hashing import derive_seed
from potstill.select import candidates as table
from potstill.select.candidates import Arm, Candidate, Candidates
from potstill.select.rules import keep_at_random, keep_best, keep_of_like_length
from potstill.select.settings import Keep

Control = Callable[[list[Candidate], list[Candidate], Keep, int], list[Candidate]]


@contextmanager
def _table(rows: Sequence[Candidate], seed: int = 7) -> Iterator[Candidates]:
    with tempfile.TemporaryDirectory() as folder, Candidates(Path(folder) / "rows", seed) as candidates:
        for one in rows:
            candidates.add(one, {"score": one.score, "tokens": float(one.tokens)})
        candidates.flush()
        yield candidates


def _kept(candidates: Candidates, arm: Arm, rows: Sequence[Candidate]) -> list[Candidate]:
    """The rows of an arm, in the order of the rule."""
    found = [one for one in rows if candidates.outcome(one.row, arm).kept]
    assert candidates.count(arm) == len(found)
    return sorted(found, key=lambda one: (-one.score, -one.divergence, one.id, one.row))


def best(rows: list[Candidate], keep: Keep) -> list[Candidate]:
    with _table(rows) as candidates:
        keep_best(candidates, keep)
        return _kept(candidates, "rule", rows)


def _control(choose: Callable[[Candidates, Keep], None], arm: Arm) -> Control:
    def control(rows: list[Candidate], kept: list[Candidate], keep: Keep, seed: int) -> list[Candidate]:
        with _table(rows, seed) as candidates:
            keep_best(candidates, keep)
            assert _kept(candidates, "rule", rows) == kept
            choose(candidates, keep)
            return _kept(candidates, arm, rows)

    return control


at_random = _control(keep_at_random, "random")
of_like_length = _control(keep_of_like_length, "length")
CONTROLS: list[Control] = [at_random, of_like_length]


def _first(ranked: list[Candidate], quotas: Counter[Any], group: Callable[[Candidate], Any]) -> set[int]:
    found = set()
    for one in ranked:
        if quotas[group(one)] > 0:
            quotas[group(one)] -= 1
            found.add(one.row)
    return found


def _drawn(rows: list[Candidate], seed: int, purpose: str) -> list[Candidate]:
    return sorted(rows, key=lambda one: (derive_seed(seed, purpose, one.id), one.id, one.row))


def naive(rows: list[Candidate], keep: Keep, seed: int) -> dict[Arm, set[int]]:
    """What each arm keeps, from lists that are sorted whole."""
    ranked = sorted(rows, key=lambda one: (-one.score, -one.divergence, one.id, one.row))
    if keep.threshold is not None:
        kept = [one for one in ranked if one.score >= keep.threshold]
    elif keep.top is not None:
        kept = ranked[: math.ceil(Fraction(str(keep.top)) * len(ranked))]
    else:
        quotas = Counter({one.prompt_id: keep.per_prompt or 0 for one in ranked})
        first = _first(ranked, quotas, lambda one: one.prompt_id)
        kept = [one for one in ranked if one.row in first]
    by_prompt = keep.per_prompt is not None

    def group(one: Candidate) -> Any:
        return one.prompt_id if by_prompt else None

    lengths = sorted(one.tokens for one in rows)
    count = max(1, min(50, math.isqrt(len(rows)) // 2))
    edges = [lengths[len(rows) * place // count] for place in range(1, count)]
    bins = {one.row: sum(one.tokens >= edge for edge in edges) for one in rows}
    by_length = _drawn(rows, seed, "length")
    wanted = Counter(bins[one.row] for one in kept)
    if not by_prompt:
        like = _first(by_length, wanted, lambda one: bins[one.row])
    else:
        left, like = Counter(bins.values()), set()
        quotas = Counter(one.prompt_id for one in kept)
        for prompt in dict.fromkeys(one.prompt_id for one in by_length):
            own = [one for one in by_length if one.prompt_id == prompt]
            for _ in range(quotas[prompt]):
                one = max(own, key=lambda row: wanted[bins[row.row]] / left[bins[row.row]])
                own.remove(one)
                wanted[bins[one.row]] -= 1
                left[bins[one.row]] -= 1
                like.add(one.row)
            left.subtract(bins[one.row] for one in own)
    return {
        "rule": {one.row for one in kept},
        "random": _first(_drawn(rows, seed, "random"), Counter(map(group, kept)), group),
        "length": like,
    }


def _row(number: int, score: float, *, prompt: str = "p", tokens: int = 10, gap: float = 0.0) -> Candidate:
    return Candidate(number, f"id{number:03d}", prompt, tokens, score, gap)


def _pool(count: int, *, prompts: int = 1, seed: int = 5) -> list[Candidate]:
    """Longer rows score higher, as sentence counts do."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        tokens = chance.randint(10, 400)
        score = tokens / 400 + chance.gauss(0, 0.1)
        rows.append(_row(number, score, prompt=f"p{number % prompts}", tokens=tokens, gap=score))
    return rows


def _ids(rows: list[Candidate]) -> list[str]:
    return sorted(one.id for one in rows)


candidates = st.lists(
    st.builds(
        Candidate,
        row=st.integers(0, 10**6),
        # Beyond the bytes of the one a letter's place in the other's alphabet: both orders are the letters'.
        id=st.text("abc\x00é\ud800\uffff𝄞", max_size=3),
        prompt_id=st.sampled_from(["p", "q", "r"]),
        tokens=st.integers(1, 50),
        score=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-1, 1)),
        divergence=st.one_of(st.sampled_from([0.0, 0.5]), st.floats(-1, 1)),
    ),
    min_size=1,
    max_size=40,
    unique_by=lambda one: one.row,
)
keeps = st.one_of(
    st.floats(0.01, 1).map(lambda share: Keep(top=share)),
    st.floats(-1, 1).map(lambda least: Keep(threshold=least)),
    st.integers(1, 3).map(lambda rows: Keep(per_prompt=rows)),
)


def test_a_share_is_the_highest_scores_rounded_up() -> None:
    rows = [_row(number, number / 10) for number in range(10)]
    assert [one.row for one in best(rows, Keep(top=0.3))] == [9, 8, 7]
    assert len(best(rows, Keep(top=0.31))) == 4
    assert len(best(rows, Keep(top=0.001))) == 1
    assert len(best([_row(number, 0.0) for number in range(100)], Keep(top=0.07))) == 7  # 0.07 * 100 > 7


def test_a_threshold_keeps_what_reaches_it() -> None:
    rows = [_row(number, score) for number, score in enumerate([0.1, 0.2, 0.3])]
    assert [one.row for one in best(rows, Keep(threshold=0.2))] == [2, 1]
    assert best(rows, Keep(threshold=0.4)) == []


def test_each_prompt_keeps_its_own_best() -> None:
    rows = [_row(number, score, prompt=prompt) for number, (score, prompt) in enumerate(
        [(0.9, "p"), (0.8, "p"), (0.1, "q"), (0.2, "q"), (0.0, "r")]
    )]  # fmt: skip
    assert sorted(one.row for one in best(rows, Keep(per_prompt=1))) == [0, 3, 4]
    assert sorted(one.row for one in best(rows, Keep(per_prompt=2))) == [0, 1, 2, 3, 4]


def test_between_equal_scores_the_divergence_decides_then_the_id() -> None:
    rows = [_row(3, 2.0, gap=0.1), _row(1, 2.0, gap=0.2), _row(2, 2.0, gap=0.1)]
    assert [one.row for one in best(rows, Keep(top=1.0))] == [1, 2, 3]


@settings(deadline=None, max_examples=40)  # a table's file is made each time
@given(candidates, keeps, st.randoms(use_true_random=False))
def test_the_rule_and_its_controls_keep_the_same_rows_whatever_the_order(
    rows: list[Candidate], keep: Keep, chance: random.Random
) -> None:
    shuffled = chance.sample(rows, len(rows))
    kept = best(rows, keep)
    assert best(shuffled, keep) == kept
    for control in CONTROLS:
        found = control(rows, kept, keep, 7)
        assert {one.row for one in control(shuffled, kept, keep, 7)} == {one.row for one in found}


@settings(deadline=None, max_examples=40)  # a table's file is made each time
@given(candidates, keeps, st.integers(0, 3))
def test_each_arm_keeps_the_rows_that_sorted_lists_would(
    rows: list[Candidate], keep: Keep, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, _table(rows, seed) as found:
        patch.setattr(table, "_PENDING_ROWS", 3)
        keep_best(found, keep)
        keep_at_random(found, keep)
        keep_of_like_length(found, keep)
        for arm, wanted in naive(rows, keep, seed).items():
            assert {one.row for one in _kept(found, arm, rows)} == wanted, arm


@pytest.mark.parametrize("keep", [Keep(top=0.4), Keep(threshold=0.5), Keep(per_prompt=1), Keep(per_prompt=3)])
def test_the_arms_of_many_rows_are_those_of_sorted_lists(keep: Keep) -> None:
    rows = _pool(600, prompts=100)
    with _table(rows, 3) as found:
        keep_best(found, keep)
        keep_at_random(found, keep)
        keep_of_like_length(found, keep)
        for arm, wanted in naive(rows, keep, 3).items():
            assert {one.row for one in _kept(found, arm, rows)} == wanted, arm


def test_a_row_has_its_scores_or_the_reason_why_it_has_none() -> None:
    with _table([_row(1, 0.25, tokens=3)]) as found:
        found.leave_out(2, "too long: \ud800")
        found.leave_out(4, "too long: \ud800")
        found.leave_out(3, "no bytes")
        found.flush()
        assert found.outcome(1, "all") == ({"score": 0.25, "tokens": 3.0}, None, True)
        assert found.outcome(2, "all") == ({}, "too long: \ud800", False)
        assert found.most_common_reasons(2) == [("too long: \ud800", 2), ("no bytes", 1)]


@settings(deadline=None, max_examples=40)  # a table's file is made each time
@given(candidates, keeps)
def test_a_control_keeps_as_many_rows_and_of_each_prompt_where_the_rule_goes_by_prompts(
    rows: list[Candidate], keep: Keep
) -> None:
    kept = best(rows, keep)
    for control in CONTROLS:
        found = control(rows, kept, keep, 7)
        assert len({one.row for one in found}) == len(found) == len(kept)
        assert {one.row for one in found} <= {one.row for one in rows}
        if keep.per_prompt is not None:
            assert Counter(one.prompt_id for one in found) == Counter(one.prompt_id for one in kept)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("keep", [Keep(top=0.5), Keep(per_prompt=2)])
def test_a_control_draws_by_its_seed(control: Control, keep: Keep) -> None:
    rows = _pool(120, prompts=30)
    kept = best(rows, keep)
    assert _ids(control(rows, kept, keep, 1)) == _ids(control(rows, kept, keep, 1))
    assert _ids(control(rows, kept, keep, 1)) != _ids(control(rows, kept, keep, 2))
    assert _ids(control(rows, kept, keep, 1)) != _ids(kept)


def _mean_tokens(rows: list[Candidate]) -> float:
    return math.fsum(one.tokens for one in rows) / len(rows)


@pytest.mark.parametrize("keep", [Keep(top=0.4), Keep(threshold=0.5), Keep(per_prompt=1)])
def test_lengths_are_matched_where_a_random_draw_misses_them(keep: Keep) -> None:
    rows = _pool(400, prompts=100)
    kept = best(rows, keep)
    wanted = _mean_tokens(kept)
    matched = _mean_tokens(of_like_length(rows, kept, keep, 3))
    drawn = _mean_tokens(at_random(rows, kept, keep, 3))
    assert drawn < 0.85 * wanted, "the rule does not go by length here: nothing is shown"
    assert matched == pytest.approx(wanted, rel=0.06)
    # It is no copy of the rule.
    assert len({*_ids(kept)} & {*_ids(of_like_length(rows, kept, keep, 3))}) < 0.95 * len(kept)


def test_matched_lengths_have_the_rules_own_distribution() -> None:
    rows = _pool(400)
    kept = best(rows, Keep(top=0.4))
    matched = of_like_length(rows, kept, Keep(top=0.4), 3)
    ours, theirs = (sorted(one.tokens for one in part) for part in (kept, matched))
    apart = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    widest = max(high - low for low, high in pairwise(sorted(one.tokens for one in rows)[::40]))
    assert max(apart) <= widest
