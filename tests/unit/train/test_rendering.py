"""By which template and in which form a student is trained is what is saved with it, and it is said."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.cache import CacheSettings
from potstill.cache import run as run_cache
from potstill.core.errors import TrainingError
from potstill.core.step import StepContext, StepResult
from potstill.core.store import Artifact
from potstill.data.chat import Renderer
from potstill.models import DEFAULT_CHAT_TEMPLATE, TransformersModel, load_tokenizer, reasoning_format
from potstill.train import TrainSettings, run

THOUGHT = "<think>\nten\n</think>\n\nEleven."


@pytest.fixture
def bare(tmp_path: Path, tiny_model_folder: Path) -> TransformersModel:
    """A base model without a chat template."""
    (tiny_model_folder / "chat_template.jinja").unlink()
    return TransformersModel(path=str(tiny_model_folder), device="cpu")


@pytest.fixture
def instructed(shared_model_folder: Path) -> TransformersModel:
    """The same weights with a chat template."""
    return TransformersModel(path=str(shared_model_folder), device="cpu")


Training = Callable[..., StepContext]


@pytest.fixture
def train(step_context: Any, traces: Any) -> Training:
    numbers = itertools.count()

    def make(student: TransformersModel, data: Artifact | None = None, **fields: Any) -> StepContext:
        source = data or traces(4, response=THOUGHT, held_out_every=100, name=f"traces-{next(numbers)}")
        folder = f"student-{next(numbers)}"
        context: StepContext = step_context(
            "train", folder=folder, models={"base": student}, data={"traces": [source]}
        )
        usual = {"do": "train", "student": "base", "data": "traces", "batch": 4, "max_steps": 1}
        result: StepResult = run(TrainSettings.model_validate({**usual, "device": "cpu", **fields}), context)
        assert result.counts["steps"]
        return context

    return make


def saved(context: StepContext) -> Any:
    return load_tokenizer(TransformersModel(path=str(context.folder)))


@pytest.fixture
def cached(step_context: Any, seal: Any, traces: Any) -> Callable[..., Artifact]:
    def make(teacher: TransformersModel, **fields: Any) -> Artifact:
        source = traces(4, response=THOUGHT, held_out_every=100, **fields)
        context = step_context("cache", folder="cache", models={"big": teacher}, data={"traces": [source]})
        settings = CacheSettings.model_validate({"do": "cache", "model": "big", "data": "traces", "top_k": 4})
        artifact: Artifact = seal(context.folder, "cache", run_cache(settings, context))
        return artifact

    return make


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_base_models_default_template_is_said_and_saved(
    train: Training, bare: TransformersModel, lora: Any
) -> None:
    context = train(bare, lora=lora)
    assert any("no chat template: it takes the one called plain" in line for line in context.reporter.said)
    assert saved(context).chat_template == DEFAULT_CHAT_TEMPLATE


def test_a_named_template_is_saved_with_the_student(train: Training, bare: TransformersModel) -> None:
    tokenizer = saved(train(bare.model_copy(update={"chat_template": "chatml"})))
    assert "<|im_start|>" in tokenizer.chat_template
    [end] = Renderer(tokenizer).end_of_turn_ids
    assert tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_reasoning_format_is_saved_with_the_student(
    train: Training, instructed: TransformersModel, lora: Any
) -> None:
    tokenizer = saved(train(instructed.model_copy(update={"reasoning_format": "strip"}), lora=lora))
    assert reasoning_format(tokenizer) == "strip"


def test_a_template_without_system_role_is_said(
    train: Training, instructed: TransformersModel, tmp_path: Path, chat_template: Callable[[str], str]
) -> None:
    (tmp_path / "gemma2.jinja").write_text(chat_template("gemma2"), encoding="utf-8")
    context = train(instructed.model_copy(update={"chat_template": str(tmp_path / "gemma2.jinja")}))
    assert any("no system role" in line for line in context.reporter.said)
    assert not any("no system role" in line for line in train(instructed).reporter.said)


def test_cached_conversations_bring_their_template_to_the_student(
    train: Training, cached: Callable[..., Artifact], bare: TransformersModel, instructed: TransformersModel
) -> None:
    context = train(bare, cached(instructed))
    assert any("takes the teacher's chat template" in line for line in context.reporter.said)
    assert saved(context).chat_template == load_tokenizer(instructed).chat_template


def test_a_stated_template_other_than_the_caches_is_refused(
    train: Training, cached: Callable[..., Artifact], instructed: TransformersModel
) -> None:
    cache = cached(instructed)
    for stated in ({"chat_template": "plain"}, {"reasoning_format": "strip"}):
        with pytest.raises(TrainingError, match="another chat template or reasoning format"):
            train(instructed.model_copy(update=stated), cache)


def test_the_same_stated_template_is_the_caches(
    train: Training, cached: Callable[..., Artifact], bare: TransformersModel
) -> None:
    stated = bare.model_copy(update={"chat_template": "chatml"})
    context = train(stated, cached(stated))
    assert not any("takes the teacher's" in line for line in context.reporter.said)


def test_from_python_cached_conversations_of_another_template_are_refused(
    cached: Callable[..., Artifact], bare: TransformersModel, instructed: TransformersModel, tmp_path: Path
) -> None:
    from potstill import DistillationArguments, DistillationTrainer

    folder = cached(instructed).folder
    arguments = DistillationArguments(output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=1)
    with pytest.raises(TrainingError, match="another chat template"):
        DistillationTrainer(bare.path, arguments, folder)
    assert DistillationTrainer(instructed.path, arguments, folder).rows.supervised_tokens


def test_a_reasoning_format_of_the_cached_teacher_is_the_students(
    train: Training, cached: Callable[..., Artifact], instructed: TransformersModel
) -> None:
    cache = cached(instructed.model_copy(update={"reasoning_format": ["<r>", "</r>"]}))
    assert reasoning_format(saved(train(instructed, cache))) == ["<r>", "</r>"]


def test_plain_texts_are_rendered_by_no_template(
    train: Training,
    cached: Callable[..., Artifact],
    step_context: Any,
    seal: Any,
    tmp_path: Path,
    bare: TransformersModel,
    instructed: TransformersModel,
) -> None:
    from potstill.core.records import RECORDS_FILE, Record, write_records

    (tmp_path / "texts").mkdir()
    texts = [Record(f"p{n}", [], response=f"State the final answer {n}.") for n in range(4)]
    write_records(tmp_path / "texts" / RECORDS_FILE, texts)
    source = seal(tmp_path / "texts", "generate")
    context = step_context("cache", folder="plain", models={"big": instructed}, data={"traces": [source]})
    settings = CacheSettings.model_validate({"do": "cache", "model": "big", "data": "traces", "top_k": 4})
    cache = seal(context.folder, "cache", run_cache(settings, context))
    assert saved(train(bare, cache)).chat_template == DEFAULT_CHAT_TEMPLATE


def test_added_tokens_that_the_cached_teacher_lacks_are_refused(
    train: Training, cached: Callable[..., Artifact], instructed: TransformersModel
) -> None:
    student = instructed.model_copy(update={"add_tokens": ["<think>", "</think>"]})
    cache = cached(instructed)
    with pytest.raises(TrainingError, match="cached teacher's logits know nothing") as caught:
        train(student, cache)
    assert "<think>, </think> are text then" in str(caught.value)


def test_a_teacher_of_the_same_added_tokens_serves(
    train: Training, cached: Callable[..., Artifact], instructed: TransformersModel
) -> None:
    student = instructed.model_copy(update={"add_tokens": ["<think>", "</think>"]})
    tokenizer = saved(train(student, cached(student), lora={"rank": 2}))
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == [300, 301]


def test_a_student_that_writes_marks_of_its_own_is_judged_as_one_that_writes_think_tags(
    train: Training, instructed: TransformersModel, traces: Any, step_context: Any, seal: Any
) -> None:
    from potstill.evaluate import EvaluateSettings
    from potstill.evaluate import run as run_evaluate

    source = traces(8, response="<think>\nten\n</think>\n\n11", held_out_every=100)
    student = instructed.model_copy(update={"reasoning_format": ["<r>", "</r>"]})
    schedule = {"lr": 2e-2, "schedule": "constant", "batch": 8, "max_steps": 60}
    folder = train(student, source, **schedule).folder
    trained = TransformersModel(path=str(folder), device="cpu")
    context = step_context("evaluate", models={"student": trained}, data={"traces": [source]})
    stated = {"do": "evaluate", "models": {"student": "student"}, "tasks": {"again": "traces"}}
    result = run_evaluate(EvaluateSettings.model_validate({**stated, "max_new_tokens": 24}), context)
    shown = (context.folder / "samples.json").read_text(encoding="utf-8")
    assert "<r>\\nten\\n</r>\\n\\n11" in shown, shown
    figures = result.metrics["models"]["student"]["tasks"]["again"]
    assert figures["verdicts"]["well_formed"]["value"] == 1.0
