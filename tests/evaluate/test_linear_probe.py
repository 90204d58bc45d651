from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.evaluate import regression
from retrieve_or_generate.evaluate.adamw import fit_adamw, initial
from retrieve_or_generate.evaluate.linear_probe import ProbeResult, linear_probe, refit, select
from retrieve_or_generate.evaluate.newton import TOLERANCE
from retrieve_or_generate.evaluate.regression import _Path, fit_path
from retrieve_or_generate.seeds import generator_for
from retrieve_or_generate.settings import ProbeSettings

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


def over(grid: tuple[float, ...]) -> ProbeSettings:
    return ProbeSettings(inverse_regularisation=grid)


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
    result = linear_probe(x, y, val_x, val_y, test_x, 6, over(GRID[::-1]))
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
    assert select(x, y, x, y, 3, over((1000.0, 100.0, 10.0))).C == 10.0


def test_a_class_may_be_missing_from_validation() -> None:
    (x, y), (val_x, val_y) = blobs(90, 3), blobs(60, 3, seed=1)
    kept = val_y != 2
    result = linear_probe(x, y, val_x[kept], val_y[kept], val_x, 3, over(GRID))
    assert set(result.predictions[val_y == 2]) >= {2}


def test_a_class_without_training_images_is_never_predicted_until_validation_adds_some() -> None:
    (x, y), (val_x, val_y) = blobs(90, 3), blobs(60, 3, seed=1)
    kept = y != 1
    selection = select(x[kept], y[kept], val_x, val_y, 4, over(GRID))
    p = selection.probe.probabilities(val_x)
    assert (p[:, [1, 3]] == 0).all()
    np.testing.assert_allclose(p.sum(1), 1)
    assert np.isfinite(selection.val_loss)
    refitted = refit(selection, x[kept], y[kept], val_x, val_y, 4, over(GRID)).probabilities(val_x)
    assert (refitted[:, 1] > 0).all()
    assert (refitted[:, 3] == 0).all()


def test_features_may_be_fewer_than_their_width_constant_or_repeated() -> None:
    x, y = blobs(12, 3, dim=40)
    assert all(probe.gradient <= TOLERANCE for probe in fit_path(x, y, 3, GRID))
    flat = np.ones((10, 5), np.float32)
    probe = fit_path(flat, np.array([0] * 7 + [1] * 3), 2, [1.0])[0]
    np.testing.assert_allclose(probe.probabilities(flat)[0], [0.7, 0.3], atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_features_that_say_nothing_of_balanced_classes_give_every_class_its_share(seed: int) -> None:
    """A network that collapsed: the start is the optimum, and rounding alone may point along all intercepts."""
    x = np.random.default_rng(seed).normal(size=(1, 24)).repeat(6, axis=0).astype(np.float32)
    (probe,) = fit_path(x / np.linalg.norm(x, axis=1, keepdims=True), np.arange(6) % 3, 3, (1.0,))
    np.testing.assert_allclose(probe.probabilities(x), 1 / 3, atol=1e-6)


def test_refuses_what_cannot_be_fitted() -> None:
    x, y = blobs(30, 3)
    spoiled = x.copy()
    spoiled[4, 2] = np.nan
    for words, call in (
        ("training features: 1 of 30 rows are not finite", lambda: fit_path(spoiled, y, 3, GRID)),
        ("validation features: 1 of 30", lambda: select(x, y, spoiled, y, 3, over(GRID))),
        ("features to classify: 1 of 30", lambda: fit_path(x, y, 3, [1.0])[0].probabilities(spoiled)),
        (r"shape \(0, 24\)", lambda: fit_path(x[:0], y[:0], 3, GRID)),
        ("all training labels of the probe are 0", lambda: fit_path(x, np.zeros(30, int), 3, GRID)),
        ("0 to 2, but there are 2 classes", lambda: fit_path(x, y, 2, GRID)),
        (r"shape \(29,\) beside 30", lambda: fit_path(x, y[:-1], 3, GRID)),
        ("C must be positive", lambda: fit_path(x, y, 3, (0.0, 1.0))),
        ("C must be positive", lambda: fit_path(x, y, 3, ())),
        ("features are 23 wide", lambda: select(x, y, x[:, 1:], y, 3, over(GRID))),
    ):
        with pytest.raises(UsageError, match=words):
            call()


PAPER = ProbeSettings(recipe="paper", epochs=80, batch_size=8)


def by_hand(
    x: np.ndarray, y: np.ndarray, first: tuple[np.ndarray, np.ndarray], orders: list[np.ndarray]
) -> list[np.ndarray]:
    """The paper's probe in float64, each formula written out: softmax gradient, clipping, decoupled decay, warm-up, cosine."""
    theta = np.concatenate([first[0], first[1][None]]).astype(np.float64)
    rows, m, v, update = np.concatenate([x, np.ones((len(x), 1))], 1).astype(np.float64), 0.0, 0.0, 0
    updates = len(orders) * math.ceil(len(x) / 8)
    for order in orders:
        for start in range(0, len(x), 8):
            batch = order[start : start + 8]
            logits = rows[batch] @ theta
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            gradient = rows[batch].T @ (p - np.eye(theta.shape[1])[y[batch]]) / len(batch)
            gradient *= min(1, 1 / (np.sqrt((gradient**2).sum()) + 1e-6))
            rising = (update + 1) / 200
            falling = 0.5 + 0.5 * np.cos(np.pi * (update - 200) / (updates - 200))
            rate = 1e-2 * (rising if update < 200 else falling)
            update += 1
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
            step = (m / (1 - 0.9**update)) / (np.sqrt(v / (1 - 0.95**update)) + 1e-8)
            theta = theta - rate * 0.1 * theta - rate * step
    return [theta[:-1], theta[-1]]


@pytest.mark.parametrize("length", [1, 4], ids=["unit features", "features whose gradients are clipped"])
def test_the_papers_recipe_is_adamw_as_its_formulas_say(length: int) -> None:
    x, y = blobs(20, 3, dim=6)
    x = length * x
    fitted = fit_adamw(x, y, 3, PAPER, seed=4)
    first = tuple(part.numpy() for part in initial(6, 3, 4))
    rng = generator_for("linear probe", "data order", 4)
    weights, intercepts = by_hand(x, y, first, [rng.permutation(20) for _ in range(80)])
    assert np.abs(fitted.weights - first[0]).max() > 0.1
    np.testing.assert_allclose(fitted.weights, weights, atol=1e-4)
    np.testing.assert_allclose(fitted.intercepts, intercepts, atol=1e-4)


def test_first_weights_are_within_one_over_the_root_of_the_width() -> None:
    for part in initial(64, 50, 1):
        assert 0.11 < part.abs().max() <= 0.125
        assert abs(part.mean()) < 0.03


def test_the_papers_recipe_has_nothing_to_choose_and_is_refitted_on_both() -> None:
    (x, y), (val_x, val_y), (test_x, test_y) = (
        blobs(n, 4, seed, noise=0.7) for seed, n in ((0, 80), (1, 60), (2, 200))
    )
    short = PAPER.model_copy(update={"epochs": 20, "learning_rate": 0.3, "batch_size": 32})
    result, again, other = (linear_probe(x, y, val_x, val_y, test_x, 4, short, seed) for seed in (1, 1, 2))
    assert result.C is None
    assert (result.probabilities == again.probabilities).all()
    assert (result.probabilities != other.probabilities).any()
    both = fit_adamw(np.concatenate([x, val_x]), np.concatenate([y, val_y]), 4, short, 1)
    np.testing.assert_array_equal(result.probe.weights, both.weights)
    assert result.selection.val_accuracy == (result.selection.probe.probabilities(val_x).argmax(1) == val_y).mean()
    assert result.accuracy(test_y) > 0.6
    with pytest.raises(UsageError, match="all training labels of the probe are 0"):
        fit_adamw(x, np.zeros(80, int), 4, short, 1)


def test_accuracy_and_mean_over_classes_are_told_apart() -> None:
    result = ProbeResult(select(*blobs(30, 2), *blobs(30, 2, 1), 2, over((1.0,))), None, np.eye(2)[[0, 0, 0, 0]])  # type: ignore[arg-type]
    labels = np.array([0, 0, 0, 1])
    assert (result.accuracy(labels), result.mean_per_class_accuracy(labels)) == (0.75, 0.5)


def test_tensors_are_worked_on_where_they_lie() -> None:
    (x, y), (val_x, val_y) = blobs(90, 3), blobs(60, 3, seed=1)
    arrays = linear_probe(x, y, val_x, val_y, val_x, 3, over(GRID))
    a, b = torch.from_numpy(x), torch.from_numpy(val_x)
    tensors = linear_probe(a, y, b, val_y, b, 3, over(GRID))
    np.testing.assert_array_equal(arrays.probabilities, tensors.probabilities)


def test_all_values_of_c_at_once_give_what_they_give_in_turn() -> None:
    """What a GPU does, on a CPU; also in two groups, the second of which starts from the first."""
    x, y = blobs(120, 4)
    values = (0.01, 0.1, 1.0, 10.0, 100.0)
    in_turn = fit_path(x, y, 4, values)
    for at_once in (5, 3):
        path = _Path(torch.tensor(x).double(), y, 4)
        path.at_once = at_once
        for one, other in zip(in_turn, path.solve(values), strict=True):
            assert other.gradient <= TOLERANCE
            assert other.objective == pytest.approx(one.objective, rel=1e-5)
            np.testing.assert_allclose(other.probabilities(x), one.probabilities(x), atol=1e-3)


def test_products_in_bfloat16_only_choose_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same optimum, to the same tolerance, as without."""
    monkeypatch.setattr(regression, "native", lambda *_: torch.bfloat16)
    x, y = blobs(150, 5)
    wide = fit_path(x, y, 5, GRID)
    monkeypatch.setattr(regression, "_NARROW_FROM", 0)
    for one, other in zip(wide, fit_path(x, y, 5, GRID), strict=True):
        assert (one.weights != other.weights).any()
        assert other.gradient <= TOLERANCE
        assert other.objective == pytest.approx(one.objective, rel=1e-5)


def test_what_float32_cannot_finish_float64_does() -> None:
    """Classes far apart and hardly regularised: an objective so small that in float32 it is mostly rounding."""
    x, y = blobs(60, 3, noise=0.05)
    for probe in fit_path(x, y, 3, (1e6, 1e8)):
        assert probe.gradient <= TOLERANCE
        assert objective(x, y, probe.weights, probe.intercepts, probe.C) == pytest.approx(probe.objective, rel=1e-9)
