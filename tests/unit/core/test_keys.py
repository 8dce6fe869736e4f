"""Keys in little memory are told apart as a dict would."""

import sys

from hypothesis import given
from hypothesis import strategies as st

from potstill.core import keys
from potstill.core.keys import KeyNumbers


@given(st.lists(st.one_of(st.binary(max_size=2), st.binary(min_size=32, max_size=32)), max_size=60))
def test_keys_have_the_numbers_that_a_dict_would_give_them(added: list[bytes]) -> None:
    found, wanted = KeyNumbers(), dict[bytes, int]()
    for key in added:
        assert found.add(key) == (key not in wanted)
        wanted.setdefault(key, len(wanted))
        assert len(found) == len(wanted)
    assert {key: found.number(key) for key in added} == wanted
    assert b"never added" not in found
    assert all(key in found for key in added)


def test_many_keys_stay_where_they_are_as_the_table_grows_and_take_28_bytes_each_at_most() -> None:
    found, count = KeyNumbers(), 20_000
    for number in range(count):
        assert found.add(str(number).encode())
    assert len(found._slots) > keys._FEWEST_SLOTS, "the table never grew: nothing is shown"
    assert all(found.number(str(number).encode()) == number for number in range(count))
    assert found.number(b"20000") is None
    size = sum(sys.getsizeof(one) for one in (found._heads, found._tails, found._slots))
    assert size / count < 28 * 1.07  # an array that grows has some room


def test_keys_that_share_a_slot_and_half_of_their_hash_are_told_apart(monkeypatch) -> None:
    monkeypatch.setattr(keys, "_halves", lambda key: (len(key) % 2, int.from_bytes(key, "little")))
    found = KeyNumbers()
    assert [found.add(key) for key in (b"a", b"b", b"cc", b"a", b"d")] == [True, True, True, False, True]
    assert [found.number(key) for key in (b"a", b"b", b"cc", b"d", b"e")] == [0, 1, 2, 3, None]
