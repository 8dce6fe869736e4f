"""An optimiser step has the gradient of a plain loop over its rows, however it is split and padded."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from potstill.core.errors import ModelError, TrainingError
from potstill.data.chat import Rendered
from potstill.logits.codecs import TopK
from potstill.logits.logit_cache import LogitCache
from potstill.logits.shards import CachedRow, ShardWriter, write_index
from potstill.losses.types import Dense, Live, Sparse, TeacherSignal
from potstill.models import LoadedModel, hidden_states, isolates_packed_rows, output_head
from potstill.train.arguments import DistillationArguments
from potstill.train.lora import add_adapter
from potstill.train.online import OnlineTeacher
from potstill.train.rows import CachedTeacher, Rows, TrainingData
from potstill.train.settings import LoraSettings
from potstill.train.student import MicroBatch, StudentWithLoss, make_micro_batch
from potstill.train.trainer import DistillationTrainer

from .precision import in_float64

VOCABULARY = 300
VOCABULARY_OF_IDS = SimpleNamespace(get_vocab=lambda: {str(number): number for number in range(VOCABULARY)})
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


def write_cache(folder: Path, teacher: Any, temperatures: tuple[float, ...]) -> None:
    """A cache that keeps the whole vocabulary of every row."""
    folder.mkdir(exist_ok=True)
    codec = TopK(VOCABULARY, VOCABULARY, temperatures)
    writer = ShardWriter(folder, codec, tokenizer="t", model="m", shard_tokens=10)
    stored = [
        CachedRow(row.ids, row.mask, held_out=False, record_id=str(number)) for number, row in enumerate(ROWS)
    ]
    for row, rendered in zip(stored, ROWS, strict=True):
        writer.append(row, codec.encode(teacher_signal(teacher, [rendered]).logits_NV))
    writer.seal()
    write_index(folder, stored)


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


def step_gradients(
    student: StudentWithLoss, batches: Sequence[MicroBatch], divergence_scale: float = 1.0
) -> dict[str, Tensor]:
    count = sum(batch.supervised for batch in batches)
    for batch in batches:
        student(batch, count, divergence_scale)[0].backward()
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


@pytest.mark.parametrize("sizes", [[8], [3, 5]], ids=str)
def test_batchmean_divides_the_summed_divergence_by_the_rows_of_the_step(
    build_tiny_model: Any, sizes: list[int]
) -> None:
    model, teacher = build_tiny_model().double(), build_tiny_model(seed=1).double()
    student = StudentWithLoss(model, VOCABULARY, alpha=1.0, temperature=TEMPERATURE)
    count = sum(row.supervised_tokens for row in ROWS)
    found = step_gradients(student, split(sizes, teacher), count / len(ROWS))
    # As torch's batchmean has it of padded rows whose unsupervised positions give nothing.
    for row in ROWS:
        supervised = torch.tensor(row.mask[1:], dtype=torch.bool)
        logits_NV = model(torch.tensor([row.ids]), use_cache=False).logits[0, :-1, :VOCABULARY][supervised]
        p_NV = (teacher_signal(teacher, [row]).logits_NV / TEMPERATURE).softmax(-1)
        log_q_NV = (logits_NV / TEMPERATURE).log_softmax(-1)
        kl = functional.kl_div(log_q_NV[None], p_NV[None], reduction="batchmean")
        (TEMPERATURE**2 * kl / len(ROWS)).backward()
    assert_same(found, gradients(model))


def test_distillation_equals_a_plain_loop_for_every_family(build_tiny_model: Any, tiny_family: str) -> None:
    model, teacher = (in_float64(build_tiny_model(tiny_family, seed=seed)) for seed in (0, 1))
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


PACKABLE = ("llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKABLE)
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(
    build_tiny_model: Any, family: str, attention: str
) -> None:
    # A window shorter than the rows, so that it must count from each row's own beginning.
    options = {"sliding_window": 4} if family == "gemma3" else {}
    model = build_tiny_model(family, **options)
    teacher = build_tiny_model(family, seed=1)
    model.set_attn_implementation(attention)
    assert isolates_packed_rows(model)
    student = StudentWithLoss(model.double(), VOCABULARY, alpha=ALPHA, temperature=TEMPERATURE)
    signal = teacher_signal(teacher.double(), ROWS)
    padded, packed = (make_micro_batch(ROWS, signal, packed=packed) for packed in (False, True))
    assert packed.input_ids_BT.shape == (1, sum(len(row.ids) for row in ROWS))
    assert padded.input_ids_BT.numel() > packed.input_ids_BT.numel()
    losses = [student(batch, batch.supervised)[0].item() for batch in (padded, packed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    expected, found = step_gradients(student, [padded]), step_gradients(student, [packed])
    for name in [name for name in expected if expected[name].abs().max() < 1e-9]:
        assert "k_proj.bias" in name  # softmax is blind to what all keys share
        del expected[name], found[name]
    assert_same(found, expected, 1e-4)  # norms, and eager attention's softmax, work in fp32
    # Without positions that begin again the rows see each other, which this test must notice.
    mixed = dataclasses.replace(packed, position_ids_BT=None)
    assert student(mixed, mixed.supervised)[0].item() != pytest.approx(losses[0], rel=1e-5)


def test_a_model_whose_packed_rows_see_one_another_is_refused(
    build_tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny_model()
    plain = model.model.forward

    def with_a_cache(*given: Any, **options: Any) -> Any:
        return plain(*given, **{**options, "use_cache": True})  # which drops the isolation, silently

    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True, packing=True)
    student = LoadedModel(model, VOCABULARY_OF_IDS, "student")
    assert DistillationTrainer(student, arguments, TrainingData(in_rows())).packs
    monkeypatch.setattr(model.model, "forward", with_a_cache)
    assert not isolates_packed_rows(model)
    with pytest.raises(TrainingError, match=r"llama model with .* attention packed rows see one another"):
        DistillationTrainer(student, arguments, TrainingData(in_rows()))


def test_gradients_of_several_ranks_add_up_to_those_of_one(build_tiny_model: Any) -> None:
    """Each rank has its own rows, and all have one count of supervised tokens; one rank has none to learn."""
    model = build_tiny_model().double()
    student = StudentWithLoss(model, VOCABULARY)
    silent = Rendered(ROWS[3].ids, [0] * len(ROWS[3].ids))
    count = sum(row.supervised_tokens for row in ROWS)
    total: dict[str, Tensor] = {}
    for rows in (ROWS[:5], ROWS[5:], [silent]):
        student(make_micro_batch(list(rows)), count)[0].backward()
        found = gradients(model)
        assert found.keys() == {name for name, _ in model.named_parameters()}  # it takes part in the exchange
        assert rows != [silent] or not any(one.any() for one in found.values())
        total = {name: one + total.get(name, 0) for name, one in found.items()}
    assert_same(total, naive_gradients(model))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_worker_processes_give_the_micro_batches_of_the_trainers_own(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    write_cache(tmp_path / "cache", build_tiny_model(seed=1), (1.0,))
    cached = CachedTeacher([LogitCache.open(tmp_path / "cache")], 1.0)

    def steps(workers: int) -> list[MicroBatch]:
        arguments = DistillationArguments(
            output_dir=str(tmp_path), use_cpu=True, batch=3, max_tokens=30, dataloader_num_workers=workers
        )
        student = LoadedModel(build_tiny_model(), VOCABULARY_OF_IDS, "student")
        trainer = DistillationTrainer(student, arguments, TrainingData(in_rows()), teacher=cached)
        loader = trainer.get_train_dataloader()
        assert loader.num_workers == workers
        return [batch for step in loader for batch in step.batches]

    own, workers = steps(0), steps(2)
    assert len(own) == len(workers) > 3
    for one, other in zip(own, workers, strict=True):
        assert one.row_ids == other.row_ids
        assert torch.equal(one.input_ids_BT, other.input_ids_BT)
        assert torch.equal(one.loss_mask_BT, other.loss_mask_BT)
        assert isinstance(one.teacher, Sparse)
        assert isinstance(other.teacher, Sparse)
        assert torch.equal(one.teacher.log_probs_NK, other.teacher.log_probs_NK)
        assert torch.equal(one.teacher.ids_NK, other.teacher.ids_NK)


def test_what_the_padding_holds_changes_nothing(build_tiny_model: Any) -> None:
    student = StudentWithLoss(build_tiny_model().double(), VOCABULARY)
    (batch,) = split([8])
    real_BT = torch.zeros_like(batch.loss_mask_BT)
    for number, row in enumerate(ROWS):
        real_BT[number, : len(row.ids)] = True
    assert not real_BT.all()
    rubbish_BT = torch.where(real_BT, batch.input_ids_BT, 123)
    assert not torch.equal(rubbish_BT, batch.input_ids_BT)
    other = MicroBatch(rubbish_BT, batch.loss_mask_BT, batch.lengths, batch.supervised)
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
    alive = MicroBatch(batch.input_ids_BT, batch.loss_mask_BT, batch.lengths, batch.supervised, live)
    assert_same(step_gradients(student, [alive]), step_gradients(student, [batch]))


@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_a_cached_teacher_equals_the_teacher_itself(
    build_tiny_model: Any, tmp_path: Path, temperature: float
) -> None:
    model, teacher = build_tiny_model(), build_tiny_model(seed=1)
    write_cache(tmp_path, teacher, (1.0, TEMPERATURE))
    assert len(list(tmp_path.glob("shard-*"))) > 1
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


def test_a_cache_of_the_whole_vocabulary_and_a_teacher_in_memory_give_the_same_gradients(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    """Through the trainer: what reads the signal cannot tell which it has."""
    teacher = build_tiny_model(seed=1)
    write_cache(tmp_path / "cache", teacher, (1.0, TEMPERATURE))
    cached = CachedTeacher([LogitCache.open(tmp_path / "cache")], TEMPERATURE)
    passes: list[Any] = []
    teacher.model.register_forward_hook(lambda module, given, output: passes.append(output))

    found, batches = {}, {}
    for name, source in (
        ("cached", cached),
        ("online", OnlineTeacher(teacher, LoadedModel(build_tiny_model(), VOCABULARY_OF_IDS, "student"))),
    ):
        model = build_tiny_model()
        arguments = DistillationArguments(
            output_dir=str(tmp_path), use_cpu=True, alpha=1.0, temperature=TEMPERATURE, max_tokens=30
        )
        student = LoadedModel(model, VOCABULARY_OF_IDS, "student")
        trainer = DistillationTrainer(student, arguments, TrainingData(in_rows()), teacher=source)
        trainer.student.bf16 = False
        step = trainer.micro_batches(trainer.rows)(range(8))
        batches[name] = step.batches
        passes.clear()
        trainer.training_step(trainer.student, step)
        found[name] = gradients(model)
        assert len(passes) == (0 if name == "cached" else len(batches[name]) > 1 and len(batches[name]))
    assert not any(one.requires_grad for one in teacher.parameters())
    # The cache keeps log-probabilities in fp16, three digits.
    assert_same(found["online"], found["cached"], 5e-3)


def test_a_teacher_of_another_vocabulary_is_refused(build_tiny_model: Any, tiny_tokenizer: Any) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<think>"])
    student = LoadedModel(build_tiny_model(), tiny_tokenizer, "student")
    OnlineTeacher(LoadedModel(build_tiny_model(seed=1), tiny_tokenizer, "same"), student)
    with pytest.raises(ModelError, match="vocabularies of teacher and student do not match"):
        OnlineTeacher(LoadedModel(build_tiny_model(seed=1), other, "other"), student)


@pytest.mark.parametrize("kind", ["responses", "teacher", "adapter"])
def test_whole_trainings_in_one_micro_batch_in_eight_and_in_packs_end_alike(
    build_tiny_model: Any, tmp_path: Path, kind: str
) -> None:
    """Through the trainer itself: optimiser, clipping and schedule included, over several epochs."""
    model_of_teacher = build_tiny_model(seed=1).double()

    def signal(rows: Rows, numbers: Sequence[int]) -> TeacherSignal:
        return teacher_signal(model_of_teacher, [rows[number] for number in numbers])

    def trained(max_tokens: int, *, packing: bool = False) -> tuple[dict[str, Tensor], int]:
        model: Any = build_tiny_model()
        if kind == "adapter":
            model = add_adapter(model, LoraSettings(rank=4), seed=3)
        arguments = DistillationArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            packing=packing,
            alpha=ALPHA if kind == "teacher" else None,
            temperature=TEMPERATURE,
            batch=8,
            max_tokens=max_tokens,
            num_train_epochs=4,
            learning_rate=1e-2,
        )
        student = LoadedModel(model.double(), VOCABULARY_OF_IDS, "student")
        teacher = signal if kind == "teacher" else None
        trainer = DistillationTrainer(student, arguments, TrainingData(in_rows()), teacher=teacher)
        trainer.train()
        weights = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
        return weights, len(trainer.micro_batches(in_rows())(range(8)).batches)

    (one, one_count), (eight, eight_count) = trained(10_000), trained(1)
    packed, packed_count = trained(40, packing=True)
    assert (one_count, eight_count, packed_count) == (1, 8, 2)
    start: Any = build_tiny_model()
    start = add_adapter(start, LoraSettings(rank=4), seed=3) if kind == "adapter" else start
    for other in (eight, packed):
        residuals = []
        for name, weight in start.double().named_parameters():
            if weight.requires_grad:
                moved = (one[name] - weight).abs().max()
                assert moved > 1e-3
                residuals.append(((other[name] - one[name]) / moved).flatten())
        residual = torch.cat(residuals)
        assert residual.abs().max() < 1e-6
        assert residual.mean().abs() < 1e-9
