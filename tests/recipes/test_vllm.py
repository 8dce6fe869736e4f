"""A recipe whose teacher vLLM runs, beside the same recipe by transformers."""

from pathlib import Path
from typing import Any

import pytest
from pyarrow.parquet import read_table

from potstill.core.records import RECORDS_FILE, Record, read_records
from potstill.logits.logit_cache import LogitCache

from ..conftest import TOKENIZER_LENGTH
from ..served import VLLM_PYTHON, VLLM_SMALL, vllm_environment
from .conftest import Command, write_recipe

NEAR_NATS = 0.02
# One head as wide as vLLM's kernels for CPUs take at least, and no padding, which vLLM counts as ids.
SHAPE = {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": TOKENIZER_LENGTH}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    if VLLM_PYTHON is None:
        pytest.skip("POTSTILL_VLLM_PYTHON names no interpreter with vLLM")
    for name, value in vllm_environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def recipe(tmp_path: Path, build_tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """Greedy traces, those on which a student differs most, the teacher's logits of them, training, exam."""
    for number, name in enumerate(("teacher", "student")):
        model = build_tiny_model("llama", seed=number, **SHAPE)
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    teacher = {"path": str(tmp_path / "teacher"), "dtype": "float32"}
    models = {
        "teacher": teacher | {"engine": "vllm", **VLLM_SMALL},
        "student": {"path": str(tmp_path / "student"), "dtype": "float32"},
    }
    data = {"task": "chain_sum", "size": 24}
    steps = {
        "traces": {
            "do": "generate",
            "model": "teacher",
            "data": data,
            "temperature": 0,
            "max_new_tokens": 16,
        },
        "picked": {
            "do": "select",
            "data": "traces",
            "student": "student",
            "teacher": "teacher",
            "level": "response",
            "keep": {"top": 0.5},
        },
        "logits": {"do": "cache", "model": "teacher", "data": "picked", "top_k": 8},
        "trained": {
            "do": "train",
            "student": "student",
            "data": "logits",
            "epochs": 1,
            "batch": 4,
            "lr": 1e-3,
        },
        "exam": {
            "do": "evaluate",
            "models": {"base": "student", "teacher": "teacher"},
            "tasks": {"sums": {"task": "chain_sum", "size": 4}},
            "max_new_tokens": 16,
        },
    }
    variants = {
        "transformers": {"models": {"teacher": {"engine": "transformers", **dict.fromkeys(VLLM_SMALL)}}}
    }
    content = {"name": "r", "seed": 3, "models": models, "steps": steps, "variants": variants}
    return write_recipe(tmp_path / "recipe.yaml", content)


def rows(folder: Path, step: str) -> list[Record]:
    return list(read_records(folder / step / RECORDS_FILE))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [[], ["scale.engine=ray", "scale.replicas=2", "scale.cpus_per_replica=1"]])
def test_a_recipe_by_vllm_makes_what_it_makes_by_transformers(
    potstill: Command, recipe: Path, tmp_path: Path, scale: list[str]
) -> None:
    if scale:
        pytest.importorskip("ray", reason="Ray, which `make ray` installs, is not there")
    found, expected = tmp_path / "vllm", tmp_path / "transformers"
    told = potstill("run", recipe, "--output", found, *scale)
    assert told.code == 0, told.out + told.err
    # Variants of a run lie below its folder.
    told = potstill("run", recipe, "--sweep", "transformers", "--output", expected)
    assert told.code == 0, told.out + told.err
    expected = expected / "transformers"
    for step in ("traces", "picked"):
        ours, theirs = rows(found, step), rows(expected, step)
        assert [one.response_token_ids for one in ours] == [one.response_token_ids for one in theirs]
        assert [one.id for one in ours]
    ours, theirs = LogitCache.open(found / "logits"), LogitCache.open(expected / "logits")
    assert len(ours) == len(theirs) > 0
    for number in range(len(ours)):
        assert ours.row(number) == theirs.row(number)
        one, other = ours.signal(number), theirs.signal(number)
        assert (one.ids_NK == other.ids_NK).float().mean() > 0.95
        assert one.log_probs_NK[:, 0].tolist() == pytest.approx(
            other.log_probs_NK[:, 0].tolist(), abs=NEAR_NATS
        )
    assert (found / "trained" / "model.safetensors").is_file()
    exams = [read_table(place / "exam" / "scores.parquet").to_pylist() for place in (found, expected)]
    by_vllm, by_transformers = ([row["response"] for row in exam] for exam in exams)
    assert len(by_vllm) == 2 * 4
    assert by_vllm == by_transformers
