"""Records in a random order, on disk in between."""

import heapq
import json
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from potstill.core.records import Record
from potstill.core.spool import Spool

__all__ = ["shuffled"]

_FIELDS = [one.name for one in fields(Record)]


def shuffled(
    records: Iterable[Record], seed: int, limit: int | None, folder: Path | None
) -> Iterator[Record]:
    """All records, or a random `limit` of them, in an order that depends on the seed and on their own alone.

    In memory a record costs some 24 bytes; the rest lies in `folder`, by default where the system keeps
    temporary files, of `limit` records little more than those.
    """
    import numpy as np

    chance, spool = random.Random(seed), Spool(folder)
    places, ends = array("d"), array("q", [0])
    worst: list[float] = []  # a heap of the negative places of those that are among the first so far
    for record in records:
        place = chance.random()
        if limit is not None:
            if len(worst) < limit:
                heapq.heappush(worst, -place)
            elif heapq.heappushpop(worst, -place) == -place:
                continue
        assert record.alternatives is None
        row = {name: getattr(record, name) for name in _FIELDS}
        spool.append(json.dumps(row).encode("ascii"))
        places.append(place)
        ends.append(spool.size)
    for number in np.argsort(np.frombuffer(places), kind="stable")[:limit].tolist() if places else ():
        yield Record(**json.loads(spool.read(ends[number], ends[number + 1] - ends[number])))
