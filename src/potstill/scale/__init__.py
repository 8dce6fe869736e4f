"""Beyond one process: training by torchrun, teachers asked on Ray, and what a cluster would take."""

from potstill.scale.devices import Cluster, cluster_of
from potstill.scale.job import Outcome, ReplicatedSettings
from potstill.scale.on_ray import ask_replicas, has_replicas
from potstill.scale.settings import Ray, Scale, Torchrun, check_processes, check_ray
from potstill.scale.torchrun import HandedOver, Training, finished, hand_over

__all__ = [
    "Cluster",
    "HandedOver",
    "Outcome",
    "Ray",
    "ReplicatedSettings",
    "Scale",
    "Torchrun",
    "Training",
    "ask_replicas",
    "check_processes",
    "check_ray",
    "cluster_of",
    "finished",
    "hand_over",
    "has_replicas",
]
