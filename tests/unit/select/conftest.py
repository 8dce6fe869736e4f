"""Traces that a tiny model wrote, with its log-probabilities, and two tiny models to select for."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from potstill.core.records import RECORDS_FILE, Record, read_records, write_records
from potstill.core.settings import Settings
from potstill.core.step import StepContext, StepResult
from potstill.data.chat import Rendered, Renderer
from potstill.models import LoadedModel, TransformersModel, load
from potstill.scoring import token_logprobs
from potstill.select import SelectSettings, run

if TYPE_CHECKING:
    from potstill.core.store import Artifact

WORDS = [
    "First",
    "12",
    "+",
    "7",
    "=",
    "19.",
    "Then",
    "take",
    "30",
    "away!",
    "The",
    "answer",
    "is",
    "-11.\nSo",
    "eleven",
    "apples",
    "are",
    "left?",
]


class Bench:
    """Runs select steps over records, in folders of their own, and reads what they leave."""

    def __init__(
        self, build_context: Callable[..., StepContext], seal: Any, folder: Path, models: dict[str, Settings]
    ) -> None:
        self.build_context, self.seal, self.folder, self.models = build_context, seal, folder, models
        self.artifacts: list[Artifact] = []
        self.context: StepContext
        self.result: StepResult

    def give(self, records: Sequence[Record]) -> None:
        """What the next runs select from."""
        folder = self.folder / f"traces{len(self.artifacts)}"
        folder.mkdir()
        write_records(folder / RECORDS_FILE, records)
        self.artifacts.append(self.seal(folder, "generate"))

    def run(
        self, folder: str = "artifact", *, seed: int = 1, copies: Any = None, **settings: Any
    ) -> list[Record]:
        """The records that stay."""
        self.context = self.build_context(
            "select", folder=folder, seed=seed, models=self.models, data={"traces": self.artifacts[-1:]}
        )
        self.context.replicas = copies
        plain = {"do": "select", "data": "traces", "student": "student", "keep": {"top": 0.5}}
        given = {key: value for key, value in {**plain, **settings}.items() if value is not None}
        self.result = run(SelectSettings.model_validate(given), self.context)
        return list(read_records(self.context.folder / RECORDS_FILE))

    @property
    def said(self) -> str:
        return "\n".join(self.context.reporter.said)


def written_by(loaded: LoadedModel, records: Sequence[Record]) -> list[Record]:
    """The same traces as that model's own: its ids and log-probabilities at temperature 1."""
    renderer = Renderer(loaded.tokenizer)
    for record in records:
        whole = renderer.render(record)
        assert whole.ids[-1:] == renderer.end_of_turn_ids
        rendered = Rendered(whole.ids[:-1], whole.mask[:-1])
        record.response_token_ids = [
            id_ for id_, mask in zip(rendered.ids, rendered.mask, strict=True) if mask
        ]
        record.tokenizer = renderer.tokenizer_hash
        record.logprobs = token_logprobs(loaded, [rendered])[0].tolist()
        record.sampling = {"logprob_temperature": 1.0}
    return [*records]


def naive_probability(bench: Bench, role: str, record: Record, *, behind: int = 0) -> float:
    """From whole logits in float64 of one row, over its response's tokens behind the first so many."""
    settings = bench.models[role]
    assert isinstance(settings, TransformersModel)
    loaded = load(settings)
    ids = record.response_token_ids or []
    prompt = Renderer(loaded.tokenizer).prompt_ids(record.messages)
    with torch.no_grad():
        logits_TV = loaded.model.double()(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, :, :300]
    logprobs = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1]
    found = [float(logprobs[at, id_]) for at, id_ in enumerate(ids)][behind:]
    return math.exp(math.fsum(found) / len(found))


@pytest.fixture
def records() -> list[Record]:
    """24 traces of 8 prompts, three answers each, of different lengths; two prompts are held out."""
    return [
        Record(
            f"p{number // 3}",
            [{"role": "user", "content": f"Question {number // 3}"}],
            f"r{number:02d}",
            number // 3 in (2, 5),
            response=" ".join(WORDS[number % 7 : number % 7 + 3 + number % 11]) + ".",
            finish_reason="stop",
            sample=number % 3,
        )
        for number in range(24)
    ]


@pytest.fixture
def bench(
    tmp_path: Path,
    step_context: Callable[..., StepContext],
    seal: Any,
    build_tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    records: list[Record],
) -> Bench:
    """A bench with the records as the model "teacher" wrote them, and a model "student"."""
    models: dict[str, Settings] = {}
    for seed, name in enumerate(("student", "teacher", "distilled")):
        build_tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        models[name] = TransformersModel(path=str(tmp_path / name), device="cpu", dtype="float32")
    found = Bench(step_context, seal, tmp_path, models)
    teacher = models["teacher"]
    assert isinstance(teacher, TransformersModel)
    found.give(written_by(load(teacher), records))
    return found
