"""Exact search by one streaming pass over a pool's embeddings: no index, any k, memory for the answers and one block.

A half-width product of every query with a block of rows finds the pairs that could beat a query's k-th best so far; only
those are scored exactly. What the narrow product may be wrong by is bounded from the rounding errors measured on the very
vectors (Cauchy-Schwarz), so no true neighbour is lost. Scores are accumulated in float64 and rounded to float32 once, so
they depend neither on the block size nor on the thread count, and equal rows score equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

_GROUP = 64  # columns whose maximum is compared with the threshold before any of them is looked at
_QUERIES = 1024  # queries per product
_CHUNK = 256  # rows converted, or pairs scored, at a time: they stay in the second-level cache

Rows = np.ndarray  # (n,) int64 global row numbers


def scan(
    xq: np.ndarray,
    shards: Iterable[np.ndarray],
    k: int,
    *,
    allowed: Iterable[np.ndarray] | None = None,
    block_rows: int = 16384,
    product_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of largest inner product with each query, best first, ties by row number.

    `xq` (q, d) float32; `shards` (n, d) float16 each, their rows counted on from shard to shard; `allowed` (n,) bool for
    each shard, False for rows that must not be found. Returns D (q, k) float32 and I (q, k) int64; where fewer than k rows
    exist the rest is -inf and -1. `product_dtype` (bfloat16 where the processor multiplies it, else float32) changes speed,
    never the answer. `progress` is told how many rows were passed. Raises ValueError for shapes that do not fit and for
    vectors that are not finite.
    """
    queries = _checked_queries(xq, k)
    dtype = product_dtype or _product_dtype()
    parts = [_Best(part, k, dtype) for part in queries.split(_QUERIES)]
    block = _Block(block_rows, queries.shape[1], dtype)
    for rows in block.fill(shards, allowed, progress):
        for best in parts:
            best.update(block, rows)
    found = [best.sorted() for best in parts]
    return np.concatenate([d for d, _ in found]), np.concatenate([i for _, i in found])


def pair_scores(xq: np.ndarray, xb: np.ndarray, query: np.ndarray, row: np.ndarray) -> np.ndarray:
    """(p,) float32 inner products of `xq[query[i]]` and `xb[row[i]]`, scored exactly as `scan` does.

    `xq` (q, d) float32, `xb` (n, d) float16.
    """
    queries = torch.from_numpy(np.array(xq, np.float32)).double()
    vectors = torch.from_numpy(np.array(xb, np.float16))
    return _exact(queries, vectors, torch.from_numpy(np.array(query)), torch.from_numpy(np.array(row))).numpy()


def _checked_queries(xq: np.ndarray, k: int) -> Tensor:
    if xq.ndim != 2 or not len(xq):
        raise ValueError(f"queries are a (q, d) array with q ≥ 1, not one of shape {xq.shape}")
    if k < 1:
        raise ValueError(f"k is at least 1, not {k}")
    if not np.isfinite(xq).all():
        raise ValueError("queries hold values that are not finite")
    return torch.from_numpy(np.array(xq, np.float32))


def _product_dtype() -> torch.dtype:
    """bfloat16 only where it is multiplied in hardware; emulated it would be slower than float32."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32


def _exact(queries: Tensor, vectors: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """(p,) float32 from float64 queries and float16 vectors."""
    scores = torch.empty(len(query), dtype=torch.float32)
    for start in range(0, len(query), _CHUNK):
        part = slice(start, start + _CHUNK)
        products = vectors.index_select(0, row[part]).float().double()
        scores[part] = products.mul_(queries.index_select(0, query[part])).sum(1)
    return scores + 0.0  # -0 and 0 are one score


class _Block:
    """The rows under the needle: as stored, narrowed, and by how much narrowing changed them."""

    def __init__(self, rows: int, dim: int, dtype: torch.dtype):
        padded = -(-rows // _GROUP) * _GROUP
        self.rows, self.dim = rows, dim
        self.vectors = torch.zeros(padded, dim, dtype=torch.float16)
        self.narrow = torch.zeros(padded, dim, dtype=dtype)
        self.norm = self.error = 0.0

    def fill(
        self, shards: Iterable[np.ndarray], allowed: Iterable[np.ndarray] | None, progress: Callable[[int], None] | None
    ) -> Iterator[Rows]:
        """Load one block after another; yields the row numbers of what is loaded."""
        first = 0
        for shard, mask in zip(shards, repeat(None) if allowed is None else allowed, strict=allowed is not None):
            self._check(shard, mask)
            for start in range(0, len(shard), self.rows):
                stop = min(start + self.rows, len(shard))
                rows = np.arange(start, stop) if mask is None else start + np.flatnonzero(mask[start:stop])
                if len(rows):
                    self._load(shard[start:stop] if len(rows) == stop - start else shard[rows])
                    yield first + rows
                if progress:
                    progress(first + stop)
            first += len(shard)

    def _check(self, shard: np.ndarray, mask: np.ndarray | None) -> None:
        if shard.ndim != 2 or shard.shape[1] != self.dim or shard.dtype != np.float16:
            raise ValueError(f"a shard is (n, {self.dim}) float16 like the queries, not {shard.shape} {shard.dtype}")
        if mask is not None and (mask.shape != (len(shard),) or mask.dtype != np.bool_):
            raise ValueError(f"a mask is ({len(shard)},) bool like its shard, not {mask.shape} {mask.dtype}")

    def _load(self, vectors: np.ndarray) -> None:
        self.count = len(vectors)
        self.padded = -(-self.count // _GROUP) * _GROUP
        self.vectors.numpy()[: self.count] = vectors
        self.narrow[self.count : self.padded] = 0
        norm = error = 0.0
        for start in range(0, self.count, _CHUNK):
            part = slice(start, min(start + _CHUNK, self.count))
            wide = self.vectors[part].float()
            self.narrow[part] = wide
            norm = max(norm, _largest_norm(wide))
            error = max(error, _largest_norm(wide.sub_(self.narrow[part])))
        self.norm, self.error = norm, error


def _largest_norm(vectors: Tensor) -> float:
    """Rounded up, so that it bounds; ValueError if there is none."""
    largest = float(torch.linalg.vector_norm(vectors, dim=1).max())
    if not np.isfinite(largest):
        raise ValueError("a shard holds values that are not finite")
    return largest * (1 + 1e-5)


class _Best:
    """The best k rows so far of some queries, in buffers of twice the room so that most rows are only appended."""

    def __init__(self, queries: Tensor, k: int, dtype: torch.dtype):
        q, self.k = len(queries), k
        self.exact = queries.double()
        self.narrow = queries.to(dtype)
        self.norm = torch.linalg.vector_norm(self.exact, dim=1)
        self.error = torch.linalg.vector_norm(self.exact - self.narrow.double(), dim=1)
        self.scores = torch.full((q, 2 * k), -torch.inf)
        self.rows = torch.full((q, 2 * k), -1, dtype=torch.int64)
        self.count = torch.zeros(q, dtype=torch.int64)
        self.kth = torch.full((q,), -torch.inf)
        self.pending = 0

    def update(self, block: _Block, rows: Rows) -> None:
        query, column = self._candidates(block)
        scores = _exact(self.exact, block.vectors, query, column)
        beats = scores > self.kth[query]  # an equal score loses: its row number is larger
        self._add(query[beats], torch.from_numpy(rows)[column[beats]], scores[beats])

    def _margin(self, block: _Block) -> Tensor:
        """(q,) float64: how far a narrow product may lie from the true one, before it is rounded for output.

        Two terms for the rounding of either factor, one for float32 accumulation over d terms.
        """
        norm, dim = block.norm + block.error, block.dim
        return self.error * norm + (self.norm + self.error) * (block.error + norm * (dim + 8) * 2.0**-23) + 1e-30

    def _candidates(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Queries and columns, ordered by both, of every pair that may beat the query's k-th best."""
        narrow = torch.mm(self.narrow, block.narrow[: block.padded].T)  # (q, n) in the product's dtype
        margin = self._margin(block)
        floor = self.kth.double()
        if block.count >= self.k and torch.isinf(floor).any():
            floor = torch.maximum(floor, self._floor_of(narrow[:, : block.count], margin))
        # Rounding is monotone: a true score ≥ floor has a product that rounds to at least this.
        threshold = (floor - margin).to(narrow.dtype)
        query, column = _at_least(narrow, threshold)
        real = column < block.count
        return query[real], column[real]

    def _floor_of(self, narrow: Tensor, margin: Tensor) -> Tensor:
        """(q,) float64: k rows of the block alone score at least this."""
        kth = narrow.float().kthvalue(narrow.shape[1] - self.k + 1, dim=1).values.double()
        return kth - kth.abs() * torch.finfo(narrow.dtype).eps - margin

    def _add(self, query: Tensor, rows: Tensor, scores: Tensor) -> None:
        """Append pairs ordered by query; make room where a query's buffer is full."""
        while len(query):
            place = self.count[query] + _position_within(query)
            fits = place < 2 * self.k
            self.scores[query[fits], place[fits]] = scores[fits]
            self.rows[query[fits], place[fits]] = rows[fits]
            self.count += torch.bincount(query[fits], minlength=len(self.count))
            self.pending += int(fits.sum())
            if not fits.all() or 2 * self.pending > self.k * len(self.count):
                self._compact()
            left = ~fits & (scores > self.kth[query])
            query, rows, scores = query[left], rows[left], scores[left]

    def _compact(self) -> None:
        """Keep the best k of each query, sorted. Rows arrive in order, so a tie goes to the earlier place."""
        key = _sortable(self.scores) << 32
        key -= torch.arange(key.shape[1])
        order = key.topk(self.k, dim=1).indices
        self.scores[:, : self.k] = self.scores.gather(1, order)
        self.rows[:, : self.k] = self.rows.gather(1, order)
        self.scores[:, self.k :] = -torch.inf
        self.rows[:, self.k :] = -1
        self.count.clamp_(max=self.k)
        self.kth = self.scores[:, self.k - 1].clone()
        self.pending = 0

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        self._compact()
        return self.scores[:, : self.k].numpy(), self.rows[:, : self.k].numpy()


def _at_least(narrow: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs with `narrow[i, j] >= threshold[i]`. Groups of columns are passed over by their maximum."""
    q, n = narrow.shape
    if narrow.dtype == torch.bfloat16 and bool((threshold > 0).all()):
        # Positive bfloat16 numbers are ordered like their bits, negative ones come below them: compare as integers.
        narrow, threshold = narrow.view(torch.int16), threshold.view(torch.int16)
    groups = narrow.view(q, n // _GROUP, _GROUP)
    query, group = (groups.amax(2) >= threshold[:, None]).nonzero(as_tuple=True)
    hit, column = (groups[query, group] >= threshold[query, None]).nonzero(as_tuple=True)
    return query[hit], group[hit] * _GROUP + column


def _position_within(query: Tensor) -> Tensor:
    """0, 1, 2, … within each run of equal numbers."""
    _, runs = torch.unique_consecutive(query, return_counts=True)
    starts = runs.cumsum(0) - runs
    return torch.arange(len(query)) - starts.repeat_interleave(runs)


def _sortable(scores: Tensor) -> Tensor:
    """int64 numbers in the order of the float32 ones."""
    bits = scores.view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
