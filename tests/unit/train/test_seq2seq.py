"""Encoder-decoders in training: the trainer, losses and files of all other students, on rows of two parts."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from potstill.core.errors import Interrupted, ModelError, TrainingError
from potstill.data.chat import Rendered, Renderer
from potstill.losses.types import Dense
from potstill.models import LoadedModel, TransformersModel, load
from potstill.teachers.transformers import generate_batch
from potstill.train import TrainSettings
from potstill.train.arguments import DistillationArguments
from potstill.train.base import Base
from potstill.train.loader import EpochPlan, MicroBatches
from potstill.train.lora import add_adapter
from potstill.train.online import OnlineTeacher
from potstill.train.rows import Rows, TrainingData
from potstill.train.settings import LoraSettings
from potstill.train.student import MicroBatch, StudentWithLoss, make_micro_batch
from potstill.train.trainer import DistillationTrainer

VOCABULARY = 200
ALPHA, TEMPERATURE = 0.3, 2.0
# Six rows whose sources and targets are of different lengths; the start token, which pads too, is in targets.
SOURCES = [[5 + number, *range(20, 20 + (number * 3) % 7), 1] for number in range(6)]
TARGETS = [[90 + number, 0, *range(40, 41 + (number * 5) % 8), 1] for number in range(6)]
ROWS = [
    Rendered([*source, 0, *target], [0] * (len(source) + 1) + [1] * len(target))
    for source, target in zip(SOURCES, TARGETS, strict=True)
]


def logits_of(model: Any, number: int) -> Tensor:
    """The logits that predict a target's tokens, from transformers' own forward of one row, unpadded."""
    written = torch.tensor([[0, *TARGETS[number][:-1]]])
    output = model(input_ids=torch.tensor([SOURCES[number]]), decoder_input_ids=written, use_cache=False)
    logits: Tensor = output.logits[0, :, :VOCABULARY]
    return logits


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


def naive_gradients(
    model: Any, teacher: Any | None = None, weights: Sequence[float] = (1.0,) * len(ROWS)
) -> dict[str, Tensor]:
    """One row at a time: the mean over all supervised tokens of (1 - a) CE + a T^2 KL."""
    count = sum(map(len, TARGETS))
    for number, weight in enumerate(weights):
        logits_NV = logits_of(model, number)
        loss = functional.cross_entropy(logits_NV, torch.tensor(TARGETS[number]), reduction="sum")
        if teacher is not None:
            p_NV = (logits_of(teacher, number).detach() / TEMPERATURE).softmax(-1)
            q_NV = (logits_NV / TEMPERATURE).softmax(-1)
            loss = (1 - ALPHA) * loss + ALPHA * TEMPERATURE**2 * (p_NV * (p_NV.log() - q_NV.log())).sum()
        (weight * loss / count).backward()
    return gradients(model)


def step_gradients(student: StudentWithLoss, batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    count = sum(batch.supervised for batch in batches)
    for batch in batches:
        student(batch, count)[0].backward()
    return gradients(student.model)


def split(sizes: Sequence[int], teacher: Any | None = None) -> list[MicroBatch]:
    made, numbers = [], list(range(len(ROWS)))
    for size in sizes:
        part, numbers = numbers[:size], numbers[size:]
        signal = (
            None if teacher is None else Dense(torch.cat([logits_of(teacher, one).detach() for one in part]))
        )
        made.append(make_micro_batch([ROWS[one] for one in part], signal))
    assert not numbers
    return made


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any("encoder" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-9, atol=1e-9 * max(gradient.abs().max().item(), 1e-3)
        )


# --- one optimiser step against a plain loop in float64


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [4, 2]])
def test_the_response_loss_has_the_gradient_of_a_loop_over_rows(tiny_t5: Any, sizes: list[int]) -> None:
    model = tiny_t5.double()
    expected = naive_gradients(model)
    assert_same(step_gradients(StudentWithLoss(model, VOCABULARY), split(sizes)), expected)


@pytest.mark.parametrize("sizes", [[6], [3, 3]])
def test_the_blend_with_a_teachers_logits_has_the_gradient_of_a_loop_over_rows(
    tiny_t5: Any, build_tiny_t5: Any, sizes: list[int]
) -> None:
    model, teacher = tiny_t5.double(), build_tiny_t5("t5", seed=5).double()
    student = StudentWithLoss(model, VOCABULARY, alpha=ALPHA, temperature=TEMPERATURE)
    assert_same(step_gradients(student, split(sizes, teacher)), naive_gradients(model, teacher))


def test_a_teacher_in_memory_gives_the_logits_of_its_own_pass(tiny_t5: Any, build_tiny_t5: Any) -> None:
    model, teacher = tiny_t5.double(), build_tiny_t5("t5_1_1", seed=5).double()
    vocabulary = SimpleNamespace(get_vocab=lambda: {str(number): number for number in range(VOCABULARY)})
    online = OnlineTeacher(teacher, LoadedModel(model, vocabulary, "student"))
    student = StudentWithLoss(model, VOCABULARY, alpha=ALPHA, temperature=TEMPERATURE)
    found = step_gradients(student, [online.answer(batch) for batch in split([4, 2])])
    assert_same(found, naive_gradients(model, teacher))


def test_an_adapter_has_the_gradient_of_a_loop_over_rows(tiny_t5: Any) -> None:
    model = add_adapter(tiny_t5, LoraSettings(rank=4), seed=1).double()
    generator = torch.Generator().manual_seed(1)
    for name, one in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.3, generator=generator)
    expected = naive_gradients(model)
    assert all("lora_" in name for name in expected)
    assert any("EncDecAttention" in name for name in expected)
    assert_same(step_gradients(StudentWithLoss(model, VOCABULARY), split([4, 2])), expected)


@pytest.mark.parametrize("adapted", [False, True], ids=["full weights", "adapter"])
def test_the_base_is_what_the_student_was(tiny_t5: Any, *, adapted: bool) -> None:
    before = copy.deepcopy(tiny_t5)
    model = add_adapter(tiny_t5, LoraSettings(rank=4), seed=1) if adapted else tiny_t5
    base = Base(model, VOCABULARY, 0.1)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_B" in name or not adapted:
                one.add_(0.1)
    signal = base.signal(make_micro_batch(ROWS))
    found = signal.head(signal.hidden_NH)
    expected = torch.cat([logits_of(before, number).detach() for number in range(len(ROWS))])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (logits_of(model, 0) - logits_of(before, 0)).abs().max() > 0.01


def test_a_row_lent_to_an_idle_rank_gives_zero_gradients_to_every_weight(tiny_t5: Any) -> None:
    rows = Rows()
    rows.append(ROWS[0], "r0")
    [idle] = MicroBatches(rows, None, 100, packed=False, rank=1, ranks=2).one_by_one([0])
    found = step_gradients(StudentWithLoss(tiny_t5, VOCABULARY), [make_micro_batch(ROWS[:1]), idle])
    alone = step_gradients(StudentWithLoss(tiny_t5, VOCABULARY), [make_micro_batch(ROWS[:1])])
    for name, gradient in alone.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


# --- the train step


@pytest.fixture
def student(build_t5_folder: Callable[..., Path]) -> TransformersModel:
    return TransformersModel(path=str(build_t5_folder("t5")))


Training = Callable[..., Any]


def weights(folder: Path) -> bytes:
    return next(iter(folder.glob("*.safetensors"))).read_bytes()


@pytest.mark.parametrize(
    "fields", [{}, {"lora": {"rank": 4}}, {"base_kl": 0.1}, {"lora": {}, "base_kl": 0.1}]
)
def test_training_lowers_the_loss_of_held_out_rows(
    train: Training, student: TransformersModel, fields: dict[str, Any]
) -> None:
    result, folder, _ = train(student=student, epochs=3, lr=1e-2, **fields)
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    assert result.metrics["untouched"] == []
    if "lora" in fields:
        assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("lora", [None, {"rank": 4, "dropout": 0.2}], ids=["full weights", "adapter"])
def test_interrupted_equals_uninterrupted(train: Training, student: TransformersModel, lora: Any) -> None:
    _, whole, _ = train("whole", student=student, epochs=2, checkpoint_minutes=0, lora=lora)
    with pytest.raises(Interrupted):
        train("broken", student=student, epochs=2, checkpoint_minutes=0, lora=lora, stop_at=3)
    _, resumed, context = train("broken", student=student, epochs=2, checkpoint_minutes=0, lora=lora)
    assert any("resum" in line or "goes on" in line for line in context.reporter.said)
    assert weights(resumed) == weights(whole)


def test_the_saved_folder_writes_in_plain_transformers_what_it_writes_here(
    train: Training, student: TransformersModel
) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    _, folder, _ = train(student=student, epochs=20, lr=1e-2)
    loaded = load(TransformersModel(path=str(folder), dtype="float32"))
    renderer = Renderer(loaded.tokenizer)
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    [answer] = generate_batch(loaded, renderer, [renderer.prompt_ids(messages)], max_new_tokens=20)
    assert answer.finish_reason == "stop"
    assert answer.response.startswith("The answer is")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    padding = [*range(len(tokenizer), model.config.vocab_size)]  # ids that stand for no token
    output = model.generate(
        **tokenizer("What is 3 + 4?", return_tensors="pt"), max_new_tokens=20, suppress_tokens=padding
    )
    assert tokenizer.decode(output[0], skip_special_tokens=True) == answer.response


def test_an_adapter_is_trained_on_and_merged(
    train: Training, student: TransformersModel, seal: Any, tmp_path: Path
) -> None:
    from potstill.merge.step import merge_into

    result, folder, _ = train(student=student, lora={"rank": 4}, lr=1e-2)
    seal(folder, "train", result)
    stage1 = TransformersModel(path=str(folder))
    (tmp_path / "merged").mkdir()
    merged = merge_into(tmp_path / "merged", stage1, name="adapter")
    assert merged.logit_difference < 1e-3
    again, _, _ = train("again", student=stage1, lr=1e-2)
    assert again.metrics["eval_loss_before"] == pytest.approx(result.metrics["eval_loss"], rel=1e-3)


def test_logits_of_a_teacher_of_the_same_tokenizer_are_learned_from(
    train: Training,
    student: TransformersModel,
    build_t5_folder: Callable[..., Path],
    traces: Any,
    seal: Any,
    step_context: Any,
) -> None:
    from potstill.cache import CacheSettings
    from potstill.cache import run as run_cache

    teacher = TransformersModel(path=str(build_t5_folder("mt5")))
    live, _, _ = train("live", student=student, teacher=teacher, alpha=1.0, epochs=2)
    source = traces(name="cached")
    context = step_context("cache", folder="cache", models={"teacher": teacher}, data={"traces": [source]})
    chosen = CacheSettings.model_validate({"do": "cache", "model": "teacher", "data": "traces", "top_k": 64})
    artifact = seal(context.folder, "cache", run_cache(chosen, context))
    stored, _, _ = train("stored", student=student, data=artifact, alpha=1.0, epochs=2)
    for result in (live, stored):
        assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    assert stored.metrics["eval_loss_before"] == pytest.approx(live.metrics["eval_loss_before"], rel=0.05)


def test_a_teacher_of_another_tokenizer_is_refused_by_name(
    train: Training, student: TransformersModel, base: TransformersModel
) -> None:
    with pytest.raises(ModelError, match="the teacher is decoder-only, the student encoder-decoder"):
        train(student=student, teacher=base)
    with pytest.raises(ModelError, match="the teacher is encoder-decoder, the student decoder-only"):
        train(student=base, teacher=student)


def test_what_has_no_meaning_is_refused_by_name(
    train: Training, student: TransformersModel, build_t5_folder: Callable[..., Path]
) -> None:
    other = TransformersModel(path=str(build_t5_folder("mt5")))
    with pytest.raises(TrainingError, match="inner states of a t5 model are those of two stacks"):
        train(student=student, teacher=other, feature={"kind": "hidden_mse"})
    with pytest.raises(TrainingError, match="packed rows see one another"):
        train(student=student, packing=True)
    with pytest.raises(TrainingError, match="embedding in three places"):
        train(student=student.model_copy(update={"add_tokens": ["<think>"]}), lora={})


def test_a_model_and_a_tokenizer_of_different_kinds_are_refused(
    build_tiny_t5: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TrainingError, match="not of one kind"):
        DistillationTrainer(
            build_tiny_t5(), arguments, [{"prompt": "2 + 3?", "response": "5"}], tokenizer=tiny_tokenizer
        )


# --- step-by-step distillation


REASONED = {"response": "<think>\n3 + 4 = 7\n</think>\n\nThe answer is 7.", "reasoning": "3 + 4 = 7"}


@pytest.fixture
def reasoned(traces: Any) -> Any:
    return traces(name="reasoned", answer="The answer is 7.", **REASONED)


def test_tasks_that_belong_together_share_a_step_in_every_epoch() -> None:
    plan = EpochPlan([3, 40, 5, 20, 4, 31], batch=2, seed=1, together=2)
    for epoch in range(3):
        plan.set_epoch(epoch)
        steps = list(plan)
        assert len(steps) == len(plan) == 2
        assert sorted(number for step in steps for number in step) == [*range(6)]
        assert all(step[one] + 1 == step[one + 1] for step in steps for one in range(0, len(step), 2))
        assert all(step[one] % 2 == 0 for step in steps for one in range(0, len(step), 2))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("max_tokens", [1000, 30])
def test_each_task_has_its_share_of_the_loss_however_the_step_is_split(
    build_tiny_t5: Any, share: float, max_tokens: int
) -> None:
    model = build_tiny_t5().double()
    rows = Rows((share, 1 - share))
    for number, row in enumerate(ROWS):
        rows.append(row, f"r{number}")
    labels, rationales = (sum(len(TARGETS[one]) for one in range(start, 6, 2)) for start in (0, 1))
    assert labels != rationales
    count = labels + rationales
    by_task = (share * count / labels, (1 - share) * count / rationales)
    expected = naive_gradients(model, weights=[by_task[number % 2] for number in range(6)])
    student = StudentWithLoss(model, VOCABULARY)
    step = MicroBatches(rows, None, max_tokens, packed=False)(range(6))
    assert (len(step.batches) > 1) == (max_tokens == 30)
    total = sum(student(batch, count)[1]["loss"] for batch in step.batches) / count
    mean = {
        start: sum(
            functional.cross_entropy(logits_of(model, one), torch.tensor(TARGETS[one]), reduction="sum")
            for one in range(start, 6, 2)
        )
        / (labels, rationales)[start]
        for start in (0, 1)
    }
    torch.testing.assert_close(
        total, (share * mean[0] + (1 - share) * mean[1]).detach(), rtol=1e-9, atol=1e-9
    )
    model.zero_grad()
    assert_same(step_gradients(student, step.batches), expected)


def test_a_trace_becomes_a_label_and_a_rationale_and_the_student_is_asked_for_labels(
    train: Training, student: TransformersModel, reasoned: Any
) -> None:
    result, folder, _ = train(student=student, data=reasoned, label_weight=0.5, epochs=40, lr=1e-2)
    assert result.counts["rows"] == 2 * 10
    assert result.counts["held_out_rows"] == 2 * 2
    assert result.counts["steps"] == 40 * 3  # ten traces in steps of four
    loaded = load(TransformersModel(path=str(folder)))
    renderer = Renderer(loaded.tokenizer)
    question = [{"role": "user", "content": "What is 0 + 1?"}]
    assert renderer.prompt_text(question) == "[label] What is 0 + 1?</s><pad>"
    [answer] = generate_batch(loaded, renderer, [renderer.prompt_ids(question)], max_new_tokens=20)
    assert answer.response == "The answer is 7."
    loaded.tokenizer.chat_template = loaded.tokenizer.chat_template.replace("[label]", "[rationale]")
    other = Renderer(loaded.tokenizer)
    [rationale] = generate_batch(loaded, other, [other.prompt_ids(question)], max_new_tokens=20)
    assert rationale.response == "3 + 4 = 7"


def test_a_later_stage_asks_in_the_same_way(
    train: Training, student: TransformersModel, reasoned: Any
) -> None:
    _, folder, _ = train(student=student, data=reasoned, label_weight=0.5)
    _, again, _ = train("again", student=TransformersModel(path=str(folder)), data=reasoned, label_weight=0.5)
    template = Renderer(load(TransformersModel(path=str(again))).tokenizer)
    assert template.prompt_text([{"role": "user", "content": "3?"}]) == "[label] 3?</s><pad>"


def test_traces_without_reasoning_are_left_out_and_where_none_has_any_that_is_an_error(
    train: Training, student: TransformersModel, traces: Any
) -> None:
    with pytest.raises(Exception, match="needs reasoning and an answer, and the trace has not both"):
        train(student=student, label_weight=0.5)


def test_a_decoder_only_student_and_cached_logits_are_refused(
    train: Training, base: TransformersModel, reasoned: Any
) -> None:
    with pytest.raises(TrainingError, match="a way to train encoder-decoders"):
        train(student=base, data=reasoned, label_weight=0.5)


def test_a_masked_prefix_cannot_be_parted() -> None:
    with pytest.raises(ValueError, match="label_weight parts a response"):
        TrainSettings.model_validate(
            {"do": "train", "student": "a/b", "data": "c/d", "label_weight": 0.5, "mask_prefix": True}
        )


def test_interrupted_step_by_step_equals_uninterrupted(
    train: Training, student: TransformersModel, reasoned: Any
) -> None:
    given: dict[str, Any] = {"student": student, "data": reasoned, "label_weight": 0.5, "epochs": 2}
    _, whole, _ = train("whole", checkpoint_minutes=0, **given)
    with pytest.raises(Interrupted):
        train("broken", checkpoint_minutes=0, stop_at=4, **given)
    _, resumed, _ = train("broken", checkpoint_minutes=0, **given)
    assert weights(resumed) == weights(whole)


def test_training_data_without_tasks_weighs_all_tokens_alike() -> None:
    assert TrainingData().train.factors([]) is None
