from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.evaluate.linear_probe import TOLERANCE, fit_path, linear_probe, refit, select

GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)
Data = tuple[np.ndarray, np.ndarray]


def blobs(n: int, classes: int, seed: int = 0, dim: int = 24, noise: float = 1.0) -> Data:
    """Unit features around class means in a few strong directions, as CLIP's are; overlapping at noise 1."""
    decay = np.arange(1, dim + 1) ** -0.7
    means = np.random.default_rng(99).normal(size=(classes, dim)) * decay
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    x = means[y] + noise * rng.normal(size=(n, dim)) * decay + 2 * np.eye(1, dim)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), y


def scikit_learn(x: np.ndarray, y: np.ndarray, C: float) -> LogisticRegression:
    return LogisticRegression(C=C, tol=1e-6, max_iter=10_000).fit(x.astype(np.float64), y)


def objective(x: np.ndarray, y: np.ndarray, weights: np.ndarray, intercepts: np.ndarray, C: float) -> float:
    """Mean cross-entropy + ‖W‖² / (2 C n), written without any of the solver's parts."""
    logits = x.astype(np.float64) @ weights + intercepts
    loss = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - logits[np.arange(len(y)), y]
    return float(loss.mean() + (weights**2).sum() / (2 * C * len(y)))


def test_finds_scikit_learns_optimum_or_a_better_one() -> None:
    x, y = blobs(150, 5)
    for probe in fit_path(x, y, 5, (*GRID, 10_000.0)):
        theirs = scikit_learn(x, y, probe.C)
        reached = objective(x, y, probe.weights, probe.intercepts, probe.C)
        assert reached == pytest.approx(probe.objective, rel=1e-9)
        best = objective(x, y, theirs.coef_.T, theirs.intercept_, probe.C)
        assert -1e-3 * best < reached - best < 1e-5 * best
        assert (probe.probabilities(x).argmax(1) == theirs.predict(x)).all()


def test_gradient_by_finite_differences_is_within_the_stated_tolerance() -> None:
    x, y = blobs(60, 3, dim=4)
    for probe in fit_path(x, y, 3, GRID):
        assert probe.gradient <= TOLERANCE
        assert abs(probe.intercepts.sum()) < 1e-9
        for row, column in ((0, 0), (2, 1), (3, 2)):
            step = np.zeros_like(probe.weights)
            step[row, column] = 1e-5
            up = objective(x, y, probe.weights + step, probe.intercepts, probe.C)
            down = objective(x, y, probe.weights - step, probe.intercepts, probe.C)
            assert (
                abs(up - down) / 2e-5 < 5 * TOLERANCE
            )  # the stated gradient is in turned axes: no entry exceeds √d times it


def test_chooses_the_c_that_scikit_learn_chooses_and_refits_on_train_and_val() -> None:
    (x, y), (val_x, val_y), (test_x, test_y) = (
        blobs(n, 6, seed, noise=2.0) for seed, n in ((0, 120), (1, 200), (2, 200))
    )
    scores = [scikit_learn(x, y, C).score(val_x.astype(np.float64), val_y) for C in GRID]
    result = linear_probe(x, y, val_x, val_y, test_x, 6, GRID[::-1])
    best = int(np.argmax(scores))
    assert 0 < best < len(GRID) - 1
    assert GRID.index(result.C) == best
    assert result.selection.val_accuracy == pytest.approx(max(scores))
    theirs = scikit_learn(np.concatenate([x, val_x]), np.concatenate([y, val_y]), result.C)
    np.testing.assert_allclose(result.probabilities, theirs.predict_proba(test_x.astype(np.float64)), atol=1e-3)
    assert (result.predictions == test_y).mean() > 0.5


def test_equal_inputs_give_equal_bits_and_row_order_hardly_matters() -> None:
    x, y = blobs(100, 4)
    first, second = (fit_path(x, y, 4, GRID) for _ in range(2))
    assert all(
        (a.weights == b.weights).all() and a.objective == b.objective for a, b in zip(first, second, strict=True)
    )
    order = np.random.default_rng(0).permutation(100)
    for a, b in zip(first, fit_path(x[order], y[order], 4, GRID), strict=True):
        assert a.objective == pytest.approx(b.objective, rel=1e-6)


def test_of_equally_good_values_of_c_the_strongest_regularisation_is_taken() -> None:
    x, y = blobs(60, 3, noise=0.05)
    assert select(x, y, x, y, 3, (1000.0, 100.0, 10.0)).C == 10.0


def test_a_class_may_be_missing_from_validation() -> None:
    (x, y), (val_x, val_y) = blobs(90, 3), blobs(60, 3, seed=1)
    kept = val_y != 2
    result = linear_probe(x, y, val_x[kept], val_y[kept], val_x, 3, GRID)
    assert set(result.predictions[val_y == 2]) >= {2}


def test_a_class_without_training_images_is_never_predicted_until_validation_adds_some() -> None:
    (x, y), (val_x, val_y) = blobs(90, 3), blobs(60, 3, seed=1)
    kept = y != 1
    selection = select(x[kept], y[kept], val_x, val_y, 4, GRID)
    p = selection.probe.probabilities(val_x)
    assert (p[:, [1, 3]] == 0).all()
    np.testing.assert_allclose(p.sum(1), 1)
    assert np.isfinite(selection.val_loss)
    refitted = refit(selection, x[kept], y[kept], val_x, val_y, 4).probabilities(val_x)
    assert (refitted[:, 1] > 0).all()
    assert (refitted[:, 3] == 0).all()


def test_features_may_be_fewer_than_their_width_constant_or_repeated() -> None:
    x, y = blobs(12, 3, dim=40)
    assert all(probe.gradient <= TOLERANCE for probe in fit_path(x, y, 3, GRID))
    flat = np.ones((10, 5), np.float32)
    probe = fit_path(flat, np.array([0] * 7 + [1] * 3), 2, [1.0])[0]
    np.testing.assert_allclose(probe.probabilities(flat)[0], [0.7, 0.3], atol=1e-5)


def test_refuses_what_cannot_be_fitted() -> None:
    x, y = blobs(30, 3)
    spoiled = x.copy()
    spoiled[4, 2] = np.nan
    for words, call in (
        ("training features: 1 of 30 rows are not finite", lambda: fit_path(spoiled, y, 3, GRID)),
        ("validation features: 1 of 30", lambda: select(x, y, spoiled, y, 3, GRID)),
        ("features to classify: 1 of 30", lambda: fit_path(x, y, 3, [1.0])[0].probabilities(spoiled)),
        (r"shape \(0, 24\)", lambda: fit_path(x[:0], y[:0], 3, GRID)),
        ("hold 1 class", lambda: fit_path(x, np.zeros(30, int), 3, GRID)),
        ("0 to 2, but there are 2 classes", lambda: fit_path(x, y, 2, GRID)),
        (r"shape \(29,\) beside 30", lambda: fit_path(x, y[:-1], 3, GRID)),
        ("C must be positive", lambda: fit_path(x, y, 3, (0.0, 1.0))),
        ("C must be positive", lambda: fit_path(x, y, 3, ())),
        ("features are 23 wide", lambda: select(x, y, x[:, 1:], y, 3, GRID)),
    ):
        with pytest.raises(UsageError, match=words):
            call()
