"""Duplicates: what counts as one, that the first stays, and how near is near."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.records import Record
from potstill.data.words import words
from potstill.select.duplicates import ExactDuplicates, NearDuplicates, _bands

STORY = " ".join(f"part{number} of this story" for number in range(60))


def row(prompt: str, response: str, record_id: str = "") -> Record:
    return Record(f"p-{prompt}", [{"role": "user", "content": prompt}], record_id, response=response)


def shingles(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + 5]) for start in range(max(1, len(found) - 4))}


def jaccard(one: str, two: str) -> float:
    a, b = shingles(one), shingles(two)
    return len(a & b) / len(a | b)


class TestExact:
    def test_the_same_words_are_a_duplicate_whatever_the_white_space(self) -> None:
        seen = ExactDuplicates()
        assert seen.earlier(row("Why?", "So it is.", "a")) is None
        assert seen.earlier(row(" Why? ", "So\n it  is.", "b")) == "a"
        assert seen.earlier(row("Why?", "So it is.", "c")) == "a"

    @pytest.mark.parametrize("other", [row("Why not?", "So."), row("Why?", "so."), row("Why?", "So")])
    def test_another_prompt_or_response_is_none(self, other: Record) -> None:
        seen = ExactDuplicates()
        assert seen.earlier(row("Why?", "So.")) is None
        assert seen.earlier(other) is None

    def test_prompt_and_response_are_not_taken_for_one_text(self) -> None:
        seen = ExactDuplicates()
        assert seen.earlier(row("a b", "c")) is None
        assert seen.earlier(row("a", "b c")) is None

    def test_lone_surrogates_are_compared_too(self) -> None:
        seen = ExactDuplicates()
        assert seen.earlier(row("\ud800", "x", "a")) is None
        assert seen.earlier(row("\ud800", "x", "b")) == "a"


class TestNear:
    def test_a_few_other_words_are_a_duplicate_of_the_first(self) -> None:
        seen = NearDuplicates(0.8, seed=1)
        changed = STORY.replace("part30", "another30")
        assert seen.earlier(row("Tell a story.", STORY, "a")) is None
        found = seen.earlier(row("Tell a story.", changed, "b"))
        assert found is not None
        assert found[0] == "a"
        assert found[1] == pytest.approx(jaccard(STORY, changed), abs=0.1)

    def test_case_and_punctuation_make_no_difference(self) -> None:
        seen = NearDuplicates(1.0, seed=1)
        assert seen.earlier(row("Tell.", STORY, "a")) is None
        assert seen.earlier(row("tell!", STORY.upper().replace(" ", ", "), "b")) == ("a", 1.0)

    def test_the_same_short_answer_to_other_questions_is_none(self) -> None:
        seen = NearDuplicates(0.8, seed=1)
        for number in range(30):
            question = " ".join(f"q{number}w{word}" for word in range(20))
            assert seen.earlier(row(question, "Answer: B")) is None

    def test_another_answer_to_the_same_long_question_is_none(self) -> None:
        seen = NearDuplicates(0.8, seed=1)
        assert seen.earlier(row(STORY, "It ends well, as she comes home in the evening.")) is None
        assert seen.earlier(row(STORY, "It ends badly, for nobody is there to open the door.")) is None

    def test_arithmetic_signs_tell_texts_apart(self) -> None:
        seen = NearDuplicates(0.8, seed=1)
        assert seen.earlier(row("3 + 4", "3 + 4 = 7")) is None
        assert seen.earlier(row("3 - 4", "3 - 4 = 7")) is None

    def test_a_chain_is_compared_with_what_was_kept(self) -> None:
        seen = NearDuplicates(0.8, seed=1)
        texts = [STORY]
        for number in range(12):
            texts.append(texts[-1].replace(f"part{number * 5} ", f"other{number * 5} "))
        found = [seen.earlier(row("Tell.", text, str(place))) for place, text in enumerate(texts)]
        kept = [str(place) for place, one in enumerate(found) if one is None]
        assert kept[0] == "0"
        assert 2 <= len(kept) < len(texts)
        assert all(one is None or one[0] in kept for one in found)

    def test_the_same_seed_gives_the_same_figures(self) -> None:
        def figures(seed: int) -> list[tuple[str, float] | None]:
            chance = random.Random(7)
            seen = NearDuplicates(0.5, seed)
            texts = [" ".join(chance.choices("abcdef", k=30)) for _ in range(60)]
            return [seen.earlier(row("Tell.", text, str(place))) for place, text in enumerate(texts)]

        assert figures(3) == figures(3)

    @pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
    def test_pairs_above_are_found_and_pairs_below_are_not(self, threshold: float) -> None:
        chance = random.Random(11)
        above = below = found_above = found_below = 0
        for pair in range(150):
            one = [f"w{pair}n{number}" for number in range(200)]
            two = list(one)
            for place in chance.sample(range(200), chance.randrange(40)):
                two[place] += "x"
            near = jaccard(" ".join(one), " ".join(two))
            seen = NearDuplicates(threshold, seed=pair)
            seen.earlier(row("", " ".join(one)))
            found = seen.earlier(row("", " ".join(two))) is not None
            three_deviations = 3 * math.sqrt(threshold * (1 - threshold) / 120)
            if near > threshold + three_deviations:
                above, found_above = above + 1, found_above + found
            elif near < threshold - three_deviations:
                below, found_below = below + 1, found_below + found
        assert above > 3
        assert below > 3
        assert found_above == above
        assert found_below == 0

    @given(st.floats(0.01, 1.0))
    def test_bands_divide_the_permutations_and_find_what_is_at_the_threshold(self, threshold: float) -> None:
        bands = _bands(threshold)
        rows = 120 // bands
        assert bands * rows == 120
        assert 1 - (1 - threshold**rows) ** bands >= 0.99 or rows == 1

    def test_empty_texts_are_duplicates_of_each_other(self) -> None:
        seen = NearDuplicates(0.8, seed=1)
        assert seen.earlier(row("", "", "a")) is None
        assert seen.earlier(row("", "", "b")) == ("a", 1.0)
