"""An optimiser step has the gradient of a plain loop over its rows, however it is split and padded."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from potstill.data.chat import Rendered
from potstill.losses.types import Dense, Live, TeacherSignal
from potstill.models import hidden_states, output_head
from potstill.train.lora import add_adapter
from potstill.train.rows import CachedTeacher, Rows
from potstill.train.settings import LoraSettings
from potstill.train.student import MicroBatch, StudentWithLoss, make_micro_batch
from potstill.train.trainer import DistillationArguments, DistillationTrainer

VOCABULARY = 300
ALPHA, TEMPERATURE = 0.3, 2.0
# Eight rows whose lengths and supervised counts all differ; 2 is the eos and padding id, and is in rows.
ROWS = [
    Rendered(
        [2, *((number * 37 + 11 * place) % VOCABULARY for place in range(4 + number)), 2],
        [0] * (2 + number % 3) + [1] * (4 + number - number % 3),
    )
    for number in range(8)
]


def in_rows(rendered: Sequence[Rendered] = ROWS) -> Rows:
    rows = Rows()
    for number, row in enumerate(rendered):
        rows.append(row, f"r{number}", number)
    return rows


def teacher_signal(teacher: Any, rows: Sequence[Rendered]) -> Dense:
    """The teacher's logits for supervised tokens, one row after the other without any padding."""
    parts = []
    for row in rows:
        with torch.no_grad():
            logits_TV = teacher(torch.tensor([row.ids]), use_cache=False).logits[0, :, :VOCABULARY]
        parts.append(logits_TV[:-1][torch.tensor(row.mask[1:], dtype=torch.bool)])
    return Dense(torch.cat(parts))


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


def naive_gradients(model: Any, teacher: Any | None = None) -> dict[str, Tensor]:
    """Full logits of one row at a time; the mean over all supervised tokens of (1 - a) CE + a T^2 KL."""
    count = sum(row.supervised_tokens for row in ROWS)
    for row in ROWS:
        supervised = torch.tensor(row.mask[1:], dtype=torch.bool)
        ids = torch.tensor([row.ids])
        logits_NV = model(ids, use_cache=False).logits[0, :-1, :VOCABULARY][supervised]
        loss = functional.cross_entropy(logits_NV, ids[0, 1:][supervised], reduction="sum")
        if teacher is not None:
            p_NV = (teacher_signal(teacher, [row]).logits_NV / TEMPERATURE).softmax(-1)
            q_NV = (logits_NV / TEMPERATURE).softmax(-1)
            kl = (p_NV * (p_NV.log() - q_NV.log())).sum()
            loss = (1 - ALPHA) * loss + ALPHA * TEMPERATURE**2 * kl
        (loss / count).backward()
    return gradients(model)


def step_gradients(student: StudentWithLoss, batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    count = sum(batch.supervised for batch in batches)
    for batch in batches:
        student(batch, count)[0].backward()
    return gradients(student.model)


def split(sizes: Sequence[int], teacher: Any | None = None) -> list[MicroBatch]:
    made, rest = [], list(ROWS)
    for size in sizes:
        part, rest = rest[:size], rest[size:]
        made.append(make_micro_batch(part, None if teacher is None else teacher_signal(teacher, part)))
    assert not rest
    return made


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 0
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name} gets no gradient: the comparison would say nothing"
        torch.testing.assert_close(
            found[name], gradient, rtol=tolerance, atol=tolerance * gradient.abs().max().item()
        )


@pytest.fixture(autouse=True)
def _one_thread(_quiet_libraries: None) -> Iterator[None]:
    """On models this small the threads of torch wait for one another longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SPLITS = [[8], [1] * 8, [3, 5], [7, 1]]


def test_the_rows_of_this_file_can_tell_a_wrong_mean_from_the_right_one(build_tiny_model: Any) -> None:
    counts = [batch.supervised for batch in split([3, 5])]
    assert counts[0] / 3 != counts[1] / 5
    model = build_tiny_model().double()
    for batch in split([3, 5]):  # normalised by micro-batch, as it must not be
        (StudentWithLoss(model, VOCABULARY)(batch, batch.supervised)[0] / 2).backward()
    with pytest.raises(AssertionError):
        assert_same(gradients(model), naive_gradients(model))


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_response_loss_equals_a_plain_loop_in_every_split(build_tiny_model: Any, sizes: list[int]) -> None:
    model = build_tiny_model().double()
    found = step_gradients(StudentWithLoss(model, VOCABULARY), split(sizes))
    assert_same(found, naive_gradients(model))


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_distillation_equals_a_plain_loop_in_every_split(build_tiny_model: Any, sizes: list[int]) -> None:
    model, teacher = build_tiny_model().double(), build_tiny_model(seed=1).double()
    student = StudentWithLoss(model, VOCABULARY, alpha=ALPHA, temperature=TEMPERATURE)
    assert_same(step_gradients(student, split(sizes, teacher)), naive_gradients(model, teacher))


def test_distillation_equals_a_plain_loop_for_every_family(build_tiny_model: Any, tiny_family: str) -> None:
    model, teacher = build_tiny_model(tiny_family).double(), build_tiny_model(tiny_family, seed=1).double()
    student = StudentWithLoss(model, VOCABULARY, alpha=ALPHA, temperature=TEMPERATURE)
    found, expected = step_gradients(student, split([3, 5], teacher)), naive_gradients(model, teacher)
    silent = {name for name, gradient in expected.items() if gradient.abs().max() < 1e-12}
    assert all("k_proj.bias" in name for name in silent)  # softmax is blind to what all keys share
    for name in silent:
        assert found.pop(name).abs().max() < 1e-12
        del expected[name]
    assert_same(found, expected, 1e-5)  # norms work in fp32


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_an_adapter_gets_the_gradient_of_a_plain_loop(build_tiny_model: Any, sizes: list[int]) -> None:
    model = add_adapter(build_tiny_model(), LoraSettings(rank=4), seed=3).double()
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_B" in name:  # zero at first, which leaves lora_A without a gradient
                one.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    found = step_gradients(StudentWithLoss(model, VOCABULARY), split(sizes))
    assert all("lora_" in name for name in found)
    assert_same(found, naive_gradients(model))


def test_what_the_padding_holds_changes_nothing(build_tiny_model: Any) -> None:
    student = StudentWithLoss(build_tiny_model().double(), VOCABULARY)
    (batch,) = split([8])
    real_BT = torch.zeros_like(batch.loss_mask_BT)
    for number, row in enumerate(ROWS):
        real_BT[number, : len(row.ids)] = True
    assert not real_BT.all()
    rubbish_BT = torch.where(real_BT, batch.input_ids_BT, 123)
    assert not torch.equal(rubbish_BT, batch.input_ids_BT)
    other = MicroBatch(rubbish_BT, batch.loss_mask_BT, batch.tokens, batch.supervised)
    assert_same(step_gradients(student, [other]), step_gradients(student, [batch]))


def test_a_longer_row_beside_it_changes_nothing_of_a_row(build_tiny_model: Any) -> None:
    model = build_tiny_model().double()
    student, short, long = StudentWithLoss(model, VOCABULARY), ROWS[0], ROWS[7]
    alone = step_gradients(student, [make_micro_batch([short])])
    other = step_gradients(student, [make_micro_batch([long])])
    together = step_gradients(student, [make_micro_batch([short, long])])
    own, others = short.supervised_tokens, long.supervised_tokens
    mixed = {name: (own * alone[name] + others * other[name]) / (own + others) for name in alone}
    assert make_micro_batch([short, long]).input_ids_BT.shape[1] > len(short.ids)
    assert_same(together, mixed, 1e-5)  # norms round to fp32, which another factor rounds otherwise


def test_a_live_teacher_equals_its_full_logits(build_tiny_model: Any) -> None:
    model, teacher = build_tiny_model().double(), build_tiny_model(seed=1).double()
    student = StudentWithLoss(model, VOCABULARY, alpha=ALPHA, temperature=TEMPERATURE)
    (batch,) = split([8], teacher)
    with torch.no_grad():
        hidden_BTH = hidden_states(teacher, batch.input_ids_BT)
    live = Live(hidden_BTH[:, :-1][batch.loss_mask_BT[:, 1:]], output_head(teacher, VOCABULARY))
    alive = MicroBatch(batch.input_ids_BT, batch.loss_mask_BT, batch.tokens, batch.supervised, live)
    assert_same(step_gradients(student, [alive]), step_gradients(student, [batch]))


@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_a_cached_teacher_equals_the_teacher_itself(
    build_tiny_model: Any, tmp_path: Path, temperature: float
) -> None:
    from potstill.logits.codecs import TopK
    from potstill.logits.shards import CachedRow, LogitCache, ShardWriter, write_index

    model, teacher = build_tiny_model(), build_tiny_model(seed=1)
    codec = TopK(VOCABULARY, VOCABULARY, (1.0, TEMPERATURE))
    writer = ShardWriter(tmp_path, codec, tokenizer="t", model="m", shard_tokens=10)
    stored = [
        CachedRow(row.ids, row.mask, held_out=False, record_id=str(number)) for number, row in enumerate(ROWS)
    ]
    for row, rendered in zip(stored, ROWS, strict=True):
        writer.append(row, codec.encode(teacher_signal(teacher, [rendered]).logits_NV))
    writer.seal()
    assert len(list(tmp_path.glob("shard-*"))) > 1
    write_index(tmp_path, stored)
    cache = CachedTeacher([LogitCache.open(tmp_path)], temperature)

    student = StudentWithLoss(model, VOCABULARY, alpha=1.0, temperature=temperature)
    rows, orders = in_rows(), [[5, 0, 7], [1, 2, 3, 4, 6]]
    cached, online = (
        [make_micro_batch([ROWS[number] for number in order], signal(order)) for order in orders]
        for signal in (
            lambda order: cache(rows, order),
            lambda order: teacher_signal(teacher, [ROWS[n] for n in order]),
        )
    )
    # The cache keeps log-probabilities in fp16, three digits.
    assert_same(step_gradients(student, cached), step_gradients(student, online), 5e-3)
    shuffled = [make_micro_batch([ROWS[n] for n in order], cache(rows, order[::-1])) for order in orders]
    with pytest.raises((AssertionError, RuntimeError)):
        assert_same(step_gradients(student, shuffled), step_gradients(student, online), 5e-3)


@pytest.mark.parametrize("kind", ["responses", "teacher", "adapter"])
def test_whole_trainings_in_one_and_in_eight_micro_batches_end_alike(
    build_tiny_model: Any, tmp_path: Path, kind: str
) -> None:
    """Through the trainer itself: optimiser, clipping and schedule included, over several epochs."""
    teacher = build_tiny_model(seed=1).double()

    def signal(rows: Rows, numbers: Sequence[int]) -> TeacherSignal:
        return teacher_signal(teacher, [rows[number] for number in numbers])

    def trained(max_tokens: int) -> tuple[dict[str, Tensor], int]:
        model: Any = build_tiny_model()
        if kind == "adapter":
            model = add_adapter(model, LoraSettings(rank=4), seed=3)
        student = StudentWithLoss(model.double(), VOCABULARY, alpha=ALPHA, temperature=TEMPERATURE)
        arguments = DistillationArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            batch=8,
            max_tokens=max_tokens,
            num_train_epochs=4,
            learning_rate=1e-2,
        )
        trainer = DistillationTrainer(
            student, arguments, in_rows(), Rows(), signal if kind == "teacher" else None
        )
        trainer.train()
        weights = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
        return weights, len(trainer.micro_batches(in_rows(), list(range(8))))

    (one, one_count), (eight, eight_count) = trained(10_000), trained(1)
    assert (one_count, eight_count) == (1, 8)
    start: Any = build_tiny_model()
    start = add_adapter(start, LoraSettings(rank=4), seed=3) if kind == "adapter" else start
    residuals = []
    for name, weight in start.double().named_parameters():
        if weight.requires_grad:
            moved = (one[name] - weight).abs().max()
            assert moved > 1e-3
            residuals.append(((eight[name] - one[name]) / moved).flatten())
    residual = torch.cat(residuals)
    assert residual.abs().max() < 1e-6
    assert residual.mean().abs() < 1e-9
