"""Multinomial logistic regression, one for each strength of regularisation C, solved to a stated gradient.

The problem is that of scikit-learn's `LogisticRegression(C)`: minimise (1/n) Σ −log p(yᵢ|xᵢ) + ‖W‖² / (2 C n), intercepts free.
It is convex, and strictly so but for one number that may be added to all intercepts; those of sum zero are returned.

It is solved by Newton's method with truncated conjugate gradients (`newton.py`) in the principal axes of the features: in float32,
with the products inside a Newton step in bfloat16 where that is native and the problem large, and looked over in float64, which
also finishes what float32 cannot. C runs from strong to weak regularisation. On a CPU each solution starts from the line through
the last two; on a GPU, which small products leave idle, all values of C are solved at once. Numbers: docs/probe.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.evaluate.newton import TOLERANCE, Problem
from retrieve_or_generate.evaluate.probe import Features, Probe, aligned, check_training
from retrieve_or_generate.precision import native

_NARROW_FROM = (
    10_000_000  # multiplications of a product, n·d·k, from which bfloat16 saves more than its conversions cost
)
_AT_ONCE = 2**28  # logits that a GPU holds of all values of C together; a gibibyte, a dozen times


@dataclass(frozen=True)
class Regression(Probe):
    """A solved probe: its objective, and the largest entry of that one's gradient in the features' principal axes."""

    objective: float
    gradient: float


def fit_path(x: Features, y: np.ndarray, n_classes: int, grid: Iterable[float]) -> list[Regression]:
    """One probe for each C of `grid`, in ascending order of C.

    The largest entry of every gradient is at most `newton.TOLERANCE`, and the last Newton step gained at most `newton.GAIN` of the
    objective. Raises UsageError for what cannot be fitted.
    """
    check_training(x, y, n_classes)
    values = sorted(set(grid))
    if not values or not 0 < values[0] <= values[-1] < float("inf"):
        raise UsageError(f"C must be positive and finite, and there must be one; not {values}")
    present, dense = np.unique(y, return_inverse=True)
    with torch.inference_mode():
        return [fit.among(n_classes, present) for fit in _Path(aligned(x), dense, len(present)).solve(values)]


class _Path:
    """Features in their principal axes with a constant beside them, and the solutions along C."""

    def __init__(self, raw: Tensor, y: np.ndarray, n_classes: int):
        self.mean, self.n_classes = raw.mean(0), n_classes
        centred = raw - self.mean
        self.axes = torch.linalg.eigh(centred.T @ centred / len(raw))[1]
        rows = torch.cat([centred @ self.axes, torch.ones_like(centred[:, :1])], 1)  # (n, d + 1)
        labels = torch.tensor(y, device=raw.device)
        work = rows.shape[0] * rows.shape[1] * n_classes
        narrow = native("bfloat16", raw.device) if work >= _NARROW_FROM else torch.float32
        self.single = Problem.of(rows, labels, n_classes, torch.float32, narrow)
        self.double = Problem.of(rows, labels, n_classes, torch.float64, torch.float64)
        self.at_once = max(1, _AT_ONCE // (len(rows) * n_classes)) if raw.is_cuda else 1

    def solve(self, values: Sequence[float]) -> Iterator[Regression]:
        """A probe for each C of `values`, which ascend."""
        solved = [self.double.rows.new_zeros(self.double.rows.shape[1], self.n_classes)]  # θ (d + 1, k) where C is 0
        for first in range(0, len(values), self.at_once):
            together = values[first : first + self.at_once]
            start = 2 * solved[-1] - solved[-2] if len(solved) > 2 else solved[-1]
            for theta, probe in self._at(together, start):
                solved.append(theta)
                yield probe

    def _at(self, values: Sequence[float], start: Tensor) -> Iterator[tuple[Tensor, Regression]]:
        """θ and its probe for each of `values`, which are solved together from one start."""
        theta = start[:, None].expand(-1, len(values), -1)  # (d + 1, B, k)
        rough = self.single.at(values).minimise(theta.float().contiguous()).theta
        found = self.double.at(values).minimise(rough.double(), settled=True)
        for i, C in enumerate(values):
            gradient = found.gradient[i].item()
            if not gradient <= TOLERANCE:
                raise ArithmeticError(f"the linear probe with C = {C:g} stopped at a gradient of {gradient:.1e}")
            weights = self.axes @ found.theta[:-1, i]
            intercepts = found.theta[-1, i] - self.mean @ weights
            centred = (intercepts - intercepts.mean()).cpu().numpy()
            yield found.theta[:, i], Regression(weights.cpu().numpy(), centred, C, found.value[i].item(), gradient)
