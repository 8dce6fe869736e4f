"""Rows without an answer: a line each with its reason, and an end where they do not end."""

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import DataError, EngineError
from potstill.teachers.failures import Failures
from potstill.teachers.protocol import RequestError

KEPT = "All answers are kept"


@pytest.fixture
def failures(tmp_path: Path) -> Failures:
    return Failures(tmp_path / "failures.jsonl", where="model big")


def fail(failures: Failures, times: int = 1, what: str = "HTTP 500: no", **fields: Any) -> None:
    for number in range(times):
        failures.add({"row": number}, RequestError(what, **fields), kept=KEPT)


def lines(failures: Failures) -> list[dict[str, Any]]:
    return [json.loads(line) for line in failures.path.read_text(encoding="utf-8").splitlines()]


class TestLines:
    def test_each_is_a_line_with_row_reason_and_status(self, failures: Failures) -> None:
        failures.add({"row": "naïve"}, RequestError("HTTP 400: no", status=400), kept=KEPT)
        failures.add({"row": 2}, DataError("too long\n", where="elsewhere"), kept=KEPT)
        assert lines(failures) == [
            {"row": "naïve", "reason": "HTTP 400: no", "status": 400},
            {"row": 2, "reason": "too long\n", "status": None},
        ]
        assert failures.count == 2

    def test_they_are_of_the_latest_attempt_alone(self, failures: Failures) -> None:
        fail(failures)
        again = Failures(failures.path, where="model big")
        assert not again.path.exists()
        assert again.count == 0


class TestInARow:
    def test_twenty_are_the_end(self, failures: Failures) -> None:
        fail(failures, 19)
        with pytest.raises(EngineError) as caught:
            fail(failures, what="HTTP 503: busy", mend="look at its log")
        assert str(caught.value).splitlines() == [
            "model big: 20 requests in a row failed, the last with: HTTP 503: busy",
            f"  to mend:  look at its log. {KEPT}",
        ]
        assert len(lines(failures)) == 20, "the last one has its line, too"

    def test_without_a_way_to_mend_it_the_file_is_named(self, failures: Failures) -> None:
        with pytest.raises(EngineError, match=r"see .*failures\.jsonl"):
            fail(failures, 20)

    def test_an_answer_in_between_begins_the_count_anew(self, failures: Failures) -> None:
        for _ in range(5):
            fail(failures, 19)
            failures.answered()
        assert failures.count == 95

    def test_rows_at_fault_do_not_count_once_another_was_answered(self, failures: Failures) -> None:
        failures.answered()
        fail(failures, 100, blames_row=True)
        for _ in range(100):
            failures.add({}, DataError("too long"), kept=KEPT)
        fail(failures, 19)
        with pytest.raises(EngineError, match="20 requests in a row"):
            fail(failures)

    def test_rows_at_fault_are_the_engines_where_none_was_answered(self, failures: Failures) -> None:
        with pytest.raises(EngineError, match="20 requests in a row"):
            fail(failures, 20, blames_row=True)


class TestShare:
    @pytest.mark.parametrize(
        ("failed", "share", "passes"),
        [(0, 0.0, True), (1, 0.0, False), (2, 0.2, True), (3, 0.2, False), (9, 1.0, True), (10, 1.0, False)],
    )
    def test_no_more_than_may_and_never_all(
        self, failures: Failures, failed: int, share: float, passes: bool
    ) -> None:
        fail(failures, failed)
        if passes:
            failures.check(share, 10, kept=KEPT)
        else:
            with pytest.raises(EngineError, match=f"{failed} of 10 requests failed"):
                failures.check(share, 10, kept=KEPT)

    def test_no_request_at_all_is_no_failure(self, failures: Failures) -> None:
        failures.check(0.0, 0, kept=KEPT)

    def test_reasons_come_with_their_counts_the_most_frequent_first(self, failures: Failures) -> None:
        fail(failures, 1, "HTTP 400: long")
        fail(failures, 3, "HTTP 500: no")
        with pytest.raises(EngineError, match=r"4 of 9 .*: 3 x HTTP 500: no; 1 x HTTP 400: long"):
            failures.check(0.1, 9, kept=KEPT)

    def test_three_reasons_are_remembered_however_many_there_are(self, failures: Failures) -> None:
        for number in range(15):
            fail(failures, what=f"reason {number}")
        with pytest.raises(EngineError) as caught:
            failures.check(0.1, 100, kept=KEPT)
        assert caught.value.what.count("reason") == 3

    @pytest.mark.parametrize(
        ("mends", "said"),
        [
            (["free some room"], "free some room; or run again"),
            (["free some room", "free some room"], "free some room; or run again"),
            (["free some room", "wait"], "run again"),
            ([None], "run again"),
        ],
    )
    def test_a_way_to_mend_them_is_told_where_all_have_the_same(
        self, failures: Failures, mends: list[str | None], said: str
    ) -> None:
        for number, mend in enumerate(mends):
            fail(failures, what=f"reason {number}", mend=mend)
        with pytest.raises(EngineError) as caught:
            failures.check(0.0, 10, kept=KEPT)
        assert (caught.value.mend or "").startswith(said)
        assert (caught.value.mend or "").endswith(f"`max_failed_share`. {KEPT}")
