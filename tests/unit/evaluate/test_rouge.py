"""ROUGE against its definition, written out."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rouge_score")

from potstill.evaluate.rouge import rouge

WORDS = st.lists(
    st.sampled_from(["the", "cat", "sat", "on", "mat", "œuf", "кот", "9"]), min_size=1, max_size=12
)


def f_measure(shared: int, answer: int, reference: int) -> float:
    if not shared:
        return 0.0
    precision, recall = shared / answer, shared / reference
    return 2 * precision * recall / (precision + recall)


def of_pairs(answer: list[str], reference: list[str], n: int) -> float:
    ours, theirs = (
        Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
        for words in (answer, reference)
    )
    return f_measure((ours & theirs).total(), ours.total(), theirs.total())


def longest(answer: list[str], reference: list[str]) -> int:
    if not answer or not reference:
        return 0
    if answer[-1] == reference[-1]:
        return 1 + longest(answer[:-1], reference[:-1])
    table = [[0] * (len(reference) + 1) for _ in range(len(answer) + 1)]
    for i, one in enumerate(answer, start=1):
        for j, other in enumerate(reference, start=1):
            table[i][j] = table[i - 1][j - 1] + 1 if one == other else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


@settings(deadline=None)  # the first call imports the library
@given(answer=WORDS, reference=WORDS)
def test_it_is_what_its_definition_says_for_words_of_any_script(
    answer: list[str], reference: list[str]
) -> None:
    found = rouge(" ".join(answer).upper(), [", ".join(reference)])
    assert found["rouge1"] == pytest.approx(of_pairs(answer, reference, 1))
    assert found["rouge2"] == pytest.approx(of_pairs(answer, reference, 2))
    assert found["rougeL"] == pytest.approx(
        f_measure(longest(answer, reference), len(answer), len(reference))
    )


def test_of_several_references_the_nearest_counts() -> None:
    near, far = "a cat sat down", "nothing of the kind"
    assert rouge("a cat sat down", [far, near]) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert rouge("a cat sat down", [far])["rouge1"] < 1


def test_characters_count_as_words_where_words_have_no_spaces() -> None:
    assert rouge("東京は晴れ", ["東京は雨"])["rouge1"] == pytest.approx(2 * 3 / (5 + 4))
    assert rouge("", ["東京"])["rouge1"] == 0
