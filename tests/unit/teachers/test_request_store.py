import math
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from potstill.core.alternatives import Alternatives
from potstill.core.errors import StoreError
from potstill.teachers import Answer
from potstill.teachers.protocol import Usage
from potstill.teachers.request_store import Bought, RequestStore, open_request_store

ANSWER = Answer(
    "\u2028naïve \ud800 text",
    "length",
    prompt_token_ids=[1, 2],
    response_token_ids=[3],
    logprobs=[-0.1],
    tokenizer="t",
    response_tokens=1,
)


def test_an_answer_comes_back_as_it_was_given(tmp_path):
    with RequestStore(tmp_path / "store.sqlite") as store:
        store.put("a", ANSWER, buyer="step")
        assert store.get("a") == ANSWER
        assert "a" in store
        assert store.get("b") is None
        assert "b" not in store
        store.put("nan", Answer("x", "stop", logprobs=[math.nan]), buyer="step")
        [unknown] = (store.get("nan") or ANSWER).logprobs or [0.0]
        assert math.isnan(unknown)


@pytest.mark.parametrize(
    "alternatives",
    [
        Alternatives.of([[(7, -0.5), (2**31 - 1, -math.inf)], []], as_ids=True),
        Alternatives.of([[(b"\xff\x00", -0.25), (b"", -1.0)], [(b'"', -3.0)]], as_ids=False),
    ],
    ids=["ids", "bytes"],
)
def test_alternatives_come_back_as_they_were_given(tmp_path, alternatives):
    answer = Answer("x", "stop", logprobs=[-0.5, -1.0], alternatives=alternatives)
    with RequestStore(tmp_path / "store.sqlite") as store:
        store.put("a", answer, buyer="step")
        assert store.get("a") == answer


def test_an_alternative_takes_a_dozen_bytes_in_the_store(tmp_path):
    places = [[(number, -1 / 3 - number) for number in range(20)]] * 500
    with RequestStore(tmp_path / "store.sqlite") as store:
        store.put("a", Answer("x", "stop", alternatives=Alternatives.of(places, as_ids=True)), buyer="step")
        [text] = store.row("SELECT answer FROM answers") or [""]
    assert len(text) < 12 * 500 * 20


def test_what_each_buyer_was_billed_is_summed_over_runs_and_unusable_answers(tmp_path):
    path = tmp_path / "store.sqlite"
    with RequestStore(path) as store:
        assert store.bought("step") == Bought()
        store.put("a", Answer("x", "stop", prompt_tokens=7, response_tokens=3), buyer="step")
        store.put("b", Answer("x", "stop", prompt_tokens=1, response_tokens=1), buyer="other")
    with RequestStore(path) as store:
        store.bill("step", Usage(10, None))
        store.put("a", Answer("bought twice", "stop", prompt_tokens=7, response_tokens=4), buyer="step")
        assert store.bought("step") == Bought(answers=3, prompt_tokens=24, response_tokens=7)
        assert store.bought("other") == Bought(1, 1, 1)


def test_a_file_of_before_bills_were_kept_is_taken_on(tmp_path):
    path = tmp_path / "store.sqlite"
    with sqlite3.connect(path) as old:
        old.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        old.execute("""INSERT INTO answers VALUES ('a', '{"response": "x", "finish_reason": "stop"}')""")
    old.close()
    with RequestStore(path) as store:
        assert store.get("a") == Answer("x", "stop")
        assert store.bought("step") == Bought()


def test_many_writers_lose_nothing(tmp_path):
    path = tmp_path / "store.sqlite"

    def write(writer: int) -> None:
        with RequestStore(path) as store:
            for number in range(25):
                store.put(f"{writer}-{number}", ANSWER, buyer="step")
                store.put("shared", Answer(str(writer), "stop"), buyer="step")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with RequestStore(path) as store:
        assert all(f"{writer}-{number}" in store for writer in range(4) for number in range(25))
        assert (store.get("shared") or ANSWER).response in {"0", "1", "2", "3"}
        assert store.bought("step").answers == 200


def test_each_model_has_a_store_of_its_own(tmp_path):
    with (
        open_request_store(tmp_path, ["openai", "a"]) as one,
        open_request_store(tmp_path, ["openai", "b"]) as other,
    ):
        one.put("a", ANSWER, buyer="step")
        assert "a" not in other
        assert one.path.parent == tmp_path / "requests"


def test_a_store_that_cannot_be_used_says_so(tmp_path: Path):
    (tmp_path / "requests").write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(StoreError, match=r"requests.*cannot be used"):
        open_request_store(tmp_path, "model")
    (tmp_path / "text.sqlite").write_text("no database at all " * 100, encoding="utf-8")
    with pytest.raises(StoreError, match="not a database"):
        RequestStore(tmp_path / "text.sqlite")


def test_a_full_disk_is_said_so_and_keeps_what_was_there(tmp_path):
    with RequestStore(tmp_path / "store.sqlite") as store:
        store.put("a", ANSWER, buyer="step")
        [pages] = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match="full"):
            store.put("b", Answer("x" * 100_000, "stop"), buyer="step")
        assert store.get("a") == ANSWER
    assert sqlite3.connect(tmp_path / "store.sqlite").execute("SELECT count(*) FROM answers").fetchone() == (
        1,
    )


def test_an_answer_that_was_damaged_is_never_given_and_can_be_kept_anew(tmp_path):
    path = tmp_path / "store.sqlite"
    with RequestStore(path) as store:
        for key in ("a", "b", "c"):
            store.put(key, Answer(f"the answer of {key}", "stop"), buyer="step")
    data = path.read_bytes()
    for key in (b"a", b"c"):
        data = data.replace(b"the answer of " + key, b"the\xffanswer of " + key)
    path.write_bytes(data)
    with RequestStore(path) as store:
        assert (store.get("b") or ANSWER).response == "the answer of b"
        with pytest.raises(StoreError, match="2 answers were damaged on the disk, and have been taken out"):
            store.get("a")
        assert "a" not in store
        assert "c" not in store
        assert "b" in store
        store.put("a", ANSWER, buyer="step")
        assert store.get("a") == ANSWER


def test_a_flipped_bit_anywhere_gives_the_answer_or_none_or_an_error(tmp_path):
    path = tmp_path / "store.sqlite"
    with RequestStore(path) as store:
        store.put("a", ANSWER, buyer="step")
    data, lost = path.read_bytes(), 0
    for place in [*range(100), *range(0, len(data), 97), *range(len(data) - 400, len(data), 3)]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        lost += 1
        with suppress(StoreError), RequestStore(path) as store:
            assert store.get("a") in (ANSWER, None)
            lost -= 1
    assert lost > 20
