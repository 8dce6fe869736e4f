"""Memory and speed of a model whose experts share a core, beside the plain one of twice its size.

A random Qwen3-MoE of 16 experts and about 200M parameters in float32, and the same with shared experts at
half of its parameters, each in a process of its own, in turns. Memory is what someone who holds the loaded
model has in use at a forward pass: the weights and the peak of the first prefill, over what was resident
before the model was loaded. What loading leaves behind does not count, for either: transformers puts the
plain model's experts together in new memory and keeps the file that they came from mapped, while the other's
weights are nothing but the mapped file. So every weight is moved to memory of its own before the prefill. The
peak of loading stands beside it. Speed is tokens a second of a prefill of 8 rows of 256 tokens, and beside it
of forward and backward, and of greedy decoding with a cache.

    python benchmarks/moe.py --json --rounds 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from findings import argument_parser, show, surroundings

SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "moe_intermediate_size": 640,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}
RANK = 128
ROWS, LENGTH, DECODED = 8, 256, 48
REPEATS = 3


def prepare(folder: Path) -> dict[str, int]:
    """Both models on the disk; gives their parameters."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from potstill.models.shared_experts import SharedExperts, expert_blocks, shared_model

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES))
    parameters = {"original": model.num_parameters()}
    model.save_pretrained(folder / "original")
    layers = {}
    for number, block in expert_blocks(model).items():
        experts, hidden, inner = block.experts.down_proj.shape
        layers[number] = SharedExperts(experts, hidden, inner, RANK, "silu")
        for one in layers[number].parameters():
            torch.nn.init.normal_(one, std=0.02)
    shared = shared_model(model, layers, RANK)
    parameters["shared"] = shared.num_parameters()
    shared.save_pretrained(folder / "shared")
    return parameters


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path) -> dict[str, float]:
    """Load one of the models in this process, and run it."""
    import torch

    from potstill.core.memory import PeakMemory
    from potstill.models.pretrained import read_weights
    from potstill.models.shared_experts import register_shared_experts

    register_shared_experts()
    ids_BT = torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    torch.ones(512, 512) @ torch.ones(512, 512)
    loading, before = PeakMemory(), resident_bytes()
    model = read_weights(str(folder), where=str(folder), dtype=torch.float32).eval()

    def prefill() -> None:
        with torch.no_grad():
            model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)

    def decode() -> None:
        with torch.no_grad():
            model.generate(ids_BT[:1, :16], max_new_tokens=DECODED, min_new_tokens=DECODED, do_sample=False)

    def train() -> None:
        model(input_ids=ids_BT[:2], labels=ids_BT[:2], use_cache=False).loss.backward()
        model.zero_grad()

    found = {"loading_peak_mb": (loading.read()["peak_memory_bytes"] - before) / 1e6}
    for weight in model.parameters():
        weight.data = weight.data.clone()
    running = PeakMemory()
    found["held_mb"] = (resident_bytes() - before) / 1e6
    prefill()
    found["peak_mb"] = (running.read()["peak_memory_bytes"] - before) / 1e6
    for name, work, tokens in (
        ("tokens_per_s", prefill, ROWS * LENGTH),
        ("decoded_tokens_per_s", decode, DECODED),
        ("trained_tokens_per_s", train, 2 * LENGTH),
    ):
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        found[name] = tokens / min(seconds)
    return found


def run_child(folder: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--measure", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{folder.name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    parameters = prepare(folder)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in parameters}
    for _ in range(rounds):
        for name, found in runs.items():
            found.append(run_child(folder / name))
            print(name, found[-1], file=sys.stderr, flush=True)
    figures = {
        key: {name: statistics.median(one[key] for one in found) for name, found in runs.items()}
        for key in runs["shared"][0]
    }
    ratios = {key: round(found["shared"] / found["original"], 3) for key, found in figures.items()}
    return {
        "memory_over_original": ratios["peak_mb"],
        "tokens_per_s_over_original": ratios["tokens_per_s"],
        "decoded_tokens_per_s_over_original": ratios["decoded_tokens_per_s"],
        "trained_tokens_per_s_over_original": ratios["trained_tokens_per_s"],
        "parameters_over_original": round(parameters["shared"] / parameters["original"], 3),
        **{key: {name: round(value, 1) for name, value in found.items()} for key, found in figures.items()},
        "parameters": parameters,
        "rank": RANK,
        "experts": SIZES["num_experts"],
        "experts_per_token": SIZES["num_experts_per_tok"],
        "rounds": rounds,
        **surroundings("potstill", "torch", "transformers"),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as name:
        result = compare(Path(name), options.rounds)
    show(result, as_json=options.json)


if __name__ == "__main__":
    main()
