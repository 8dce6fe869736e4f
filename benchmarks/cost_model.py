"""What the cost model foretells of this machine's generate, cache and train steps over what they take.

    python benchmarks/cost_model.py [--json] [--hidden 256,512] [--blocks 8]

Random Llamas of 512 ids write, score and learn texts of their own through the three steps. Each step is
carried out with some rows and with four times as many, and the difference is what counts: neither starting
nor loading is foretold. Seconds are the processor's, of one core, to which a machine that is not calm does
less than to the clock; so are those by which products and memory are measured. 1 is right.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import scaling
from findings import argument_parser, show, surroundings

PROMPT_ROWS, ROWS, WRITTEN_TOKENS, REPEATED = (8, 32), (48, 192), 48, 8


def machine() -> Any:
    """This machine as a device, its products and memory measured by the processor's time."""
    import torch

    from potstill.models import supports_bf16
    from potstill.scale import local
    from potstill.train import throughput

    throughput.time.perf_counter = local.time.perf_counter = time.process_time
    device = torch.device("cpu")
    return local.this_machine(device, torch.bfloat16 if supports_bf16(device) else torch.float32)


def build(folder: Path, hidden: int, blocks: int) -> int:
    """A model and traces; returns how many weights are multiplied with each token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from potstill.core.records import RECORDS_FILE, read_records, write_records
    from potstill.core.store import Store

    folder.mkdir()
    scaling.build(folder, max(ROWS))
    config = LlamaConfig.from_pretrained(folder / "model")
    config.update(
        {
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": blocks,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 64,
            "head_dim": 64,
            "max_position_embeddings": 2048,
        }
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    store = Store(folder / "store")
    records = [*read_records(store.folder("generate", "traces") / RECORDS_FILE)]
    for one in records:
        one.response = " ".join([one.response or ""] * REPEATED)
        one.logprobs = None
    for count in (*PROMPT_ROWS, *ROWS):
        made = store.prepare("generate", f"rows{count}")
        write_records(made / RECORDS_FILE, records[:count])
        store.seal(made, kind="generate", fingerprint=f"rows{count}", settings={}, seed=1, seconds=0.0)
    return sum(one.numel() for name, one in model.named_parameters() if one.ndim == 2 and "embed" not in name)


def carry_out(kind: str, folder: Path, rows: int) -> tuple[float, int]:
    """The processor's seconds of a step, and its tokens."""
    from potstill.models import TransformersModel
    from potstill.pipeline.kinds import settings_class, step_function

    given: dict[str, dict[str, Any]] = {
        "generate": {"model": "model", "max_new_tokens": WRITTEN_TOKENS},
        "cache": {"model": "model", "top_k": 8, "batch_tokens": 2048},
        "train": {"student": "model", "batch": 16, "epochs": 1, "schedule": "constant"},
    }
    settings = settings_class(kind).model_validate({"do": kind, "data": f"rows{rows}", **given[kind]})
    context = scaling.step_context(folder, kind)
    model = TransformersModel(path=str(folder / "model"), device="cpu")  # in the type that suits the machine
    context.resolve_models = lambda reference: {str(reference): model}
    with tempfile.TemporaryDirectory(dir=folder) as cache:  # of answers, which are not to be found again
        context.cache_folder = Path(cache)
        started = time.process_time()
        result = step_function(kind)(settings, context)
    return time.process_time() - started, result.tokens


def foretold(kind: str, here: Any, parameters: int, tokens: int, rows: int) -> float:
    """Seconds by the cost model."""
    from potstill.scale.roofline import generation, scoring_seconds, train_flops

    device = here.device
    if kind == "cache":
        return scoring_seconds(device, parameters, tokens, tokens / rows)
    if kind == "train":
        return train_flops(parameters, tokens, tokens / rows) / (device.train_share * device.flops_per_s)
    written = generation(
        here, parameters, prompt_tokens=32, response_tokens=WRITTEN_TOKENS, rows=min(rows, 16)
    )
    assert written is not None
    return tokens / written.tokens_per_s


def measure(folder: Path, hidden: int, blocks: int, here: Any) -> dict[str, float]:
    parameters = build(folder, hidden, blocks)
    found: dict[str, float] = {"parameters": parameters}
    for kind, sizes in (("generate", PROMPT_ROWS), ("cache", ROWS), ("train", ROWS)):
        carry_out(kind, folder, sizes[0])  # imports, and what is compiled
        (few_s, few), (many_s, many) = (carry_out(kind, folder, rows) for rows in sizes)
        seconds, tokens, rows = many_s - few_s, many - few, sizes[1] - sizes[0]
        found[f"{kind}_tokens_per_s"] = round(tokens / seconds, 1)
        found[f"{kind}_predicted_over_measured"] = round(
            foretold(kind, here, parameters, tokens, rows) / seconds, 3
        )
        print(kind, hidden, found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--hidden", default="256,512", help="hidden sizes, multiples of 64")
    parser.add_argument("--blocks", type=int, default=8)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    here = machine()
    found: dict[str, Any] = {
        "benchmark": "cost_model",
        **surroundings(),
        "gflops_per_s": round(here.device.flops_per_s / 1e9, 1),
        "gbytes_per_s": round(here.device.bytes_per_s / 1e9, 1),
        "weight_bytes": here.device.weight_bytes,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for hidden in map(int, options.hidden.split(",")):
            found[f"hidden{hidden}"] = measure(Path(scratch) / str(hidden), hidden, options.blocks, here)
    show(found, as_json=options.json)


if __name__ == "__main__":
    main()
