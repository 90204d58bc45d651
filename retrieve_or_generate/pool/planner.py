"""Scan or index: what a search of a pool would cost either way on this machine, which one to take, and why.

An exact scan costs one pass over the embeddings however many queries there are, until the products cost more than the reading. An
index costs each query its lists and the rows that are scored again, and finds only a part: it is taken where it is faster and its
measured recall is high enough. Rates are measured on the spot, in a fraction of a second, on the pool's own files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.memory import memory_bytes
from retrieve_or_generate.pool.exact import pair_scores
from retrieve_or_generate.pool.index import (
    LEAST_QUERIES,
    Index,
    IndexRecipe,
    Measured,
    measure_recall,
    open_index,
    recorded_recall,
    search_index,
)
from retrieve_or_generate.pool.layout import Modality, Pool
from retrieve_or_generate.pool.scan import scan
from retrieve_or_generate.pool.vectors import vectors
from retrieve_or_generate.progress import duration

LEAST_RECALL = 0.95
MEASURED_UNASKED_SECONDS = 60.0  # a recall that takes longer is measured only by rog index verify
_BLOCK, _QUERIES, _PAIRS, _PROBES, _LONG_SECONDS = 32768, 256, 4096, 64, 0.5
_ANSWER_BYTES = 24  # per query and neighbour: score and row number, with twice the room


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second, with rows of the pool's dimension.

    Bytes of embeddings read; rows passed by one query; further queries × rows; pairs scored exactly.
    """

    read_bytes: float
    rows: float
    products: float
    pairs: float


@dataclass(frozen=True)
class Plan:
    """How to search, and why. Seconds are estimates; `index_seconds` is None where there is no index to ask."""

    engine: Literal["scan", "index"]
    why: str
    scan_seconds: float
    index_seconds: float | None
    memory_bytes: int
    recall: Measured | None


def plan(
    pool: Pool,
    queries: int,
    k: int,
    index: IndexRecipe | Index | None,
    device: str = "cpu",
    *,
    modality: Modality | None = None,
    folder: Path | None = None,
    rates: Rates | None = None,
    nprobe: int | None = None,
    least_recall: float = LEAST_RECALL,
) -> Plan:
    """The engine for `queries` queries of `k` neighbours each, over the index's modality, or `modality` where there is no index.

    A recipe stands for its index in `folder`, by default beside the pool. Raises `UsageError` where the answers do not fit this
    machine's memory.
    """
    recipe = index.recipe if isinstance(index, Index) else index
    asked = modality or (recipe.modality if recipe else "image")
    answers = queries * min(k, pool.rows) * _ANSWER_BYTES
    if answers > memory_bytes():
        raise UsageError(
            f"{queries} queries with k={k} have {answers / 2**30:.0f} GiB of answers, more than this machine's memory; "
            "lower k, or search class by class"
        )
    scan_seconds = scan_time(pool, queries, k, rates or measure_rates(pool, asked, device))
    exact = f"one exact pass over {pool.rows:,} rows takes {_about(scan_seconds)}"
    opened = index if isinstance(index, Index) else _there(index, pool, folder)

    def scanning(why: str, index_seconds: float | None = None, recall: Measured | None = None) -> Plan:
        return Plan("scan", f"{exact}; {why}", scan_seconds, index_seconds, answers, recall)

    if opened is None:
        return scanning("no index was asked for" if recipe is None else f"no index of recipe {recipe.name!r} is built")
    recall = recorded_recall(opened, pool, k, nprobe)
    if recall is None:
        return scanning("the recall of the index is not measured at this k (rog index verify measures it)")
    if recall.recall_at_k < least_recall:
        return scanning(f"the index finds only {recall}", None, recall)
    index_seconds = index_time(opened, pool, queries, k, nprobe)
    estimate = f"the index takes {_about(index_seconds)} and finds {recall}"
    if index_seconds >= scan_seconds:
        return scanning(estimate, index_seconds, recall)
    return Plan("index", f"{estimate}; {exact}", scan_seconds, index_seconds, answers, recall)


def _about(seconds: float) -> str:
    return f"about {duration(seconds)}" if seconds >= 1 else "less than a second"


def _there(recipe: IndexRecipe | None, pool: Pool, folder: Path | None) -> Index | None:
    if recipe is None:
        return None
    place = folder or pool.folder / "indices" / recipe.name
    return open_index(place, pool, recipe, verify=False) if place.exists() else None


def scan_time(pool: Pool, queries: int, k: int, rates: Rates) -> float:
    """Seconds: reading and products overlap, scoring of what beats the k-th best comes on top.

    Of n rows in random order, about k (1 + ln(n / k)) beat a query's k-th best so far.
    """
    rows, kept = pool.rows, min(k, pool.rows)
    read = rows * pool.dim * 2 / rates.read_bytes
    products = rows / rates.rows + rows * (queries - 1) / rates.products
    pairs = queries * kept * (1 + float(np.log(rows / kept))) / rates.pairs
    return max(read, products) + pairs


def index_time(index: Index, pool: Pool, queries: int, k: int, nprobe: int | None = None) -> float:
    """Seconds for `queries` queries, from a few of them: rows of the pool, searched and scored again."""
    rows = (np.arange(_PROBES, dtype=np.int64) * pool.rows) // _PROBES
    xq = vectors(pool, index.recipe.modality, np.unique(rows)).astype(np.float32)
    first = _seconds(lambda: search_index(index, pool, xq[:1], k, nprobe=nprobe))  # maps what is not mapped yet
    rest = xq[1 : 1 + min(queries, int(_LONG_SECONDS / first))]
    if not len(rest):
        return first * queries
    return _seconds(lambda: search_index(index, pool, rest, k, nprobe=nprobe)) / len(rest) * queries


@lru_cache(maxsize=8)
def measure_rates(pool: Pool, modality: Modality = "image", device: str = "cpu") -> Rates:
    """Rates of this machine on the first rows of a shard in the middle of the pool, measured once a process."""
    shard = pool.shards[len(pool.shards) // 2]
    stored = pool.embeddings(shard, modality)[:_BLOCK]
    read = _seconds(lambda: np.array(stored))
    block = np.array(stored)
    xq = np.resize(block[:_QUERIES].astype(np.float32), (_QUERIES, pool.dim))

    def pass_seconds(queries: int) -> float:
        return min(_seconds(lambda: scan(xq[:queries], [block], 1, device=device)) for _ in range(2))

    pass_seconds(1)  # starts threads, loads kernels
    one, many = pass_seconds(1), pass_seconds(_QUERIES)
    query, row = np.arange(_PAIRS) % _QUERIES, np.arange(_PAIRS) % len(block)
    pairs = _seconds(lambda: pair_scores(xq, block, query, row))
    return Rates(
        read_bytes=stored.nbytes / read,
        rows=len(block) / one,
        products=len(block) * (_QUERIES - 1) / max(many - one, 1e-6),
        pairs=_PAIRS / pairs,
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return max(time.perf_counter() - started, 1e-9)


def known_recall(
    index: Index, pool: Pool, k: int, sample: Callable[[], np.ndarray], nprobe: int | None = None, device: str = "cpu"
) -> Measured:
    """The recall that goes with the answers of an index: what was recorded, else measured now if that takes a minute at most.

    `sample` gives (q, d) unit queries, a hundred at least, when they are needed. Raises `UsageError` where measuring takes longer.
    """
    recorded = recorded_recall(index, pool, k, nprobe)
    if recorded:
        return recorded
    seconds = scan_time(pool, LEAST_QUERIES, k, measure_rates(pool, index.recipe.modality, device))
    if seconds > MEASURED_UNASKED_SECONDS:
        raise UsageError(
            f"{index.path}: nobody has measured what share of the true neighbours it finds at k={k}; measuring takes "
            f"{_about(seconds)}: rog index verify {index.path} --pool {pool.folder} -k {k}"
        )
    return measure_recall(index, pool, sample(), k, nprobe, device=device)
