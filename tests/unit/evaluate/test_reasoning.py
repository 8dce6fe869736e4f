import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.evaluate.reasoning import read_reasoning

STEPS = ["First 12 + 7 = 19.", "Then 19 - 30 = -11.", "The difference is below zero."]
THOUGHT = f"<think>\n{' '.join(STEPS)}\n</think>\n\nThe answer is -11."


def test_the_think_block_is_the_reasoning() -> None:
    found = read_reasoning(THOUGHT)
    assert (found.present, found.tagged, found.steps) == (True, True, 3)
    assert found.words == 18
    assert found.repetition == 0
    assert found.quality == pytest.approx(0.4 + 0.3 * 3 / 5 + 0.3 * 18 / 100)


@pytest.mark.parametrize(
    ("block", "steps"), [("6 0\n3 1\n1 1", 3), ("strawberry 3", 1), ("Hm.\n3\nWell.", 0)]
)
def test_a_line_of_two_words_in_a_think_block_is_a_step(block: str, steps: int) -> None:
    found = read_reasoning(f"<think>\n{block}\n</think>\n2")
    assert (found.present, found.steps, found.words) == (steps > 0, steps, 2 * steps)
    assert not read_reasoning(f"{block}\n2").present


def test_enough_steps_and_words_in_good_form_are_worth_one() -> None:
    steps = [
        f"Step {n} moves the {n} apples from basket {n} to shelf {n * n} and counts them." for n in range(9)
    ]
    found = read_reasoning("<think>\n" + "\n".join(steps) + "\n</think>\n\nNine.")
    assert found.quality == pytest.approx(1.0)


def test_without_tags_all_but_the_last_step_is_reasoning() -> None:
    found = read_reasoning(" ".join([*STEPS, "The answer is -11."]))
    assert (found.present, found.tagged, found.steps, found.words) == (True, False, 3, 18)
    assert found.quality == pytest.approx(0.2 + 0.3 * 3 / 5 + 0.3 * 18 / 100)


@pytest.mark.parametrize(
    "response",
    ["", "-11", "The answer is -11.", "First 12 + 7 = 19. The answer is -11.", "<think>\n\n</think>\n\n-11"],
)
def test_an_answer_alone_is_no_reasoning(response: str) -> None:
    found = read_reasoning(response)
    assert not found.present
    assert (found.steps, found.words, found.quality) == (0, 0, 0.0)


def test_a_block_that_was_cut_off_counts_as_reasoning_in_half_form() -> None:
    cut, whole = read_reasoning("<think>\n" + " ".join(STEPS)), read_reasoning(THOUGHT)
    assert (cut.present, cut.tagged, cut.steps) == (True, True, 3)
    assert whole.quality - cut.quality == pytest.approx(0.2)


def test_the_tags_of_openthoughts_are_think_tags() -> None:
    marked = (
        f"<|begin_of_thought|>{' '.join(STEPS)}<|end_of_thought|>"
        "<|begin_of_solution|>The answer is -11.<|end_of_solution|>"
    )
    assert read_reasoning(marked).quality == pytest.approx(read_reasoning(THOUGHT).quality)


def test_a_loop_adds_no_steps_and_lowers_the_quality() -> None:
    looped = read_reasoning("<think>\n" + " ".join(STEPS * 40) + "\n</think>\n\n-11")
    assert looped.steps == 3
    assert looped.repetition > 0.9
    assert looped.quality < 0.1 * read_reasoning(THOUGHT).quality + 0.05


@given(st.text() | st.lists(st.sampled_from(["<think>", "</think>", "\n", "a b c. ", "x"])).map("".join))
def test_any_text_has_figures_in_their_range(response: str) -> None:
    found = read_reasoning(response)
    assert 0 <= found.quality <= 1
    assert 0 <= found.repetition <= 1
    assert found.present == (found.steps > 0)
