"""Tokens a second and peak memory of training, beside transformers' Trainer and TRL's SFT and GKD trainers.

Every contestant trains the same 18-block cut of SmolLM2-135M-Instruct on the same rows for one epoch, in a
process of its own, in turns, with the same batch and precision. A token is one of a row's own, prompt
included; padding does not count. The cached and the online signal come from the uncut model. Peers are
measured where they are installed.

    python benchmarks/train_step.py --json --rounds 3
"""

import argparse
import importlib.metadata
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from findings import argument_parser, show, surroundings

KEPT_BLOCKS = [0, 1, 2, 8, 9, 10, 11, 16, 18, 19, 20, 21, 22, 23, 24, 27, 28, 29]
BATCH, LEARNING_RATE, TOP_K = 8, 1e-4, 64


def prepare(folder: Path, rows: int, *, caches: bool) -> None:
    """Teacher, student, rows and, where they are needed, cached logits, from the package index alone."""
    import torch

    from potstill.data.tasks import task_rows
    from potstill.models import TransformersModel, load
    from potstill.student.depth import drop_blocks

    teacher = load(TransformersModel(path="smollm2-135m-instruct"), dtype=torch.float32)
    for name in ("teacher", "student"):
        if name == "student":
            drop_blocks(teacher.model, KEPT_BLOCKS)
        teacher.model.save_pretrained(folder / name)
        teacher.tokenizer.save_pretrained(folder / name)
    examples = [
        {"prompt": row["question"], "response": row["answer_cot"]}
        for row in task_rows("gsm_symbolic", {}, rows, 1)
    ]
    (folder / "rows.jsonl").write_text(
        "".join(f"{json.dumps(example)}\n" for example in examples), encoding="utf-8"
    )
    if not caches:
        return
    settings = [
        f"model={folder / 'teacher'}",
        f"data.path={folder / 'rows.jsonl'}",
        f"top_k={TOP_K}",
    ]
    output = ["--store", folder / "store", "--output", folder / "run", "--quiet"]
    command = [sys.executable, "-c", "from potstill.cli import main; main()", "cache", *settings, *output]
    subprocess.run([str(part) for part in command], check=True)


def examples(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def messages(example: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": example["prompt"]},
        {"role": "assistant", "content": example["response"]},
    ]


def has_bf16() -> bool:
    import torch

    from potstill.models import supports_bf16

    return supports_bf16(torch.device("cpu"))


def common_arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "output"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "bf16": has_bf16(),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def ours(folder: Path, teacher: str | None) -> Any:
    from potstill import DistillationArguments, DistillationTrainer

    arguments = DistillationArguments(
        output_dir=str(folder / "output"),
        batch=BATCH,
        learning_rate=LEARNING_RATE,
        num_train_epochs=1,
        use_cpu=True,
    )
    if teacher == "cached":
        return DistillationTrainer(str(folder / "student"), arguments, folder / "run" / "cache")
    online = str(folder / "teacher") if teacher == "online" else None
    return DistillationTrainer(str(folder / "student"), arguments, examples(folder), teacher=online)


def loaded(folder: Path, name: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder / name),
    )


def hf_trainer(folder: Path, **options: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer = loaded(folder, "student")
    rows = []
    for example in examples(folder):
        text = tokenizer.apply_chat_template(messages(example), tokenize=False)
        prompt = tokenizer.apply_chat_template(
            messages(example)[:1], tokenize=False, add_generation_prompt=True
        )
        ids, known = tokenizer(text)["input_ids"], len(tokenizer(prompt)["input_ids"])
        rows.append({"input_ids": ids, "labels": [-100] * known + ids[known:]})
    return Trainer(
        model=model,
        args=TrainingArguments(**common_arguments(folder), **options),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )


def trl_sft(folder: Path, **options: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = loaded(folder, "student")
    rows = [{"prompt": one[:1], "completion": one[1:]} for one in map(messages, examples(folder))]
    return SFTTrainer(
        model,
        SFTConfig(**common_arguments(folder), **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def trl_gkd(folder: Path, **options: Any) -> Any:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    model, tokenizer = loaded(folder, "student")
    rows = [{"messages": messages(one)} for one in examples(folder)]
    # No rollouts (lmbda 0) and forward KL (beta 0): the same work as ours with the teacher in memory.
    arguments = GKDConfig(**common_arguments(folder), **options, lmbda=0.0, beta=0.0, temperature=1.0)
    return GKDTrainer(
        model=model,
        teacher_model=loaded(folder, "teacher")[0],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


CONTESTANTS: dict[str, Callable[[Path], Any]] = {
    "sft": lambda folder: ours(folder, None),
    "cached_kd": lambda folder: ours(folder, "cached"),
    "online_kd": lambda folder: ours(folder, "online"),
    "hf_trainer": lambda folder: hf_trainer(folder, train_sampling_strategy="group_by_length"),
    # Its default: rows in random order, padded to the longest of each batch.
    "hf_trainer_ungrouped": hf_trainer,
    "trl_sft": trl_sft,
    "trl_gkd": trl_gkd,
    # TRL recomputes activations by default, which costs a third of the speed and saves memory; without it:
    "trl_sft_stored": lambda folder: trl_sft(folder, activation_checkpointing=False),
    "trl_gkd_stored": lambda folder: trl_gkd(folder, activation_checkpointing=False),
}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Train one epoch in this process."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    texts = [tokenizer.apply_chat_template(messages(one), tokenize=False) for one in examples(folder)]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    trainer = CONTESTANTS[name](folder)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    last = next(one["loss"] for one in reversed(trainer.state.log_history) if "loss" in one)
    # Linux counts the peak in KiB.
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"tokens": tokens, "tokens_per_s": tokens / seconds, "peak_mb": peak_mb, "last_loss": last}


def run_child(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--contestant", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(folder: Path, rounds: int, names: list[str]) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            runs[name].append(run_child(name, folder))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    speed = {name: statistics.median(one["tokens_per_s"] for one in found) for name, found in runs.items()}
    memory = {name: statistics.median(one["peak_mb"] for one in found) for name, found in runs.items()}

    def ratio(figures: dict[str, float], one: str, other: str) -> float | None:
        return round(figures[one] / figures[other], 3) if {one, other} <= figures.keys() else None

    return {
        "cached_kd_over_trl_gkd": ratio(speed, "cached_kd", "trl_gkd"),
        "sft_over_hf_trainer": ratio(speed, "sft", "hf_trainer"),
        "sft_over_hf_trainer_ungrouped": ratio(speed, "sft", "hf_trainer_ungrouped"),
        "sft_over_trl_sft": ratio(speed, "sft", "trl_sft"),
        "peak_memory_over_trl_gkd": ratio(memory, "cached_kd", "trl_gkd"),
        "cached_kd_over_trl_gkd_stored": ratio(speed, "cached_kd", "trl_gkd_stored"),
        "sft_over_trl_sft_stored": ratio(speed, "sft", "trl_sft_stored"),
        "cached_over_online": ratio(speed, "cached_kd", "online_kd"),
        "cached_memory_over_online": ratio(memory, "cached_kd", "online_kd"),
        "tokens_per_s": {name: round(value, 1) for name, value in speed.items()},
        "peak_mb": {name: round(value) for name, value in memory.items()},
        "tokens": runs[names[0]][0]["tokens"],
        "rounds": rounds,
        "bf16": has_bf16(),
        **surroundings("potstill", "torch", "transformers", "trl"),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=CONTESTANTS, nargs="+", help="by default all that are installed")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measure(options.contestant, options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        has_trl = importlib.util.find_spec("trl") is not None
        names = options.only or [one for one in CONTESTANTS if has_trl or not one.startswith("trl_")]
        prepare(Path(name), options.rows, caches="cached_kd" in names)
        result = compare(Path(name), options.rounds, names)
    show(result, as_json=options.json)


if __name__ == "__main__":
    main()
