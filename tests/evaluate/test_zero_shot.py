from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.evaluate.zero_shot import accuracy, mean_per_class_accuracy, probabilities, zero_shot_logits

LOGITS = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 4.0, 1.0], [0.0, 0.0, 1.0]], np.float32)
LABELS = np.array([0, 1, 1, 2])


def test_worked_by_hand() -> None:
    assert accuracy(LOGITS, LABELS) == 3 / 4
    assert mean_per_class_accuracy(LOGITS, LABELS) == pytest.approx((1 + 1 / 2 + 1) / 3)


@given(st.integers(0, 10_000))
def test_agrees_with_scikit_learn_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, logits = np.concatenate([np.arange(4), rng.integers(0, 4, 30)]), rng.normal(size=(34, 4))
    predicted = logits.argmax(1)
    assert accuracy(logits, labels) == pytest.approx(accuracy_score(labels, predicted))
    assert mean_per_class_accuracy(logits, labels) == pytest.approx(balanced_accuracy_score(labels, predicted))
    order = rng.permutation(34)
    assert accuracy(logits[order], labels[order]) == accuracy(logits, labels)


def test_ties_go_to_the_smaller_class_and_absent_classes_do_not_count() -> None:
    tied = np.zeros((2, 3))
    assert accuracy(tied, np.array([0, 1])) == 0.5
    assert mean_per_class_accuracy(tied, np.array([0, 0])) == 1.0


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (np.zeros((0, 3)), np.zeros(0, int), "no images"),
        (np.array([[0.0, np.nan]]), np.array([0]), "1 of 1 images have NaN"),
        (np.zeros((2, 3)), np.array([0, 3]), "scores for 3 classes"),
        (np.zeros((2, 3)), np.array([0, -1]), "labels from -1"),
        (np.zeros((2, 3)), np.array([0]), r"shape \(2, 3\)"),
    ],
)
def test_refuses_what_cannot_be_measured(logits: np.ndarray, labels: np.ndarray, words: str) -> None:
    for metric in (accuracy, mean_per_class_accuracy):
        with pytest.raises(UsageError, match=words):
            metric(logits, labels)


def test_logits_are_scaled_cosines_and_probabilities_sum_to_one() -> None:
    features, weights = np.eye(3, dtype=np.float32)[:2], np.eye(3, dtype=np.float32)
    logits = zero_shot_logits(features, weights, 50.0)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, 50 * np.eye(3)[:2])
    p = probabilities(np.array([[1000.0, 1000.0], [0.0, np.log(3)]]))
    np.testing.assert_allclose(p, [[0.5, 0.5], [0.25, 0.75]])
