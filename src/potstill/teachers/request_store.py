"""Every answer that a model gave, under the key of its request, kept the moment it arrives."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from potstill.core.alternatives import Alternatives
from potstill.core.database import CheckedValues
from potstill.core.hashing import hash_json
from potstill.teachers.protocol import Answer, Usage

__all__ = ["Bought", "RequestStore", "open_request_store"]

_BOUGHT = (
    "bought (buyer TEXT PRIMARY KEY, answers INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, "
    "response_tokens INTEGER NOT NULL)"
)
_ADD_TO_BILL = (
    "INSERT INTO bought VALUES (?, 1, ?, ?) ON CONFLICT (buyer) DO UPDATE SET answers = answers + 1, "
    "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
    "response_tokens = response_tokens + excluded.response_tokens"
)


@dataclass(frozen=True, slots=True)
class Bought:
    """What one buyer was billed for: answers, unusable ones included, and their tokens where counted."""

    answers: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0


class RequestStore(CheckedValues):
    """Answers of one model by request key, and what each buyer (a step) was billed for them.

    A key's first answer stays.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "answers", "key TEXT", "answer TEXT", [_BOUGHT])

    def get(self, key: str) -> Answer | None:
        """The answer of a key, or None."""
        text = self.value(key)
        if text is None:
            return None
        found = json.loads(text)
        if "alternatives" in found:
            found["alternatives"] = Alternatives.of_json(found["alternatives"])
        return Answer(**found)

    def put(self, key: str, answer: Answer, *, buyer: str) -> None:
        """Keep an answer, unless the key has one, and what it cost its buyer; both or, if killed, neither."""
        stated = {
            one.name: value for one in fields(answer) if (value := getattr(answer, one.name)) is not None
        }
        if answer.alternatives is not None:
            stated["alternatives"] = answer.alternatives.to_json()
        text = json.dumps(stated)
        cost = (buyer, answer.prompt_tokens or 0, answer.response_tokens or 0)
        self.keep([(key, text)], (_ADD_TO_BILL, [cost]))

    def bill(self, buyer: str, usage: Usage) -> None:
        """Note what a buyer was billed for an answer that is of no use."""
        self.write((_ADD_TO_BILL, [(buyer, usage.prompt_tokens or 0, usage.response_tokens or 0)]))

    def bought(self, buyer: str) -> Bought:
        """What a buyer was billed for so far, by all its runs."""
        row = self.row("SELECT answers, prompt_tokens, response_tokens FROM bought WHERE buyer = ?", buyer)
        return Bought() if row is None else Bought(*row)


def open_request_store(cache_folder: Path, model: Any) -> RequestStore:
    """The store of one model's answers; `model` is what they are known by (JSON-able)."""
    return RequestStore(cache_folder / "requests" / f"{hash_json(model)[:24]}.sqlite")
