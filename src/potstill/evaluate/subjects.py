"""Models under evaluation: those that transformers loads here, and those that another engine serves."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from potstill.core.errors import ModelError
from potstill.core.hashing import hash_json
from potstill.core.records import Record, write_records
from potstill.core.settings import ModelRef, Settings
from potstill.core.step import StepContext
from potstill.data.chat import Renderer
from potstill.evaluate.settings import Decoding, EvaluateSettings
from potstill.generate import GenerateSettings, PromptPlan, check_budget
from potstill.models import (
    LoadedModel,
    SharedWeights,
    TransformersModel,
    identity,
    load,
    load_tokenizer,
    tokenizer_hash,
)
from potstill.scoring import Pieces
from potstill.teachers import Answer, Teacher, open_teacher
from potstill.teachers.asking import Asking
from potstill.teachers.budget import Budget
from potstill.teachers.request_store import open_request_store
from potstill.teachers.transformers import generate_batch

__all__ = ["Decoded", "LocalSubject", "ServedSubject", "Subject", "open_subject"]


@dataclass(frozen=True)
class Decoded:
    """Answers to prompts, as many a prompt as there are samples, in order; None is one that failed.

    `seconds` is what it took to decode all of them, None where some were known already.
    """

    answers: list[Answer | None]
    seconds: float | None


class LocalSubject:
    """A model that transformers loads, when something has to be measured and not before.

    Its weights are taken from `shared` where another model on the same base left them there.
    """

    def __init__(
        self,
        name: str,
        reference: ModelRef,
        model: TransformersModel,
        settings: EvaluateSettings,
        context: StepContext,
        shared: SharedWeights | None = None,
    ) -> None:
        self.name, self.reference, self.settings = name, reference, model
        self.tokenizer = load_tokenizer(model, say=context.say)
        self.renderer = Renderer(self.tokenizer)
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
        self.identity = identity(model)
        self._batch, self._context, self._shared = settings.batch, context, shared
        self._pieces = Pieces(more=self._say_more)
        self._loaded: LoadedModel | None = None

    def _say_more(self, pieces: int) -> None:
        rows = max(1, -(-self._batch // pieces))
        self._context.say(f"{self.name}: out of memory: {rows:,} answers are decoded at once from here on")

    @property
    def loaded(self) -> LoadedModel:
        """The model itself."""
        if self._loaded is None:
            self._loaded = load(self.settings, shared=self._shared)
        return self._loaded

    def is_same_model(self, other: "Subject") -> bool:
        """Whether two names stand for the same weights in the same precision."""
        return isinstance(other, LocalSubject) and (self.identity, self.settings.quantize) == (
            other.identity,
            other.settings.quantize,
        )

    def read_response(self, record: Record, response: str) -> str:
        """A response to the record's prompt, its reasoning in a think block."""
        return self.renderer.read_response(record.messages, response)

    def thinks(self, record: Record) -> bool:
        """Whether the chat template is that of a model that reasons before it answers."""
        return "enable_thinking" in str(self.tokenizer.chat_template) or self.renderer.opens_reasoning(
            record.messages
        )

    def decode(self, records: Sequence[Record], decoding: Decoding, *, description: str) -> Decoded:
        """Answers, prompts of like length decoded together, in pieces where memory runs out.

        Sampling draws by seeds made from the prompt's id and the sample's number, the same for every model.
        Raises DataError for a prompt that does not fit the model's context, ModelError for an answer that
        does not fit into memory alone.
        """
        prompts_ids = [self.renderer.prompt_ids(record.messages) for record in records]
        places = [(number, sample) for number in range(len(records)) for sample in range(decoding.samples)]
        order = sorted(range(len(places)), key=lambda one: len(prompts_ids[places[one][0]]), reverse=True)
        found: dict[int, Answer] = {}
        seconds = 0.0
        model, context = self.loaded, self._context

        def decode(chosen: Sequence[int]) -> list[Answer]:
            return generate_batch(
                model,
                self.renderer,
                [prompts_ids[places[one][0]] for one in chosen],
                max_new_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                seeds=[_seed(records[places[one][0]], places[one][1], context) for one in chosen],
                stop=context.stop,
            )

        def too_large(one: int) -> ModelError:
            tokens = len(prompts_ids[places[one][0]]) + decoding.max_new_tokens
            return ModelError(
                f"an answer of up to {tokens:,} tokens, prompt included, does not fit into memory",
                where=self.name,
                mend="lower `max_new_tokens`, or use a machine or device with more memory",
            )

        with context.progress(description, total=len(places), unit="answers") as progress:
            for start in range(0, len(order), self._batch):
                chosen = order[start : start + self._batch]
                started = time.monotonic()
                answers = list(self._pieces.run(decode, chosen, too_large))
                seconds += time.monotonic() - started
                context.check_stop()
                found.update(zip(chosen, answers, strict=True))
                progress.advance(len(chosen))
        return Decoded([found[one] for one in range(len(places))], seconds)

    def close(self) -> None:
        """Let go of the model; its weights are free once `shared` does not keep them."""
        self._loaded = None


def _seed(record: Record, sample: int, context: StepContext) -> int:
    return context.derive_seed("sample", record.prompt_id, sample)


class ServedSubject:
    """A model of another engine: a server, llama.cpp, a function. It is opened when it has to be asked.

    Its answers are kept in the request store like those of a generate step, and asked for once. Each time
    that it is asked has a file of its own for failures, whose name begins with `failures`.
    """

    tokenizer_hash = None

    def __init__(
        self,
        name: str,
        reference: ModelRef,
        model: Settings,
        settings: EvaluateSettings,
        context: StepContext,
        failures: str,
    ) -> None:
        self.name, self.reference, self._failures = name, reference, failures
        self.engine = str(getattr(model, "engine", type(model).__name__))
        content = model.content() or {}
        self.identity = str(content.get("identity") or hash_json(content))
        self._model, self._settings, self._context = model, settings, context
        self._runner: asyncio.Runner | None = None
        self._teacher: Teacher | None = None
        self._asked = 0
        check_budget(self._generate_settings(settings.decoding()), model)

    def is_same_model(self, other: "Subject") -> bool:
        """Whether two names stand for the same model; what an engine makes of its weights is its own."""
        return other is self

    def read_response(self, record: Record, response: str) -> str:
        """A response to the record's prompt, its reasoning in a think block if the template is known here."""
        renderer = None if self._teacher is None else self._teacher.renderer
        return response if renderer is None else renderer.read_response(record.messages, response)

    def decode(self, records: Sequence[Record], decoding: Decoding, *, description: str) -> Decoded:
        """Answers, from the request store where it has them; those that failed are None.

        Raises EngineError when more than `max_failed_share` of them failed, BudgetError when `max_cost` is
        used up; answers are kept and the next run asks for the rest.
        """
        if self._runner is None:
            self._runner = asyncio.Runner()
            self._teacher = self._runner.run(self._open())
        self._context.say(description)
        path = self._context.scratch / "asked.parquet"
        write_records(path, records)
        return self._runner.run(self._ask(self._generate_settings(decoding), path))

    async def _open(self) -> Teacher:
        return open_teacher(self._model, say=self._context.say)

    async def _ask(self, settings: GenerateSettings, prompts_path: Path) -> Decoded:
        teacher, context = self._teacher, self._context
        assert teacher is not None
        with open_request_store(context.cache_folder, [self.engine, teacher.identity]) as store:
            plan = PromptPlan(settings, context, teacher, prompts_path)
            budget = Budget(
                store.bought(context.folder.name),
                price=getattr(self._model, "price", None),
                max_cost=settings.max_cost,
                max_tokens=None,
            )
            self._asked += 1
            failures_path = context.folder / f"{self._failures}-{self._asked}.jsonl"
            asking = Asking(
                plan, teacher, store, budget, context, model=self.name, failures_path=failures_path
            )
            started = time.monotonic()
            await asking.ask()
            seconds = time.monotonic() - started
            asking.check_failures(self._settings.max_failed_share)
            return Decoded([store.get(planned.key) for planned in plan], None if asking.reused else seconds)

    def _generate_settings(self, decoding: Decoding) -> GenerateSettings:
        """The same request of a generate step, so that both find each other's answers in the store."""
        return GenerateSettings.model_construct(
            model=self.reference,
            data=[],
            samples=decoding.samples,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_new_tokens=decoding.max_new_tokens,
            max_cost=self._settings.max_cost,
        )

    def close(self) -> None:
        """Free what the engine holds."""
        if self._runner is not None and self._teacher is not None:
            self._runner.run(self._teacher.close())
            self._runner.close()
        self._runner = self._teacher = None


Subject = LocalSubject | ServedSubject


def open_subject(
    name: str,
    reference: ModelRef,
    settings: EvaluateSettings,
    context: StepContext,
    shared: SharedWeights | None = None,
    *,
    failures: str | None = None,
) -> Subject:
    """The model that a reference names, ready to be measured; nothing is loaded or asked yet.

    `failures` is for a model that is asked in a second part beside that of a subject: a name for the files of
    what fails in it.
    """
    model = context.model(reference)
    if not isinstance(model, TransformersModel):
        return ServedSubject(name, reference, model, settings, context, failures or f"failures-{reference}")
    if settings.device is not None:
        model = model.model_copy(update={"device": settings.device})
    return LocalSubject(name, reference, model, settings, context, shared)
