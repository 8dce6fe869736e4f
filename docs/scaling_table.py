"""Write the table of docs/scaling.md: what distillations of some sizes take on some nodes, by the cost model.

python docs/scaling_table.py
"""

from pathlib import Path

from potstill.cache import CacheSettings
from potstill.core.events import format_seconds
from potstill.pipeline.estimates import TRACE_TOKEN_BYTES, cache_bytes_a_token
from potstill.scale import cluster_of
from potstill.scale.roofline import generation, scoring_seconds, training

TARGET = Path(__file__).with_name("scaling.md")
START, END = "<!-- written by docs/scaling_table.py -->\n", "<!-- end of what is written -->\n"
GPUS, NODES = "8xH200", (1, 16)
PROMPT_TOKENS, RESPONSE_TOKENS, TOP_K, BATCH = 256, 768, 64, 256
PAIRS = ((7e9, 0.5e9), (32e9, 1.5e9), (70e9, 8e9), (405e9, 70e9))
CACHE = CacheSettings.model_validate({"do": "cache", "model": "./model", "data": "./data", "top_k": TOP_K})
TEACHER_TOKENS = (1e6, 1e7, 1e8, 1e9)


def table() -> str:
    """The table in Markdown."""
    head = ["teacher tokens", "teacher, student", "traces", f"cache, top {TOP_K}"]
    head += [f"{work}, {_nodes(nodes)}" for work in ("write", "cache", "train an epoch") for nodes in NODES]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for tokens in TEACHER_TOKENS:
        for teacher, student in PAIRS:
            lines.append("| " + " | ".join(_row(tokens, teacher, student)) + " |")
    return "\n".join(lines) + "\n"


def _row(tokens: float, teacher: float, student: float) -> list[str]:
    rows, length = round(tokens / RESPONSE_TOKENS), PROMPT_TOKENS + RESPONSE_TOKENS
    clusters = [cluster_of(GPUS, nodes) for nodes in NODES]
    written = [
        generation(one, teacher, prompt_tokens=PROMPT_TOKENS, response_tokens=RESPONSE_TOKENS, rows=rows)
        for one in clusters
    ]
    trained = [training(one, student, batch=BATCH, length=length) for one in clusters]
    return [
        f"{tokens:,.0f}",
        f"{teacher / 1e9:g}B, {student / 1e9:g}B",
        _bytes(tokens * TRACE_TOKEN_BYTES),
        _bytes(tokens * cache_bytes_a_token(CACHE)),
        *("-" if one is None else format_seconds(tokens / one.tokens_per_s) for one in written),
        *(
            format_seconds(scoring_seconds(one.device, teacher, rows * length, length) / one.gpus)
            for one in clusters
        ),
        *("-" if one is None else format_seconds(rows * length / one.tokens_per_s) for one in trained),
    ]


def _nodes(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def page() -> str:
    """The whole page with the table as it is now."""
    text = TARGET.read_text(encoding="utf-8")
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8", newline="\n")
