"""BM25 against its formula in float64, ties, and what its files are."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from potstill.data.words import words
from potstill.retrieval.bm25 import Bm25, build_bm25, highest

TEXTS = [
    "A zindle costs 11 coins.",
    "The zindle has been grey since 1801, and a zindle stays grey.",
    "Ондар стоит 17 монет.",
    "A florp costs 12 coins; it is not a zindle.",
    "",
    "coins coins coins",
]


def oracle(query: str, texts: list[str]) -> list[float]:
    documents = [words(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        total = 0.0
        for word in words(query):
            holding, tf = sum(word in other for other in documents), document.count(word)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            total += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        scores.append(total)
    return scores


@pytest.mark.parametrize(
    "query", ["What does a zindle cost in coins?", "coins zindle zindle", "ондар", "17 florp", "The GREY"]
)
def test_scores_are_those_of_the_formula(tmp_path: Path, query: str) -> None:
    build_bm25(TEXTS, tmp_path / "index")
    found = Bm25(tmp_path / "index").search(query, 9)
    wanted = sorted(((n, s) for n, s in enumerate(oracle(query, TEXTS)) if s), key=lambda one: -one[1])
    assert [number for number, _ in found] == [number for number, _ in wanted]
    assert [score for _, score in found] == pytest.approx([score for _, score in wanted], rel=1e-5)
    assert found


@pytest.mark.parametrize("query", ["", "  ", "unknown words", "???"])
def test_a_query_without_known_words_finds_nothing(tmp_path: Path, query: str) -> None:
    build_bm25(TEXTS, tmp_path / "index")
    assert Bm25(tmp_path / "index").search(query, 3) == []


def test_of_equal_scores_the_first_passages_are_found(tmp_path: Path) -> None:
    build_bm25(["the same text"] * 7 + ["another one"], tmp_path / "index")
    assert [number for number, _ in Bm25(tmp_path / "index").search("same", 3)] == [0, 1, 2]


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), max_size=12), st.integers(1, 14))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_highest_are_the_first_of_a_stable_sort(values: list[float], count: int) -> None:
    wanted = sorted(range(len(values)), key=lambda number: -values[number])[:count]
    scores_N = np.array(values, dtype=np.float32)
    assert [number for number, _ in highest(scores_N, count)] == wanted
    positive = [number for number in wanted if values[number] > 0]
    assert [number for number, _ in highest(scores_N, count, above=0.0)] == positive


def test_an_index_is_plain_arrays_and_json_and_is_not_loaded_whole(tmp_path: Path) -> None:
    build_bm25(TEXTS, tmp_path / "index")
    kinds = {path.suffix for path in (tmp_path / "index").iterdir()}
    assert kinds == {".npy", ".json"}
    for path in (tmp_path / "index").iterdir():
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        else:
            json.loads(path.read_text(encoding="utf-8"))
    index = Bm25(tmp_path / "index")
    assert isinstance(index._index.scores["data"], np.memmap)
