"""Rendered rows on disk, a few bytes of each in memory."""

import hashlib
from array import array
from pathlib import Path

from potstill.core.spool import Spool
from potstill.data.chat import Rendered

__all__ = ["PackedRows"]


class PackedRows:
    """Token ids, mask and record id of many rows, on disk; in memory a row costs 12 bytes.

    The file lies in `folder`, by default where the system keeps temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.lengths = array("i")
        self._ends, self._spool = array("q", [0]), Spool(folder)
        self._digest = b""

    def append(self, rendered: Rendered, record_id: str = "") -> None:
        """Add one row."""
        self.lengths.append(len(rendered.ids))
        name = record_id.encode("utf-8", "surrogatepass")
        data = array("i", rendered.ids).tobytes() + bytes(rendered.mask) + name
        self._spool.append(data)
        self._digest = hashlib.sha256(self._digest + data).digest()
        self._ends.append(self._spool.size)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Rendered:
        ids, mask, _ = self._parts(number)
        return Rendered(array("i", ids).tolist(), list(mask))

    def id(self, number: int) -> str:
        """The id of a row's record."""
        return self._parts(number)[2].decode("utf-8", "surrogatepass")

    def length(self, number: int) -> int:
        """Tokens of a row."""
        return self.lengths[number]

    @property
    def digest(self) -> str:
        """What tells these rows, in their order, from others."""
        return self._digest.hex()[:12]

    def _parts(self, number: int) -> tuple[bytes, bytes, bytes]:
        start, end, length = self._ends[number], self._ends[number + 1], self.lengths[number]
        data, ids_bytes = self._spool.read(start, end - start), length * self.lengths.itemsize
        return data[:ids_bytes], data[ids_bytes : ids_bytes + length], data[ids_bytes + length :]
