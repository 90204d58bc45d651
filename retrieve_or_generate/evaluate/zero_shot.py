"""Accuracy from logits, as a share in [0, 1]. Ties go to the class with the smaller id."""

from __future__ import annotations

import numpy as np

from retrieve_or_generate.errors import UsageError


def zero_shot_logits(features: np.ndarray, class_weights: np.ndarray, scale: float) -> np.ndarray:
    """CLIP's logits, (n, k) float32: `features` (n, d) and the columns of `class_weights` (d, k) of unit length, times `scale`."""
    return np.float32(scale) * (features.astype(np.float32) @ class_weights.astype(np.float32))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of (n, k) `logits` (or probabilities) whose largest entry is the label. Raises UsageError if empty or NaN."""
    return float(_hits(logits, labels).mean())


def mean_per_class_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur in `labels` of the accuracy within the class. Raises UsageError if empty or NaN."""
    hits = _hits(logits, labels)
    return float(np.mean([hits[labels == label].mean() for label in np.unique(labels)]))


def _hits(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    check_scores(logits, labels)
    return logits.argmax(1) == labels


def check_scores(scores: np.ndarray, labels: np.ndarray) -> None:
    """UsageError unless `scores` are (n, k), n > 0, without NaN, and `labels` are (n,) class ids below k."""
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise UsageError(
            f"scores of shape {scores.shape} and labels of shape {labels.shape}: give (n, classes) and (n,)"
        )
    if not len(labels):
        raise UsageError("no images to measure on: a share of nothing is not a number")
    if np.isnan(scores).any():
        rows = int(np.isnan(scores).any(1).sum())
        raise UsageError(f"{rows} of {len(scores)} images have NaN scores; the model that made them is not usable")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise UsageError(f"labels from {labels.min()} to {labels.max()}, but scores for {scores.shape[1]} classes")
