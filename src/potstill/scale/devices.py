"""What GPUs can do, as far as a plan needs it: multiplications, memory, and what lies between several."""

import re
from dataclasses import dataclass

from potstill.core.errors import RecipeError

__all__ = ["DEVICES", "Cluster", "Device", "cluster_of"]

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """A GPU, or another place where models run.

    `flops_per_s` are those of dense bf16 products, `bytes_per_s` those of its memory, `link_bytes_per_s` what
    it sends to the others of its node, `network_bytes_per_s` to other nodes. `train_share` and `read_share`
    are what training gets of the first and writing token by token of the second; docs/scaling.md says whence.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    network_bytes_per_s: float = 50 * _GIGA  # 400 Gbit/s a GPU, as in common nodes of eight
    train_share: float = 0.35
    read_share: float = 0.6
    weight_bytes: float = 2  # of a weight that is not trained


# Peaks by NVIDIA's data sheets. Shares other than the defaults are where published figures differ from them.
DEVICES = {
    one.name: one
    for one in (
        Device("A100-40GB", 312 * _TERA, 1.555 * _TERA, 40 * _GIGA, 300 * _GIGA, 25 * _GIGA, 0.5),
        Device("A100", 312 * _TERA, 2.039 * _TERA, 80 * _GIGA, 300 * _GIGA, 25 * _GIGA, 0.5),
        Device("L40S", 362 * _TERA, 0.864 * _TERA, 48 * _GIGA, 32 * _GIGA, 25 * _GIGA),
        Device("H100", 989 * _TERA, 3.35 * _TERA, 80 * _GIGA, 450 * _GIGA),
        Device("H200", 989 * _TERA, 4.8 * _TERA, 141 * _GIGA, 450 * _GIGA),
        Device("B200", 2250 * _TERA, 8.0 * _TERA, 180 * _GIGA, 900 * _GIGA),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Nodes with equal GPUs, and what an hour of one costs where that is known."""

    device: Device
    gpus_per_node: int
    nodes: int = 1
    usd_per_gpu_hour: float | None = None

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        nodes = f"{self.nodes:,} nodes of " if self.nodes > 1 else ""
        return f"{nodes}{self.gpus_per_node} x {self.device.name}"


def cluster_of(
    gpus: str, nodes: int = 1, usd_per_gpu_hour: float | None = None, *, where: str = "--gpus"
) -> Cluster:
    """A cluster from a node's GPUs, as in "8xH100", and how many nodes there are.

    Raises RecipeError for another form, and for a GPU of which nothing is known.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[xX×]\s*)?([A-Za-z0-9-]+)", gpus.strip())
    if found is None or found[1] == "0" or nodes < 1:
        raise RecipeError(
            f"{gpus!r} on {nodes} nodes is no cluster",
            where=where,
            expected="how many GPUs of which kind a node has, such as 8xH100, and at least one node",
        )
    names = {name.lower(): name for name in DEVICES}
    if (name := names.get(found[2].lower())) is None:
        raise RecipeError(
            f"nothing is known of a GPU called {found[2]!r}",
            where=where,
            expected=f"one of {', '.join(DEVICES)}",
            mend="name the one that is most like it; it is a product's peak and its memory that count",
        )
    return Cluster(DEVICES[name], int(found[1] or 1), nodes, usd_per_gpu_hour)
