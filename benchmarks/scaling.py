"""How memory and time grow from 10,000 rows to 1,000,000, in select, cache and the training data loader.

    python benchmarks/scaling.py [--json] [--plot FILE] [--rows 10000,100000] [--parts select,cache]

The rows are sums with answers of some words; one in 50 repeats another. Their teacher's log-probabilities are
drawn at random. The student to select for and the teacher to cache are one random model of one block and 512
ids, so that what is measured is the toolkit and not a model's products. Each size of each part has a process
of its own, and its peak of resident memory counts from the part's beginning on. Time is the processor's, to
which a machine that is not calm does less.

`rss_growth_mb_10k_to_1m` is the peak of the largest size less that of the smallest, `time_exponent` the slope
of log seconds over log rows between the two largest: 1 is linear. Parts that begin with `filter_` are
selections by one filter alone, `loader` is the loader of traces, `cached_loader` that of cached logits.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from findings import argument_parser, show, surroundings

SIZES = (10_000, 100_000, 1_000_000)
PARTS = ("select", "cache", "loader", "cached_loader")
VOCABULARY, HIDDEN, TOP_K, BATCH = 512, 16, 8, 64
REPEATED_EVERY = 50
FILTERS: dict[str, dict[str, Any]] = {
    "none": {"min_characters": 1},
    "exact_duplicates": {"exact_duplicates": True},
    "near_duplicates": {"near_duplicates": 0.95},
    "languages": {"languages": ["en"]},
    "max_repetition": {"max_repetition": 0.9},
    "contamination": {"contamination": {"data": "evaluation"}},
}
THINGS = (
    "apples",
    "pears",
    "plums",
    "figs",
    "dates",
    "limes",
    "nuts",
    "beans",
    "peas",
    "leeks",
    "roots",
    "seeds",
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def texts(rows: int) -> Iterator[tuple[str, str]]:
    """Questions and answers."""
    for number in range(rows):
        chance = random.Random(number - 1 if number % REPEATED_EVERY == 1 else number)
        one, other = chance.sample(THINGS, 2)
        a, b = chance.randrange(10**6), chance.randrange(10**6)
        words = " ".join(chance.sample(THINGS, 4))
        yield f"{a} {one} and {b} {other}: how many?", f"Of {words} there are {a + b} in all."


def build(folder: Path, rows: int) -> None:
    """The model, and the traces as a sealed artifact."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from potstill.core.records import RECORDS_FILE, Record, write_records
    from potstill.core.store import Store

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for pair in texts(2_000) for text in pair), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")

    def records() -> Iterator[Record]:
        for number, (question, answer) in enumerate(texts(rows)):
            chance = random.Random(number)
            yield Record(
                f"{chance.getrandbits(128):032x}",
                [{"role": "user", "content": question}],
                response=answer,
                finish_reason="stop",
                logprobs=[-chance.expovariate(1.0) for _ in range(16)],
                sampling={"logprob_temperature": 1.0},
            )

    store = Store(folder / "store")
    for name, count in (("traces", rows), ("evaluation", 1_000)):
        made = store.prepare("generate", name)
        write_records(made / RECORDS_FILE, (one for one, _ in zip(records(), range(count), strict=False)))
        store.seal(made, kind="generate", fingerprint=name, settings={}, seed=1, seconds=0.0)


def step_context(folder: Path, kind: str) -> Any:
    from potstill.core.events import Reporter
    from potstill.core.step import StepContext
    from potstill.core.store import Artifact, Store
    from potstill.models import TransformersModel

    model = TransformersModel(path=str(folder / "model"), device="cpu", dtype="float32")
    store = Store(folder / "store")
    return StepContext(
        name=kind,
        kind=kind,
        folder=store.prepare(kind, kind, discard=True),
        seed=1,
        cache_folder=store.root,
        reporter=Reporter("quiet"),
        resolve_models=lambda reference: {str(reference): model},
        resolve_data=lambda reference: [(Artifact.open(store.folder("generate", reference.target)), None)],
    )


def select(folder: Path, **settings: Any) -> None:
    from potstill.select import SelectSettings, run

    rule = {"student": "model", "keep": {"top": 0.5}, "filters": {"exact_duplicates": True}}
    given = {"do": "select", "data": "traces", **(settings or rule)}
    run(SelectSettings.model_validate(given), step_context(folder, "select"))


def cache(folder: Path) -> None:
    from potstill.cache import CacheSettings, run

    given = {"do": "cache", "data": "traces", "model": "model", "top_k": TOP_K, "batch_tokens": 4096}
    run(CacheSettings.model_validate(given), step_context(folder, "cache"))


def epoch(data: Any, teacher: Any) -> None:
    """All optimiser steps of one epoch, as the trainer gets them."""
    from potstill.train.loader import EpochPlan, MicroBatches, StepLoader

    rows = data.train
    plan = EpochPlan(rows.lengths, BATCH, seed=1)
    numbers: Any = range(len(rows))
    steps = StepLoader(numbers, batch_sampler=plan, collate_fn=MicroBatches(rows, teacher, 4096, False))
    assert sum(len(step.numbers) for step in steps) == len(rows)


def loader(folder: Path) -> None:
    from potstill.core.records import RECORDS_FILE, read_records
    from potstill.core.store import Store
    from potstill.data.chat import Renderer
    from potstill.models import TransformersModel, load_tokenizer
    from potstill.train.rows import rows_of_records

    renderer = Renderer(load_tokenizer(TransformersModel(path=str(folder / "model"))))
    records = read_records(Store(folder / "store").folder("generate", "traces") / RECORDS_FILE)
    epoch(rows_of_records(records, renderer, 256), None)


def cached_loader(folder: Path) -> None:
    from potstill.core.store import Store
    from potstill.logits.logit_cache import LogitCache
    from potstill.train.rows import read_caches

    found = LogitCache.open(Store(folder / "store").folder("cache", "cache"))
    epoch(
        *read_caches([(found, None)], vocabulary_size=VOCABULARY, temperature=1.0, top_k=None, max_length=256)
    )


WORK: dict[str, Callable[[Path], None]] = {
    "select": select,
    "cache": cache,
    "loader": loader,
    "cached_loader": cached_loader,
    **{
        f"filter_{name}": lambda folder, filters=filters: select(folder, rule="none", filters=filters)
        for name, filters in FILTERS.items()
    },
}


def measure(part: str, folder: Path) -> dict[str, float]:
    """Carry out one part in this process: its seconds and its peak of memory."""
    import torch

    from potstill.core.memory import PeakMemory

    torch.set_num_threads(1)
    torch.ones(256, 256) @ torch.ones(256, 256)
    memory, started, cpu = PeakMemory(), time.perf_counter(), time.process_time()
    WORK[part](folder)
    return {
        "cpu_s": round(time.process_time() - cpu, 2),
        "clock_s": round(time.perf_counter() - started, 2),
        "peak_mb": round(memory.read()["peak_memory_bytes"] / 1e6, 1),
    }


def in_own_process(part: str, folder: Path, rows: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", part, "--folder", str(folder), "--rows", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{part} of {rows:,} rows failed:\n{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{part} {rows:,}: {found}", file=sys.stderr, flush=True)
    return found


def measure_all(sizes: list[int], parts: list[str], folder: Path) -> dict[str, Any]:
    """Every part at every size."""
    runs: dict[str, dict[int, dict[str, float]]] = {part: {} for part in parts}
    for rows in sizes:
        here = folder / str(rows)
        if not here.exists():
            in_own_process("build", here, rows)
        for part in parts:
            if not part.startswith("filter_") or rows < max(sizes) or len(sizes) < 3:
                runs[part][rows] = in_own_process(part, here, rows)
    return {
        part: {"rows": [*found], **growth(found), "runs": [*found.values()]} for part, found in runs.items()
    }


def growth(runs: dict[int, dict[str, float]]) -> dict[str, float]:
    """What is judged: growth of memory over all sizes, and the exponent of time between the two largest."""
    sizes = sorted(runs)
    if len(sizes) < 2:
        return {}
    peak = {rows: runs[rows]["peak_mb"] for rows in sizes}
    before, last = sizes[-2:]
    exponent = math.log(runs[last]["cpu_s"] / runs[before]["cpu_s"]) / math.log(last / before)
    grown = peak[last] - peak[sizes[0]]
    return {
        "rss_growth_mb_10k_to_1m" if (sizes[0], last) == (SIZES[0], SIZES[-1]) else "rss_growth_mb": round(
            grown, 1
        ),
        "bytes_a_row": round(grown * 1e6 / (last - sizes[0]), 1),
        "time_exponent": round(exponent, 3),
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Peak of memory and seconds over rows, of each part."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for part, one in found.items():
        memory.plot(
            one["rows"], [run["peak_mb"] for run in one["runs"]], marker="o", label=part.replace("_", " ")
        )
        seconds.plot(one["rows"], [run["cpu_s"] for run in one["runs"]], marker="o")
    for axes, title in ((memory, "peak of resident memory, MB"), (seconds, "processor's seconds")):
        axes.set(xscale="log", xlabel="rows", title=title)
        axes.grid(alpha=0.3)
    memory.set_ylim(bottom=0)
    seconds.set_yscale("log")
    memory.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--plot", type=Path, help="write a chart of it as SVG")
    parser.add_argument("--rows", default=",".join(map(str, SIZES)), help="sizes to measure")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"of {', '.join(WORK)}; cached_loader needs cache"
    )
    parser.add_argument(
        "--folder", type=Path, help="where data stay between calls; by default a temporary one"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = sorted(map(int, options.rows.split(",")))
    if options.child == "build":
        options.folder.mkdir(parents=True)
        build(options.folder, sizes[0])
        print("{}")
        return
    if options.child:
        print(json.dumps(measure(options.child, options.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        parts = measure_all(sizes, options.parts.split(","), options.folder or Path(scratch))
    if options.plot:
        plot(parts, options.plot)
    found = {"benchmark": "scaling", **surroundings(), "parts": parts}
    show(found if options.json else parts, as_json=options.json)


if __name__ == "__main__":
    main()
