"""Linear probe: multinomial logistic regression on frozen features, solved to a stated gradient, C chosen on validation.

The problem is that of scikit-learn's `LogisticRegression(C)`: minimise (1/n) Σ −log p(yᵢ|xᵢ) + ‖W‖² / (2 C n), intercepts free.
It is convex, and strictly so but for one number that may be added to all intercepts; those of sum zero are returned.

It is solved by Newton's method with truncated conjugate gradients. In the principal axes of the features the Hessian is nearly
diagonal, mean p(1 − p) of a class times the variance along an axis (after Böhning 1992), which makes the preconditioner. Steps are
taken in float32 until the gradient is small and finished in float64. C runs from strong to weak regularisation, and each
solution starts from the line through the last two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.evaluate.zero_shot import accuracy

TOLERANCE = 1e-6  # of the largest entry of the gradient of the objective above; scikit-learn's default `tol` is 1e-4
_LAST_GAIN = 1e-5  # of the last Newton step, as a share of the objective: gradients are small where regularisation is
_ROUGH = 10.0  # times both, where float32 hands over to float64
_NEWTON_STEPS, _CONJUGATE_STEPS = 200, 2000  # far above what either needs; they end a loop that makes no headway


@dataclass(frozen=True)
class Probe:
    """A fitted probe: `weights` (d, k) and `intercepts` (k,) float64; a class without a training image has intercept −∞."""

    weights: np.ndarray
    intercepts: np.ndarray
    C: float
    objective: float
    gradient: float

    def among(self, n_classes: int, present: np.ndarray) -> Probe:
        """The same probe where its classes are the ids `present` out of `n_classes`."""
        weights, intercepts = np.zeros((len(self.weights), n_classes)), np.full(n_classes, -np.inf)
        weights[:, present], intercepts[present] = self.weights, self.intercepts
        return replace(self, weights=weights, intercepts=intercepts)

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """(m, d) features to (m, k) float64 class probabilities."""
        _check_features(x, "features to classify")
        if x.shape[1] != len(self.weights):
            raise UsageError(f"features are {x.shape[1]} wide, but the probe was fitted on {len(self.weights)}")
        logits = torch.tensor(x).double() @ torch.tensor(self.weights) + torch.tensor(self.intercepts)
        return torch.softmax(logits, 1).numpy()


@dataclass(frozen=True)
class Selection:
    """The C that classifies validation features best, the probe fitted with it on the training features, and how well it did."""

    probe: Probe
    val_accuracy: float
    val_loss: float

    @property
    def C(self) -> float:
        return self.probe.C

    @property
    def score(self) -> tuple[float, float]:
        """Orders selections on different features: more right, else less loss."""
        return self.val_accuracy, -self.val_loss


@dataclass(frozen=True)
class ProbeResult:
    """`probabilities` (m, k) float64 and `predictions` (m,) of the test features, by `probe`, refitted on train and val."""

    selection: Selection
    probe: Probe
    probabilities: np.ndarray

    @property
    def C(self) -> float:
        return self.probe.C

    @property
    def predictions(self) -> np.ndarray:
        return self.probabilities.argmax(1)


def linear_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    test_x: np.ndarray,
    n_classes: int,
    grid: Sequence[float],
) -> ProbeResult:
    """Choose C of `grid` on validation, refit on train and val together, classify `test_x`. Features (·, d) float32, labels (·,).

    Raises:
        UsageError: features that are empty, not finite or of different widths; labels out of range; fewer than two classes.
    """
    selection = select(train_x, train_y, val_x, val_y, n_classes, grid)
    probe = refit(selection, train_x, train_y, val_x, val_y, n_classes)
    return ProbeResult(selection, probe, probe.probabilities(test_x))


def select(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    n_classes: int,
    grid: Sequence[float],
) -> Selection:
    """The probe of highest validation accuracy; of equals the one with the strongest regularisation (smallest C)."""
    _check(val_x, val_y, n_classes, "validation")
    selections = [_on_validation(probe, val_x, val_y) for probe in fit_path(train_x, train_y, n_classes, grid)]
    return max(selections, key=lambda selection: (selection.val_accuracy, -selection.C))


def refit(
    selection: Selection, train_x: np.ndarray, train_y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray, n_classes: int
) -> Probe:
    """The selected C on train and validation features together."""
    x, y = np.concatenate([train_x, val_x]), np.concatenate([train_y, val_y])
    return fit_path(x, y, n_classes, [selection.C])[0]


def fit_path(x: np.ndarray, y: np.ndarray, n_classes: int, grid: Iterable[float]) -> list[Probe]:
    """One probe for each C of `grid`, in ascending order of C. The largest entry of every gradient is at most `TOLERANCE`."""
    _check(x, y, n_classes, "training")
    values = sorted(set(grid))
    if not values or not 0 < values[0] <= values[-1] < float("inf"):
        raise UsageError(f"C must be positive and finite, and there must be one; not {values}")
    present, dense = np.unique(y, return_inverse=True)
    if len(present) < 2:
        raise UsageError(f"training labels of the probe hold {len(present)} class; it needs two or more")
    with torch.inference_mode():
        return [fit.among(n_classes, present) for fit in _Path(x, dense, len(present)).solve(values)]


def _on_validation(probe: Probe, x: np.ndarray, y: np.ndarray) -> Selection:
    p = probe.probabilities(x)
    loss = -np.log(np.maximum(p[np.arange(len(y)), y], 1e-12)).mean()
    return Selection(probe, accuracy(p, y), float(loss))


class _Path:
    """Features in their principal axes with a constant beside them, and the solutions along C."""

    def __init__(self, x: np.ndarray, y: np.ndarray, n_classes: int):
        raw = torch.tensor(x).double()
        self.mean = raw.mean(0)
        centred = raw - self.mean
        variances, self.axes = torch.linalg.eigh(centred.T @ centred / len(raw))
        one = torch.ones(1, dtype=torch.float64)
        rows = torch.cat([centred @ self.axes, one.expand(len(raw), 1)], 1)  # (n, d + 1)
        one_hot = torch.nn.functional.one_hot(torch.tensor(y), n_classes)
        penalty = torch.ones(rows.shape[1], 1, dtype=torch.float64) / len(rows)
        penalty[-1] = 0
        exact = _Problem(rows, one_hot.double(), penalty, torch.cat([variances.clamp_min(0), one])[:, None])
        self.problems = (exact.to(torch.float32), _ROUGH), (exact, 1.0)

    def solve(self, values: Sequence[float]) -> Iterator[Probe]:
        """A probe for each C of `values`, which ascend."""
        exact = self.problems[-1][0]
        solved = [torch.zeros(exact.rows.shape[1], exact.one_hot.shape[1], dtype=torch.float64)]
        for C in values:
            theta = 2 * solved[-1] - solved[-2] if len(solved) > 2 else solved[-1]
            for problem, slack in self.problems:
                theta, objective, gradient = problem.at(C).minimise(theta.to(problem.rows.dtype), slack)
            if gradient > TOLERANCE:
                raise ArithmeticError(f"the linear probe with C = {C:g} stopped at a gradient of {gradient:.1e}")
            solved.append(theta)
            weights = self.axes @ theta[:-1]
            intercepts = theta[-1] - self.mean @ weights
            yield Probe(weights.numpy(), (intercepts - intercepts.mean()).numpy(), C, objective, gradient)


@dataclass(frozen=True)
class _Problem:
    """θ (d + 1, k) minimises mean cross-entropy of `rows` θ plus half the sum of `penalty` θ²; the last row are intercepts."""

    rows: Tensor
    one_hot: Tensor
    penalty: Tensor
    variances: Tensor

    def to(self, dtype: torch.dtype) -> _Problem:
        return _Problem(*(part.to(dtype) for part in (self.rows, self.one_hot, self.penalty, self.variances)))

    def at(self, C: float) -> _Problem:
        return replace(self, penalty=self.penalty / C)

    def minimise(self, theta: Tensor, slack: float) -> tuple[Tensor, float, float]:
        """θ where both tolerances hold `slack` times over, the objective there, and the largest entry of its gradient."""
        logits = self.rows @ theta
        value, first, gain = self._value(logits, theta), None, float("inf")
        for _ in range(_NEWTON_STEPS):
            p = torch.softmax(logits, 1)
            gradient = self._through_rows(p - self.one_hot, theta)
            inverse = 1 / (self.variances * (p - p * p).mean(0) + self.penalty).clamp_min(1e-12)
            largest, size = gradient.abs().max().item(), torch.sum(inverse * gradient * gradient).item()
            if size == 0 or (largest <= slack * TOLERANCE and gain <= slack * _LAST_GAIN * value):
                break
            first = first or size
            enough = (
                size * min(0.3, (size / first) ** 0.25) ** 2
            )  # looser far from the solution: superlinear at the end
            step, logit_step = self._newton_step(p, gradient, inverse, size, enough)
            slope = torch.sum(gradient * step).item()
            length, value_there = self._line_search(logits, theta, logit_step, step, value, slope)
            if length == 0:
                break
            theta, logits = theta + length * step, logits + length * logit_step
            value, gain = value_there, value - value_there
        return theta, value, largest

    def _value(self, logits: Tensor, theta: Tensor) -> float:
        loss = (torch.logsumexp(logits, 1) - (logits * self.one_hot).sum(1)).mean()
        return (loss + (self.penalty * theta * theta).sum() / 2).item()

    def _through_rows(self, over_classes: Tensor, theta: Tensor) -> Tensor:
        """rowsᵀ `over_classes` / n + `penalty` θ: the gradient, or the Hessian times θ."""
        return torch.addmm(self.penalty * theta, self.rows.T, over_classes, alpha=1 / len(self.rows))

    def _newton_step(
        self, p: Tensor, gradient: Tensor, inverse: Tensor, size: float, enough: float
    ) -> tuple[Tensor, Tensor]:
        """A descent direction s with H s ≈ −gradient, and `rows` s: conjugate gradients until the residual's size is `enough`."""
        residual, step, logit_step = -gradient, torch.zeros_like(gradient), torch.zeros_like(p)
        direction = inverse * residual
        for _ in range(_CONJUGATE_STEPS):
            along = self.rows @ direction
            weighted = p * along
            curved = self._through_rows(weighted - p * weighted.sum(1, keepdim=True), direction)
            length = size / torch.sum(direction * curved).item()
            step, logit_step, residual = (
                step + length * direction,
                logit_step + length * along,
                residual - length * curved,
            )
            scaled = inverse * residual
            size, last = torch.sum(residual * scaled).item(), size
            if size <= enough:
                break
            direction = scaled + (size / last) * direction
        return step, logit_step

    def _line_search(
        self, logits: Tensor, theta: Tensor, logit_step: Tensor, step: Tensor, value: float, slope: float
    ) -> tuple[float, float]:
        """The first of 1, ½, ¼, … that lowers the objective enough (Armijo) and the objective there; 0 if none does."""
        slack = 4 * torch.finfo(theta.dtype).eps * abs(value)
        length = 1.0
        while length > 1e-4:
            there = self._value(logits + length * logit_step, theta + length * step)
            if there <= value + 1e-4 * length * slope + slack:
                return length, there
            length /= 2
        return 0.0, value


def _check_features(x: np.ndarray, what: str) -> None:
    if x.ndim != 2 or not x.size:
        raise UsageError(f"{what}: shape {x.shape}; give (n, d) with at least one row")
    if not np.isfinite(x).all():
        rows = int((~np.isfinite(x)).any(1).sum())
        raise UsageError(f"{what}: {rows} of {len(x)} rows are not finite; the model that made them is not usable")


def _check(x: np.ndarray, y: np.ndarray, n_classes: int, what: str) -> None:
    _check_features(x, f"{what} features")
    if y.shape != (len(x),):
        raise UsageError(f"{what} labels: shape {y.shape} beside {len(x)} rows of features")
    if y.min() < 0 or y.max() >= n_classes:
        raise UsageError(f"{what} labels: {y.min()} to {y.max()}, but there are {n_classes} classes")
