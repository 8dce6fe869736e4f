"""How long pruning SmolLM2-135M by width and depth takes, measured as its user sees it.

64 sums, each worked out line by line by a solver, are the calibration traces. The `init` step is run from the
command line in a process of its own, once a case: `sizes` keeps 18 of 30 blocks at stated widths, `search`
tries 8 combinations of depth and width within 60.2M parameters. Its seconds are those of the whole command:
starting, loading, measuring, cutting, saving, loading what was saved, and the student's quality beside the
model's. The model is fetched and converted beforehand. Beside the clock stands the processor's time, to which
a machine that is not calm does less.

    python benchmarks/prune.py --json
    python benchmarks/prune.py --json --case sizes
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from findings import argument_parser, show, surroundings

MODEL = "smollm2-135m-instruct"
TRACES = 64
SUMS = {"min_terms": 4, "max_terms": 8, "min_digits": 2, "max_digits": 3}
CASES: dict[str, dict[str, Any]] = {
    "sizes": {"layers": 18, "hidden_size": 432, "intermediate_size": 1152, "attention_heads": 9},
    "search": {"target_params": "60.2M", "candidates": 8},
}


def potstill(folder: Path, step: str) -> None:
    """Make one step of the recipe in a folder."""
    call = "from potstill.cli import main; main()"
    place = ["--only", step, "--store", str(folder / "store"), "--output", str(folder / "run"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", call, "run", str(folder / "recipe.yaml"), *place],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{step} failed:\n{done.stderr[-4000:]}")


def children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def prepare(folder: Path, cases: list[str]) -> None:
    """The recipe and its traces, and the model in the form that the step loads."""
    from potstill.models import find_source

    print(find_source(MODEL).folder, file=sys.stderr)
    shared = {"do": "init", "model": "base", "data": "traces", "samples": TRACES, "device": "cpu"}
    recipe = {
        "name": "prune",
        "models": {
            "base": {"path": MODEL},
            "solver": {"engine": "solver", "function": "potstill.teachers.solvers:chain_sum"},
        },
        "steps": {
            "traces": {
                "do": "generate",
                "model": "solver",
                "data": {"task": "chain_sum", "size": TRACES, "parameters": SUMS},
            },
            **{case: {**shared, **CASES[case]} for case in cases},
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    potstill(folder, "traces")


def measure(case: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, [case])
        started, cpu_started = time.perf_counter(), children_cpu_seconds()
        potstill(folder, case)
        seconds, cpu_seconds = time.perf_counter() - started, children_cpu_seconds() - cpu_started
        manifest = json.loads((folder / "run" / case / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["counts"]["calibration_rows"] == TRACES
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "step_seconds": manifest["seconds"],
        "peak_mb": manifest["peak_memory_bytes"] / 1e6,
        "supervised_tokens": manifest["metrics"]["quality"]["tokens"],
        "parameters": manifest["counts"]["parameters"],
        "parameters_before": manifest["metrics"]["parameters_before"],
    }


def compare(cases: list[str], rounds: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, found in runs.items():
            found.append(measure(case))
            print(case, found[-1], file=sys.stderr, flush=True)
    keys = next(iter(runs.values()))[0]
    return {
        **{
            key: {
                case: round(statistics.median(one[key] for one in found), 1) for case, found in runs.items()
            }
            for key in keys
        },
        "calibration_traces": TRACES,
        "rounds": rounds,
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count(),
        **surroundings("potstill", "torch", "transformers"),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--case", choices=CASES, help="one of them alone")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    result = compare([options.case] if options.case else [*CASES], options.rounds)
    show(result, as_json=options.json)


if __name__ == "__main__":
    main()
