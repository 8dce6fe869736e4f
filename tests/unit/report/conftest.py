"""A run as the quickstart leaves it, with figures of the size that it has; no model is involved."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from potstill.core.store import FileEntry, Manifest
from potstill.report import RunView, StepView

RunBuilder = Callable[..., RunView]

RECIPE = """\
name: quickstart
description: A teacher's knowledge goes into a pruned student, on a laptop.
seed: 7
models:
  writer: {engine: llama_cpp, path: smollm2-135m-instruct}
  teacher: {path: smollm2-135m-instruct}
steps:
  traces: {do: generate, model: writer, data: [{task: chain_sum, size: 90}, {task: gsm_symbolic, size: 90}]}
  logits: {do: cache, model: teacher, data: traces, top_k: 64}
  pruned: {do: init, model: teacher, blocks: 18, data: traces}
  student: {do: train, student: pruned, data: logits, epochs: 4, lr: 3.0e-4, batch: 8}
  exam:
    do: evaluate
    models: {base: pruned, student: student, teacher: teacher}
    teacher: teacher
    data: traces:held_out
"""


def _estimate(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def evaluation_metrics() -> dict[str, Any]:
    """An evaluation in which the student is closer to the teacher, and not clearly right more often."""

    def model(
        reference: str, kl: float | None, agreement: float, perplexity: float, right: float, speed: float
    ) -> Any:
        held_out: dict[str, Any] = {"rows": 41, "supervised_tokens": 3120}
        if kl is not None:
            held_out["kl_nats_per_token"] = _estimate(kl, 0.03 + kl * 0.05)
            held_out["top1_agreement"] = _estimate(agreement, 0.018)
        held_out["perplexity"] = _estimate(perplexity, perplexity * 0.06)
        task = {
            "prompts": 100,
            "verdicts": {
                "correct": {"value": right, "low": max(right - 0.05, 0.0), "high": right + 0.07},
                "well_formed": {"value": 1.0, "low": 0.963, "high": 1.0},
            },
            "mean_response_tokens": _estimate(74.2, 5.5),
            "finish_reasons": {"stop": 81, "length": 19},
        }
        return {
            "reference": reference,
            "identity": f"weights of {reference}",
            "is_teacher": kl is None,
            "held_out": held_out,
            "tasks": {"chain_sum": task},
            "speed": {"decoding_tokens_per_s": speed},
        }

    models = {
        "base": model("pruned", 6.612, 0.068, 1840.0, 0.0, 231.0),
        "student": model("student", 1.183, 0.588, 5.91, 0.03, 229.0),
        "teacher": model("teacher", None, 1.0, 1.71, 0.06, 148.0),
    }
    student = {
        "held_out": {
            "kl_nats_per_token": {"value": -5.429, "low": -5.71, "high": -5.16},
            "top1_agreement": {"value": 0.520, "low": 0.497, "high": 0.544},
            "perplexity": {"value": 0.0032, "low": 0.0028, "high": 0.0037},
        },
        "tasks": {
            "chain_sum": {
                "verdicts": {
                    "correct": {"value": 0.03, "low": -0.012, "high": 0.084, "p": 0.25},
                    "well_formed": {"value": 0.0, "low": -0.037, "high": 0.037, "p": 1.0},
                }
            }
        },
    }
    machine = {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "device": "cpu", "memory_gib": 23.5}
    return {
        "baseline": "base",
        "teacher": "teacher",
        "models": models,
        "differences": {"student": student},
        "machine": machine,
    }


def training_history() -> list[dict[str, float]]:
    """A loss at every step and held-out figures now and then, falling as losses do."""
    chance, history = random.Random(5), []
    for step in range(1, 321):
        kl = 1.1 + 5.2 * 2.718 ** (-step / 55) + chance.gauss(0, 0.09)
        cross_entropy = 1.6 + 6.0 * 2.718 ** (-step / 50) + chance.gauss(0, 0.11)
        loss = 0.5 * (kl + cross_entropy)
        point: dict[str, float] = {
            "step": step,
            "loss": loss,
            "kl": kl,
            "cross_entropy": cross_entropy,
            "tokens": 174,
        }
        point["learning_rate"] = 3e-4 * (1 - step / 320)
        if step == 1 or step % 80 == 0:
            point |= {
                "eval_loss": loss + 0.12,
                "eval_kl": kl + 0.1,
                "eval_cross_entropy": cross_entropy + 0.15,
            }
        history.append(point)
    return history


SAMPLES = [
    {
        "source": "held_out",
        "record_id": "a1",
        "messages": [{"role": "user", "content": "State the final answer: 12 + 7 - 30 ="}],
        "reference": "-11",
        "trace": "12 + 7 - 30 = 19 - 30 = -11\n\nThe answer is -11.",
        "answers": {
            "base": {
                "response": "the the the the of of",
                "finish_reason": "length",
                "response_tokens": 96,
                "verdicts": {"correct": False, "well_formed": True},
            },
            "student": {
                "response": "12 + 7 - 30 = 19 - 30 = -11",
                "finish_reason": "stop",
                "response_tokens": 21,
                "verdicts": {"correct": True, "well_formed": True},
            },
            "teacher": {
                "response": "12 + 7 - 30 = -11.",
                "finish_reason": "stop",
                "response_tokens": 14,
                "verdicts": {"correct": True, "well_formed": True},
            },
        },
    },
    {
        "source": "chain_sum",
        "record_id": "a2",
        "messages": [
            {
                "role": "user",
                "content": "Ella buys 3 boxes of 12 pencils each and gives a third of them to her brother, "
                "who already has 5. How many pencils does her brother have now?",
            },
        ],
        "reference": "17",
        "trace": None,
        "answers": {
            "base": {
                "response": "is is is",
                "finish_reason": "length",
                "response_tokens": 96,
                "verdicts": {"correct": False},
            },
            "student": {
                "response": "To find how many pencils her brother has, take a third of 36.\n\n"
                "1/3 x 36 = 12\n\nSo her brother has 12 + 5 = 17 pencils.",
                "finish_reason": "stop",
                "response_tokens": 58,
                "verdicts": {"correct": True},
            },
            "teacher": {
                "response": "3 x 12 = 36 pencils; 36 / 3 = 12 are given away; her brother has 12 + 5 = 17.",
                "finish_reason": "stop",
                "response_tokens": 45,
                "verdicts": {"correct": True},
            },
        },
    },
]


def _step(root: Path, name: str, kind: str, needs: list[str], seconds: float, **fields: Any) -> StepView:
    folder = root / name
    folder.mkdir(parents=True)
    manifest = Manifest(
        kind=kind,
        fingerprint=f"{name:x<64}",
        content="0" * 64,
        seed=7,
        seconds=seconds,
        versions={"python": "3.11.7", "potstill": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        **{"settings": {"do": kind}, "files": {}, **fields},
    )
    return StepView(name, kind, needs, seconds, False, manifest, folder)


@pytest.fixture
def build_run(tmp_path: Path) -> RunBuilder:
    """`build_run(name="quickstart", **changes of RunView)`: the finished run, under tmp_path."""

    def build(name: str = "quickstart", **changes: Any) -> RunView:
        return replace(make_run(tmp_path / name, name), **changes)

    return build


def make_run(root: Path, name: str) -> RunView:
    """The five steps of the quickstart under a root folder."""
    importance = (
        [0.62, 0.31] + [0.05 + 0.11 * abs((index * 37 % 19) - 9) / 9 for index in range(26)] + [0.21, 0.44]
    )
    kept = sorted(sorted(range(30), key=lambda index: -importance[index])[:18])
    weights = {"model.safetensors": FileEntry(sha256="1" * 64, size_bytes=4)}
    steps = [
        _step(
            root,
            "traces",
            "generate",
            [],
            128.4,
            counts={"rows": 180, "prompts": 180, "failed": 0},
            tokens=15321,
            settings={"do": "generate", "model": "writer", "max_new_tokens": 96, "temperature": 0.0},
            metrics={"mean_response_tokens": 85.1, "finish_reasons": {"stop": 63, "length": 117}},
        ),
        _step(
            root,
            "logits",
            "cache",
            ["traces"],
            41.9,
            counts={"rows": 180, "tokens": 15484},
            settings={
                "do": "cache",
                "model": "teacher",
                "data": "traces",
                "top_k": 64,
                "temperatures": [1.0],
            },
            metrics={"bytes_per_token": 262.0, "mean_tail_mass": 0.0123},
        ),
        _step(
            root,
            "pruned",
            "init",
            ["traces"],
            18.2,
            counts={"parameters": 92_000_000},
            files=weights,
            settings={"do": "init", "model": "teacher", "blocks": 18},
            metrics={"block_importance": importance, "kept_blocks": kept},
        ),
        _step(
            root,
            "student",
            "train",
            ["pruned", "logits"],
            205.0,
            tokens=55680,
            files=weights,
            settings={
                "do": "train",
                "student": "pruned",
                "data": "logits",
                "lr": 3e-4,
                "epochs": 4,
                "lora": None,
                "betas": [0.9, 0.95],
            },
            metrics={"history": training_history()},
        ),
        _step(
            root,
            "exam",
            "evaluate",
            ["pruned", "student", "traces"],
            96.1,
            counts={"held_out_rows": 41},
            settings={
                "do": "evaluate",
                "models": {"base": "pruned", "student": "student", "teacher": "teacher"},
            },
            metrics=evaluation_metrics(),
        ),
    ]
    (root / "exam" / "samples.json").write_text(json.dumps(SAMPLES), encoding="utf-8")
    described = [{"name": step.name, "kind": step.kind, "needs": step.needs} for step in steps]
    events: list[dict[str, Any]] = [
        {"time": 1000.0, "event": "run_started", "recipe": name, "steps": described}
    ]
    time = 1000.0
    for step in steps:
        time += step.seconds or 0.0
        events.append({"time": time, "event": "step_finished", "step": step.name, "kind": step.kind})
    events.append({"time": time + 0.4, "event": "run_finished"})
    return RunView(name, RECIPE, steps, events, root)
