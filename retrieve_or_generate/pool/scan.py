"""Exact search by one streaming pass over a pool's embeddings: no index, any k, memory for the answers and a few blocks.

`nearest` holds the best rows so far; here stand the passes. A pass over a large pool opens with a guess: the best rows among a
sample say what the k-th score of all of them will at least be, all but surely, and pairs below it need not be looked at while
the first k rows are found. Whether the guess held shows at the end, and a query that it failed is searched again without one:
the guess changes speed, never the answer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pool.blocks import take_rows
from retrieve_or_generate.pool.filters import RowFilter
from retrieve_or_generate.pool.layout import Modality, Pool, PoolShard
from retrieve_or_generate.pool.nearest import Found, Nearest
from retrieve_or_generate.pool.scan_state import ScanState
from retrieve_or_generate.store import content_key

__all__ = ["Found", "scan", "scan_pool"]

_SAMPLE_ROWS = 24576
_SURE = math.log(1e7)  # a guess fails with a probability of at most 1e-7 per query, if the sample is a fair one
_VERSION = 1  # part of the key of a pass: raise when the same pass finds other rows


def scan(
    xq: np.ndarray,
    shards: Iterable[np.ndarray],
    k: int,
    *,
    allowed: Iterable[np.ndarray] | None = None,
    block_rows: int | None = None,
    product_dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Found:
    """The k rows of largest inner product with each query, best first, ties by row number.

    `xq` (q, d) float32; `shards` (n, d) float16 each, their rows counted on from shard to shard; `allowed` (n,) bool for
    each shard, False for rows that must not be found. Returns D (q, k) float32 and I (q, k) int64; where fewer than k rows
    exist the rest is -inf and -1. `product_dtype` (bfloat16 where the hardware multiplies it, else float32), `block_rows` and
    `device` change speed, never the answer; so does giving all shards in a list, which lets the pass open with a guess.
    `progress` is told how many rows were passed. Raises ValueError for shapes that do not fit and for vectors that are not
    finite.
    """

    def one_pass(queries: np.ndarray, floor: np.ndarray | None, progress: Callable[[int], None] | None) -> Found:
        nearest = Nearest(queries, k, device=device, block_rows=block_rows, product_dtype=product_dtype, floor=floor)
        first = 0
        for shard, mask in zip(shards, repeat(None) if allowed is None else allowed, strict=allowed is not None):
            nearest.add(shard, first, mask, progress)
            first += len(shard)
        return nearest.found()

    floor = None
    if allowed is None and isinstance(shards, Sequence):
        sizes = [len(shard) for shard in shards]
        floor = _guess(xq, k, sum(sizes), partial(_taken, shards, sizes), device)
    D, I = one_pass(xq, floor, progress)  # noqa: E741  FAISS's name for it
    short = _failed(D, floor)
    if short.any():
        D[short], I[short] = one_pass(xq[short], None, None)
    return D, I


def _guess(
    xq: np.ndarray, k: int, rows: int, take: Callable[[np.ndarray], np.ndarray], device: str
) -> np.ndarray | None:
    """(q,) float32: scores that more than k of `rows` rows surpass, all but surely; None where a sample would say too little.

    Were there fewer, a sample would hold on average at most `share` of them, and how many it holds would be spread less than
    Poisson's numbers of that mean.
    """
    if rows < 4 * _SAMPLE_ROWS or xq.ndim != 2:
        return None
    share = k * _SAMPLE_ROWS / rows
    rank = next(r for r in range(math.ceil(share) + 1, 10**9) if _rarity(r, share) >= _SURE)
    if rank > _SAMPLE_ROWS // 4:
        return None
    nearest = Nearest(xq, rank, device=device)
    nearest.add(take(np.linspace(0, rows - 1, _SAMPLE_ROWS).astype(np.int64)), 0)
    # The next number below, so that a score equal to it surpasses the guess.
    return np.nextafter(nearest.found()[0][:, -1], np.float32(-np.inf))


def _rarity(least: int, mean: float) -> float:
    """-ln of a bound on the probability that one of Poisson's numbers is at least `least`, which is above their mean.

    Beyond `least` the probabilities fall faster than a geometric series.
    """
    first = least * math.log(mean) - mean - math.lgamma(least + 1)
    return math.log1p(-mean / (least + 1)) - first


def _taken(shards: Iterable[np.ndarray], sizes: Sequence[int], rows: np.ndarray) -> np.ndarray:
    """(n, d) float16 of `rows`, which ascend, of shards of these sizes."""
    ends = np.cumsum(sizes)
    parts = np.split(rows, np.searchsorted(rows, ends))
    firsts = ends - np.asarray(sizes)
    taken = [take_rows(shard, part - first) for shard, part, first in zip(shards, parts, firsts, strict=False)]
    return np.concatenate(taken)


def _failed(D: np.ndarray, floor: np.ndarray | None) -> np.ndarray:
    """(q,) bool: queries of whose best k not all are known to lie above their guess."""
    return np.zeros(len(D), bool) if floor is None else D[:, -1] <= floor


def scan_pool(
    pool: Pool,
    xq: np.ndarray,
    k: int,
    modalities: Sequence[Modality] = ("image",),
    *,
    rows: RowFilter | None = None,
    device: str = "cpu",
    state: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Modality, Found]:
    """What `scan` gives for the pool's image or text embeddings, or both in one pass: D and I by modality.

    `xq` (q, d) float32. `rows` says which rows may be found. With a folder `state` the best rows so far are kept there durably, and
    the same call goes on from them, to the same answer; keeping them takes at most a twentieth of the time, so a few shards
    that pass quickly may be passed again. `progress` is called with bytes of embeddings passed and bytes in all.

    Raises ValueError for queries that do not fit, `IntegrityError` naming the file whose rows cannot be read or are not finite,
    `UsageError` where `state` holds another scan.
    """
    floors: dict[Modality, np.ndarray | None] = dict.fromkeys(modalities)
    if rows is None:
        sizes = [shard.rows for shard in pool.shards]
        for modality in modalities:
            shards = (pool.embeddings(shard, modality) for shard in pool.shards)
            with suppress(ValueError):  # the pass meets what is wrong as well, and names its file
                floors[modality] = _guess(xq, k, pool.rows, partial(_taken, shards, sizes), device)
    found = _pool_pass(pool, xq, k, floors, rows, device, state, progress)
    for modality, (D, I) in found.items():  # noqa: E741
        short = _failed(D, floors[modality])
        if short.any():
            again = state / f"again-{modality}" if state else None
            D[short], I[short] = _pool_pass(pool, xq[short], k, {modality: None}, rows, device, again, progress)[
                modality
            ]
    return found


def _pool_pass(
    pool: Pool,
    xq: np.ndarray,
    k: int,
    floors: dict[Modality, np.ndarray | None],
    rows: RowFilter | None,
    device: str,
    folder: Path | None,
    progress: Callable[[int, int], None] | None,
) -> dict[Modality, Found]:
    """The answers by modality of one pass over the shards; short for queries whose k-th score is not above their floor."""
    best = {modality: Nearest(xq, k, device=device, floor=floor) for modality, floor in floors.items()}
    with ScanState(folder, _pass_key(pool, xq, k, floors, rows)).held() as state:
        done, kept, excluded = state.load() or (0, {}, {})
        for modality in best if kept else ():
            best[modality].resume(*kept[modality])
        if rows:
            rows.resume(excluded)
        told = _Told(pool, len(best), done, progress)
        for shard, mask in _masked(pool.shards[done:], rows):
            for modality, nearest in best.items():
                _pass_shard(pool, shard, modality, nearest, mask, told)
            last = shard is pool.shards[-1]
            if last or state.is_due():
                found = {modality: nearest.found() for modality, nearest in best.items()}
                state.keep(shard.index + 1, found, dict(rows.excluded) if rows else {})
        return {modality: nearest.found() for modality, nearest in best.items()}


def _pass_key(
    pool: Pool, xq: np.ndarray, k: int, floors: dict[Modality, np.ndarray | None], rows: RowFilter | None
) -> str:
    """What the state of a pass follows from."""
    arrays = [xq.astype(np.float32), *(floor for floor in floors.values() if floor is not None)]
    sums = [[*array.shape, hashlib.sha256(array.tobytes()).hexdigest()] for array in arrays]
    return content_key([_VERSION, pool.fingerprint, sums, k, list(floors), rows.fingerprint if rows else None])


def _masked(shards: Sequence[PoolShard], rows: RowFilter | None) -> Iterator[tuple[PoolShard, np.ndarray | None]]:
    """Each shard with its mask, the next one's made while one is passed."""
    if rows is None:
        yield from ((shard, None) for shard in shards)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="masks") as thread:
        ahead = [thread.submit(rows.mask, shard) for shard in shards[:1]]
        for number, shard in enumerate(shards):
            mask = ahead.pop().result()
            ahead += [thread.submit(rows.mask, following) for following in shards[number + 1 : number + 2]]
            yield shard, mask


def _pass_shard(
    pool: Pool, shard: PoolShard, modality: Modality, nearest: Nearest, mask: np.ndarray | None, told: _Told
) -> None:
    try:
        nearest.add(pool.embeddings(shard, modality), shard.first_row, mask, told.within(shard))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        path = shard.image_embeddings if modality == "image" else shard.text_embeddings
        raise IntegrityError(f"{path}: {error}") from error
    told.passed(shard)


class _Told:
    """Bytes passed, of one pass over every modality, for whoever wants to know."""

    def __init__(self, pool: Pool, modalities: int, done: int, tell: Callable[[int, int], None] | None):
        self._row_bytes, self._tell = 2 * pool.dim, tell
        self._bytes = modalities * self._row_bytes * sum(shard.rows for shard in pool.shards[:done])
        self._all = modalities * self._row_bytes * pool.rows

    def within(self, shard: PoolShard) -> Callable[[int], None]:
        return lambda row: self._say(self._bytes + (row - shard.first_row) * self._row_bytes)

    def passed(self, shard: PoolShard) -> None:
        self._bytes += shard.rows * self._row_bytes

    def _say(self, done: int) -> None:
        if self._tell:
            self._tell(done, self._all)
