"""potstill distils a teacher model's knowledge into a smaller student, in named runs."""

from importlib import import_module, metadata
from typing import Any

# Where each public name lives; imported when it is first asked for, so that `import potstill` stays cheap.
_HOMES: dict[str, str] = {
    "DistillationArguments": "potstill.train.arguments",
    "DistillationTrainer": "potstill.train.trainer",
}

__all__ = ["DistillationArguments", "DistillationTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("potstill")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
