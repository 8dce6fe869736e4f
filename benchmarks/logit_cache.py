"""Bytes a token of the logit cache on real traces, speed and memory of reading it in random order.

    python benchmarks/logit_cache.py [--json] [--store FOLDER] [--tokens 1000000]

The traces are the shipped quickstart recipe's: SmolLM2-135M-Instruct, from PyPI, answers 180 problems. It
then scores them once, and what it gives is kept in each way that is compared. Speed and memory are measured
in a process of their own, on a cache of about 10,000 tokens and on one of `--tokens`, made of the same logits
again and again.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from potstill.core.events import Reporter
from potstill.core.records import RECORDS_FILE, read_records
from potstill.core.store import Store, default_store_root
from potstill.data.batches import collate, micro_batches
from potstill.data.chat import Rendered, Renderer
from potstill.logits.codecs import Codec, Draws, TopK
from potstill.logits.hdf5 import export_hdf5
from potstill.logits.logit_cache import LogitCache
from potstill.logits.shards import CachedRow, ShardWriter, write_index
from potstill.losses.head import per_token, supervised_pairs
from potstill.models import TransformersModel, hidden_states, load, output_head
from potstill.pipeline.runner import RunOptions, run_graph
from potstill.recipe import load_recipe

TOP_K, DRAWS, BATCH_TOKENS, ROWS_A_READ = 64, 50, 2048, 16
Kept = list[tuple[CachedRow, dict[str, torch.Tensor]]]


def capture(store: Store) -> tuple[int, dict[str, Kept]]:
    """The vocabulary's size, and what each codec keeps of every row, from one pass of the teacher."""
    recipe = load_recipe("quickstart")
    options = RunOptions(only=frozenset({"traces"}))
    made = run_graph(recipe.graph, recipe.seed, store, Reporter("plain"), options)
    teacher = load(TransformersModel(path="smollm2-135m-instruct"))
    renderer = Renderer(teacher.tokenizer)
    rows = {}
    for record in read_records(made["traces"].folder / RECORDS_FILE):
        rendered = renderer.render(record)
        row = CachedRow(rendered.ids, rendered.mask, record.held_out, record.id)
        rows.setdefault(row.key, row)
    ordered, size = list(rows.values()), teacher.vocabulary_size
    codecs: dict[str, Codec] = {"topk": TopK(TOP_K, size), "sampled": Draws(DRAWS, size)}
    kept: dict[str, Kept] = {name: [] for name in codecs}
    head = output_head(teacher.model, size)
    lengths = [len(row.token_ids) for row in ordered]
    for numbers in micro_batches(lengths, range(len(ordered)), BATCH_TOKENS):
        batch = [ordered[number] for number in numbers]
        tensors = collate([Rendered(list(row.token_ids), list(row.mask)) for row in batch], pad_id=0)
        with torch.no_grad():
            hidden_BTH = hidden_states(teacher.model, tensors["input_ids"], tensors["attention_mask"])
        hidden_NH, _ = supervised_pairs(hidden_BTH, tensors["input_ids"], tensors["loss_mask"])
        counts = [sum(row.mask) for row in batch]
        for name, codec in codecs.items():
            found = per_token(hidden_NH, head, codec.encoder([row.key for row in batch], counts))
            split = {one: torch.split(values, counts) for one, values in found.items()}
            kept[name] += [
                (row, {one: parts[number] for one, parts in split.items()})
                for number, row in enumerate(batch)
            ]
    return size, kept


def write(folder: Path, codec: Codec, kept: Kept, repeats: int = 1) -> LogitCache:
    """A cache of what was kept; repeated rows get other token ids, since equal rows are stored once."""
    folder.mkdir()
    writer = ShardWriter(folder, codec, tokenizer="benchmark", model="benchmark")
    rows = []
    for repeat in range(repeats):
        for row, quantities in kept:
            other = [repeat, *row.token_ids[1:]] if repeat else row.token_ids
            rows.append(CachedRow(other, row.mask, row.held_out, row.record_id))
            if rows[-1].key not in writer:
                writer.append(rows[-1], quantities)
    writer.seal()
    write_index(folder, rows)
    return LogitCache.open(folder)


def narrowed(kept: Kept, size: int, k: int) -> Kept:
    """What top-k keeps with a smaller k: the others join the tail."""
    found = []
    for row, quantities in kept:
        log_odds = quantities["tail_odds"].double()
        tail = torch.sigmoid(log_odds) + quantities["log_probs"][:, k:].double().exp().sum(-1, keepdim=True)
        narrow = {name: quantities[name][:, :k] for name in ("ids", "log_probs")}
        found.append((row, {**quantities, **narrow, "tail_odds": torch.logit(tail)}))
    return found


def read_at_random(folder: Path) -> dict[str, float]:
    """Read a whole cache in random order, some rows at a time as training does: speed and resident memory."""
    torch.set_num_threads(1)
    cache, process = LogitCache.open(folder), psutil.Process()
    order = list(range(len(cache)))
    random.Random(0).shuffle(order)
    tokens, started, cpu = 0, time.perf_counter(), time.process_time()
    for first in range(0, len(order), ROWS_A_READ):
        tokens += len(cache.signals(order[first : first + ROWS_A_READ]).top_ids)
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / (time.perf_counter() - started),
        "tokens_per_cpu_s": tokens / (time.process_time() - cpu),
        "rss_mb": process.memory_info().rss / 1e6,
    }


def in_own_process(folder: Path) -> dict[str, float]:
    """`read_at_random` without what this process holds."""
    command = [sys.executable, __file__, "--read", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def distillkit_bytes(vocabulary: int, k: int = 128, values_bytes: int = 56) -> float:
    """DistillKit's published k = 128 layout: ids in as few bits as they need, 16 exact values, a fit."""
    return k * int(np.ceil(np.log2(vocabulary))) / 8 + values_bytes


def measure(store: Store, tokens: int) -> dict[str, Any]:
    """All figures."""
    size, kept = capture(store)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for k in (8, 16, 32, TOP_K):
            cache = write(root / f"top{k}", TopK(k, size), narrowed(kept["topk"], size, k))
            figures = cache.figures()
            found[f"topk{k}_bytes_per_token"] = figures["bytes_per_token"]
            found[f"topk{k}_mass_kept"] = figures["mean_kept_mass"]
        export_hdf5(cache, root / "top64.h5")
        here = int(cache.supervised.sum())
        found["hdf5_gzip_topk64_bytes_per_token"] = (root / "top64.h5").stat().st_size / here
        figures = write(root / "sampled", Draws(DRAWS, size), kept["sampled"]).figures()
        found["sampled50_bytes_per_token"] = figures["bytes_per_token"]
        found["sampled50_distinct_ids"] = figures["mean_distinct_ids"]
        found["distillkit_k128_bytes_per_token"] = distillkit_bytes(size)
        found["measured_tokens"] = here
        write(root / "large", TopK(TOP_K, size), kept["topk"], repeats=max(2, tokens // here))
        small, large = in_own_process(root / f"top{TOP_K}"), in_own_process(root / "large")
        found["read_tokens"] = large["tokens"]
        found["read_tokens_per_s"] = large["tokens_per_s"]
        found["read_tokens_per_cpu_s"] = large["tokens_per_cpu_s"]
        found["rss_growth_mb"] = large["rss_mb"] - small["rss_mb"]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--store", type=Path, default=default_store_root(), help="where traces are kept")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="size of the large cache")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read is not None:
        print(json.dumps(read_at_random(options.read)))
        return
    found = measure(Store(options.store), options.tokens)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:34} {value:,.4g}" if isinstance(value, float) else f"{name:34} {value:,}")


if __name__ == "__main__":
    main()
