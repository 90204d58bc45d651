"""Copies within an image set: of each picture only one stays, the one with the best score."""

from __future__ import annotations

import numpy as np

from retrieve_or_generate.curate.descriptor import Thumbnails, copies


def duplicates(
    sha256: np.ndarray,
    features: np.ndarray,
    thumbnails: Thumbnails,
    scores: np.ndarray,
    keys: np.ndarray,
    cosine: float,
) -> np.ndarray:
    """Which rows go, (n,) bool: all but the best of equal bytes, then all but the best of what shows one picture.

    Best is the highest score, then the first key. `features` is (n, d) of unit length.
    """
    order = np.lexsort((keys, -scores))
    best = order[np.unique(sha256[order], return_index=True)[1]]
    pairs = near_pairs(features[best], thumbnails.take(best), cosine)
    goes = np.ones(len(keys), bool)
    goes[best] = surplus(pairs, scores[best], keys[best])
    return goes


def near_pairs(features: np.ndarray, thumbnails: Thumbnails, cosine: float) -> np.ndarray:
    """Pairs of rows (pairs, 2) with copies for thumbnails and an embedding cosine from `cosine` on."""
    i, j = copies(thumbnails, thumbnails)
    i, j = i[i < j], j[i < j]
    near = np.einsum("nd,nd->n", features[i], features[j]) >= cosine
    return np.stack([i[near], j[near]], axis=1)


def surplus(pairs: np.ndarray, scores: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which rows go, (n,) bool: going from the best score down (then by key), every copy of one that stays.

    No two rows that stay are a pair, and every row that goes has a partner that stays: a chain of likenesses does not pull
    down its far end.
    """
    position = np.empty(len(scores), np.int64)
    position[np.lexsort((keys, -scores))] = np.arange(len(scores))
    swap = position[pairs[:, 0]] > position[pairs[:, 1]]
    ordered = np.where(swap[:, None], pairs[:, ::-1], pairs)
    goes = np.zeros(len(scores), bool)
    for better, worse in ordered[np.argsort(position[ordered[:, 1]], kind="stable")]:
        goes[worse] |= not goes[better]
    return goes
