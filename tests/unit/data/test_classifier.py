"""Texts get labels; the fit is held to the optimum that a slow float64 descent finds."""

import numpy as np
import pytest

from potstill.core.errors import DataError
from potstill.data.classifier import embed, fit_classifier, fit_logistic

SUMS = [f"What is {n} plus {n + 3}, and what is their product?" for n in range(40)]
RIVERS = [f"Which river flows past the {n}th town in the valley?" for n in range(40)]
TEXTS, LABELS = [*SUMS, *RIVERS], ["sums"] * 40 + ["rivers"] * 40


def test_the_fit_is_the_optimum_of_the_regularised_cross_entropy() -> None:
    chance = np.random.default_rng(0)
    features = chance.normal(size=(60, 5))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    classes = chance.integers(0, 3, size=60)
    decay = 0.05
    weights = fit_logistic(features.astype(np.float32), classes, 3, decay=decay, iterations=2000)
    slow_weights = np.zeros((5, 3))
    for _ in range(20_000):
        powers = np.exp(features @ slow_weights)
        errors = powers / powers.sum(1, keepdims=True) - np.eye(3)[classes]
        slow_weights -= 0.5 * (features.T @ errors / 60 + decay * slow_weights)
    assert weights == pytest.approx(slow_weights, abs=1e-4)


def test_new_texts_get_the_label_of_texts_like_them() -> None:
    classifier = fit_classifier(TEXTS, LABELS)
    found = classifier.predict(["What is the product of 8 and 9?", "Which river flows north?"])
    assert [label for label, _ in found] == ["sums", "rivers"]
    assert all(0.5 < confidence <= 1 for _, confidence in found)
    assert classifier.trial is not None
    assert (classifier.trial.rows, classifier.trial.accuracy) == (16, 1.0)


def test_a_text_like_no_other_is_as_likely_to_be_any_label() -> None:
    [(_, confidence)] = fit_classifier(TEXTS, LABELS).predict(["xyzzy"])
    assert confidence < 0.6


def test_texts_that_say_nothing_of_their_label_get_little_confidence() -> None:
    classifier = fit_classifier(SUMS, ["odd" if n % 2 else "even" for n in range(40)])
    assert classifier.trial is not None
    assert classifier.trial.confidence < 0.75


def test_the_same_rows_give_the_same_classifier() -> None:
    one, other = (fit_classifier(TEXTS, LABELS).predict(["Is it a river?"]) for _ in range(2))
    assert one == other


def test_few_rows_are_all_learnt_from() -> None:
    classifier = fit_classifier(["two and two", "the long river"], ["sums", "rivers"])
    assert classifier.trial is None
    assert classifier.predict(["a river"])[0][0] == "rivers"


def test_one_label_alone_is_refused() -> None:
    with pytest.raises(DataError, match="1 labels"):
        fit_classifier(SUMS, ["sums"] * 40)


def test_cyrillic_and_broken_text_have_features() -> None:
    found = embed(["Какая река длиннее?", "\ud800", ""])
    assert found[0].sum() > 0
    assert found[2].sum() == 0
