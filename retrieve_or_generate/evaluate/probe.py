"""A fitted probe, whatever fitted it, and what features and labels must be like."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from retrieve_or_generate.errors import UsageError

Features = np.ndarray | Tensor
"""(n, d) float32; a tensor is worked on where it lies, an array on the CPU."""


@dataclass(frozen=True)
class Probe:
    """`weights` (d, k) and `intercepts` (k,) float64; a class that was not fitted has intercept −∞. C: None if there was none."""

    weights: np.ndarray
    intercepts: np.ndarray
    C: float | None

    def among(self, n_classes: int, present: np.ndarray) -> Self:
        """The same probe where its classes are the ids `present` out of `n_classes`."""
        weights, intercepts = np.zeros((len(self.weights), n_classes)), np.full(n_classes, -np.inf)
        weights[:, present], intercepts[present] = self.weights, self.intercepts
        return replace(self, weights=weights, intercepts=intercepts)

    def probabilities(self, x: Features) -> np.ndarray:
        """(m, d) features to (m, k) float64 class probabilities."""
        check_features(x, "features to classify")
        if x.shape[1] != len(self.weights):
            raise UsageError(f"features are {x.shape[1]} wide, but the probe was fitted on {len(self.weights)}")
        rows = aligned(x)
        weights, intercepts = (torch.tensor(part, device=rows.device) for part in (self.weights, self.intercepts))
        return torch.softmax(rows @ weights + intercepts, 1).cpu().numpy()


def aligned(x: Features) -> Tensor:
    """A float64 copy: the last bits of products depend on where an array of the caller happens to lie."""
    if not isinstance(x, Tensor):
        return torch.tensor(x).double()
    device = "cpu" if x.device.type == "mps" else x.device  # Apple's has no float64
    return x.detach().to(device, torch.float64, copy=True)


def check_features(x: Features, what: str) -> None:
    """UsageError unless `x` is (n, d), n > 0, of finite numbers."""
    if x.ndim != 2 or not len(x) or not x.shape[1]:
        raise UsageError(f"{what}: shape {tuple(x.shape)}; give (n, d) with at least one row")
    finite = x.isfinite() if isinstance(x, Tensor) else np.isfinite(x)
    if not finite.all():
        rows = int((~finite).any(1).sum())
        raise UsageError(f"{what}: {rows} of {len(x)} rows are not finite; the model that made them is not usable")


def check_training(x: Features, y: np.ndarray, n_classes: int) -> None:
    """UsageError unless a probe can be fitted to `x` and `y`: as `check_labels`, and of two classes or more."""
    check_labels(x, y, n_classes, "training")
    if len(np.unique(y)) < 2:
        raise UsageError(f"all training labels of the probe are {y[0]}; it needs images of two classes or more")


def check_labels(x: Features, y: np.ndarray, n_classes: int, what: str) -> None:
    """UsageError unless `x` are features and `y` a class id below `n_classes` for each of them."""
    check_features(x, f"{what} features")
    if y.shape != (len(x),):
        raise UsageError(f"{what} labels: shape {y.shape} beside {len(x)} rows of features")
    if y.min() < 0 or y.max() >= n_classes:
        raise UsageError(f"{what} labels: {y.min()} to {y.max()}, but there are {n_classes} classes")
