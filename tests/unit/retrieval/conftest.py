"""A small corpus of invented facts, traces that need them, and a tiny encoder."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from potstill.core.records import RECORDS_FILE, Record, read_records, write_records
from potstill.core.settings import Settings
from potstill.core.step import StepContext, StepResult
from potstill.models import TransformersModel
from potstill.retrieval import RetrieveSettings, run

from ...rows import write_rows

if TYPE_CHECKING:
    from potstill.core.store import Artifact

NAMES = ("zindle", "florp", "marn", "tovik", "quess", "brell", "ondar", "lisk")


def articles() -> list[dict[str, str]]:
    """Of each name a price and a colour, in articles of their own."""
    rows = []
    for number, name in enumerate(NAMES):
        rows.append({"title": f"{name} price", "text": f"A {name} costs {number + 11} coins."})
        rows.append({"title": f"{name} colour", "text": f"The {name} has been dyed in grey since {number}."})
    return rows


def priced(number: int, *, held_out: bool = False) -> Record:
    """A question for a price, with the rationale that names it."""
    name = NAMES[number]
    return Record(
        f"p{number}",
        [{"role": "user", "content": f"What does one pay for the {name}?"}],
        f"r{number}",
        held_out,
        response=f"<think>\nA {name} costs {number + 11} coins.\n</think>\n\n{number + 11}",
        reasoning=f"A {name} costs {number + 11} coins.",
        answer=str(number + 11),
        reference=str(number + 11),
        logprobs=[-0.5],
        prompt_token_ids=[5, 6],
        finish_reason="stop",
    )


class Bench:
    """Runs retrieve steps over records, and reads what they leave."""

    def __init__(
        self, build: Callable[..., StepContext], seal: Any, folder: Path, models: dict[str, Settings]
    ) -> None:
        self.build, self.seal, self.folder, self.models = build, seal, folder, models
        self.data: dict[str, list[Artifact]] = {}
        self.corpus = write_rows(folder / "facts.jsonl", articles())
        self.context: StepContext
        self.result: StepResult

    def give(self, records: list[Record], name: str = "traces") -> None:
        (self.folder / name).mkdir()
        write_records(self.folder / name / RECORDS_FILE, records)
        self.data[name] = [self.seal(self.folder / name, "generate")]

    def settings(self, **settings: Any) -> RetrieveSettings:
        plain = {"do": "retrieve", "data": "traces", "corpus": {"path": self.corpus}, "student": "student"}
        return RetrieveSettings.model_validate({**plain, **settings})

    def run(self, folder: str = "artifact", seed: int = 1, **settings: Any) -> list[Record]:
        self.context = self.build("retrieve", folder=folder, seed=seed, models=self.models, data=self.data)
        self.result = run(self.settings(**settings), self.context)
        return list(read_records(self.context.folder / RECORDS_FILE))

    @property
    def said(self) -> str:
        reporter: Any = self.context.reporter
        return "\n".join(reporter.said)


@pytest.fixture
def bench(
    tmp_path: Path,
    step_context: Callable[..., StepContext],
    seal: Any,
    shared_model_folder: Path,
) -> Bench:
    """A bench with eight traces, of which the last two are held out."""
    models: dict[str, Settings] = {"student": TransformersModel(path=str(shared_model_folder), device="cpu")}
    found = Bench(step_context, seal, tmp_path, models)
    found.give([priced(number, held_out=number > 5) for number in range(8)])
    return found
