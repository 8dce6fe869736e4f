"""What it costs that copies of a teacher answer through Ray, against as many plain processes.

    python benchmarks/ray_overhead.py [--json] [--prompts 200] [--rounds 3] [--new-tokens 96]

SmolLM2-135M by llama.cpp, one thread a copy, answers sums greedily. `processes`: two runs at once without
Ray, each with half of the prompts, whose rates are added up. `replicas`: one run of all prompts, with two
copies on Ray. A run is timed from its first request to its last answer, models loaded, so that start-up is
left out. Rounds alternate, and `replicas_over_processes` is the median of their ratios.
`whole_s` is the time of the whole runs, Ray's start with it.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from findings import argument_parser, show, surroundings

from potstill.core.events import read_events

COPIES = 2


def start(folder: Path, seeds: Sequence[int], options: argparse.Namespace, *overrides: str) -> Any:
    """A run over as many data sets as there are seeds, in a store of its own."""
    folder.mkdir()
    size = options.prompts // COPIES
    recipe = {
        "name": "overhead",
        "models": {
            "big": {"engine": "llama_cpp", "model": "smollm2-135m-instruct", "slots": 4, "threads": 1}
        },
        "steps": {
            "traces": {
                "do": "generate",
                "model": "big",
                "data": [{"task": "chain_sum", "size": size, "seed": seed} for seed in seeds],
                "temperature": 0.0,
                "max_new_tokens": options.new_tokens,
            }
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-c", "from potstill.cli import main; main()", "run", "recipe.yaml", "--quiet"]
    return subprocess.Popen([*command, "--store", "store", "--output", "run", *overrides], cwd=folder)


def measure(
    folder: Path, parts: Sequence[Sequence[int]], options: argparse.Namespace, *overrides: str
) -> Any:
    """Tokens a second of runs side by side, from each one's first request to its last answer."""
    began = time.monotonic()
    folder.mkdir()
    folders = [folder / str(number) for number in range(len(parts))]
    running = [start(one, seeds, options, *overrides) for one, seeds in zip(folders, parts, strict=True)]
    if any(one.wait() for one in running):
        sys.exit(f"a run failed: see {folder}")
    whole_s = time.monotonic() - began
    tokens, rate = 0, 0.0
    for one in folders:
        events = {event["event"]: event for event in read_events(one / "run" / "events.jsonl")}
        answered = events["answers"]["bought"]["response_tokens"]
        tokens += answered
        rate += answered / (events["answers"]["time"] - events["requests"]["time"])
    return {"tokens": tokens, "tokens_per_s": round(rate, 2), "whole_s": round(whole_s, 1)}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    before = surroundings("ray")
    on_ray = ("scale.engine=ray", f"scale.replicas={COPIES}")
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.rounds):
            arms = {
                "processes": lambda at: measure(at, [[one] for one in range(COPIES)], options),
                "replicas": lambda at: measure(at, [[*range(COPIES)]], options, *on_ray),
            }
            order = list(arms) if number % 2 == 0 else [*reversed(arms)]
            rounds.append({arm: arms[arm](Path(name) / f"{arm}-{number}") for arm in order})
    ratios = [one["replicas"]["tokens_per_s"] / one["processes"]["tokens_per_s"] for one in rounds]
    found: dict[str, Any] = {
        "benchmark": "ray_overhead",
        **before,
        "prompts": options.prompts,
        "new_tokens": options.new_tokens,
        "replicas_over_processes": round(statistics.median(ratios), 4),
        "ratios": [round(one, 4) for one in ratios],
        "rounds": rounds,
    }
    show(found, as_json=options.json)


if __name__ == "__main__":
    main()
