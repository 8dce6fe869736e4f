"""What LLaMA-Factory is given: rows by its documented rules, and settings by its names."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.core.errors import DataError, ModelError, StoreError
from potstill.core.records import RECORDS_FILE, Record, read_records, write_records
from potstill.export import Exported, export_llamafactory, sharegpt_row

from ...rows import write_rows
from .runs import run_in

LLAMAFACTORY_PYTHON = os.environ.get("POTSTILL_LLAMAFACTORY_PYTHON")
ASKED = {"role": "user", "content": "What is 12 + 7?"}
THOUGHT = "<think>\ntwelve and seven\n</think>\n\n19"


def trace(*messages: dict[str, str], response: str | None = "19", **fields: Any) -> Record:
    return Record("p", list(messages), response=response, **{"finish_reason": "stop", **fields})


def check_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """A data set's rows, held against the rules that LLaMA-Factory's data/README states for ShareGPT."""
    entry = json.loads((folder / "dataset_info.json").read_text(encoding="ascii"))[name]
    assert entry["formatting"] == "sharegpt"
    columns, tags = entry["columns"], entry["tags"]
    lines = (folder / entry["file_name"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert isinstance(row[columns["system"]], str)
        turns = row[columns["messages"]]
        assert len(turns) % 2 == 0
        for place, turn in enumerate(turns):
            assert turn[tags["role_tag"]] == tags["assistant_tag" if place % 2 else "user_tag"]
            assert isinstance(turn[tags["content_tag"]], str)
    return rows


def test_a_conversation_alternates_and_its_system_message_stands_apart() -> None:
    row = sharegpt_row(
        trace(
            {"role": "system", "content": "Be short."},
            ASKED,
            {"role": "assistant", "content": "19"},
            {"role": "user", "content": "and twice that?"},
            response="38",
        )
    )
    assert row == {
        "conversations": [
            {"from": "human", "value": "What is 12 + 7?"},
            {"from": "gpt", "value": "19"},
            {"from": "human", "value": "and twice that?"},
            {"from": "gpt", "value": "38"},
        ],
        "system": "Be short.",
    }


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (trace(), "plain text"),
        (trace(ASKED, response=None), "no response"),
        (trace(ASKED, finish_reason="length"), "unfinished"),
        (trace(ASKED, {"role": "assistant", "content": "19"}), "alternate"),
        (trace(ASKED, ASKED, ASKED), "alternate"),
        (trace({"role": "system", "content": "Be short."}), "plain text"),
    ],
)
def test_what_it_could_not_use_is_left_out_with_the_reason(record: Record, reason: str) -> None:
    found = sharegpt_row(record)
    assert isinstance(found, str)
    assert reason in found


def test_a_think_block_that_the_generation_prompt_opened_is_whole_in_the_row() -> None:
    inside = trace(
        ASKED, response="twelve and seven\n</think>\n\n19", reasoning="twelve and seven", answer="19"
    )
    whole = trace(ASKED, response=THOUGHT, reasoning="twelve and seven", answer="19")
    for record in (inside, whole):
        row = sharegpt_row(record)
        assert not isinstance(row, str)
        assert row["conversations"][-1]["value"] == THOUGHT


@pytest.fixture
def recipe(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [
        {"prompt": f"question {number}", "response": f"naïve answer {number}", "uuid": str(number)}
        for number in range(12)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    data = {"path": str(tmp_path / "rows.jsonl")}
    train = {"do": "train", "batch": 4, "warmup_ratio": 0.1, "max_steps": None}
    return {
        "name": "staged",
        "seed": 3,
        "models": {"base": {"path": str(tiny_model_folder)}},
        "steps": {
            "stage1": {
                **train,
                "student": "base",
                "data": {**data, "held_out": 0.25},
                "lora": {"rank": 2, "alpha": 4.0},
                "lr": 1e-4,
                "epochs": 3,
            },
            "stage2": {**train, "student": "stage1", "data": data, "lr": 5e-5, "max_steps": 2},
        },
    }


Runner = Callable[[dict[str, Any]], Path]


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return partial(run_in, tmp_path)


def config_of(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def test_a_run_becomes_data_and_a_yaml_a_stage(
    recipe: dict[str, Any], run: Runner, tmp_path: Path, tiny_model_folder: Path
) -> None:
    exported = export_llamafactory(run(recipe), tmp_path / "out")
    assert exported.stages == ["stage1.yaml", "stage2.yaml"]
    train, held_out = (check_rows(tmp_path / "out", name) for name in ("stage1", "stage1_held_out"))
    assert exported.rows == {
        "stage1.jsonl": len(train),
        "stage1_held_out.jsonl": len(held_out),
        "stage2.jsonl": 12,
    }
    assert len(train) + len(held_out) == 12
    assert held_out
    assert {row["conversations"][1]["value"] for row in [*train, *held_out]} == {
        f"naïve answer {number}" for number in range(12)
    }
    first, second = (config_of(tmp_path / "out", name) for name in ("stage1", "stage2"))
    assert first["model_name_or_path"] == second["model_name_or_path"] == str(tiny_model_folder)
    assert (first["stage"], first["do_train"], first["finetuning_type"]) == ("sft", True, "lora")
    assert (first["lora_rank"], first["lora_alpha"], first["lora_target"]) == (2, 4, "all")
    assert "adapter_name_or_path" not in first
    assert second["adapter_name_or_path"] == first["output_dir"] == "saves/stage1"
    assert (first["dataset"], first["eval_dataset"], first["dataset_dir"]) == (
        "stage1",
        "stage1_held_out",
        ".",
    )
    assert "eval_dataset" not in second
    assert (first["gradient_accumulation_steps"], first["per_device_train_batch_size"]) == (4, 1)
    assert (first["learning_rate"], second["learning_rate"]) == (1e-4, 5e-5)
    assert (first["num_train_epochs"], second["max_steps"]) == (3, 2)
    assert (first["lr_scheduler_type"], first["warmup_ratio"]) == ("cosine", 0.1)
    assert 10 < first["cutoff_len"] < 200
    assert first["mask_history"] is True, "of several answers potstill supervises the last one"
    assert "template" not in first, "the tokenizer's own is what potstill trains with"


def test_the_rows_are_those_that_the_run_trained_on(
    recipe: dict[str, Any], run: Runner, tmp_path: Path
) -> None:
    folder = run(recipe)
    export_llamafactory(folder, tmp_path / "out")
    counts = json.loads((folder / "stage1" / "manifest.json").read_text(encoding="utf-8"))["counts"]
    assert len(check_rows(tmp_path / "out", "stage1")) == counts["rows"]
    assert len(check_rows(tmp_path / "out", "stage1_held_out")) == counts["held_out_rows"]


def test_a_step_brings_the_stages_before_it(recipe: dict[str, Any], run: Runner, tmp_path: Path) -> None:
    folder = run(recipe)
    assert export_llamafactory(folder / "stage1", tmp_path / "one").stages == ["stage1.yaml"]
    assert export_llamafactory(folder / "stage2", tmp_path / "two").stages == ["stage1.yaml", "stage2.yaml"]
    with pytest.raises(StoreError, match="'stage3' is no step"):
        export_llamafactory(folder / "stage3", tmp_path / "three")


def test_settings_go_along_or_are_said_not_to(recipe: dict[str, Any], run: Runner, tmp_path: Path) -> None:
    recipe["models"]["base"]["quantize"] = "nf4"
    recipe["steps"]["stage1"] |= {
        "min_lr_ratio": 0.2,
        "base_kl": 0.1,
        "groups": [{"match": "layers.0", "lr_multiplier": 0.5}],
        "activation_checkpointing": True,
        "trainer": {"optim": "adamw_torch"},
        "weight_decay": 0.1,
        "max_length": 24,
    }
    pytest.importorskip("bitsandbytes")
    folder = run(recipe)
    exported = export_llamafactory(folder, tmp_path / "out", template="qwen3")
    config = config_of(tmp_path / "out", "stage1")
    assert (config["quantization_bit"], config["quantization_type"]) == (4, "nf4")
    assert config["lr_scheduler_type"] == "cosine_with_min_lr"
    assert config["lr_scheduler_kwargs"] == {"min_lr_rate": 0.2}
    assert (config["optim"], config["weight_decay"]) == ("adamw_torch", 0.1)
    assert "activation_checkpointing" not in config, "it is the default there, by another name"
    assert config["template"] == "qwen3"
    assert config["cutoff_len"] <= 24
    assert exported.lost == {"stage1": ["groups", "base_kl"]}
    text = (tmp_path / "out" / "stage1.yaml").read_text(encoding="utf-8")
    assert text.startswith("# not carried over: groups\n# not carried over: base_kl\n")


def test_a_training_by_tokens_is_one_of_as_many_steps(
    recipe: dict[str, Any], run: Runner, tmp_path: Path
) -> None:
    recipe["steps"]["stage1"]["tokens"] = 100
    folder = run(recipe)
    export_llamafactory(folder, tmp_path / "out")
    config = config_of(tmp_path / "out", "stage1")
    manifest = json.loads((folder / "stage1" / "manifest.json").read_text(encoding="utf-8"))
    assert config["max_steps"] == manifest["counts"]["steps"]
    assert "num_train_epochs" not in config


def test_a_full_training_goes_on_from_the_weights_before_it(
    recipe: dict[str, Any], run: Runner, tmp_path: Path
) -> None:
    del recipe["steps"]["stage1"]["lora"]
    export_llamafactory(run(recipe), tmp_path / "out")
    second = config_of(tmp_path / "out", "stage2")
    assert (second["finetuning_type"], second["model_name_or_path"]) == ("full", "saves/stage1")
    assert "adapter_name_or_path" not in second


def test_an_adapter_on_weights_that_were_trained_whole_is_an_adapter_there_too(
    recipe: dict[str, Any], run: Runner, tmp_path: Path
) -> None:
    steps = recipe["steps"]
    steps["stage2"]["lora"] = {**steps["stage1"].pop("lora"), "rank": 3}
    steps["stage3"] = {**steps["stage2"], "student": "stage2"}
    del steps["stage3"]["lora"]
    export_llamafactory(run(recipe), tmp_path / "out")
    first, second, third = (config_of(tmp_path / "out", f"stage{number}") for number in (1, 2, 3))
    assert (first["finetuning_type"], second["finetuning_type"], third["finetuning_type"]) == (
        "full",
        "lora",
        "lora",
    )
    assert "lora_rank" not in first
    assert (second["lora_rank"], third["lora_rank"]) == (3, 3)
    assert second["model_name_or_path"] == third["model_name_or_path"] == "saves/stage1"
    assert "adapter_name_or_path" not in second
    assert third["adapter_name_or_path"] == "saves/stage2"


def test_an_artifact_of_traces_becomes_data_alone(tmp_path: Path, traces: Any) -> None:
    exported = export_llamafactory(traces(12).folder, tmp_path / "out")
    assert exported.rows == {"traces.jsonl": 10, "traces_held_out.jsonl": 2}
    assert exported.stages == []
    check_rows(tmp_path / "out", "traces")


def test_rows_that_are_left_out_are_counted_by_reason(tmp_path: Path, traces: Any) -> None:
    artifact = traces(12)
    records = list(read_records(artifact.folder / RECORDS_FILE))
    records[0].finish_reason = "length"
    write_records(artifact.folder / RECORDS_FILE, records)
    exported = export_llamafactory(artifact.folder, tmp_path / "out")
    assert exported.rows["traces.jsonl"] == 9
    assert [*exported.left_out["traces"].values()] == [1]


def test_a_folder_in_use_is_left_alone_and_a_mistake_leaves_none_behind(
    recipe: dict[str, Any], run: Runner, tmp_path: Path, traces: Any
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StoreError, match="is there already"):
        export_llamafactory(traces(12).folder, tmp_path / "data")
    assert (tmp_path / "data" / "dataset_info.json").read_text(encoding="utf-8") == "{}"
    with pytest.raises(StoreError, match="no manifest"):
        export_llamafactory(tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_training_on_logits_is_not_exported_as_training_on_text(
    recipe: dict[str, Any], run: Runner, tmp_path: Path
) -> None:
    recipe["steps"]["logits"] = {
        "do": "cache",
        "model": "base",
        "data": recipe["steps"]["stage2"]["data"],
        "top_k": 4,
    }
    recipe["steps"]["stage2"]["data"] = "logits"
    with pytest.raises(DataError, match="learns from a teacher's logits"):
        export_llamafactory(run(recipe), tmp_path / "out")


def test_an_adapter_as_base_is_refused(recipe: dict[str, Any], run: Runner, tmp_path: Path) -> None:
    folder = run(recipe)
    recipe["models"]["base"]["path"] = str((folder / "stage1").resolve())
    del recipe["steps"]["stage1"]["lora"]
    recipe["name"] = "again"
    with pytest.raises(ModelError, match="itself an adapter"):
        export_llamafactory(run(recipe), tmp_path / "out")


def test_names_with_each_values_have_no_comma_and_are_no_other_steps_names(
    recipe: dict[str, Any], run: Runner, tmp_path: Path
) -> None:
    recipe["steps"]["stage1"]["each"] = {"part": ["a", "b"]}
    recipe["steps"]["stage2"]["each"] = {"part": ["a", "b"]}
    exported: Exported = export_llamafactory(run(recipe), tmp_path / "out")
    assert sorted(exported.stages) == ["stage1+a.yaml", "stage1+b.yaml", "stage2+a.yaml", "stage2+b.yaml"]
    assert config_of(tmp_path / "out", "stage2+b")["adapter_name_or_path"] == "saves/stage1+b"


@pytest.mark.parametrize(
    ("changes", "names", "file"),
    [
        ({"stage1": {"each": {"part": ["x y", "x+y"]}}}, r"stage1\[x y\] and stage1\[x\+y\]", "stage1+x+y"),
        ({"stage1_held_out": {}}, "stage1 and stage1_held_out", "stage1_held_out"),
    ],
)
def test_two_steps_are_never_one_file(
    recipe: dict[str, Any], run: Runner, tmp_path: Path, changes: dict[str, Any], names: str, file: str
) -> None:
    first = recipe["steps"]["stage1"]
    recipe["steps"] = {"stage1": first} | {name: {**first, **one} for name, one in changes.items()}
    with pytest.raises(StoreError, match=f"steps {names} would both write {re.escape(file)}"):
        export_llamafactory(run(recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()


_TRAIN_THERE = """
import sys, yaml
from llamafactory.train.tuner import run_exp

with open(sys.argv[1], encoding="utf-8") as file:
    run_exp({**yaml.safe_load(file), "bf16": False, "use_cpu": True})
"""


def test_llamafactory_itself_trains_the_stages(recipe: dict[str, Any], run: Runner, tmp_path: Path) -> None:
    if LLAMAFACTORY_PYTHON is None:
        pytest.skip("POTSTILL_LLAMAFACTORY_PYTHON names no interpreter with LLaMA-Factory")
    made, out = run(recipe), tmp_path / "out"
    export_llamafactory(made, out)
    for stage, rate in (("stage1", 1e-4), ("stage2", 5e-5)):
        command = [LLAMAFACTORY_PYTHON, "-c", _TRAIN_THERE, f"{stage}.yaml"]
        done = subprocess.run(command, check=False, cwd=out, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counts = json.loads((made / stage / "manifest.json").read_text(encoding="utf-8"))["counts"]
        state = json.loads((out / "saves" / stage / "trainer_state.json").read_text(encoding="utf-8"))
        assert state["global_step"] == counts["steps"]
        assert max(entry.get("learning_rate", 0) for entry in state["log_history"]) == rate
        evaluated = [entry for entry in state["log_history"] if "eval_loss" in entry]
        assert len(evaluated) == (3 if stage == "stage1" else 0)
    assert "Loaded adapter(s): saves/stage1" in done.stdout + done.stderr
