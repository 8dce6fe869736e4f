"""Many keys in little memory, where a set or a dict would take a hundred bytes and more for each."""

import hashlib
from array import array

__all__ = ["KeyNumbers"]

_FEWEST_SLOTS = 1024
_FULL_NUMERATOR, _FULL_DENOMINATOR = 2, 3


class KeyNumbers:
    """Distinct keys, numbered from 0 in the order in which they were first added; up to 28 bytes a key.

    Of a key 128 bits of BLAKE2b are kept: two keys of n are taken for one with a chance of n^2 / 2^129, of a
    billion less than one in 10^20.
    """

    def __init__(self) -> None:
        self._heads, self._tails = array("Q"), array("Q")
        # Open addressing: a key's number and 1 more, 0 where there is none.
        self._slots = _empty(_FEWEST_SLOTS)

    def __len__(self) -> int:
        return len(self._heads)

    def __contains__(self, key: bytes) -> bool:
        return self.number(key) is not None

    def number(self, key: bytes) -> int | None:
        """A key's number; None where it was not added."""
        found = self._slots[self._slot(*_halves(key))]
        return found - 1 if found else None

    def add(self, key: bytes) -> bool:
        """Whether the key is new; it then has the next number."""
        head, tail = _halves(key)
        slot = self._slot(head, tail)
        if self._slots[slot]:
            return False
        self._heads.append(head)
        self._tails.append(tail)
        self._slots[slot] = len(self)
        if len(self) * _FULL_DENOMINATOR > len(self._slots) * _FULL_NUMERATOR:
            self._grow()
        return True

    def _slot(self, head: int, tail: int) -> int:
        """The slot that holds a key, or the empty one in which it belongs."""
        slots, last = self._slots, len(self._slots) - 1
        slot = head & last
        while (found := slots[slot]) and (self._heads[found - 1] != head or self._tails[found - 1] != tail):
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        slots = self._slots = _empty(2 * len(self._slots))
        last = len(slots) - 1
        for number, head in enumerate(self._heads, start=1):
            slot = head & last
            while slots[slot]:
                slot = (slot + 1) & last
            slots[slot] = number


def _empty(slots: int) -> "array[int]":
    return array("I", bytes(slots * array("I").itemsize))


def _halves(key: bytes) -> tuple[int, int]:
    digest = hashlib.blake2b(key, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
