"""Copies within an image set: of each picture only one stays, the one with the best score."""

from __future__ import annotations

import numpy as np

from retrieve_or_generate.curate.descriptor import Thumbnails, copies


def copy_pairs(sha256: np.ndarray, features: np.ndarray, thumbnails: Thumbnails, cosine: float) -> np.ndarray:
    """Pairs of rows (pairs, 2) that show one picture: equal bytes, or an embedding cosine from `cosine` on and equal
    thumbnails. `features` is (n, d) of unit length. Each picture is paired with the first of its equals in bytes, not with all.
    """
    _, first, same = np.unique(sha256, return_index=True, return_inverse=True)
    later = np.setdiff1d(np.arange(len(sha256)), first)
    equal = np.stack([first[same[later]], later], axis=1)
    i, j = copies(thumbnails.take(first), thumbnails.take(first))
    i, j = first[i[i < j]], first[j[i < j]]
    near = np.einsum("nd,nd->n", features[i], features[j]) >= cosine
    return np.concatenate([equal, np.stack([i[near], j[near]], axis=1)])


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
