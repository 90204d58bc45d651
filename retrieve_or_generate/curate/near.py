"""Which rows show one picture: found exactly, in bounded memory, however many rows there are.

A `Comparison` says it in two steps. The gate is an inner product that no pair of copies stays below: products of blocks, on the
device, find the pairs that pass. The look is exact, on the CPU, at those pairs alone; so neither blocks nor device change an
answer. Where copies cannot lie far apart along a line, rows are compared with their neighbours on it only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Look = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Rows of the left and of the right, (pairs,) int64 each, to which of the pairs are copies, (pairs,) bool."""

_BLOCK = 2048  # rows that are decided together
_STEP = 64  # rows of a block that are compared with each other, after those before them are decided
_GROUP = 128  # rows of a block that are multiplied together, neighbours on the line
_COLUMNS = 65_536  # rows that they are multiplied with at once: 32 MiB of products
_LOOKED_AT = 16_384  # pairs looked at together


@dataclass(frozen=True)
class Comparison:
    """How the rows of two collections are compared. `left` is (n, d) and `right` (m, d) float32; copies have left · right of at
    least `least`, rounding included, and differ by at most `reach` along `line`, (n,) and (m,), if there is one.
    """

    left: np.ndarray
    right: np.ndarray
    least: float
    look: Look
    line: tuple[np.ndarray, np.ndarray] | None = None
    reach: float = float("inf")

    def confirmed(self, also: Look) -> Comparison:
        """The same, but only those pairs are copies that `also` agrees on."""

        def both(i: np.ndarray, j: np.ndarray) -> np.ndarray:
            agree = self.look(i, j)
            agree[agree] = also(i[agree], j[agree])
            return agree

        return replace(self, look=both)


def cosines(a: np.ndarray, b: np.ndarray, least: float) -> Look:
    """Looks whether rows of unit length have a cosine from `least` on."""
    return lambda i, j: np.asarray(np.einsum("nd,nd->n", a[i], b[j]) >= least)


def cosine_comparison(a: np.ndarray, b: np.ndarray, least: float) -> Comparison:
    """Rows of unit length, (n, d) and (m, d) float32, are copies from a cosine of `least` on."""
    return Comparison(a, b, least - 1e-4, cosines(a, b, least))


def _on(device: torch.device | str, vectors: np.ndarray) -> torch.Tensor:
    import torch  # here, so that what only names a descriptor starts in a moment

    return torch.from_numpy(vectors).to(device)


class _Search:
    """`columns` of a comparison's right side, laid out along its line (`on_line`) or in order, on the device."""

    def __init__(
        self,
        comparison: Comparison,
        device: torch.device | str,
        columns: np.ndarray | None = None,
        on_line: bool = True,
    ):
        self._comparison, self._device = comparison, device
        self._line = comparison.line if on_line else None
        columns = np.arange(len(comparison.right)) if columns is None else columns
        places = self._line[1][columns] if self._line else columns
        order = np.argsort(places, kind="stable")
        self._columns, self._places = columns[order], places[order]
        self._right = _on(device, comparison.right[self._columns])

    def forget(self, gone: np.ndarray) -> None:
        """Drop columns that are `gone`, (m,) bool, once they are a quarter of all."""
        stays = np.flatnonzero(~gone[self._columns])
        if 4 * len(stays) < 3 * len(self._columns):
            self._columns, self._places = self._columns[stays], self._places[stays]
            self._right = self._right[_on(self._device, stays)]

    def of(self, rows: np.ndarray, wanted: Look, before: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of `rows` of the left that are copies, among those that are `wanted`, with columns before `before`."""
        found = [
            self._look(i, j, wanted, before)
            for group, low, high in self._spans(rows, before)
            for start in range(low, high, _COLUMNS)
            for i, j in [self._gate(group, start, min(start + _COLUMNS, high))]
        ]
        i, j = (np.concatenate([np.empty(0, np.int64), *(pair[side] for pair in found)]) for side in (0, 1))
        order = np.lexsort((j, i))
        return i[order], j[order]

    def _spans(self, rows: np.ndarray, before: int | None) -> Iterator[tuple[np.ndarray, int, int]]:
        """`rows` in groups, and from where to where in the layout the copies of each can lie."""
        if self._line:
            rows = rows[np.argsort(self._line[0][rows], kind="stable")]
        for start in range(0, len(rows), _GROUP):
            group = rows[start : start + _GROUP]
            if self._line:
                low, high = (
                    self._line[0][group[0]] - self._comparison.reach,
                    self._line[0][group[-1]] + self._comparison.reach,
                )
                yield group, int(self._places.searchsorted(low)), int(self._places.searchsorted(high, side="right"))
            else:
                yield group, 0, len(self._places) if before is None else int(self._places.searchsorted(before))

    def _gate(self, rows: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        left = _on(self._device, self._comparison.left[rows])
        i, j = (left @ self._right[start:stop].T >= self._comparison.least).nonzero(as_tuple=True)
        return rows[i.cpu().numpy()], self._columns[j.cpu().numpy() + start]

    def _look(self, i: np.ndarray, j: np.ndarray, wanted: Look, before: int | None) -> tuple[np.ndarray, np.ndarray]:
        asked = wanted(i, j) if before is None else wanted(i, j) & (j < before)
        i, j = i[asked], j[asked]
        parts = [slice(start, start + _LOOKED_AT) for start in range(0, len(i), _LOOKED_AT)]
        agree = np.concatenate([np.empty(0, bool), *(self._comparison.look(i[part], j[part]) for part in parts)])
        return i[agree], j[agree]


def copies(comparison: Comparison, device: torch.device | str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) in which row i of the left and row j of the right are copies, sorted; two (pairs,) int64 arrays."""
    search, n = _Search(comparison, device), len(comparison.left)
    found = [
        search.of(np.arange(start, min(start + _BLOCK, n)), lambda i, j: np.ones(len(i), bool))
        for start in range(0, n, _BLOCK)
    ]
    i, j = (np.concatenate([np.empty(0, np.int64), *(pair[side] for pair in found)]) for side in (0, 1))
    return i, j


def surplus(comparisons: Sequence[Comparison], rows: int, device: torch.device | str = "cpu") -> np.ndarray:
    """Which of the rows go, (rows,) bool, when the first is the best: every copy, by any comparison, of one before it that stays.

    Each comparison is of the rows with themselves. No two rows that stay are copies, and every row that goes has a copy before it
    that stays: a chain of likenesses does not pull down its far end. What went is not compared with again, so that ten thousand
    files of one picture cost no more than as many pictures.
    """
    searches = [_Search(comparison, device) for comparison in comparisons]
    goes = np.zeros(rows, bool)
    for start in range(0, rows, _BLOCK):
        stop = min(start + _BLOCK, rows)
        for search in searches:
            search.forget(goes)
            i, _ = search.of(_staying(goes, start, stop), lambda i, j: ~goes[j], before=start)
            goes[i] = True
        _go_down(comparisons, goes, start, stop, device)
    return goes


def _go_down(
    comparisons: Sequence[Comparison], goes: np.ndarray, start: int, stop: int, device: torch.device | str
) -> None:
    """Decide on a block whose rows copy nothing before it, a few rows at a time, as most of a block may be one picture."""
    rows = _staying(goes, start, stop)
    searches = [_Search(comparison, device, rows, on_line=False) for comparison in comparisons]
    for first in range(0, len(rows), _STEP):
        found = [np.empty((0, 2), np.int64)]
        step = rows[first : first + _STEP]
        for search in searches:
            search.forget(goes)
            pairs = search.of(step[~goes[step]], lambda i, j: (j < i) & ~goes[j], before=int(step[-1]))
            found.append(np.stack(pairs, axis=1))
        for later, earlier in _in_order(np.concatenate(found)):
            goes[later] |= not goes[earlier]


def _in_order(pairs: np.ndarray) -> list[list[int]]:
    """(pairs, 2) sorted by what comes later, then by what comes earlier."""
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].tolist()


def _staying(goes: np.ndarray, start: int, stop: int) -> np.ndarray:
    return np.flatnonzero(~goes[start:stop]) + start
