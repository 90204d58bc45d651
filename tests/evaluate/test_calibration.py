from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.evaluate.calibration import ece


def reference(p: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Equation 3 of Guo et al. bin by bin, interval I_m = ((m − 1)/M, m/M]."""
    confidence, right, total = p.max(1), p.argmax(1) == labels, 0.0
    for m in range(1, bins + 1):
        inside = (confidence > (m - 1) / bins) & (confidence <= m / bins)
        if inside.any():
            total += inside.sum() / len(p) * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_worked_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    labels = np.array([0, 1, 0, 1])
    # bins of a tenth: (0.8, 0.9] holds two, one right; (0.5, 0.6] one, right; (0.6, 0.7] one, right
    assert ece(p, labels, bins=10) == pytest.approx((2 * abs(0.5 - 0.9) + abs(1 - 0.6) + abs(1 - 0.7)) / 4)


@given(st.integers(0, 10_000), st.integers(1, 20))
def test_agrees_with_the_definition_in_any_order(seed: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    p, labels = rng.dirichlet([0.5] * 4, 50), rng.integers(0, 4, 50)
    assert ece(p, labels, bins) == pytest.approx(reference(p, labels, bins), abs=1e-12)
    order = rng.permutation(50)
    assert ece(p[order], labels[order], bins) == pytest.approx(ece(p, labels, bins), abs=1e-12)


def test_a_bin_is_closed_above() -> None:
    p = np.array([[0.5, 0.5], [0.6, 0.4]])  # in (0, 0.5] and (0.5, 1]
    assert ece(p, np.array([0, 1]), bins=2) == pytest.approx((0.5 + 0.6) / 2)


def test_certain_and_right_is_zero_certain_and_wrong_is_one() -> None:
    certain = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert ece(certain, np.array([0, 1])) == 0.0
    assert ece(certain, np.array([1, 0])) == 1.0


@pytest.mark.parametrize(
    ("p", "words"),
    [(np.zeros((0, 2)), "no images"), (np.array([[np.nan, 0.5]]), "NaN"), (np.array([[3.0, -2.0]]), "not logits")],
)
def test_refuses_what_is_no_probability(p: np.ndarray, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ece(p, np.zeros(len(p), int))
