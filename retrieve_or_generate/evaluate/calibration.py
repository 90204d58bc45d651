"""Calibration: how far confidence is from accuracy."""

from __future__ import annotations

import numpy as np

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.evaluate.zero_shot import check_scores


def ece(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the most probable class, in [0, 1] (Guo et al. 2017, equation 3).

    `probabilities` (n, k) in [0, 1]; confidences fall into `bins` of equal width, each open below and closed above. Raises
    UsageError if empty, NaN or outside [0, 1].
    """
    check_scores(probabilities, labels)
    confidence, right = probabilities.max(1).astype(np.float64), probabilities.argmax(1) == labels
    if probabilities.min() < 0 or confidence.max() > 1 + 1e-6:
        raise UsageError("calibration needs probabilities in [0, 1], not logits")
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, weights=right - confidence, minlength=bins)  # |B|·(acc(B) − conf(B))
    return float(np.abs(gap).sum() / len(labels))
