"""What the libraries beneath potstill are told before they are imported, and the cores that they may use."""

import logging
import os
import warnings

__all__ = ["prepare_libraries", "quiet_bitsandbytes", "usable_cores"]


def prepare_libraries() -> None:
    """Set what a process needs of its libraries, unless the user has; before torch is imported."""
    # Must be set before torch allocates: huge pages for its tensors on Linux.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # PEFT asks every model for a property that transformers has renamed; its user can do nothing about it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    quiet_bitsandbytes()


def quiet_bitsandbytes() -> None:
    """Keep bitsandbytes from asking for a package as it is imported, by PEFT for any adapter too.

    The package has a kernel that is not used here: its layers have no gradient.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def usable_cores() -> int:
    """The processor's cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
