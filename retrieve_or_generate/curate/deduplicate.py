"""Copies within an image set: of each picture only one stays, the one with the best score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from retrieve_or_generate.curate.near import Comparison, surplus

if TYPE_CHECKING:
    import torch

Comparing = Callable[[np.ndarray], Sequence[Comparison]]
"""Rows, (n,) int64, to comparisons of just these rows, in this order, with themselves."""


def duplicates(
    sha256: np.ndarray, scores: np.ndarray, keys: np.ndarray, comparing: Comparing, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Which rows go, (n,) bool: all but the best of equal bytes, then, from the best down, what copies one that stays.

    Best is the highest score, then the first key.
    """
    order = np.lexsort((keys, -scores))
    first = np.unique(sha256[order], return_index=True)[1]
    best = order[np.sort(first)]
    goes = np.ones(len(keys), bool)
    goes[best] = surplus(comparing(best), len(best), device)
    return goes
