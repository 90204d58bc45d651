"""Scores that stand: inner products added up in float64 and rounded to float32 once.

They depend neither on what is scored together nor on the number of threads, and equal rows score equal. The order in which one
kernel adds is the standard; a faster one may stand in for it wherever its sum is so far from a boundary between two float32
numbers that both round alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

_CHUNK = {"cpu": 256, "cuda": 32768}  # pairs scored at a time; a processor keeps them in its cache
_LEAST_RUN = (
    8  # pairs of one query, on average, from which a product for each query is faster than one of gathered queries
)
_MANY = 2048  # pairs from which it pays to sort them by row
_ROWS = 512  # rows widened at a time for pairs sorted by row
_WIDER = (torch.float16, torch.float32, torch.float64)  # by steps that have fast kernels


def pair_scores(xq: np.ndarray, xb: np.ndarray, query: np.ndarray, row: np.ndarray) -> np.ndarray:
    """(p,) float32 inner products of `xq[query[i]]` and `xb[row[i]]`, scored exactly as a scan does.

    `xq` (q, d) float32, `xb` (n, d) float16.
    """
    queries = torch.from_numpy(np.array(xq, np.float32)).double()
    vectors = torch.from_numpy(np.array(xb, np.float16))
    return _by_pair(queries, vectors, torch.from_numpy(np.array(query)), torch.from_numpy(np.array(row))).numpy()


class ExactScores:
    """Of pairs of `queries` (q, d) and float16 rows."""

    def __init__(self, queries: Tensor):
        self._queries = queries.double()
        self._norm = torch.linalg.vector_norm(self._queries, dim=1)

    def __call__(self, vectors: Tensor, largest: float, query: Tensor, row: Tensor) -> Tensor:
        """(p,) float32 for pairs ordered by query and then row; no row of `vectors` (n, d) has a norm above `largest`."""
        if query.device.type != "cpu" or len(query) < _MANY:
            return _by_pair(self._queries, vectors, query, row)
        sums = _by_row(self._queries, vectors, query, row)
        # What two sums of d exact products may differ by, whatever the order of adding.
        apart = (self._norm * (largest * (vectors.shape[1] + 8) * 2.0**-52)).index_select(0, query)
        scores, other = (sums - apart).float(), sums.add_(apart).float()
        unsure = (scores != other).nonzero()[:, 0]
        scores[unsure] = _by_pair(self._queries, vectors, query[unsure], row[unsure])
        return scores.add_(0.0)  # -0 and 0 are one score


def _by_pair(queries: Tensor, vectors: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """(p,) float32 from float64 queries and float16 vectors; fast where equal `query` stand together."""
    scores = torch.empty(len(query), dtype=torch.float32, device=queries.device)
    for part, runs in _chunks(query):
        products = vectors.index_select(0, row[part]).float().double()
        if runs:  # a product with each query, which is not copied for each of its rows
            for number, own in runs:
                products[own].mul_(queries[number])
        else:
            products.mul_(queries.index_select(0, query[part]))
        scores[part] = products.sum(1).float()
    return scores + 0.0


def _chunks(query: Tensor) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Parts of the pairs, each with its runs of one query (number, and where in the part) where these are long enough to use."""
    size = _CHUNK[query.device.type]
    numbers, runs = torch.unique_consecutive(query, return_counts=True)
    if query.device.type != "cpu" or len(numbers) * _LEAST_RUN > len(query):
        yield from ((slice(start, start + size), []) for start in range(0, len(query), size))
        return
    start, stop, inside = 0, 0, list[tuple[int, slice]]()
    for number, left in zip(numbers.tolist(), runs.tolist(), strict=True):
        while left:
            taken = min(left, start + size - stop)
            inside.append((number, slice(stop - start, stop - start + taken)))
            stop, left = stop + taken, left - taken
            if stop == start + size or stop == len(query):
                yield slice(start, stop), inside
                start, inside = stop, []


def _by_row(queries: Tensor, vectors: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """(p,) float64 sums, each row widened once for all its pairs, which are added up where both vectors lie."""
    _expect_sparse()
    order = torch.from_numpy(row.numpy().astype(np.min_scalar_type(len(vectors))).argsort(kind="stable"))
    pairs = torch.bincount(row, minlength=len(vectors))
    rows = pairs.nonzero()[:, 0]
    ends = torch.nn.functional.pad(pairs[rows].cumsum(0), (1, 0))
    sums, query = torch.zeros(len(query), dtype=torch.float64), query[order]
    narrow, wide, widest = (torch.empty(_ROWS, vectors.shape[1], dtype=t) for t in _WIDER)
    for start in range(0, len(rows), _ROWS):
        taken = rows[start : start + _ROWS]
        end = ends[start : start + len(taken) + 1]
        own, size = slice(int(end[0]), int(end[-1])), (len(taken), len(queries))
        wanted = torch.sparse_csr_tensor(end - end[0], query[own], sums[own], size, check_invariants=False)
        torch.index_select(vectors, 0, taken, out=narrow[: len(taken)])
        left = widest[: len(taken)].copy_(wide[: len(taken)].copy_(narrow[: len(taken)]))
        sums[own] = torch.sparse.sampled_addmm(wanted, left, queries.T).values()
    return torch.empty_like(sums).index_copy_(0, order, sums)


@cache
def _expect_sparse() -> None:
    """Have torch say now, unheard, what it says once a process: that its sparse matrices by rows are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()
