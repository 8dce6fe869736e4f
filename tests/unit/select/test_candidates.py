"""The table of scored rows: what is added is counted, kept by arms, and found again by its row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potstill.core.hashing import derive_seed
from potstill.select import candidates as table
from potstill.select.candidates import ARMS, Candidate, Candidates, Outcome

SEED = 7


@pytest.fixture
def candidates(tmp_path: Path) -> Iterator[Candidates]:
    with Candidates(tmp_path / "rows", SEED) as made:
        yield made


def candidate(row: int, **fields: Any) -> Candidate:
    names = {"row": row, "id": f"id{row}", "prompt_id": f"p{row}"}
    return Candidate(**{**names, "tokens": 10 + row, "score": row / 4, "divergence": -float(row), **fields})


def fill(candidates: Candidates, count: int) -> None:
    for row in range(count):
        candidates.add(candidate(row), {"divergence": row / 8, "surprise": -float(row)})
    candidates.flush()


class TestRows:
    def test_a_row_has_its_scores_and_whether_an_arm_keeps_it(self, candidates: Candidates) -> None:
        fill(candidates, 3)
        candidates.keep("rule", "SELECT row FROM candidates WHERE tokens > ?", 11)
        kept, left = candidates.outcome(2, "rule"), candidates.outcome(1, "rule")
        assert kept == Outcome({"divergence": 0.25, "surprise": -2.0}, None, kept=True)
        assert left == Outcome({"divergence": 0.125, "surprise": -1.0}, None, kept=False)
        assert candidates.outcome(1, "all").kept

    def test_a_row_without_a_score_has_the_reason(self, candidates: Candidates) -> None:
        candidates.leave_out(4, "half a character \ud800")
        candidates.flush()
        assert candidates.outcome(4, "rule") == Outcome({}, "half a character \ud800", kept=False)
        assert candidates.unscored() == 1
        assert candidates.count() == 0

    def test_a_row_that_is_not_there_is_kept_by_nobody(self, candidates: Candidates) -> None:
        assert candidates.outcome(0, "all") == Outcome({}, None, kept=False)

    def test_names_of_scores_are_those_of_all_rows(self, candidates: Candidates) -> None:
        assert candidates.score_names == ()
        candidates.add(candidate(0), {"divergence": 1.0})
        assert candidates.score_names == ("divergence",)
        with pytest.raises(AssertionError):
            candidates.add(candidate(1), {"surprise": 1.0})

    def test_ids_may_hold_half_a_character_and_are_in_the_order_of_their_letters(
        self, candidates: Candidates
    ) -> None:
        ids = ["b", "a\ud800", "é", "a", "\U0001f600", "\uffff"]
        for row, name in enumerate(ids):
            candidates.add(candidate(row, id=name), {"divergence": 0.0})
        candidates.flush()
        ordered = [ids[row] for (row,) in candidates.rows("SELECT row FROM candidates ORDER BY id")]
        assert ordered == sorted(ids)

    def test_a_second_row_of_one_number_is_refused(self, candidates: Candidates) -> None:
        candidates.add(candidate(0), {"divergence": 0.0})
        candidates.add(candidate(0), {"divergence": 1.0})
        with pytest.raises(ValueError, match=r"scores cannot be used \(UNIQUE"):
            candidates.flush()


class TestMany:
    @pytest.mark.parametrize("count", [1, 3, 4, 9])
    def test_rows_are_written_some_at_a_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
    ) -> None:
        monkeypatch.setattr(table, "_PENDING_ROWS", 3)
        with Candidates(tmp_path / "rows", SEED) as candidates:
            for row in range(count):
                candidates.add(candidate(row), {"divergence": 0.0})
                candidates.leave_out(100 + row, "none")
                assert row + 1 - candidates.count() < 3
                assert row + 1 - candidates.unscored() < 3
            candidates.flush()
            assert candidates.count() == candidates.unscored() == count

    def test_what_the_file_held_before_is_gone(self, tmp_path: Path) -> None:
        for _ in range(2):
            with Candidates(tmp_path / "rows", SEED) as candidates:
                assert candidates.count() == 0
                fill(candidates, 2)

    def test_draws_depend_on_seed_purpose_and_id_alone(self, tmp_path: Path) -> None:
        def drawn(seed: int, rows: list[int]) -> dict[bytes, tuple[int, int]]:
            with Candidates(tmp_path / "rows", seed) as candidates:
                for row in rows:
                    candidates.add(candidate(row), {"divergence": 0.0})
                candidates.flush()
                found = candidates.rows("SELECT id, random_seed, length_seed FROM candidates")
                return {name: (one, other) for name, one, other in found}

        first = drawn(SEED, [0, 1, 2])
        assert first == drawn(SEED, [2, 0, 1])
        assert first[b"id1"] == (derive_seed(SEED, "random", "id1"), derive_seed(SEED, "length", "id1"))
        assert not set(first.values()) & set(drawn(8, [0, 1, 2]).values())


class TestFigures:
    def test_columns_scores_and_counts_are_of_what_an_arm_keeps(self, candidates: Candidates) -> None:
        fill(candidates, 4)
        for arm, least in (("rule", 2), ("random", 3)):
            candidates.keep(arm, "SELECT row FROM candidates WHERE row >= ?", least)
        assert [candidates.count(arm) for arm in ARMS] == [4, 2, 1, 0]
        assert sorted(candidates.values("tokens", "rule")) == [12, 13]
        assert sorted(candidates.values("score")) == [0.0, 0.25, 0.5, 0.75]
        assert sorted(candidates.scores("surprise", "rule")) == [-3.0, -2.0]
        assert [*candidates.scores("divergence", "length")] == []
        assert candidates.extremes("score") == (0.0, 0.75)
        assert candidates.extremes("divergence") == (-3.0, 0.0)

    def test_reasons_come_by_how_many_have_them_and_then_by_their_first_row(
        self, candidates: Candidates
    ) -> None:
        for row, reason in enumerate(["b", "a", "c", "c", "a", "d"]):
            candidates.leave_out(row, reason)
        candidates.flush()
        assert candidates.most_common_reasons(3) == [("a", 2), ("c", 2), ("b", 1)]
        assert candidates.most_common_reasons(9)[-1] == ("d", 1)
