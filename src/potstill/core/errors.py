"""Errors written for the person at the terminal: what, where, what was expected, how to mend it."""

__all__ = [
    "BudgetError",
    "DataError",
    "EngineError",
    "Interrupted",
    "ModelError",
    "PotstillError",
    "RecipeError",
    "StoreError",
    "TrainingError",
]


class PotstillError(ValueError):
    """A mistake the user can mend. `str()` gives the whole message, one aspect a line."""

    def __init__(
        self, what: str, *, where: str | None = None, expected: str | None = None, mend: str | None = None
    ) -> None:
        self.what, self.where, self.expected, self.mend = what, where, expected, mend
        lines = [what if where is None else f"{where}: {what}"]
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if mend is not None:
            lines.append(f"  to mend:  {mend}")
        super().__init__("\n".join(lines))


class RecipeError(PotstillError):
    """The recipe or a command's arguments are wrong."""


class DataError(PotstillError):
    """Input rows are missing, malformed or unusable."""


class ModelError(PotstillError):
    """A model or tokenizer cannot be found, loaded or combined."""


class EngineError(PotstillError):
    """A teacher's engine or server refused, failed or is out of reach."""


class BudgetError(PotstillError):
    """What a step may buy is used up; everything bought is kept."""


class StoreError(PotstillError):
    """The artifact store or a run folder cannot be read or written."""


class TrainingError(PotstillError):
    """Training cannot go on without silently learning something wrong."""


class Interrupted(Exception):
    """The user asked the run to stop (Ctrl-C or SIGTERM); everything made so far is kept."""
