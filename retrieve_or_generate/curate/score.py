"""The CLIP score of an image for its class, and what it keeps (2406.05184, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_ROWS = 65_536  # scored at once


def clip_scores(features: np.ndarray, class_weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cosine of each image with its own class: (n, d) and (d, classes), both of unit length, and (n,) to (n,) float32.

    A class is one vector, the normalised mean over its templates, as in the paper's code (its text says maximum).
    """
    scores = np.empty(len(labels), np.float32)
    for start in range(0, len(labels), _ROWS):
        part = slice(start, start + _ROWS)
        scores[part] = np.einsum("nd,dn->n", features[part], class_weights[:, labels[part]])
    return scores


def best_template_scores(
    features: np.ndarray, template_features: Callable[[int], np.ndarray], labels: np.ndarray
) -> np.ndarray:
    """Cosine of each image with the template of its own class that fits it best, as the paper's text has it.

    `features` is (n, d) of unit length, `labels` (n,); `template_features` gives a class its (templates, d), of unit length. The
    result is (n,) float32.
    """
    scores = np.empty(len(labels), np.float32)
    for label in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == label)
        scores[rows] = (features[rows] @ template_features(label).T).max(1)
    return scores


def places(scores: np.ndarray, labels: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The place of each image within its class, (n,) int64: 0 has the best score; equal scores stand in order of key."""
    order = np.lexsort((keys, -scores, labels))
    sorted_labels = labels[order]
    first_of_class = np.searchsorted(sorted_labels, sorted_labels, side="left")
    result = np.empty(len(labels), np.int64)
    result[order] = np.arange(len(labels)) - first_of_class
    return result


def top_fraction(scores: np.ndarray, labels: np.ndarray, keys: np.ndarray, fraction: float) -> np.ndarray:
    """Which images are among the best `fraction` of their class, (n,) bool; at least one of every class that has any."""
    counts = np.bincount(labels)
    most = np.ceil(np.round(fraction * counts, 9)).astype(np.int64)
    return np.asarray(places(scores, labels, keys) < most[labels])
