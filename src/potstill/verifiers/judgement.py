"""What a verifier found out about one answer."""

from dataclasses import dataclass, field

__all__ = ["Judgement"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """Verdicts and scores (0..1) by name; `note` says why an answer is wrong or could not be judged."""

    verdicts: dict[str, bool] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    note: str | None = None
