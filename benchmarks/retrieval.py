"""Time, memory and recall of an index of passages, and of searches in it.

Passages are made of invented words that are as unevenly frequent as words are (Zipf), 30 to 90 a passage. A
question is so many words drawn from one passage, with words from anywhere beside them; recall@k is the share
of questions whose passage is among the first k. Index and searches run in processes of their own, so that
each has its own peak memory. Seconds are the processor's and the clock's.

    python benchmarks/retrieval.py --json
    python benchmarks/retrieval.py --json --method dense --passages 2000 --questions 100
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 50_000
WORDS = (30, 90)
OWN_WORDS, OTHER_WORDS = 5, 5
RANKS = (1, 10, 100)


class Drawing:
    """Draws words by Zipf's law; the same passage for a number whenever it is asked for."""

    def __init__(self) -> None:
        draw = random.Random(1)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
        self.words = ["".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(VOCABULARY)]
        self.weights: list[float] = []
        total = 0.0
        for rank in range(1, VOCABULARY + 1):
            total += 1 / rank
            self.weights.append(total)

    def some(self, draw: random.Random, count: int) -> list[str]:
        """Words, frequent ones more often."""
        return draw.choices(self.words, cum_weights=self.weights, k=count)

    def passage(self, number: int) -> str:
        """The passage of a number."""
        draw = random.Random(f"passage {number}")
        return " ".join(self.some(draw, draw.randint(*WORDS)))

    def question(self, number: int) -> str:
        """A question that the passage of a number answers."""
        draw = random.Random(f"question {number}")
        own = draw.choices(self.passage(number).split(), k=OWN_WORDS)
        return " ".join([*own, *self.some(draw, OTHER_WORDS)])


def settings(folder: Path, method: str) -> tuple[Any, Any, Any]:
    from potstill.core.events import Reporter
    from potstill.core.step import StepContext
    from potstill.models import TransformersModel, load_tokenizer
    from potstill.retrieval import RetrieveSettings

    student = TransformersModel(path="smollm2-135m-instruct")
    found = RetrieveSettings.model_validate(
        {
            "do": "retrieve",
            "data": "unused",
            "student": "student",
            "corpus": {"path": str(folder / "corpus.jsonl")},
            "method": method,
            # Every passage is its own article, and is not cut.
            "passage_tokens": 1000,
        }
    )
    context = StepContext(
        name="benchmark",
        kind="retrieve",
        folder=folder,
        seed=1,
        cache_folder=folder / "store",
        reporter=Reporter("quiet"),
        resolve_models=lambda _: {"student": student},
        resolve_data=lambda _: [],
    )
    return found, context, load_tokenizer(student)


def index(folder: Path, method: str) -> dict[str, float]:
    """Cut, count and write the index."""
    from potstill.retrieval.index import open_retriever

    arguments = settings(folder, method)
    clock, processor = time.monotonic(), time.process_time()
    retriever = open_retriever(*arguments)
    return {
        "passages": len(retriever.passages),
        "seconds": time.monotonic() - clock,
        "processor_seconds": time.process_time() - processor,
        "megabytes_on_disk": sum(one.stat().st_size for one in folder.glob("store/artifacts/*/**/*")) / 1e6,
    }


def search(folder: Path, method: str, passages: int, questions: int) -> dict[str, float]:
    """Ask the index that `index` left."""
    from potstill.retrieval.index import open_retriever

    arguments, drawing = settings(folder, method), Drawing()
    numbers = random.Random(2).sample(range(passages), questions)
    clock, processor = time.monotonic(), time.process_time()
    retriever = open_retriever(*arguments)
    opened, opened_processor = time.monotonic() - clock, time.process_time() - processor
    texts = [drawing.question(number) for number in numbers]
    clock, processor = time.monotonic(), time.process_time()
    found = [[one for one, _ in retriever.search(text, max(RANKS))] for text in texts]
    return {
        "seconds_to_open": opened,
        "processor_seconds_to_open": opened_processor,
        "milliseconds_a_question": 1000 * (time.monotonic() - clock) / questions,
        "processor_milliseconds_a_question": 1000 * (time.process_time() - processor) / questions,
        **{
            f"recall@{rank}": sum(number in one[:rank] for number, one in zip(numbers, found, strict=True))
            / questions
            for rank in RANKS
        },
    }


def in_a_process(stage: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
    for name in ("method", "passages", "questions"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def write_corpus(path: Path, passages: int) -> None:
    drawing = Drawing()

    def lines() -> Iterator[str]:
        for number in range(passages):
            yield json.dumps({"title": f"passage {number}", "text": drawing.passage(number)}) + "\n"

    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--method", choices=["bm25", "dense", "hybrid"], default="bm25")
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--stage", choices=["index", "search"])
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        if arguments.stage == "index":
            found = index(arguments.folder, arguments.method)
        else:
            found = search(arguments.folder, arguments.method, arguments.passages, arguments.questions)
        found["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", arguments.passages)
        results: dict[str, Any] = {
            "benchmark": "retrieval",
            "method": arguments.method,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "index": in_a_process("index", folder, arguments),
            "search": in_a_process("search", folder, arguments),
        }
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for stage in ("index", "search"):
        print(
            stage,
            *(f"{key.replace('_', ' ')}: {value:,.4g}" for key, value in results[stage].items()),
            sep="\n  ",
        )


if __name__ == "__main__":
    main()
