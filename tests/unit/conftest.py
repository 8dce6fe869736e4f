"""What a step function is given: a context around folders, and sealed artifacts to read."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from potstill.core.events import Reporter
from potstill.core.records import RECORDS_FILE, Record, write_records
from potstill.core.settings import DataRef, ModelRef, Settings
from potstill.core.step import StepContext, StepResult
from potstill.core.store import Artifact, Store

from ..vllm_stub import stub_environment

if TYPE_CHECKING:
    from potstill.models import TransformersModel

ContextBuilder = Callable[..., StepContext]
Sealer = Callable[..., Artifact]


class RecordingReporter(Reporter):
    """Keeps what a step says, shows and tells of; `on_event` hears every event."""

    def __init__(self) -> None:
        super().__init__("quiet")
        self.said: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.totals: list[float | None] = []
        self.figures: list[dict[str, object]] = []
        self.on_event: Callable[[dict[str, Any]], None] = lambda event: None

    def say(self, message: str) -> None:
        self.said.append(message.strip())

    def progress(self, description: str, total: float | None = None, unit: str = "rows") -> Any:
        self.totals.append(total)
        return nullcontext(self)

    def advance(self, count: float = 1, **figures: object) -> None:
        self.figures.append(figures)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"event": kind, **fields})
        self.on_event(self.events[-1])


@pytest.fixture
def step_context(tmp_path: Path) -> ContextBuilder:
    """`step_context(kind, *, folder="artifact", seed=1, models={}, data={})`, with a recording reporter."""

    def build(
        kind: str,
        *,
        folder: str = "artifact",
        seed: int = 1,
        models: Mapping[str, Settings | Mapping[str, Settings]] | None = None,
        data: Mapping[str, Sequence[Artifact]] | None = None,
    ) -> StepContext:
        def resolve_models(reference: ModelRef) -> Mapping[str, Settings]:
            found = (models or {})[str(reference)]
            return found if isinstance(found, Mapping) else {str(reference): found}

        def resolve_data(reference: DataRef) -> list[tuple[Artifact, str | None]]:
            return [(artifact, reference.view) for artifact in (data or {})[reference.target]]

        (tmp_path / folder).mkdir(exist_ok=True)
        return StepContext(
            name="step",
            kind=kind,
            folder=tmp_path / folder,
            seed=seed,
            cache_folder=tmp_path / "store",
            reporter=RecordingReporter(),
            resolve_models=resolve_models,
            resolve_data=resolve_data,
        )

    return build


@pytest.fixture(scope="session")
def stub_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with a stand-in for vLLM."""
    return stub_environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture
def seal(tmp_path: Path) -> Sealer:
    """`seal(folder, kind, result)`: what a step made in a folder, as the artifact the next step reads."""

    def make(folder: Path, kind: str, result: StepResult | None = None) -> Artifact:
        fields = vars(result or StepResult())
        return Store(tmp_path / "store").seal(
            folder, kind=kind, fingerprint=folder.name, settings={}, seed=1, seconds=0.0, **fields
        )

    return make


@pytest.fixture
def traces(tmp_path: Path, seal: Sealer) -> Callable[..., Artifact]:
    """`traces(count, *, held_out_every=5, **fields)`: answered sums of different lengths, sealed."""

    def make(count: int = 12, *, held_out_every: int = 5, name: str = "traces", **fields: Any) -> Artifact:
        records = []
        for number in range(count):
            sum_ = " + ".join(str(number + term) for term in range(2 + number % 4))
            written = {"response": f"The answer is {number}.", "finish_reason": "stop", **fields}
            messages = [{"role": "user", "content": f"What is {sum_}?"}]
            held_out = number % held_out_every == held_out_every - 1
            records.append(Record(f"p{number}", messages, f"r{number:02d}", held_out, **written))
        (tmp_path / name).mkdir()
        write_records(tmp_path / name / RECORDS_FILE, records)
        return seal(tmp_path / name, "generate")

    return make


@pytest.fixture
def adapter(
    build_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, seal: Any
) -> Callable[..., "TransformersModel"]:
    """`adapter(family, *, base_fields=, config=, name=, base_name=, seed=, **lora)`.

    A sealed adapter that changes its base a lot.
    """

    def make(
        family: str = "llama",
        *,
        base_fields: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        dtype: str = "float32",
        name: str = "adapter",
        base_name: str = "base",
        seed: int = 1,
        **lora: Any,
    ) -> "TransformersModel":
        import torch

        from potstill.models import TransformersModel, load
        from potstill.train.lora import add_adapter, save_adapter
        from potstill.train.settings import LoraSettings

        folder = tmp_path / base_name
        if not folder.exists():
            build_tiny_model(family, **(config or {})).to(getattr(torch, dtype)).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
        base = TransformersModel(path=str(folder), device="cpu", **(base_fields or {}))
        settings = LoraSettings(**{"rank": 4, **lora})
        model = add_adapter(load(base, dtype=torch.float32).model, settings, seed=2 + seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter, one in model.named_parameters():
                if "lora_B" in parameter or "lora_embedding_A" in parameter:
                    one.normal_(std=0.05, generator=generator)
                if "lora_magnitude_vector" in parameter:
                    one.mul_(1 + 0.2 * torch.rand(one.shape, generator=generator))
        save_adapter(model, tmp_path / name)
        sealed = seal(tmp_path / name, "train")
        manifest = sealed.manifest.model_copy(
            update={"extra": {"base": base.model_dump(mode="json", exclude={"device"}, exclude_none=True)}}
        )
        (sealed.folder / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")
        return TransformersModel(path=str(sealed.folder), device="cpu")

    return make
