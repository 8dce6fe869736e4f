"""Where in a response's text its tokens stand."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data.responses import bytes_of_tokens, join_reasoning


@given(st.text(min_size=1), st.data())
def test_tokens_that_make_up_the_text_are_as_long_as_they_are(text: str, data: st.DataObject) -> None:
    whole = text.encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)))) | {0, len(whole)})
    tokens = [whole[start:end] for start, end in pairwise(cuts)]
    found = bytes_of_tokens(tokens, text)
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # no UTF-8 says these
        return
    assert found is not None
    assert sum(found) == len(whole)
    # A token's end lies where its bytes end, or before the character that it breaks off in.
    for said, placed in zip(accumulate(map(len, tokens)), accumulate(found), strict=True):
        assert placed == len(whole[:said].decode("utf-8", "ignore").encode())


def test_a_character_that_tokens_share_belongs_to_the_last_of_them() -> None:
    assert bytes_of_tokens([b"a\xf0\x9f", b"\x99", b"\x82b"], "a🙂b") == [1, 0, 5]


def test_a_response_cut_off_inside_a_character_is_placed_as_it_was_decoded() -> None:
    assert bytes_of_tokens([b"a", b"\xf0\x9f"], "a\ufffd") == [1, 3]


def test_a_sentencepieces_leading_space_stands_for_nothing() -> None:
    assert bytes_of_tokens([b" Hello", b" world"], "Hello world") == [5, 6]


def test_reasoning_and_answer_that_came_apart_are_found_in_turn() -> None:
    text = join_reasoning("Two and two.", "4")
    assert text == "<think>\nTwo and two.\n</think>\n\n4"
    found = bytes_of_tokens([b"Two and", b" two.", b"4"], text)
    assert found == [15, 5, 12]  # what was added belongs to the next token
    channels = [b"<|channel|>", b"analysis", b"<|message|>", b"Two and two.", b"<|end|>", b"4"]
    found = bytes_of_tokens(channels, text)
    assert found is not None
    assert sum(found) == len(text)
    assert found == [0, 0, 0, 20, 0, 12]


def test_white_space_that_a_server_dropped_belongs_to_the_last_token() -> None:
    assert bytes_of_tokens([b"Yes", b"."], "Yes.\n") == [3, 2]
    assert bytes_of_tokens([b"\n", b"Yes", b".", b"\n"], "Yes.") == [0, 3, 1, 0]


@pytest.mark.parametrize(("tokens", "text"), [([b"No"], "Yes"), ([], "Yes"), ([], "")])
def test_tokens_that_say_something_else_are_not_placed(tokens: list[bytes], text: str) -> None:
    assert bytes_of_tokens(tokens, text) is None
