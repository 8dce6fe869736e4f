"""Articles cut by tokens, and passages within a budget."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from potstill.core.errors import DataError, ModelError
from potstill.core.records import Record
from potstill.retrieval.passages import Passages, first_tokens, joined_within, split, write_passages

TEXTS = st.text(st.sampled_from("ab 1.\n—é知🙂"), max_size=120)
over_texts = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@given(text=TEXTS, most=st.integers(8, 20))
@over_texts
def test_passages_are_all_of_a_text_in_order_and_never_more_than_so_many_tokens(
    tiny_tokenizer: Any, text: str, most: int
) -> None:
    parts = list(split(text, tiny_tokenizer, most))
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(part and part == part.strip() and count(tiny_tokenizer, part) <= most for part in parts)


def test_a_passage_ends_with_a_word_unless_the_word_alone_is_too_long(tiny_tokenizer: Any) -> None:
    words = "state the final answer to the following problem of apples " * 5
    parts = list(split(words, tiny_tokenizer, 12))
    assert len(parts) > 4
    assert " ".join(parts).split() == words.split()
    long = "x" * 90
    assert "".join(split(long, tiny_tokenizer, 12)) == long


@given(text=TEXTS, title=st.text("QZ ", max_size=40), most=st.integers(8, 20))
@over_texts
def test_passages_under_a_title_are_all_of_a_text_within_so_many_tokens(
    tiny_tokenizer: Any, text: str, title: str, most: int
) -> None:
    parts = list(split(text, tiny_tokenizer, most, title))
    assert all(count(tiny_tokenizer, part) <= most for part in parts)
    heading = first_tokens(title.strip(), tiny_tokenizer, most // 4).rstrip()
    bodies = [part.removeprefix(f"{heading}\n") for part in parts]
    assert all(body and body == body.strip() for body in bodies)
    assert "".join("".join(bodies).split()) == "".join(text.split())


def test_each_passage_of_a_long_article_begins_with_its_title(tiny_tokenizer: Any) -> None:
    words = "state the final answer to the following problem of apples " * 5
    parts = [part.split("\n") for part in split(words, tiny_tokenizer, 16, "apples ")]
    assert len(parts) > 4
    assert {title for title, _ in parts} == {"apples"}
    assert " ".join(body for _, body in parts).split() == words.split()
    assert list(split("of apples", tiny_tokenizer, 16, "apples")) == ["of apples"]
    [first, *_] = split(words, tiny_tokenizer, 16, "apples " * 99)
    title, body = first.split("\n")
    assert count(tiny_tokenizer, title) <= 4
    assert words.startswith(body)
    word = "x" * 90
    assert "".join(split(word, tiny_tokenizer, 12, "apples")) == word, "no room for both"


def test_a_long_text_is_not_tokenised_whole_for_each_of_its_passages(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "of the apples are left " * 2000
    seen: list[int] = []

    class Backend:
        def encode(self, part: str, **options: Any) -> Any:
            seen.append(len(part))
            return tiny_tokenizer.backend_tokenizer.encode(part, **options)

    class Tokenizer:
        backend_tokenizer = Backend()

    parts = list(split(text, Tokenizer(), 50))
    assert sum(seen) < 12 * len(text), "the window, not the rest of the text"
    assert len(parts) > 100


@given(texts=st.lists(TEXTS.map(str.strip).filter(bool), max_size=5), budget=st.integers(8, 60))
@over_texts
def test_passages_together_stay_within_the_budget(tiny_tokenizer: Any, texts: list[str], budget: int) -> None:
    joined, used = joined_within(texts, tiny_tokenizer, budget)
    assert count(tiny_tokenizer, joined) <= budget
    assert used <= len(texts)
    whole = "\n\n".join(texts)
    assert whole.startswith(joined)
    if count(tiny_tokenizer, whole) <= budget:
        assert (joined, used) == (whole, len(texts))
    assert used or not texts, "the first passage is cut rather than left out"


def test_a_file_of_passages_is_read_by_number_and_in_order(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.retrieval.passages._BATCH_ROWS", 4)
    articles = [
        Record(f"p{n}", [], response=f"story {n} of apples", meta={"title": f"T{n}"}) for n in range(10)
    ]
    assert write_passages(tmp_path / "p.arrow", articles, tiny_tokenizer, 50) == (10, 10)
    passages = Passages(tmp_path / "p.arrow")
    assert len(passages) == 10
    assert passages[9] == (9, "story 9 of apples", "T9")
    assert list(passages.texts()) == [f"story {n} of apples" for n in range(10)]
    assert list(passages.texts(6)) == [f"story {n} of apples" for n in range(6, 10)]


def test_a_corpus_without_text_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="none of the 1 rows of the corpus has a text") as caught:
        write_passages(tmp_path / "p.arrow", [Record("p", [])], tiny_tokenizer, 50)
    assert "corpus" in (caught.value.mend or "")


def test_a_tokenizer_that_does_not_tell_where_tokens_stand_is_refused() -> None:
    with pytest.raises(ModelError, match="does not say where"):
        first_tokens("text", object(), 9)
