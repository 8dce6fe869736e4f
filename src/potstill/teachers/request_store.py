"""Every answer that a model gave, under the key of its request, kept the moment it arrives."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from potstill.core.database import Database
from potstill.core.hashing import hash_json
from potstill.teachers.protocol import Answer, Usage

__all__ = ["Bought", "RequestStore", "open_request_store"]

_ANSWERS = "answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"
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


class RequestStore(Database):
    """Answers of one model by request key, and what each buyer (a step) was billed for them.

    A key's first answer stays.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "answers", [_ANSWERS, _BOUGHT])

    def __contains__(self, key: str) -> bool:
        return self.row("SELECT 1 FROM answers WHERE key = ?", key) is not None

    def get(self, key: str) -> Answer | None:
        """The answer of a key, or None."""
        row = self.row("SELECT answer FROM answers WHERE key = ?", key)
        return None if row is None else Answer(**json.loads(row[0]))

    def put(self, key: str, answer: Answer, *, buyer: str) -> None:
        """Keep an answer, unless the key has one, and what it cost its buyer; both or, if killed, neither."""
        text = json.dumps({name: value for name, value in asdict(answer).items() if value is not None})
        cost = (buyer, answer.prompt_tokens or 0, answer.response_tokens or 0)
        self.write(("INSERT OR IGNORE INTO answers VALUES (?, ?)", [(key, text)]), (_ADD_TO_BILL, [cost]))

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
