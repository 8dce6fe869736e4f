"""A small text classifier: hashed n-grams as the embedding, logistic regression on top; nothing is loaded.

Shapes: N texts, D features, C labels.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from potstill.core.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

__all__ = ["TextClassifier", "Trial", "embed", "fit_classifier", "fit_logistic"]

FEATURES = 4096
MOST_ROWS = 8_000  # a matrix of 131 MB, of which there are a few
_CHARACTERS = 4  # of a character n-gram
_DECAY, _ITERATIONS = 1e-5, 100
_TESTED = 5  # one of so many labelled rows is for testing
_WORD = re.compile(r"\w+")
_TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(13))  # never surer than the fit itself


class Trial(NamedTuple):
    """The share of right labels and the mean confidence on `rows` labelled rows that were not learnt from."""

    rows: int
    accuracy: float
    confidence: float


@dataclass(frozen=True)
class TextClassifier:
    """Labels with weights DC of features D by importance; no trial where rows were too few."""

    labels: list[str]
    weights_DC: Any
    importance_D: Any
    temperature: float
    trial: Trial | None

    def predict(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """The likeliest label of each text, and its probability."""
        features_ND = _weighted(embed(texts), self.importance_D)
        shares_NC = _softmax(features_ND @ self.weights_DC / self.temperature)
        best_N = shares_NC.argmax(1)
        return [
            (self.labels[best], float(shares[best])) for best, shares in zip(best_N, shares_NC, strict=True)
        ]


def fit_classifier(texts: Sequence[str], labels: Sequence[str]) -> TextClassifier:
    """Learn labels from texts; deterministic.

    Every fifth row is first left out to measure accuracy and to fit the temperature that confidence is
    divided by (Guo et al. 2017), then all rows are learnt from. DataError for fewer than two labels.
    """
    import numpy as np

    names = sorted(set(labels))
    if len(names) < 2:
        raise DataError(
            f"labelled rows have {len(names)} labels",
            expected="rows of two labels at least",
            mend="give rows of every label that is to be predicted",
        )
    counts_ND = embed(texts)
    classes_N = np.array([names.index(label) for label in labels])
    # In turn within each label, so that the tested rows hold the labels in proportion.
    turn: Counter[str] = Counter()
    tested_N = np.zeros(len(texts), dtype=bool)
    for number, label in enumerate(labels):
        turn[label] += 1
        tested_N[number] = turn[label] % _TESTED == 0
    temperature, trial = 1.0, None
    if tested_N.any():
        importance_D = _importance(counts_ND[~tested_N])
        weights_DC = fit_logistic(
            _weighted(counts_ND[~tested_N], importance_D), classes_N[~tested_N], len(names)
        )
        logits_NC = _weighted(counts_ND[tested_N], importance_D) @ weights_DC
        right_N = classes_N[tested_N]
        losses = [
            -float(np.log(_softmax(logits_NC / one)[range(len(right_N)), right_N] + 1e-12).mean())
            for one in _TEMPERATURES
        ]
        temperature = _TEMPERATURES[losses.index(min(losses))]
        shares_NC = _softmax(logits_NC / temperature)
        trial = Trial(
            len(right_N), float((shares_NC.argmax(1) == right_N).mean()), float(shares_NC.max(1).mean())
        )
    importance_D = _importance(counts_ND)
    weights_DC = fit_logistic(_weighted(counts_ND, importance_D), classes_N, len(names))
    return TextClassifier(names, weights_DC, importance_D, temperature, trial)


def embed(texts: Sequence[str]) -> "Matrix":
    """Counts ND of hashed words and character n-grams, dampened by a logarithm."""
    import numpy as np

    counts_ND = np.zeros((len(texts), FEATURES), dtype=np.float32)
    for number, text in enumerate(texts):
        words = _WORD.findall(text.casefold())
        joined = " ".join(["", *words, ""])
        parts = [joined[at : at + _CHARACTERS] for at in range(len(joined) - _CHARACTERS + 1)]
        for part, count in Counter([*words, *parts]).items():
            counts_ND[number, zlib.crc32(part.encode("utf-8", "surrogatepass")) % FEATURES] += count
    return np.log1p(counts_ND)


def _importance(counts_ND: "Matrix") -> "Matrix":
    """How rare each feature is among the texts: the smoothed logarithm of the inverse document frequency."""
    import numpy as np

    documents_D = (counts_ND > 0).sum(0)
    found: Matrix = (np.log((1 + len(counts_ND)) / (1 + documents_D)) + 1).astype(np.float32)
    return found


def _weighted(counts_ND: "Matrix", importance_D: "Matrix") -> "Matrix":
    """Features of unit length."""
    import numpy as np

    weighted_ND = counts_ND * importance_D
    found: Matrix = weighted_ND / np.maximum(np.linalg.norm(weighted_ND, axis=1, keepdims=True), 1e-12)
    return found


def _softmax(logits_NC: "Matrix") -> "Matrix":
    import numpy as np

    powers_NC = np.exp(logits_NC - logits_NC.max(1, keepdims=True))
    found: Matrix = powers_NC / powers_NC.sum(1, keepdims=True)
    return found


def fit_logistic(
    features_ND: "Matrix",
    classes_N: Any,
    classes: int,
    *,
    decay: float = _DECAY,
    iterations: int = _ITERATIONS,
) -> "Matrix":
    """Weights DC that minimise the mean cross-entropy plus decay / 2 |W|^2.

    Without biases, so that a text of which nothing is known may be any label. Accelerated gradient
    descent (Nesterov 1983): rows of unit length bound the curvature by 1/2, so that a step of 1 never
    overshoots.
    """
    import numpy as np

    rows = len(features_ND)
    wanted_NC = np.eye(classes, dtype=np.float32)[classes_N]
    weights_DC = ahead_DC = np.zeros((features_ND.shape[1], classes), dtype=np.float32)
    for number in range(1, iterations + 1):
        errors_NC = (_softmax(features_ND @ ahead_DC) - wanted_NC) / rows
        stepped_DC = ahead_DC - (features_ND.T @ errors_NC + decay * ahead_DC)
        ahead_DC = stepped_DC + (number - 1) / (number + 2) * (stepped_DC - weights_DC)
        weights_DC = stepped_DC
    return weights_DC
