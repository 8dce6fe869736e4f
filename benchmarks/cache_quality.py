"""Held-out KL of students that learned from the whole teacher, from caches of several kinds, and from text.

    python benchmarks/cache_quality.py [--json] [--plot FILE.svg] [--layers 18] [--steps 14] [--seeds 3]

The traces are the shipped quickstart recipe's, a quarter of their prompts held out, and the student is its
teacher cut to `--layers` blocks. A seed decides the order of the rows, and the draws of a sampled cache; all
students of a seed see the same rows in the same order. KL is to the whole teacher, on the held-out rows.
Intervals are over held-out prompts, those of differences paired by prompt; every seed's difference is given
beside them. What was measured of a student stays in the store, and it is not trained again.
"""

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from potstill import DistillationArguments, DistillationTrainer
from potstill.core.events import Reporter
from potstill.core.hashing import hash_json
from potstill.core.records import RECORDS_FILE, read_records
from potstill.core.store import Store, default_store_root, write_atomically
from potstill.data.chat import Renderer
from potstill.evaluate.intervals import Estimate, bootstrap_ratio, bootstrap_ratio_difference
from potstill.logits.codecs import Codec, Draws, TopK
from potstill.logits.logit_cache import LogitCache
from potstill.logits.shards import CachedRow, ShardWriter, write_index
from potstill.losses.head import per_token
from potstill.losses.types import Live
from potstill.models import LoadedModel, TransformersModel, load
from potstill.pipeline.runner import RunOptions, run_graph
from potstill.recipe import load_recipe
from potstill.train.online import OnlineTeacher
from potstill.train.rows import Rows, SignalSource, TrainingData, length_limit, read_caches, rows_of_records
from potstill.train.student import MicroBatch, StudentWithLoss, make_micro_batch

HELD_OUT, TOP_K, DRAWS = 0.25, 64, 50
NARROW = (64, 32, 16, 8)
FULL, TEXT, SAMPLED = "full_kl", "ce_only", f"sampled{DRAWS}"
BIASED = {f"topk{k}": f"topk{k}_renormalised" for k in (64, 8)}
ARMS = (FULL, *(f"topk{k}" for k in NARROW), SAMPLED, *BIASED.values(), TEXT)
# What is asked of the figures: the first less the second.
QUESTIONS = (
    *((arm, FULL) for arm in ARMS if arm != FULL),
    *((f"topk{k}", SAMPLED) for k in NARROW),
    *((biased, tailed) for tailed, biased in BIASED.items()),
    *((arm, TEXT) for arm in ARMS if arm not in (FULL, TEXT)),
)
Sums = dict[str, list[float]]
"""What was measured of one student, one number a held-out row."""


@dataclass(frozen=True)
class Size:
    """How much is trained, and on what."""

    rows: int
    layers: int
    steps: int
    batch: int
    lr: float


@dataclass
class Bench:
    """What all students have in common. `hidden` holds the teacher's hidden states of each training row."""

    caches: Path
    students: Path
    untrained: Path
    size: Size
    vocabulary_size: int
    data: TrainingData
    hidden: list[torch.Tensor]
    teacher: OnlineTeacher
    held_out: list[MicroBatch]
    prompt_ids: list[str]

    def live(self, _: Rows, numbers: Sequence[int]) -> Live:
        """The teacher's whole distribution, a `SignalSource`."""
        return Live(torch.cat([self.hidden[number] for number in numbers]), self.teacher.head)

    def cache(self, codec: Codec) -> LogitCache:
        """What a codec keeps of the teacher on the training rows."""
        folder = self.caches / f"{codec.name}-{hash_json(vars(codec))[:12]}"
        rows = self.data.train
        cached = [CachedRow(rows[n].ids, rows[n].mask, False, rows.ids[n]) for n in range(len(rows))]
        if not (folder / "index.safetensors").exists():
            folder.mkdir(exist_ok=True)
            writer = ShardWriter(folder, codec, tokenizer="benchmark", model="benchmark")
            for row, hidden_NH in zip(cached, self.hidden, strict=True):
                if row.key not in writer:
                    encode = codec.encoder([row.key], [len(hidden_NH)])
                    writer.append(row, per_token(hidden_NH, self.teacher.head, encode))
            writer.seal()
            write_index(folder, cached)
        return LogitCache.open(folder)

    def signal(self, arm: str, seed: int) -> tuple[TrainingData, SignalSource | None]:
        """The rows and the teacher that one student learns from."""
        if arm in (FULL, TEXT):
            return TrainingData(self.data.train), self.live if arm == FULL else None
        size, sampled = self.vocabulary_size, arm == SAMPLED
        codec = Draws(DRAWS, size, seed=seed) if sampled else TopK(TOP_K, size)
        return read_caches(
            [(self.cache(codec), None)],
            vocabulary_size=size,
            temperature=1.0,
            top_k=None if sampled else int(arm.removeprefix("topk").removesuffix("_renormalised")),
            max_length=2**31,
        )


def prepare(store: Store, size: Size) -> Bench:
    """Traces and pruned student from the pipeline, and one pass of the teacher over all rows."""
    overrides = [f"traces.held_out={HELD_OUT}", f"pruned.layers={size.layers}"]
    recipe = load_recipe("quickstart", overrides)
    for step in ("traces", "pruned"):
        made = run_graph(
            recipe.graph, recipe.seed, store, Reporter("plain"), RunOptions(only=frozenset({step}))
        )
    student = load(TransformersModel(path=str(made["pruned"].folder)))
    teacher = OnlineTeacher(load(TransformersModel(path="smollm2-135m-instruct")), student)
    records = list(read_records(made["traces"].folder / RECORDS_FILE))
    if size.rows < len(records):
        records = random.Random(0).sample(records, size.rows)
    data = rows_of_records(records, Renderer(student.tokenizer), length_limit(student.model, None))
    prompt_ids = {record.id: record.prompt_id for record in records}

    def hidden(rows: Rows, number: int) -> torch.Tensor:
        return teacher.signal(make_micro_batch([rows[number]])).hidden_NH

    held_out = [
        make_micro_batch([data.held_out[n]], Live(hidden(data.held_out, n), teacher.head))
        for n in range(len(data.held_out))
    ]
    contents = [made["traces"].manifest.content, len(records)]
    caches = store.root / "cache-quality" / hash_json(contents)[:16]
    students = caches / hash_json([made["pruned"].manifest.content, vars(size)])[:16]
    students.mkdir(parents=True, exist_ok=True)
    return Bench(
        caches,
        students,
        made["pruned"].folder,
        size,
        student.vocabulary_size,
        data,
        [hidden(data.train, n) for n in range(len(data.train))],
        teacher,
        held_out,
        [prompt_ids[record_id] for record_id in data.held_out.ids],
    )


def train(bench: Bench, arm: str, seed: int) -> LoadedModel:
    """One student."""
    data, teacher = bench.signal(arm, seed)
    loaded = load(TransformersModel(path=str(bench.untrained)), dtype=torch.float32, trainable=True)
    with TemporaryDirectory() as scratch:
        arguments = DistillationArguments(
            output_dir=scratch,
            batch=bench.size.batch,
            max_steps=bench.size.steps,
            learning_rate=bench.size.lr,
            alpha=None if teacher is None else 1.0,
            renormalise=arm in BIASED.values(),
            order_seed=seed,
            seed=seed,
        )
        DistillationTrainer(loaded, arguments, data, teacher=teacher).train()
    return loaded


@torch.no_grad()
def measure(bench: Bench, loaded: LoadedModel) -> Sums:
    """The held-out rows' sums over supervised tokens."""
    student = StudentWithLoss(loaded.model.eval(), bench.vocabulary_size, alpha=1.0)
    found: Sums = {"tokens": [], "kl": [], "agreement": [], "cross_entropy": []}
    for batch in bench.held_out:
        _, sums = student(batch, batch.supervised)
        for name, values in found.items():
            values.append(float(sums[name]) if name in sums else batch.supervised)
    return found


def kept(path: Path, make: Callable[[], Sums]) -> Sums:
    """What was measured before, else what is measured now."""
    if not path.exists():
        started = time.perf_counter()
        write_atomically(path, json.dumps(make()))
        print(f"{path.stem}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    found: Sums = json.loads(path.read_text(encoding="utf-8"))
    print(f"{path.stem}: KL {sum(found['kl']) / sum(found['tokens']):.4f}", file=sys.stderr, flush=True)
    return found


def joined(sums: Sequence[Sums], name: str) -> list[float]:
    return [value for one in sums for value in one[name]]


def mean(sums: Sequence[Sums], name: str, prompt_ids: Sequence[str]) -> Estimate:
    """A mean over tokens of all seeds' students, its interval over prompts."""
    clusters = [*prompt_ids] * len(sums)
    return bootstrap_ratio(joined(sums, name), joined(sums, "tokens"), clusters, seed=0)


def difference(
    first: Sequence[Sums], second: Sequence[Sums], name: str, prompt_ids: Sequence[str]
) -> dict[str, Any]:
    """The first arm's mean less the second's, paired by prompt and seed; and that of each seed."""

    def ratios(sums: Sequence[Sums]) -> tuple[list[float], list[float]]:
        return joined(sums, name), joined(sums, "tokens")

    clusters = [*prompt_ids] * len(first)
    found = bootstrap_ratio_difference(ratios(second), ratios(first), clusters, seed=0)
    each = [
        (sum(one[name]) - sum(other[name])) / sum(one["tokens"])
        for one, other in zip(first, second, strict=True)
    ]
    return {**found.as_dict(), "seeds": each}


def compare(store: Store, size: Size, seeds: int) -> dict[str, Any]:
    """All figures."""
    bench = prepare(store, size)
    untrained = kept(
        bench.students / "untrained.json",
        lambda: measure(bench, load(TransformersModel(path=str(bench.untrained)), dtype=torch.float32)),
    )
    sums: dict[str, list[Sums]] = {arm: [] for arm in ARMS}
    for seed in range(1, seeds + 1):
        for arm in ARMS:
            path = bench.students / f"{arm}-seed{seed}.json"
            sums[arm].append(kept(path, lambda arm=arm, seed=seed: measure(bench, train(bench, arm, seed))))
    codecs: dict[str, Codec] = {f"topk{k}": TopK(k, bench.vocabulary_size) for k in NARROW}
    codecs[SAMPLED] = Draws(DRAWS, bench.vocabulary_size, seed=1)
    caches = {name: bench.cache(codec).figures() for name, codec in codecs.items()}
    kl = {arm: mean(found, "kl", bench.prompt_ids) for arm, found in sums.items()}
    gain = kl[TEXT].value - kl[FULL].value
    agreement = {arm: mean(found, "agreement", bench.prompt_ids) for arm, found in sums.items()}
    return {
        "untrained_kl_nats": sum(untrained["kl"]) / sum(untrained["tokens"]),
        "kl_nats": {arm: one.as_dict() for arm, one in kl.items()},
        "top1_agreement": {arm: one.as_dict() for arm, one in agreement.items()},
        "kl_differences_nats": {
            f"{one} - {other}": difference(sums[one], sums[other], "kl", bench.prompt_ids)
            for one, other in QUESTIONS
        },
        # 0 is cross-entropy alone, 1 the whole teacher.
        "gain_kept": {arm: (kl[TEXT].value - kl[arm].value) / gain for arm in ARMS},
        "bytes_per_token": {name: figures["bytes_per_token"] for name, figures in caches.items()},
        "dense_fp16_bytes_per_token": 2 * bench.vocabulary_size,
        "mass_kept": {name: one["mean_kept_mass"] for name, one in caches.items() if name != SAMPLED},
        "sampled_distinct_ids": caches[SAMPLED]["mean_distinct_ids"],
        **vars(size),
        "seeds": seeds,
        "training_rows": len(bench.data.train),
        "held_out_prompts": len(set(bench.prompt_ids)),
        "held_out_tokens": int(sum(untrained["tokens"])),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads used",
    }


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Held-out KL against bytes a token; the bars are the paired intervals of the difference to full KL."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 3.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    kl, sizes = found["kl_nats"], found["bytes_per_token"]

    def point(arm: str, x: float, label: str | None = None, **style: Any) -> None:
        value, gap = kl[arm]["value"], found["kl_differences_nats"][f"{arm} - {FULL}"]
        reach = [[gap["value"] - gap["low"]], [gap["high"] - gap["value"]]]
        axes.errorbar([x], [value], yerr=reach, capsize=3, label=label, **style)

    tops = [f"topk{k}" for k in NARROW]
    axes.plot([sizes[arm] for arm in tops], [kl[arm]["value"] for arm in tops], color="#1f66c7", linewidth=1)
    for arm in tops:
        label = "top-k with its tail" if arm == tops[0] else None
        point(arm, sizes[arm], label, fmt="o", color="#1f66c7")
        axes.annotate(
            f"k = {arm.removeprefix('topk')}",
            (sizes[arm], kl[arm]["value"]),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=8.5,
        )
    for tailed, biased in BIASED.items():
        label = "top-k renormalised (biased)" if tailed == tops[0] else None
        point(biased, 1.05 * sizes[tailed], label, fmt="s", color="#a3195b")
    point(SAMPLED, sizes[SAMPLED], f"{DRAWS} draws", fmt="D", color="#c2570c")
    axes.axhline(kl[FULL]["value"], color="#0f7d76", linewidth=1.3, label="the whole teacher, in memory")
    axes.axhline(
        kl[TEXT]["value"], color="#6b7280", linewidth=1.3, linestyle="--", label="no teacher: text alone"
    )
    axes.set_xscale("log")
    axes.set_xticks([10, 20, 50, 100, 200], ["10", "20", "50", "100", "200"])
    axes.minorticks_off()
    axes.set_xlim(10, 200)
    axes.set_xlabel("bytes a token on disk")
    axes.set_ylabel("held-out KL to the teacher, nats a token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def show(found: Mapping[str, Any]) -> None:
    """The figures as text."""
    print(f"untrained: KL {found['untrained_kl_nats']:.3f} nats\n")
    print(f"{'learned from':20} {'bytes':>7} {'KL, nats':>9} {'agreement':>10} {'gain kept':>10}")
    for arm in ARMS:
        size = found["bytes_per_token"].get(arm.removesuffix("_renormalised"))
        print(
            f"{arm:20} {'' if size is None else format(size, '.1f'):>7} "
            f"{found['kl_nats'][arm]['value']:9.4f} {found['top1_agreement'][arm]['value']:10.1%} "
            f"{found['gain_kept'][arm]:10.0%}"
        )
    print()
    for name, gap in found["kl_differences_nats"].items():
        verdict = "worse" if gap["value"] > 0 else "better"
        if gap["low"] <= 0 <= gap["high"]:
            verdict = "no clear difference"
        interval = f"{gap['low']:+.4f} to {gap['high']:+.4f}"
        seeds = ", ".join(f"{one:+.4f}" for one in gap["seeds"])
        print(f"{name:32} {gap['value']:+.4f} ({interval}) {verdict}; seeds {seeds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, help="an SVG file to draw quality against bytes a token into")
    parser.add_argument("--store", type=Path, default=default_store_root(), help="where all of it is kept")
    parser.add_argument("--rows", type=int, default=180, help="traces, held-out ones among them")
    parser.add_argument("--layers", type=int, default=18, help="blocks of the student, of 30")
    parser.add_argument("--steps", type=int, default=14, help="optimiser steps of each student")
    parser.add_argument("--batch", type=int, default=4, help="rows a step, of about 130 tokens")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    size = Size(options.rows, options.layers, options.steps, options.batch, options.lr)
    found = compare(Store(options.store), size, options.seeds)
    if options.plot is not None:
        draw(found, options.plot)
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
