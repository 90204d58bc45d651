"""The best k rows so far for many queries, shard after shard: what `scan` turns on.

A half-width product of every query with a block of rows finds the pairs that could beat a query's k-th best so far; only
those are scored exactly. What the narrow product may be wrong by is bounded from the rounding errors measured on the very
vectors (Cauchy-Schwarz), so no true neighbour is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from retrieve_or_generate.pool.blocks import BlockReader
from retrieve_or_generate.pool.exact import ExactScores

_GROUP = 64  # columns whose maximum is compared with the threshold before any of them is looked at
_QUERIES = 1024  # queries per product
_SELECTED = 128  # queries whose k-th best of a block is looked for at a time: it takes six times the block's products
_REFRESH = 8  # the k-th best of all queries is looked for when one part in so many of k rows, on average, is new
_CHUNK = {"cpu": 256, "cuda": 32768}  # rows narrowed at a time; a processor keeps them in its cache
_BLOCK_ROWS = {"cpu": 16384, "cuda": 131072}

Found = tuple[np.ndarray, np.ndarray]
"""D (q, k) float32, best first, and I (q, k) int64; -inf and -1 where there are fewer than k."""


class Nearest:
    """The k rows of largest inner product with each query, of those added so far; ties by row number, the lower first.

    `xq` (q, d) float32. Rows must be added in the order of their numbers. With `floor` (q,) float32 only scores above it are
    looked for: the answer for a query holds where its k-th score is above its floor, and is short elsewhere. Memory: 24 bytes
    times queries times k, and a few blocks. Raises ValueError for queries that do not fit.
    """

    def __init__(
        self,
        xq: np.ndarray,
        k: int,
        *,
        device: str = "cpu",
        block_rows: int | None = None,
        product_dtype: torch.dtype | None = None,
        floor: np.ndarray | None = None,
    ):
        queries = _checked_queries(xq, k)
        self._device = torch.device(device)
        self._dtype = product_dtype or _product_dtype(self._device)
        self._reader = BlockReader(
            block_rows or _BLOCK_ROWS[self._device.type], queries.shape[1], self._device, multiple=_GROUP
        )
        floors = torch.full((len(queries),), -torch.inf) if floor is None else torch.from_numpy(np.array(floor))
        self._block = _Block(self._reader.padded, queries.shape[1], self._dtype, self._device)
        product = torch.empty(min(_QUERIES, len(queries)) * self._reader.padded, dtype=self._dtype, device=self._device)
        self._parts = [
            _Best(part.to(self._device), k, self._dtype, low.to(self._device), product)
            for part, low in zip(queries.split(_QUERIES), floors.split(_QUERIES), strict=True)
        ]

    def add(
        self,
        shard: np.ndarray,
        first_row: int,
        allowed: np.ndarray | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Pass over `shard` (n, d) float16, whose rows count on from `first_row`.

        `allowed` (n,) bool is False for rows to leave out. `progress` is told the number after the last row passed. Raises
        ValueError for shapes that do not fit and for vectors that are not finite.
        """
        with _full_accumulation(self._device):
            for vectors, rows, stop in self._reader.read(shard, allowed):
                if len(rows):
                    self._block.load(vectors, len(rows))
                    numbers = torch.from_numpy(first_row + rows).to(self._device)
                    for best in self._parts:
                        best.update(self._block, numbers)
                if progress:
                    progress(first_row + stop)

    def found(self) -> Found:
        """The answer for all rows added so far; more may be added after."""
        found = [best.sorted() for best in self._parts]
        return np.concatenate([d for d, _ in found]), np.concatenate([i for _, i in found])

    def resume(self, D: np.ndarray, I: np.ndarray) -> None:  # noqa: E741  FAISS's name for it
        """Go on from what `found` gave."""
        first = 0
        for best in self._parts:
            part = slice(first, first + best.queries)
            best.resume(torch.from_numpy(D[part]), torch.from_numpy(I[part]))
            first += best.queries


def _checked_queries(xq: np.ndarray, k: int) -> Tensor:
    if xq.ndim != 2 or not len(xq):
        raise ValueError(f"queries are a (q, d) array with q ≥ 1, not one of shape {xq.shape}")
    if k < 1:
        raise ValueError(f"k is at least 1, not {k}")
    if not np.isfinite(xq).all():
        raise ValueError("queries hold values that are not finite")
    return torch.from_numpy(np.array(xq, np.float32))


def _product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 only where it is multiplied in hardware; emulated it would be slower than float32."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32


@contextmanager
def _full_accumulation(device: torch.device) -> Iterator[None]:
    """The bound on a narrow product holds for sums kept in float32; a GPU may be set to add up in less."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction, settings.allow_tf32
    settings.allow_bf16_reduced_precision_reduction, settings.allow_tf32 = False, False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction, settings.allow_tf32 = before


class _Block:
    """The rows under the needle: as stored, narrowed, and by how much narrowing changed them."""

    def __init__(self, padded: int, dim: int, dtype: torch.dtype, device: torch.device):
        self.dim, self._narrow = dim, torch.zeros(padded, dim, dtype=dtype, device=device)
        self._wide = torch.empty(_CHUNK[device.type], dim, device=device)

    def load(self, vectors: Tensor, count: int) -> None:
        """Take `vectors` (n + padding, d) float16, of which the first `count` are rows and the rest is not looked at."""
        self.vectors, self.count = vectors, count
        self.narrow = self._narrow[: len(vectors)]
        self.narrow[count:] = 0
        self.norm = self.error = 0.0
        for start in range(0, count, len(self._wide)):
            part = slice(start, min(start + len(self._wide), count))
            wide = self._wide[: part.stop - start].copy_(vectors[part])
            self.narrow[part] = wide
            self.norm = max(self.norm, _largest_norm(wide))
            self.error = max(self.error, _largest_norm(wide.sub_(self.narrow[part])))


def _largest_norm(vectors: Tensor) -> float:
    """Rounded up, so that it bounds; ValueError if there is none."""
    largest = float(torch.linalg.vector_norm(vectors, dim=1).max())
    if not np.isfinite(largest):
        raise ValueError("a shard holds values that are not finite")
    return largest * (1 + 1e-5)


class _Best:
    """The best k rows so far of some queries, in buffers of twice the room so that most rows are only appended."""

    def __init__(self, queries: Tensor, k: int, dtype: torch.dtype, floor: Tensor, product: Tensor):
        self.queries, self.k, self.device = len(queries), k, queries.device
        self.product = product  # room for a product with a block
        self.exact = ExactScores(queries)
        self.narrow = queries.to(dtype)
        self.norm = torch.linalg.vector_norm(queries.double(), dim=1)
        self.error = torch.linalg.vector_norm(queries.double() - self.narrow.double(), dim=1)
        self.scores = torch.full((self.queries, 2 * k), -torch.inf, device=self.device)
        self.rows = torch.full((self.queries, 2 * k), -1, dtype=torch.int64, device=self.device)
        self.count = torch.zeros(self.queries, dtype=torch.int64, device=self.device)
        self.floor = floor  # (q,) float32: the given one, or the k-th best score once that is higher
        self.pending = 0

    def update(self, block: _Block, rows: Tensor) -> None:
        query, column = self._candidates(block)
        scores = self.exact(block.vectors, block.norm, query, column)
        # An equal score loses: its row number is larger.
        beats = _where(scores > self.floor.index_select(0, query))
        self._add(*_taken(beats, query, rows.index_select(0, column), scores))

    def _margin(self, block: _Block) -> Tensor:
        """(q,) float64: how far a narrow product may lie from the true one, before it is rounded for output.

        Two terms for the rounding of either factor, one for float32 accumulation over d terms.
        """
        norm, dim = block.norm + block.error, block.dim
        return self.error * norm + (self.norm + self.error) * (block.error + norm * (dim + 8) * 2.0**-23) + 1e-30

    def _candidates(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Queries and columns, ordered by both, of every pair that may beat the query's floor."""
        narrow = self.product[: self.queries * len(block.narrow)].view(self.queries, -1)
        torch.mm(self.narrow, block.narrow.T, out=narrow)  # (q, n) in the product's dtype
        margin = self._margin(block)
        floor = self.floor.double()
        if block.count >= self.k and torch.isinf(floor).any():
            floor = torch.maximum(floor, self._floor_of(narrow[:, : block.count], margin))
        # Rounding is monotone: a true score ≥ floor has a product that rounds to at least this.
        threshold = (floor - margin).to(narrow.dtype)
        query, column = _at_least(narrow, threshold)
        query, column = _taken(_where(column < block.count), query, column)
        return query, column

    def _floor_of(self, narrow: Tensor, margin: Tensor) -> Tensor:
        """(q,) float64: k rows of the block alone score at least this."""
        if 2 * self.k * _GROUP <= narrow.shape[1]:  # so few are mostly the best of their group of columns
            narrow = narrow[:, : narrow.shape[1] // _GROUP * _GROUP].unflatten(1, (-1, _GROUP)).amax(2)
        nth = narrow.shape[1] - self.k + 1
        kth = torch.cat([part.float().kthvalue(nth, dim=1).values for part in narrow.split(_SELECTED)]).double()
        return kth - kth.abs() * torch.finfo(narrow.dtype).eps - margin

    def _add(self, query: Tensor, rows: Tensor, scores: Tensor) -> None:
        """Append pairs ordered by query; make room where a query's buffer is full."""
        room = self.scores.shape[1]
        while len(query):
            new = torch.bincount(query, minlength=self.queries)
            start = self.count - (new.cumsum(0) - new)
            place = torch.arange(len(query), device=self.device) + start.index_select(0, query)
            fits = _where(place < room)
            at, more_rows, more_scores = _taken(fits, place + query * room, rows, scores)
            self.scores.view(-1)[at] = more_scores
            self.rows.view(-1)[at] = more_rows
            self.count = (self.count + new).clamp_(max=room)
            self.pending += len(fits)
            if len(fits) == len(query):
                break
            self._compact()
            left = _where((place >= room) & (scores > self.floor.index_select(0, query)))
            query, rows, scores = _taken(left, query, rows, scores)
        if _REFRESH * self.pending > self.k * self.queries:
            self._raise_floor()

    def _raise_floor(self) -> None:
        """To the k-th best score of every query that has as many."""
        full = (self.count >= self.k).nonzero()[:, 0]
        if len(full):
            scores = self.scores[full, : int(self.count.max())]
            self.floor[full] = torch.maximum(self.floor[full], _kth_largest(scores, self.k))
        self.pending = 0

    def _compact(self) -> None:
        """Keep the best k of each query, sorted. Rows arrive in order, so a tie goes to the earlier place."""
        key = _sortable(self.scores) << 32
        key -= torch.arange(key.shape[1], device=self.device)
        order = key.topk(self.k, dim=1).indices
        self.scores[:, : self.k] = self.scores.gather(1, order)
        self.rows[:, : self.k] = self.rows.gather(1, order)
        self.scores[:, self.k :] = -torch.inf
        self.rows[:, self.k :] = -1
        self.count.clamp_(max=self.k)
        self.floor = torch.maximum(self.floor, self.scores[:, self.k - 1])
        self.pending = 0

    def sorted(self) -> Found:
        self._compact()
        return self.scores[:, : self.k].cpu().numpy(), self.rows[:, : self.k].cpu().numpy()

    def resume(self, scores: Tensor, rows: Tensor) -> None:
        self.scores[:, : self.k] = scores.to(self.device)
        self.rows[:, : self.k] = rows.to(self.device)
        self.count = (self.rows >= 0).sum(1)
        self._compact()


def _at_least(narrow: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs with `narrow[i, j] >= threshold[i]`. Groups of columns are passed over by their maximum."""
    q, n = narrow.shape
    if narrow.dtype == torch.bfloat16 and bool((threshold > 0).all()):
        # Positive bfloat16 numbers are ordered like their bits, negative ones come below them: compare as integers.
        narrow, threshold = narrow.view(torch.int16), threshold.view(torch.int16)
    groups = narrow.view(q, n // _GROUP, _GROUP)
    query, group = (groups.amax(2) >= threshold[:, None]).nonzero(as_tuple=True)
    columns = groups.view(-1, _GROUP).index_select(0, query * groups.shape[1] + group)
    hits = _where((columns >= threshold[query, None]).view(-1))
    query, group = _taken(hits // _GROUP, query, group)
    return query, group * _GROUP + hits % _GROUP


def _where(mask: Tensor) -> Tensor:
    """Places of what is true in `mask` (n,); numpy is quicker where few are."""
    return mask.nonzero()[:, 0] if mask.is_cuda else torch.from_numpy(np.flatnonzero(mask.numpy()))


def _taken(places: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """(n,) of each of `values` at `places` (n,)."""
    return tuple(one.index_select(0, places) for one in values)


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """(q,) of `scores` (q, n); numpy is twice as quick on a processor."""
    if scores.is_cuda:
        return scores.topk(k, dim=1).values[:, -1]
    nth = scores.shape[1] - k
    return torch.from_numpy(np.partition(scores.numpy(), nth, axis=1)[:, nth])


def _sortable(scores: Tensor) -> Tensor:
    """int64 numbers in the order of the float32 ones."""
    bits = scores.view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
