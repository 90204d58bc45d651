"""A copy detector for pictures: small luminance and colour thumbnails that agree as only re-encoding or resizing explains.

Stands in for a learned descriptor (SSCD, ISC), whose weights are not at hand. It finds copies that were re-encoded or resized;
crops, flips, rotations and recoloured copies it does not find. The tolerances lie between what JPEG at quality 60 changes in
a picture of 32 pixels (at most 2.9 grey levels at 8×8, 0.12 of the detail) and pictures that merely look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NAME = "thumbnail-1"
LUMINANCE_TOLERANCE = 4.0  # grey levels, root mean square over 8×8 cells, where colours are equal
COLOUR_TOLERANCE = 6.0  # levels of Cb and Cr over 4×4 cells, where luminance is equal; chroma subsampling reaches 4.7
DETAIL_TOLERANCE = 0.2  # share of the standard deviation of the 16×16 luminance
_DETAIL_FLOOR = 2.0  # grey levels: what JPEG does to a picture without contrast
_GATE_SLACK = 1.05  # the gate's product is rounded; the check behind it is not
_BLOCK_ROWS = 4096
_CELLS = 16
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)


@dataclass(frozen=True)
class Thumbnails:
    """Of n pictures, in 0..255: `luminance` (n, 64) 8×8, `detail` (n, 256) 16×16 luminance, `colour` (n, 32) 4×4 Cb and Cr."""

    luminance: np.ndarray
    detail: np.ndarray
    colour: np.ndarray

    def __len__(self) -> int:
        return len(self.luminance)

    def take(self, rows: np.ndarray) -> Thumbnails:
        return Thumbnails(self.luminance[rows], self.detail[rows], self.colour[rows])


def _cell_means(size: int) -> np.ndarray:
    """(16, size): the share of each cell that each pixel has, along one side."""
    edges = np.linspace(0, size, _CELLS + 1)
    pixels = np.arange(size)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.clip(covered, 0, None) * _CELLS / size, dtype=np.float32)


def _halved(cells: np.ndarray) -> np.ndarray:
    n, channels, side, _ = cells.shape
    return np.asarray(cells.reshape(n, channels, side // 2, 2, side // 2, 2).mean((3, 5)))


def describe(pixels: np.ndarray) -> Thumbnails:
    """(n, 3, s, s) uint8 to thumbnails; any s."""
    means = _cell_means(pixels.shape[-1])
    rgb = means @ pixels.astype(np.float32) @ means.T  # (n, 3, 16, 16)
    fine = np.einsum("kc,nchw->nkhw", _YCBCR, rgb)
    middle = _halved(fine)
    coarse = _halved(middle)
    n = len(pixels)
    return Thumbnails(middle[:, 0].reshape(n, 64), fine[:, 0].reshape(n, 256), coarse[:, 1:].reshape(n, 32))


def stack(parts: Sequence[Thumbnails]) -> Thumbnails:
    """The pictures of `parts` (at least one), in their order."""
    names = ("luminance", "detail", "colour")
    return Thumbnails(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _rms(difference: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(np.square(difference).mean(1)))


def _agree(a: Thumbnails, b: Thumbnails) -> np.ndarray:
    """For aligned rows: is one picture a copy of the other? (n,) bool, the same with `a` and `b` exchanged."""
    luminance = _rms(a.luminance - b.luminance) / LUMINANCE_TOLERANCE
    colour = _rms(a.colour - b.colour) / COLOUR_TOLERANCE
    contrast = np.minimum(a.detail.std(1), b.detail.std(1))
    detail = _rms(a.detail - b.detail) <= np.maximum(_DETAIL_FLOOR, DETAIL_TOLERANCE * contrast)
    return np.asarray(detail & (luminance**2 + colour**2 <= 1))


def copies(a: Thumbnails, b: Thumbnails) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) in which picture i of `a` and picture j of `b` are copies, sorted; two (pairs,) int64 arrays.

    One product of the luminance thumbnails finds the pairs that can be near enough; only these are looked at in full.
    """
    limit = b.luminance.shape[1] * (LUMINANCE_TOLERANCE * _GATE_SLACK) ** 2
    norms = np.square(b.luminance).sum(1)
    found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    for start in range(0, len(a), _BLOCK_ROWS):
        block = a.luminance[start : start + _BLOCK_ROWS]
        distances = np.square(block).sum(1)[:, None] + norms - 2 * block @ b.luminance.T
        rows, columns = np.nonzero(distances <= limit)
        agree = _agree(a.take(rows + start), b.take(columns))
        found.append((rows[agree] + start, columns[agree]))
    return np.concatenate([i for i, _ in found]), np.concatenate([j for _, j in found])
