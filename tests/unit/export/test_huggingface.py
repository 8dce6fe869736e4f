"""A run's model in one folder that plain transformers loads, which answers as the run's own does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import StoreError
from potstill.data.chat import Renderer
from potstill.export import export_huggingface
from potstill.models import TransformersModel, load
from potstill.teachers.transformers import generate_batch

from .runs import run_in

PROMPTS = ["What is 1 + 2?", "State the final answer", "How many apples are left?"]


@pytest.fixture
def run(tmp_path: Path, shared_model_folder: Path) -> Callable[..., Path]:
    """`run(**steps)`: the folder of a run with an adapter `student` of two epochs, and what else is given.

    Its base is tiny, or `base`, which takes a learning rate of its own.
    """

    def make(
        *, lora: dict[str, Any] | None = None, base: str | None = None, lr: float = 0.05, **steps: Any
    ) -> Path:
        rows = tmp_path / "rows.jsonl"
        lines = [
            f'{{"prompt": "What is {n} + {n}?", "response": "The answer is {2 * n}."}}' for n in range(8)
        ]
        rows.write_text("\n".join(lines), encoding="utf-8")
        train = {"do": "train", "student": "base", "data": {"path": str(rows)}, "epochs": 2, "batch": 4}
        train |= {"lr": lr, "device": "cpu", "keep_epochs": "all"}
        student = train if lora is None else {**train, "lora": lora}
        recipe = {
            "name": "exported",
            "models": {"base": {"path": base or str(shared_model_folder)}},
            "steps": {"student": student, **steps},
        }
        return run_in(tmp_path, recipe)

    return make


def answers(model: Any, tokenizer: Any) -> list[list[int]]:
    """Greedy answers in fp32."""
    found = []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        found.append(generated[0, ids.shape[1] :].tolist())
    return found


def plain_answers(folder: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert not (folder / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return answers(model, AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    "lora", [{"rank": 4}, {"rank": 4, "dora": True, "rslora": True}], ids=["lora", "dora"]
)
def test_merged_adapter_and_exported_models_give_the_same_answers(
    run: Any, tmp_path: Path, shared_model_folder: Path, lora: Any
) -> None:
    folder = run(lora=lora, merged={"do": "merge", "model": "student", "device": "cpu"})
    adapter = load(TransformersModel(path=str(folder / "student"), device="cpu"), dtype=torch.float32)
    expected = answers(adapter.model, adapter.tokenizer)
    assert expected != plain_answers(shared_model_folder), "the adapter changes nothing"
    assert plain_answers(folder / "merged") == expected
    assert export_huggingface(folder, tmp_path / "last") == "merged"
    assert export_huggingface(folder / "student", tmp_path / "student") == "student"
    assert plain_answers(tmp_path / "last") == expected
    assert plain_answers(tmp_path / "student") == expected


@pytest.mark.slow
def test_so_they_do_on_an_embedded_model(run: Any, tmp_path: Path) -> None:
    """Its weights are saved in half precision, so what merging rounds could turn an answer."""
    asked = [*PROMPTS, *(f"What is {n} + {n}?" for n in range(9))]
    merge = {"do": "merge", "model": "student", "device": "cpu"}
    folder = run(lora={"rank": 8}, base="smollm2-135m-instruct", lr=2e-3, merged=merge)
    assert export_huggingface(folder / "student", tmp_path / "exported") == "student"

    def found(place: Path | str) -> list[str]:
        loaded = load(TransformersModel(path=str(place), device="cpu"), dtype=torch.float32)
        renderer = Renderer(loaded.tokenizer)
        prompts = [renderer.prompt_ids([{"role": "user", "content": one}]) for one in asked]
        return [one.response for one in generate_batch(loaded, renderer, prompts, max_new_tokens=8)]

    adapted = found(folder / "student")
    assert len({*adapted}) > 6
    assert adapted != found("smollm2-135m-instruct"), "the adapter changes nothing"
    assert found(folder / "merged") == adapted
    assert found(tmp_path / "exported") == adapted


def test_the_card_says_how_the_exported_model_is_loaded(run: Any, tmp_path: Path) -> None:
    folder = run(lora={"rank": 2})
    export_huggingface(folder, tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "peft" not in card.partition("Versions:")[0]
    assert "library_name: transformers" in card
    assert str(tmp_path) not in card.partition("## Settings")[0]
    assert not (tmp_path / "mine" / "manifest.json").exists()


def test_the_card_of_an_epoch_has_its_own_figures_alone(run: Any, tmp_path: Path) -> None:
    sums = tmp_path / "sums.jsonl"
    sums.write_text('{"question": "What is 2 + 2?", "answer": "4"}\n' * 2, encoding="utf-8")
    task = {"data": {"path": str(sums)}, "max_new_tokens": 4}
    exam = {"do": "evaluate", "models": {"mine": "student", "first": "student:epoch1"}, "device": "cpu"}
    folder = run(exam={**exam, "tasks": {"sums": task}})
    cards = {}
    for epoch in ("epoch1", "epoch2"):
        export_huggingface(folder / "student" / epoch, tmp_path / epoch)
        cards[epoch] = (tmp_path / epoch / "README.md").read_text(encoding="utf-8")
    assert "# exported: student:epoch1" in cards["epoch1"]
    assert "No evaluation of this model" not in cards["epoch1"]
    assert "No evaluation of this model" in cards["epoch2"]


def test_an_epoch_is_exported_by_its_folder(run: Any, tmp_path: Path) -> None:
    folder = run()
    assert export_huggingface(folder / "student" / "epoch1", tmp_path / "first") == "student:epoch1"
    assert export_huggingface(folder, tmp_path / "last") == "student"
    files = {path.name for path in (tmp_path / "last").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json", "README.md"} <= files
    assert not [name for name in files if name.startswith("epoch") or name == "manifest.json"]
    first, last = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "last"))
    assert first == (folder / "student" / "epoch1" / "model.safetensors").read_bytes()
    assert last == (folder / "student" / "model.safetensors").read_bytes()
    with pytest.raises(StoreError, match="student kept no 'epoch9'"):
        export_huggingface(folder / "student" / "epoch9", tmp_path / "ninth")


def test_what_has_no_model_is_refused_and_leaves_nothing(run: Any, tmp_path: Path) -> None:
    folder = run()
    with pytest.raises(StoreError, match="'teacher' is no finished step that makes a model"):
        export_huggingface(folder / "teacher", tmp_path / "out")
    with pytest.raises(StoreError, match="is no run's folder"):
        export_huggingface(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(StoreError, match="is there already"):
        export_huggingface(folder, tmp_path / "full")


def test_shared_experts_are_trained_by_name_and_exported_whole(
    tmp_path: Path, build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """A compressed student in two stages, experts first; its answers are the exported plain model's."""
    from transformers import AutoModelForCausalLM

    build_tiny_model("qwen3_moe").save_pretrained(tmp_path / "moe")
    tiny_tokenizer.save_pretrained(tmp_path / "moe")
    rows = tmp_path / "rows.jsonl"
    lines = [f'{{"prompt": "What is {n} + {n}?", "response": "The answer is {2 * n}."}}' for n in range(8)]
    rows.write_text("\n".join(lines), encoding="utf-8")
    usual = {"do": "train", "data": {"path": str(rows)}, "epochs": 1, "batch": 4, "lr": 0.01, "device": "cpu"}
    experts = [{"match": r"shared_core|delta_"}, {"match": ".", "lr_multiplier": 0}]
    recipe = {
        "name": "exported",
        "models": {"base": {"path": str(tmp_path / "moe")}},
        "steps": {
            "shared": {
                "do": "init",
                "model": "base",
                "method": "share_experts",
                "rank": 4,
                "data": {"path": str(rows)},
                "device": "cpu",
            },
            "student": {
                **usual,
                "student": "shared",
                "stages": [{"name": "experts", "groups": experts}, {"name": "all"}],
            },
            "adapted": {**usual, "student": "shared", "lora": {"rank": 4}},
        },
    }
    folder = run_in(tmp_path, recipe)

    before, trained = (
        load(TransformersModel(path=str(folder / name)), dtype=torch.float32).model
        for name in ("shared", "student-experts")
    )
    moved = {
        name
        for name, one in trained.named_parameters()
        if not torch.equal(one, dict(before.named_parameters())[name])
    }
    assert moved == {name for name, _ in trained.named_parameters() if ".experts." in name}

    card = (folder / "student" / "README.md").read_text(encoding="utf-8")
    assert "Its experts share a core" in card
    assert "AutoModelForCausalLM" not in card
    for name in ("shared", "student", "adapted"):
        loaded = load(TransformersModel(path=str(folder / name), device="cpu"), dtype=torch.float32)
        expected = answers(loaded.model, loaded.tokenizer)
        output = tmp_path / f"plain-{name}"
        export_huggingface(folder / name, output)
        found, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        assert not any(info.values())
        assert found.config.model_type == "qwen3_moe"
        assert plain_answers(output) == expected
        assert "Its experts share a core" not in (output / "README.md").read_text(encoding="utf-8")
