"""Settings of the `evaluate` step; nothing heavy is imported here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from potstill.core.settings import ModelRef, Settings, execution
from potstill.data.sources import Data
from potstill.evaluate.scorer_settings import BertScoreSettings, HarnessSettings, JudgeSettings
from potstill.verifiers.settings import Verifier

__all__ = ["Decoding", "EvaluateSettings", "TaskSettings"]

_ANSWER_TOKENS, _REASONING_TOKENS = 512, 4096


@dataclass(frozen=True)
class Decoding:
    """How every model's answers to a task are decoded; `samples` a prompt, `max_new_tokens` an answer."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int


class TaskSettings(Settings):
    """A task with settings of its own; what it leaves out is as the step says."""

    data: Data
    choose_by: Literal["generation", "letter", "text"] = Field(
        "generation",
        description="multiple choice: the option that an answer settles on, the likeliest letter, or the "
        "likeliest text of an option",
    )
    normalise: Literal["none", "token", "byte"] = Field(
        "byte", description="what an option's log-probability is divided by, where options are chosen by text"
    )
    limit: PositiveInt | None = Field(None, description="at most so many prompts; the first ones")
    samples: PositiveInt | None = Field(None, description="answers a prompt")
    temperature: float | None = Field(None, ge=0, description="0 takes the likeliest token")
    top_p: float | None = Field(
        None, gt=0, le=1, description="sample from the likeliest tokens of this share"
    )
    max_new_tokens: PositiveInt | None = Field(None, description="tokens an answer, reasoning included")
    verifier: Verifier | None = Field(
        None, description="what judges answers in the place of the rows' own verifier"
    )

    @property
    def generates(self) -> bool:
        """Whether models write answers, instead of options being scored."""
        return self.choose_by == "generation"

    @model_validator(mode="after")
    def _check(self) -> Self:
        unused = ("samples", "temperature", "top_p", "max_new_tokens")
        given = [name for name in unused if getattr(self, name) is not None]
        if self.verifier is not None and not self.generates:
            raise ValueError("verifier is for answers that are written, and choose_by scores options")
        if given and not self.generates:
            raise ValueError(f"{given[0]} is for answers that are written, and choose_by scores options")
        return self


def _kind(value: Any) -> str:
    has_options = isinstance(value, TaskSettings) or (isinstance(value, Mapping) and "data" in value)
    return "TaskSettings" if has_options else "Data"


Task = Annotated[
    Annotated[TaskSettings, Tag("TaskSettings")] | Annotated[Data, Tag("Data")], Discriminator(_kind)
]
"""How a recipe declares a task: its prompts alone, or `data` beside settings."""


class EvaluateSettings(Settings):
    """Compare models on the same traces and prompts with the same decoding.

    On held-out traces: KL to the teacher, top-1 agreement and perplexity. On tasks: the share of verified
    answers, how well formed the reasoning is, and with `rouge` the likeness to given responses. On sets that
    training did not touch (`forgetting`), before and after: verified answers, and perplexity of given
    responses.
    """

    kind: ClassVar[str] = "evaluate"
    schema_version: ClassVar[int] = 4

    do: Literal["evaluate"]
    models: dict[str, ModelRef] | list[ModelRef] = Field(
        min_length=1,
        description="models by the role they play, such as base and student; in a list, by their own names",
    )
    baseline: str | None = Field(
        None, description="the model that others are compared with; by default base, else the first"
    )
    teacher: ModelRef | None = Field(
        None, description="the model whose distribution KL and agreement are measured to"
    )
    data: Data | None = Field(None, description="traces kept from training, such as traces:held_out")
    tasks: dict[str, Task] = Field(
        {},
        description="prompts with a verifier, by the name the report gives them; settings go beside `data`",
    )
    forgetting: dict[str, Task] = Field(
        {}, description="prompts or traces that training did not touch, as under tasks"
    )
    by: str | None = Field(
        None,
        min_length=1,
        description="a column or label of the tasks' rows, such as category: right answers for each of its "
        "values beside those for all",
    )
    rouge: bool = Field(
        False, description="compare answers with the responses that the rows of tasks come with, by ROUGE"
    )
    bertscore: BertScoreSettings | None = Field(
        None, description="compare them by the hidden states of a model, too"
    )
    judge: JudgeSettings | None = Field(
        None, description="a model judges the answers of tasks beside the baseline's"
    )
    rating_sheet: PositiveInt | None = Field(
        None,
        description="write a blinded sheet for human raters, with the first so many prompts of each task; "
        "`potstill rate` reads it back",
    )
    lm_eval: HarnessSettings | None = Field(None, description="benchmarks of lm-eval")
    limit: int | None = Field(
        None, ge=1, description="at most so many traces, and prompts of each task; the first ones"
    )
    max_new_tokens: PositiveInt | None = Field(
        None,
        description=f"tokens an answer, reasoning included; by default {_ANSWER_TOKENS}, and "
        f"{_REASONING_TOKENS} where a model's chat template or a given trace reasons",
    )
    samples: int = Field(1, ge=1, description="answers a prompt; more than one needs a temperature")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of this share")
    pass_at: list[PositiveInt] | None = Field(
        None, description="the k of pass@k; by default the number of samples, where there are several"
    )
    max_failed_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a served model's answers to a task that may fail; they count as wrong",
    )
    samples_shown: int = Field(
        4, ge=0, description="prompts whose answers the report shows side by side, of each kind"
    )

    batch: int = execution(32, ge=1, description="prompts decoded at once")
    max_tokens: int | None = execution(
        None, ge=1, description="padded tokens of traces at once; by default by device"
    )
    max_cost: float | None = execution(
        None,
        gt=0,
        description="dollars that answers of each served model may cost; the model needs a `price`",
    )
    device: str | None = execution(None, description="cpu, cuda, ...; by default the GPU where there is one")

    @property
    def roles(self) -> dict[str, ModelRef]:
        """The models by name."""
        return self.models if isinstance(self.models, dict) else {str(one): one for one in self.models}

    @property
    def compares(self) -> bool:
        """Whether answers are compared with the responses that rows come with."""
        return self.rouge or self.bertscore is not None

    @property
    def written(self) -> list[str]:
        """The tasks whose answers models write."""
        return [name for name in self.tasks if self.all_tasks[name].generates]

    @property
    def all_tasks(self) -> dict[str, TaskSettings]:
        """Tasks and sets for forgetting by name, those given by their data alone with settings as well."""
        return {
            name: task if isinstance(task, TaskSettings) else TaskSettings.model_construct(data=task)
            for name, task in {**self.tasks, **self.forgetting}.items()
        }

    def decoding(self, task: TaskSettings | None = None, *, reasons: bool = False) -> Decoding:
        """How answers to a task are decoded; without one, those that are only shown."""

        def chosen(name: str) -> Any:
            own = None if task is None else getattr(task, name)
            return getattr(self, name) if own is None else own

        return Decoding(
            samples=1 if task is None else chosen("samples"),
            temperature=chosen("temperature"),
            top_p=chosen("top_p"),
            max_new_tokens=chosen("max_new_tokens") or (_REASONING_TOKENS if reasons else _ANSWER_TOKENS),
        )

    @model_validator(mode="before")
    @classmethod
    def _fill_baseline(cls, value: Any) -> Any:
        # Written out, because which model stands first is not part of a fingerprint.
        if not isinstance(value, dict) or value.get("baseline") is not None:
            return value
        models, teacher = value.get("models"), value.get("teacher")
        if isinstance(models, list):
            models = {name: name for name in models if isinstance(name, str)}
        if not isinstance(models, dict) or not models:
            return value
        others = [role for role, reference in models.items() if reference != teacher]
        return {**value, "baseline": "base" if "base" in models else [*others, *models][0]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data is None and not self.tasks and not self.forgetting and self.lm_eval is None:
            raise ValueError("nothing to evaluate on: give data (held-out traces), tasks, or both")
        if self.compares and not self.tasks:
            name = "rouge" if self.rouge else "bertscore"
            raise ValueError(
                f"{name} needs tasks whose rows have responses, such as {{name: traces:held_out}}"
            )
        if self.baseline not in self.roles:
            raise ValueError(f"baseline {self.baseline!r} is not among the models: {', '.join(self.roles)}")
        if isinstance(self.models, list) and len(self.roles) < len(self.models):
            raise ValueError("models names one twice")
        if both := sorted(self.tasks.keys() & self.forgetting.keys()):
            raise ValueError(f"{both[0]!r} stands under tasks and under forgetting")
        return self

    @model_validator(mode="after")
    def _check_scorers(self) -> Self:
        for name in ("judge", "rating_sheet"):
            if getattr(self, name) is not None and (not self.written or len(self.roles) < 2):
                raise ValueError(f"{name} compares answers: it needs two models, and tasks that are written")
        for name in self.judge.tasks if self.judge is not None else ():
            if name not in self.written:
                raise ValueError(f"judge: {name!r} is no task whose answers are written")
        return self

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        tasks = {name: self.decoding(task) for name, task in self.all_tasks.items() if task.generates}
        for name, decoding in tasks.items():
            if decoding.samples > 1 and decoding.temperature == 0:
                raise ValueError(
                    f"the {decoding.samples} samples of {name} would all be alike; set a temperature"
                )
        most = max((decoding.samples for decoding in tasks.values()), default=self.samples)
        if self.pass_at and max(self.pass_at) > most:
            raise ValueError(f"pass@{max(self.pass_at)} needs as many samples a prompt, not {most}")
        return self
