"""This machine as a device of the cost model, from what its own products and memory reach."""

import functools
import time
from typing import TYPE_CHECKING

from potstill.scale.devices import Cluster, Device

if TYPE_CHECKING:
    import torch

__all__ = ["read_bytes_per_s", "this_machine"]

_READ_BYTES, _REPEATS = 2**27, 4
_CPU_TRAIN_SHARE = 0.5  # by benchmarks/cost_model.py


def this_machine(device: "torch.device", dtype: "torch.dtype") -> Cluster:
    """One device with a weight's bytes in `dtype`; measuring takes a second or two, once a process."""
    import psutil
    import torch

    from potstill.train.throughput import peak_flops_per_s

    on_gpu = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[1] if on_gpu else psutil.virtual_memory().total
    return Cluster(
        Device(
            str(device),
            peak_flops_per_s(device, dtype),
            read_bytes_per_s(device, dtype),
            float(memory),
            float("inf"),
            train_share=Device.train_share if on_gpu else _CPU_TRAIN_SHARE,
            weight_bytes=dtype.itemsize,
        ),
        1,
    )


@functools.cache
def read_bytes_per_s(device: "torch.device", dtype: "torch.dtype") -> float:
    """Bytes a second of a product with one vector, for which a matrix larger than caches is read; cached."""
    import torch

    rows = 4096
    weights = torch.ones(rows, _READ_BYTES // dtype.itemsize // rows, device=device, dtype=dtype)
    vector = torch.ones(weights.shape[1], device=device, dtype=dtype)
    best_s = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        (weights @ vector)[0].item()  # waits for it on a GPU
        best_s = min(best_s, time.perf_counter() - started)
    return _READ_BYTES / best_s
