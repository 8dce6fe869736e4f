"""Experiment trackers that a training reports to, by transformers' own callbacks."""

import importlib.util
from collections.abc import Sequence

from potstill.core.errors import TrainingError

__all__ = ["check_trackers"]

# Any of these packages serves.
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


def check_trackers(names: Sequence[str]) -> None:
    """Raise TrainingError for a tracker whose package is missing, before anything is trained.

    Of others that transformers knows, it says so itself.
    """
    for name, packages in _PACKAGES.items():
        if name in names and not any(map(importlib.util.find_spec, packages)):
            raise TrainingError(
                f"report_to: {name} is not installed",
                expected=f"one of {', '.join(_PACKAGES)}, each of which is an extra",
                mend='`pip install "potstill[trackers]"`, or leave it out of report_to',
            )
