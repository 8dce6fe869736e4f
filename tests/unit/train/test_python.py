"""The trainer from Python, without a recipe."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.errors import DataError, TrainingError

from ...rows import write_rows

EXAMPLES = [
    {"prompt": f"What is {number} + {number}?", "response": f"{number} + {number} = {2 * number}"}
    for number in range(12)
]


@pytest.fixture
def teacher_folder(tmp_path: Path, build_tiny_model: Any, tiny_tokenizer: Any) -> Path:
    build_tiny_model(seed=5).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_fifteen_lines_distil_a_model(
    tiny_model_folder: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # The script of the trainer's docstring, with a smaller model.
    from potstill import DistillationArguments, DistillationTrainer

    arguments = DistillationArguments(
        num_train_epochs=3,
        learning_rate=3e-3,
        alpha=0.5,
        temperature=2.0,
        groups=[{"match": "embed_tokens", "lr_multiplier": 0.1}],
        use_cpu=True,
        batch=4,
    )
    trainer = DistillationTrainer(str(tiny_model_folder), arguments, EXAMPLES, teacher=str(teacher_folder))
    trainer.train()
    trainer.save_model("student")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    logged = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert len(logged) == 9
    assert logged[-1]["kl"] < logged[0]["kl"]
    saved = AutoModelForCausalLM.from_pretrained("student")
    assert torch.equal(saved.lm_head.weight, trainer.loaded.model.lm_head.weight)
    assert AutoTokenizer.from_pretrained("student").chat_template


def test_models_in_memory_messages_and_held_out_examples(
    build_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from potstill import DistillationArguments, DistillationTrainer

    messages = [
        {
            "messages": [
                {"role": "user", "content": one["prompt"]},
                {"role": "assistant", "content": one["response"]},
            ]
        }
        for one in EXAMPLES
    ]
    arguments = DistillationArguments(
        output_dir=str(tmp_path), use_cpu=True, eval_strategy="epoch", learning_rate=3e-3
    )
    trainer = DistillationTrainer(
        build_tiny_model(),
        arguments,
        messages[:8],
        held_out=messages[8:],
        teacher=build_tiny_model(seed=5),
        tokenizer=tiny_tokenizer,
    )
    trainer.train()
    evaluated = [entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry]
    assert len(evaluated) == 3
    assert evaluated[-1] < evaluated[0]


def test_a_folder_of_cached_logits_is_data_or_the_teacher_of_examples(
    tiny_model_folder: Path, teacher_folder: Path, step_context: Any, tmp_path: Path
) -> None:

    from potstill import DistillationArguments, DistillationTrainer
    from potstill.cache import CacheSettings
    from potstill.cache import run as run_cache
    from potstill.models import TransformersModel

    write_rows(tmp_path / "rows.jsonl", EXAMPLES)
    teacher = TransformersModel(path=str(teacher_folder))
    context = step_context("cache", folder="logits", models={"teacher": teacher})
    data = {"path": str(tmp_path / "rows.jsonl"), "held_out": 0.0}
    run_cache(CacheSettings.model_validate({"do": "cache", "model": "teacher", "data": data}), context)

    def kl(data: Any, **fields: Any) -> float:
        arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1)
        trainer = DistillationTrainer(tiny_model_folder, arguments, data, **fields)
        trainer.train()
        return float(trainer.state.log_history[0]["kl"])

    assert kl(context.folder) == pytest.approx(kl(EXAMPLES, teacher=context.folder), rel=1e-6)
    link = tmp_path / "link"  # as a run folder has it where there are no links
    link.write_text(str(context.folder), encoding="utf-8")
    assert kl(link) == kl(context.folder)
    assert kl(tmp_path / "rows.jsonl", teacher=context.folder) == kl(EXAMPLES, teacher=context.folder)
    with pytest.raises(DataError, match="there are no logits for a row"):
        kl([{"prompt": "What is 1 + 1?", "response": "11"}], teacher=context.folder)


def test_what_is_missing_is_told_before_training(
    tiny_model_folder: Path, build_tiny_model: Any, tmp_path: Path
) -> None:
    from potstill import DistillationArguments, DistillationTrainer

    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TrainingError, match="without its tokenizer"):
        DistillationTrainer(build_tiny_model(), arguments, EXAMPLES)
    with pytest.raises(DataError, match="example 2: its keys are first, second"):
        DistillationTrainer(tiny_model_folder, arguments, [EXAMPLES[0], {"first": "a", "second": "b"}])
    with pytest.raises(DataError, match="example 1"):
        DistillationTrainer(tiny_model_folder, arguments, [{"prompt": "What?"}])
    arguments.groups = [{"match": "mlp", "rate": 1}]
    with pytest.raises(TrainingError, match="groups"):
        DistillationTrainer(tiny_model_folder, arguments, EXAMPLES)


# --- arguments


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps=4[\s\S]*decided by batch"),
        ({"per_device_train_batch_size": 2}, r"per_device_train_batch_size=2[\s\S]*decided by batch"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, r"load_best_model_at_end[\s\S]*early_"),
        ({"lr_scheduler_type": "constant"}, r"lr_scheduler_type='constant'[\s\S]*decided by schedule"),
        ({"logging_steps": 10}, r"logging_steps=10[\s\S]*every step is logged"),
        ({"bf16": True}, r"bf16=True[\s\S]*autocast"),
        ({"data_seed": 3}, r"data_seed=3[\s\S]*order_seed"),
        ({"kl_reduction": "mean"}, "kl_reduction: Input should be 'token' or 'batchmean', and it is 'mean'"),
        ({"schedule": "lineer"}, "schedule: Input should be 'cosine', 'linear' or 'constant'"),
        ({"alpha": 1.5}, "alpha: .*less than or equal to 1, and it is 1.5"),
        ({"temperature": 0.0}, "temperature: .*greater than 0"),
        ({"beta": -0.1}, "beta: .*greater than or equal to 0"),
        ({"skew": 1.0}, "skew: .*less than 1"),
        ({"batch": 0}, "batch: .*greater than or equal to 1"),
        ({"early_stopping": {"patience": 0}}, "early_stopping.patience: .*greater than or equal to 1"),
        ({"groups": [{"match": "("}]}, "groups.0.match: .*no regular expression"),
    ],
)
def test_a_field_that_would_be_overtaken_or_is_out_of_range_is_refused(
    wrong: dict[str, Any], message: str
) -> None:
    from potstill import DistillationArguments

    with pytest.raises(TrainingError, match=message):
        DistillationArguments(use_cpu=True, **wrong)


def test_every_field_of_transformers_that_we_decide_has_a_default_that_passes_a_second_time() -> None:
    import dataclasses

    from potstill import DistillationArguments

    first = DistillationArguments(use_cpu=True, batch=3, num_train_epochs=2)
    second = dataclasses.replace(first, learning_rate=1e-3)
    assert (second.batch, second.per_device_train_batch_size, second.num_train_epochs) == (3, 3, 2)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["alpha", "beta", "skew", "temperature", "max_length"]), st.floats(-1, 3))
def test_the_range_of_each_of_our_fields_is_that_of_a_recipe(field: str, value: float) -> None:
    from pydantic import ValidationError

    from potstill import DistillationArguments
    from potstill.train import TrainSettings

    try:
        TrainSettings.model_validate({"do": "train", "student": "a", "data": "b", field: value})
    except ValidationError:
        with pytest.raises(TrainingError, match=field):
            DistillationArguments(use_cpu=True, **{field: value})
    else:
        assert getattr(DistillationArguments(use_cpu=True, **{field: value}), field) == value


# --- held-out rows


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, [2, 4, 6]),
        ({"early_stopping": {"every": 5}}, [5, 6]),
        ({"eval_strategy": "steps", "eval_steps": 3}, [3, 6]),
    ],
)
def test_early_stopping_sees_to_its_evaluations(
    tiny_model_folder: Path, tmp_path: Path, fields: dict[str, Any], steps: list[int]
) -> None:
    from potstill import DistillationArguments, DistillationTrainer

    arguments = DistillationArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        batch=4,
        num_train_epochs=3,
        **{"early_stopping": {"patience": 9}, **fields},
    )
    trainer = DistillationTrainer(tiny_model_folder, arguments, EXAMPLES[:8], held_out=EXAMPLES[8:])
    trainer.train()
    losses = {one["step"]: one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one}
    assert list(losses) == steps
    assert trainer.early_stopping is not None
    assert trainer.early_stopping.kept_step == min(losses, key=lambda step: losses[step])


def test_early_stopping_without_held_out_rows_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    from potstill import DistillationArguments, DistillationTrainer

    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True, early_stopping={})
    with pytest.raises(TrainingError, match="loss of held-out rows, and there are none"):
        DistillationTrainer(tiny_model_folder, arguments, EXAMPLES)


@pytest.mark.parametrize("kind", ["cache", "rows"])
def test_held_out_rows_beside_data_that_have_their_own_are_refused(
    tiny_model_folder: Path, tmp_path: Path, kind: str
) -> None:
    from potstill import DistillationArguments, DistillationTrainer
    from potstill.data.chat import Rendered
    from potstill.train.rows import TrainingData

    data = TrainingData()
    data.train.append(Rendered([5, 6, 7], [0, 1, 1]))
    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TrainingError, match="held_out is given besides data that say"):
        DistillationTrainer(
            tiny_model_folder, arguments, data if kind == "rows" else tmp_path, held_out=EXAMPLES
        )


def test_evaluate_takes_no_other_rows_and_needs_held_out_ones(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    from potstill import DistillationArguments, DistillationTrainer

    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer = DistillationTrainer(tiny_model_folder, arguments, EXAMPLES[:8], held_out=EXAMPLES[8:])
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(TrainingError, match="other rows"):
        trainer.evaluate(EXAMPLES)
    with pytest.raises(TrainingError, match="prefix"):
        trainer.evaluate(metric_key_prefix="test")
    with pytest.raises(TrainingError, match="no held-out rows"):
        DistillationTrainer(tiny_model_folder, arguments, EXAMPLES).evaluate()


# --- data files


def test_a_data_files_path_serves_for_examples(tiny_model_folder: Path, tmp_path: Path) -> None:
    import json

    from potstill import DistillationArguments, DistillationTrainer

    files = {"train": tmp_path / "rows.jsonl", "held_out": tmp_path / "held_out.json"}
    write_rows(files["train"], EXAMPLES[:8])
    files["held_out"].write_text(json.dumps(EXAMPLES[8:]), encoding="utf-8")
    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    found = DistillationTrainer(tiny_model_folder, arguments, str(files["train"]), held_out=files["held_out"])
    expected = DistillationTrainer(tiny_model_folder, arguments, EXAMPLES[:8], held_out=EXAMPLES[8:])
    for some, others in ((found.rows, expected.rows), (found.held_out, expected.held_out)):
        assert [some[number] for number in range(len(some))] == [others[n] for n in range(len(others))]


def test_a_malformed_row_and_a_file_of_another_kind_are_told(tiny_model_folder: Path, tmp_path: Path) -> None:
    from potstill import DistillationArguments, DistillationTrainer

    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    bad, other = tmp_path / "rows.jsonl", tmp_path / "rows.tsv"
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": ', encoding="utf-8")
    other.write_bytes(b"prompt\tresponse\n\x00\xff" + b"a" * 9000)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2"):
        DistillationTrainer(tiny_model_folder, arguments, bad)
    with pytest.raises(DataError, match="neither cached logits nor a data file"):
        DistillationTrainer(tiny_model_folder, arguments, other)
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        DistillationTrainer(tiny_model_folder, arguments, tmp_path / "missing.jsonl")


def test_memory_is_tuned_on_a_cpu_before_the_student_is_loaded(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill import DistillationArguments, DistillationTrainer

    done: list[str] = []
    monkeypatch.setattr("potstill.train.trainer.keep_freed_memory", lambda: done.append("tuned"))
    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TrainingError, match="without its tokenizer"):
        DistillationTrainer(torch.nn.Linear(1, 1), arguments, EXAMPLES)
    assert done == ["tuned"]
