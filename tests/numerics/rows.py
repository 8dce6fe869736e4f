"""Rendered rows of random ids and of different lengths."""

import random

from potstill.data.chat import Rendered


def rendered_rows(count: int, *, vocabulary: int, seed: int = 3) -> list[Rendered]:
    """Up to 9 tokens of prompt and 14 of response each."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        prompt, response = chance.randint(1, 9), chance.randint(1, 14)
        ids = [chance.randrange(3, vocabulary) for _ in range(prompt + response)]
        rows.append(Rendered(ids, [0] * prompt + [1] * response))
    return rows
