"""The perceptual hash of a picture: 64 bits that say which low frequencies are above their median (pHash).

Copies that were re-encoded, resized, or changed in brightness or contrast differ in few bits; crops and rotations differ in many.
Pictures with little structure may share a hash by chance, so within a set the embeddings must agree as well.
"""

from __future__ import annotations

import numpy as np
from scipy.fft import dctn

from retrieve_or_generate.curate.near import Comparison
from retrieve_or_generate.curate.thumbnail import cell_means

NAME = "phash-1"
_CELLS, _FREQUENCIES = 32, 8
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def describe(pixels: np.ndarray) -> np.ndarray:
    """(n, 3, s, s) uint8, any s, to (n, 8) uint8: 64 packed bits, from the 8×8 lowest frequencies of 32×32 grey cells."""
    means = cell_means(pixels.shape[-1], _CELLS)
    grey = np.einsum("c,nchw->nhw", _LUMA, pixels.astype(np.float32))
    low = dctn(means @ grey @ means.T, axes=(1, 2))[:, :_FREQUENCIES, :_FREQUENCIES]
    flat = low.reshape(len(pixels), _FREQUENCIES**2)
    return np.packbits(flat > np.median(flat, axis=1, keepdims=True), axis=1)


def comparison(a: np.ndarray, b: np.ndarray, bits: int) -> Comparison:
    """Hashes of two collections, (n, 8) and (m, 8), are copies when at most `bits` of the 64 differ."""
    left, right = (np.unpackbits(side, axis=1).astype(np.float32) * 2 - 1 for side in (a, b))

    def look(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return np.asarray(np.bitwise_count(a[i] ^ b[j]).sum(1) <= bits)

    return Comparison(left, right, 64 - 2 * bits, look)
