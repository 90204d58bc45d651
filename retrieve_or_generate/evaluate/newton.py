"""Newton's method with truncated conjugate gradients for B penalised multinomial regressions on the same rows.

θ (d, B, k) minimises, for each of B penalties apart, the mean cross-entropy of rows·θ plus half the sum of penalty·θ²; the last
row of θ are intercepts, which cost nothing. The B problems run in step, and one that is done stands still.

The preconditioner is each class's own block of the Hessian, the rows weighed by their curvature p(1 − p): their mean as a matrix of
rank one and, in the features' principal axes, only the variances around it. Products with the Hessian may be taken in a narrower
type, for they only choose a direction: gradient, objective and line search never are, so what is solved stays the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TOLERANCE = 1e-6  # of the largest entry of the gradient; scikit-learn's default `tol` is 1e-4
GAIN = 1e-5  # of the last Newton step, as a share of the objective: gradients are small where regularisation is weak
_NEWTON_STEPS, _CONJUGATE_STEPS = 200, 2000  # far above what either needs; they end a loop that makes no headway
_TINY = 1e-12
_ROUNDED = 1e-3  # of a mean square: variances below it are lost in the rounding of narrow products
_RECENT = 5  # conjugate steps that together may gain a tenth of GAIN before a Newton step ends


@dataclass(frozen=True)
class Minimum:
    """θ (d, B, k), and of each of the B problems the objective and the largest entry of its gradient there, (B,)."""

    theta: Tensor
    value: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Blocks:
    """Of each problem and class the matrix diag(1 / `inverse`) + w · `mean` `mean`ᵀ, positive definite; it is never written out."""

    inverse: Tensor  # (d, B, k)
    mean: Tensor  # (d, B, k)
    share: Tensor  # (B, k), what Sherman and Morrison's formula makes of w

    @classmethod
    def of(cls, weight: Tensor, mean: Tensor, square: Tensor, penalty: Tensor) -> Blocks:
        """Of the rows' weights (B, k), weighted mean and weighted mean square (d, B, k), and penalties (d, B, 1)."""
        variance = (square - weight * mean**2).clamp_min(_ROUNDED * square)  # the intercept's is 0
        inverse = 1 / (variance + penalty).clamp_min(_TINY)
        return cls(inverse, mean, weight / (1 + weight * (mean**2 * inverse).sum(0)))

    def solve(self, right: Tensor) -> Tensor:
        """The z (d, B, k) of block · z = `right`."""
        z = self.inverse * right
        return z - self.inverse * self.mean * (self.share * (self.mean * z).sum(0))


@dataclass(frozen=True)
class Problem:
    """`rows` (n, d) that end in a constant 1, `labels` (n, 1, 1) and `penalty` (d, B, 1), for C = 1 until `at` says otherwise."""

    rows: Tensor
    one_hot: Tensor  # (n, 1, k)
    labels: Tensor
    penalty: Tensor
    narrow_rows: Tensor  # in the type of products with the Hessian

    @classmethod
    def of(cls, rows: Tensor, labels: Tensor, n_classes: int, dtype: torch.dtype, narrow: torch.dtype) -> Problem:
        """The problem in `dtype`, with products with the Hessian in `narrow`."""
        rows = rows.to(dtype)
        one_hot = torch.nn.functional.one_hot(labels, n_classes).to(dtype)[:, None]
        penalty = torch.full_like(rows[0], 1 / len(rows))
        penalty[-1] = 0
        return cls(rows, one_hot, labels[:, None, None], penalty[:, None, None], rows.to(narrow))

    def at(self, values: Sequence[float]) -> Problem:
        """The problems for these C."""
        return replace(self, penalty=self.penalty / self.rows.new_tensor(values)[:, None])

    def minimise(self, theta: Tensor, *, settled: bool = False) -> Minimum:
        """Where every gradient is within `TOLERANCE` and the last step gained at most `GAIN`, or no step leads further down.

        With `settled` a start whose gradient is small enough is an end: it was reached by a step that gained little.
        """
        logits = self._logits(theta)
        value = self._value(logits, theta)
        gain = torch.full_like(value, 0.0 if settled else torch.inf)
        first, stuck = None, torch.zeros_like(value, dtype=torch.bool)
        bound = TOLERANCE if settled else 0.9 * TOLERANCE  # what float32 rounds must not carry it over
        for _ in range(_NEWTON_STEPS):
            p = torch.softmax(logits, -1)
            gradient = self._over_rows(p - self.one_hot, theta, self.rows)
            largest = gradient.abs().amax((0, 2))
            active = ~((largest <= bound) & (gain <= GAIN * value) | stuck)
            if not active.any():
                break
            blocks = self._blocks(p)
            size = _dot(gradient, blocks.solve(gradient))
            first = size if first is None else first
            step = self._newton_step(p, gradient, blocks, first, value, active)
            logit_step, slope = self._logits(step), _dot(gradient, step)
            length, there = self._line_search(logits, theta, logit_step, step, value, slope)
            gain, stuck = torch.where(active, value - there, gain), stuck | active & (length == 0)
            theta = theta + length[:, None] * step
            logits, value = logits + length[:, None] * logit_step, there
        return Minimum(theta, value, largest)

    def _logits(self, theta: Tensor) -> Tensor:
        return _product(self.rows, theta)

    def _value(self, logits: Tensor, theta: Tensor) -> Tensor:
        label = self.labels.expand(-1, logits.shape[1], 1)
        loss = (torch.logsumexp(logits, -1) - logits.gather(-1, label)[..., 0]).mean(0)
        return loss + _dot(self.penalty * theta, theta) / 2

    def _over_rows(self, over_classes: Tensor, theta: Tensor, rows: Tensor) -> Tensor:
        """`rows`ᵀ `over_classes` / n + `penalty` θ, the product in the type of `rows`: the gradient, or the Hessian times θ."""
        return _product(rows.T, over_classes).to(theta.dtype) / len(rows) + self.penalty * theta

    def _blocks(self, p: Tensor) -> Blocks:
        curvature = p - p * p  # (n, B, k)
        weight = curvature.mean(0)
        mean = _product(self.narrow_rows.T, curvature).to(p.dtype) / (len(p) * weight.clamp_min(_TINY))
        square = _product(self.narrow_rows.square().T, curvature).to(p.dtype) / len(p)
        return Blocks.of(weight, mean, square, self.penalty)

    def _newton_step(
        self, p: Tensor, gradient: Tensor, blocks: Blocks, first: Tensor, value: Tensor, active: Tensor
    ) -> Tensor:
        """A descent direction s with H s ≈ −gradient where `active`, else 0.

        Conjugate gradients end when the residual has shrunk enough, looser far from the solution so that Newton's steps converge
        superlinearly, or when the last few gain next to nothing and the residual is within the tolerance.
        """
        residual, step = -gradient, torch.zeros_like(gradient)
        direction = blocks.solve(residual)
        size = _dot(residual, direction)
        enough = size * (size / first).pow(0.25).clamp(max=0.3) ** 2
        going, gains = active & (size > 0), deque[Tensor](maxlen=_RECENT)
        for _ in range(_CONJUGATE_STEPS):
            along = _product(self.narrow_rows, direction).to(p.dtype)
            weighted = p * along
            weighted -= p * weighted.sum(-1, keepdim=True)
            curved = self._over_rows(weighted, direction, self.narrow_rows)
            curvature = _dot(direction, curved)
            going = going & (curvature > 0)  # none along all intercepts alike, where rounding alone may point
            length = torch.where(going, size / curvature, 0)
            step += length[:, None] * direction
            residual -= length[:, None] * curved
            scaled = blocks.solve(residual)
            last, size = size, _dot(residual, scaled)
            gains.append(length * last / 2)
            going = going & (size > enough)
            if len(gains) == _RECENT:
                spent = torch.stack(list(gains)).sum(0) <= GAIN / 10 * value
                going = going & ~(spent & (residual.abs().amax((0, 2)) <= TOLERANCE / 2))
            if not going.any():
                break
            direction = scaled + torch.where(going, size / last, 0)[:, None] * direction
        return step

    def _line_search(
        self, logits: Tensor, theta: Tensor, logit_step: Tensor, step: Tensor, value: Tensor, slope: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of each problem the first of 1, ½, ¼, … that lowers its objective enough (Armijo), and the objective there; or 0."""
        slack = 4 * torch.finfo(theta.dtype).eps * value.abs()
        length = torch.ones_like(value)
        while True:
            reached = self._value(logits + length[:, None] * logit_step, theta + length[:, None] * step)
            down = reached <= value + 1e-4 * length * slope + slack
            if down.all() or length.max() < 1e-4:
                return torch.where(down, length, 0), torch.where(down, reached, value)
            length = torch.where(down, length, length / 2)


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """(m, q) times (q, B, k) in the type of `rows`: (m, B, k)."""
    return (rows @ columns.to(rows.dtype).flatten(1)).unflatten(1, columns.shape[1:])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a·b over all but the problems: (d, B, k) twice to (B,)."""
    return (a * b).sum((0, 2))
