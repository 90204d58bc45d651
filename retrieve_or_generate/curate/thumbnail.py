"""A copy detector without weights: small luminance and colour thumbnails that agree as only re-encoding or resizing explains.

The named fallback for a learned descriptor (`learned.py`). It finds copies that were re-encoded or resized; crops, flips, rotations
and recoloured copies it does not find. The tolerances lie between what JPEG at quality 60 changes in a picture of 32 pixels (at
most 2.9 grey levels at 8×8, 0.12 of the detail) and pictures that merely look alike.
"""

from __future__ import annotations

import numpy as np

from retrieve_or_generate.curate.near import Comparison

NAME = "thumbnail-1"
LUMINANCE_TOLERANCE = 4.0  # grey levels, root mean square over 8×8 cells, where colours are equal
COLOUR_TOLERANCE = 6.0  # levels of Cb and Cr over 4×4 cells, where luminance is equal; chroma subsampling reaches 4.7
DETAIL_TOLERANCE = 0.2  # share of the standard deviation of the 16×16 luminance
_DETAIL_FLOOR = 2.0  # grey levels: what JPEG does to a picture without contrast
_GATE_SLACK = 1.05  # the gate's product is rounded; the look behind it is not
_CELLS = 16
_LUMINANCE, _DETAIL, _COLOUR = slice(0, 64), slice(64, 320), slice(320, 352)
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)


def cell_means(size: int, cells: int = _CELLS) -> np.ndarray:
    """(cells, size): the share of each cell that each pixel has, along one side."""
    edges = np.linspace(0, size, cells + 1)
    pixels = np.arange(size)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.clip(covered, 0, None) * cells / size, dtype=np.float32)


def _halved(cells: np.ndarray) -> np.ndarray:
    n, channels, side, _ = cells.shape
    return np.asarray(cells.reshape(n, channels, side // 2, 2, side // 2, 2).mean((3, 5)))


def describe(pixels: np.ndarray) -> np.ndarray:
    """(n, 3, s, s) uint8, any s, to (n, 352) float32 in 0..255: 8×8 luminance, 16×16 luminance, 4×4 Cb and Cr."""
    means = cell_means(pixels.shape[-1])
    rgb = means @ pixels.astype(np.float32) @ means.T  # (n, 3, 16, 16)
    fine = np.einsum("kc,nchw->nkhw", _YCBCR, rgb)
    middle = _halved(fine)
    coarse = _halved(middle)
    n = len(pixels)
    parts = (middle[:, 0].reshape(n, 64), fine[:, 0].reshape(n, 256), coarse[:, 1:].reshape(n, 32))
    return np.concatenate(parts, axis=1)


def _rms(difference: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(np.square(difference).mean(1)))


def agree(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For aligned thumbnails: is one picture a copy of the other? (n,) bool, the same with `a` and `b` exchanged."""
    luminance = _rms(a[:, _LUMINANCE] - b[:, _LUMINANCE]) / LUMINANCE_TOLERANCE
    colour = _rms(a[:, _COLOUR] - b[:, _COLOUR]) / COLOUR_TOLERANCE
    contrast = np.minimum(a[:, _DETAIL].std(1), b[:, _DETAIL].std(1))
    detail = _rms(a[:, _DETAIL] - b[:, _DETAIL]) <= np.maximum(_DETAIL_FLOOR, DETAIL_TOLERANCE * contrast)
    return np.asarray(detail & (luminance**2 + colour**2 <= 1))


def comparison(a: np.ndarray, b: np.ndarray) -> Comparison:
    """Thumbnails of two collections, (n, 352) and (m, 352).

    The gate is the distance of the 8×8 luminances, r = 8 · tolerance, as a product: |x - y|² ≤ r² is x·y - |x|²/2 - |y|²/2 ≥ -r²/2.
    The line is the mean luminance, in which copies differ by no more than in the root mean square.
    """
    reach = LUMINANCE_TOLERANCE * _GATE_SLACK
    (left, left_half), (right, right_half) = (_halved_norms(side[:, _LUMINANCE]) for side in (a, b))
    one = np.ones((1, 1), np.float32)
    return Comparison(
        np.hstack([left, left_half, np.broadcast_to(one, left_half.shape)]),
        np.hstack([right, np.broadcast_to(one, right_half.shape), right_half]),
        -64 * reach**2 / 2,
        lambda i, j: agree(a[i], b[j]),
        (a[:, _LUMINANCE].mean(1), b[:, _LUMINANCE].mean(1)),
        reach,
    )


def _halved_norms(luminance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Luminance about mid-grey (so that the products round less), and minus half its squared length, (n, 1)."""
    centred = luminance - np.float32(127.5)
    return centred, -np.square(centred).sum(1, keepdims=True) / 2
