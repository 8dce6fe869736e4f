"""Time and memory of the logit distillation loss, hidden states to gradients, against its matrix products.

One training loss: alpha CE and KL from a teacher's top-k, forward and backward, gradients for the hidden
states and the head. The limit is the three matrix products alone. All contestants take turns in one process;
each one's peak memory is measured in a process of its own.

Shapes: N tokens, H hidden size, V vocabulary, K the teacher's kept ids, C tokens of one chunk.
"""

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from findings import argument_parser, show

from potstill.core.memory import keep_freed_memory

K = 64
ALPHA, TEMPERATURE = 0.5, 2.0
MB = 1e6


class Sizes(NamedTuple):
    """The head of a student that suits a device, and how many tokens go through it."""

    hidden_size: int
    vocabulary: int
    tokens: int
    many_tokens: int


SIZES = {"cpu": Sizes(576, 49_152, 1024, 8192), "cuda": Sizes(2048, 151_936, 4096, 32_768)}


@dataclass
class Case:
    """Inputs of one loss; the teacher both as its top-k and, for who needs it, as logits."""

    hidden_NH: Any
    weight_VH: Any
    targets_N: Any
    weights_N: Any
    teacher: Any
    teacher_logits_NV: Any = None


def make_case(tokens: int, dtype: Any, device: str, *, dense: bool) -> Case:
    """Random inputs whose logits spread like a small model's."""
    import torch

    from potstill.losses.types import Sparse

    width, vocabulary, *_ = SIZES[device]
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    spread = 0.1 * (576 / width) ** 0.5
    weight_VH = (
        (spread * torch.randn(vocabulary, width, generator=generator)).to(device, dtype).requires_grad_()
    )
    targets_N = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    teacher_logits_NV = None
    if dense:
        teacher_logits_NV = (3 * torch.randn(tokens, vocabulary, generator=generator)).to(device)
    stride = vocabulary // K
    ids_NK = torch.randint(stride, (tokens, K), generator=generator) + stride * torch.arange(K)
    shares_NK = torch.randn(tokens, K + 1, generator=generator).mul(2).log_softmax(-1).to(device)
    teacher = Sparse(
        ids_NK.to(device), shares_NK[:, :K].contiguous(), shares_NK[:, K].contiguous(), TEMPERATURE
    )
    weights_N = torch.full((tokens,), 1 / tokens, device=device)
    return Case(hidden_NH, weight_VH, targets_N, weights_N, teacher, teacher_logits_NV)


def limit(case: Case) -> Callable[[], None]:
    """The three matrix products, into memory that is there already."""
    import torch

    hidden_NH, weight_VH = case.hidden_NH.detach(), case.weight_VH.detach()
    logits_NV = hidden_NH @ weight_VH.T
    of_hidden_NH, of_weight_VH = torch.empty_like(hidden_NH), torch.empty_like(weight_VH)

    def run() -> None:
        torch.mm(hidden_NH, weight_VH.T, out=logits_NV)
        torch.mm(logits_NV, weight_VH, out=of_hidden_NH)
        torch.mm(logits_NV.T, hidden_NH, out=of_weight_VH)

    return run


@dataclass
class Head:
    """A matrix, as `weighted_loss` takes it."""

    weight_VH: Any

    @property
    def parameters(self) -> tuple[Any, ...]:
        """The matrix alone."""
        return (self.weight_VH,)

    def __call__(self, hidden: Any, /) -> Any:
        """Logits."""
        import torch

        return torch.nn.functional.linear(hidden, self.weight_VH)


def potstill(case: Case) -> Callable[[], None]:
    """The loss as potstill trains with it."""
    from potstill.losses.blend import blend
    from potstill.losses.head import weighted_loss

    def run() -> None:
        quantities = blend(case.targets_N, case.teacher, alpha=ALPHA, temperature=TEMPERATURE)
        weighted_loss(case.hidden_NH, Head(case.weight_VH), quantities, case.weights_N)[0].backward()

    return run


def _top_k_loss(logits_NV: Any, case: Case, rows: slice) -> Any:
    """The same loss from whole log-probabilities and a gather, in fp32."""
    import torch
    from torch.nn import functional

    teacher = case.teacher.rows(rows)
    logits_NV = logits_NV.float()
    cross_entropy_N = functional.cross_entropy(logits_NV, case.targets_N[rows], reduction="none")
    log_q_NK = functional.log_softmax(logits_NV / TEMPERATURE, -1).gather(-1, teacher.ids_NK)
    kept_N = (teacher.log_probs_NK.exp() * (teacher.log_probs_NK - log_q_NK)).sum(-1)
    tail_N = teacher.log_tail_N.exp()
    rest_N = torch.log1p(-log_q_NK.exp().sum(-1))
    kl_N = kept_N + tail_N * (teacher.log_tail_N - rest_N)
    return (((1 - ALPHA) * cross_entropy_N + ALPHA * TEMPERATURE**2 * kl_N) * case.weights_N[rows]).sum()


def gather(case: Case) -> Callable[[], None]:
    """Whole logits, log-softmax, gather, autograd."""

    def run() -> None:
        rows = slice(0, len(case.targets_N))
        _top_k_loss(case.hidden_NH @ case.weight_VH.T, case, rows).backward()

    return run


def dense(case: Case) -> Callable[[], None]:
    """Whole logits and KLDivLoss against a whole teacher, in fp32, autograd."""
    from torch.nn import functional

    def run() -> None:
        logits_NV = (case.hidden_NH @ case.weight_VH.T).float()
        cross_entropy = functional.cross_entropy(logits_NV, case.targets_N)
        kl = functional.kl_div(
            functional.log_softmax(logits_NV / TEMPERATURE, -1),
            functional.softmax(case.teacher_logits_NV / TEMPERATURE, -1),
            reduction="batchmean",
        )
        ((1 - ALPHA) * cross_entropy + ALPHA * TEMPERATURE**2 * kl).backward()

    return run


def chunks(chunk_tokens: int) -> Callable[[Case], Callable[[], None]]:
    """One level of chunks, each with its own logits, autograd and sums."""

    def contestant(case: Case) -> Callable[[], None]:
        import torch

        def run() -> None:
            of_hidden_NH = torch.zeros_like(case.hidden_NH)
            of_weight_VH = torch.zeros_like(case.weight_VH, dtype=torch.float32)
            for start in range(0, len(case.targets_N), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                hidden_CH = case.hidden_NH[rows].detach().requires_grad_()
                loss = _top_k_loss(hidden_CH @ case.weight_VH.T, case, rows)
                of_hidden_CH, of_chunk_VH = torch.autograd.grad(loss, [hidden_CH, case.weight_VH])
                of_hidden_NH[rows] = of_hidden_CH
                of_weight_VH += of_chunk_VH
            case.hidden_NH.grad = of_hidden_NH
            case.weight_VH.grad = of_weight_VH.to(case.weight_VH.dtype)

        return run

    return contestant


CONTESTANTS: dict[str, Callable[[Case], Callable[[], None]]] = {
    "limit": limit,
    "potstill": potstill,
    "dense": dense,
    "gather": gather,
    "chunks_128": chunks(128),
    "chunks_512": chunks(512),
}


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def times_ms(dtype: Any, device: str, rounds: int) -> dict[str, float]:
    """The median time of each contestant; they take turns, so that what disturbs one disturbs all."""
    case = make_case(SIZES[device].tokens, dtype, device, dense=True)
    runs = {name: contestant(case) for name, contestant in CONTESTANTS.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):  # the first round warms up
        for name, run in runs.items():
            case.hidden_NH.grad = case.weight_VH.grad = None
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if number:
                found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def extra_mb(name: str, tokens: int, dtype: Any, device: str) -> float:
    """Peak memory of a contestant beyond its inputs and gradients (the head's in fp32), in this process."""
    CONTESTANTS[name](make_case(64, dtype, device, dense=name == "dense"))()  # loads kernels
    case = make_case(tokens, dtype, device, dense=name == "dense")
    run = CONTESTANTS[name](case)
    gradients = case.hidden_NH.nbytes + 4 * case.weight_VH.numel()
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before - gradients) / MB
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_bytes("VmRSS")
    run()
    return (_status_bytes("VmHWM") - before - gradients) / MB


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {key}: peak memory is measured on Linux")


def _extra_mb_elsewhere(name: str, tokens: int, options: argparse.Namespace) -> float:
    own = [sys.executable, __file__, "--memory-of", name, "--tokens", str(tokens)]
    settings = ["--dtype", options.dtype, "--device", options.device, "--threads", str(options.threads)]
    done = subprocess.run([*own, *settings], check=True, capture_output=True, text=True)
    return round(float(done.stdout), 1)


def _hardware(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    known = torch.cpu.get_capabilities()
    units = [unit for unit in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if known.get(unit)]
    return f"{known.get('num_physical_cores')} cores of {known.get('cpu_name')} ({', '.join(units)})"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _default_dtype(device: str) -> str:
    import torch

    known = torch.cpu.get_capabilities()
    fast = device == "cuda" or known.get("avx512_bf16") or known.get("amx_bf16")
    return "bf16" if fast else "fp32"


def measure(options: argparse.Namespace, dtype: Any) -> dict[str, Any]:
    """Every figure of one run."""
    import torch

    medians = times_ms(dtype, options.device, options.rounds)
    sizes, limit_ms = SIZES[options.device], medians.pop("limit")
    found: dict[str, Any] = {
        "benchmark": "kd_loss",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": _hardware(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "tokens": sizes.tokens,
        "hidden_size": sizes.hidden_size,
        "vocabulary": sizes.vocabulary,
        "top_k": K,
        "rounds": options.rounds,
        "matmul_limit_ms": round(limit_ms, 2),
    }
    if options.device == "cuda":
        found["triton"] = _version("triton")
    figures: dict[str, dict[str, float]] = {}
    for name, median in medians.items():
        figures[name] = {"time_over_matmul_limit": round(median / limit_ms, 3)}
        if not options.no_memory:
            figures[name]["extra_mb"] = _extra_mb_elsewhere(name, sizes.tokens, options)
    if not options.no_memory:
        many = sizes.many_tokens
        figures["potstill"][f"extra_mb_{many}"] = _extra_mb_elsewhere("potstill", many, options)
    return found | figures.pop("potstill") | {"peers": figures}


def main() -> None:
    """Measure and print, as lines or as one JSON object."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="by default bf16 where there are units for it"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own number")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--memory-of", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.memory_of:
        keep_freed_memory()  # before torch's first tensor; where peaks are measured, it must go back
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    options.dtype = options.dtype or _default_dtype(options.device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    if options.memory_of:
        print(extra_mb(options.memory_of, options.tokens, dtype, options.device))
        return
    found = measure(options, dtype)
    show(found, as_json=options.json)


if __name__ == "__main__":
    main()
