"""Beyond one process: train steps run by torchrun."""

from potstill.scale.job import Outcome
from potstill.scale.settings import Torchrun, check_processes
from potstill.scale.torchrun import HandedOver, finished, train

__all__ = ["HandedOver", "Outcome", "Torchrun", "check_processes", "finished", "train"]
