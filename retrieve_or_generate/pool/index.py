"""A FAISS index over a pool's embeddings: searched from disk, its answers scored exactly, its recall measured.

Reads what `build.py` wrote (`index.json` names every file with its sha256: a damaged index still answers, only wrongly, so nothing
but a checksum tells) or what others published (`published.py`). An index is approximate. `measure_recall` says by how much, against
the exact scan, and keeps the number: beside an index of ours as `measured.json`, for a published one in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from pydantic import ValidationError

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pool.build import INDEX_SEAL, build_index
from retrieve_or_generate.pool.exact import pair_scores
from retrieve_or_generate.pool.faiss_files import INDEX, LISTS, search_parameters
from retrieve_or_generate.pool.layout import Modality, Pool, PoolShard
from retrieve_or_generate.pool.published import (
    fingerprint,
    index_files,
    published_modality,
    read_published,
    sampled,
    try_reading,
)
from retrieve_or_generate.pool.recipe import LEAST_QUERIES, RECIPES, IndexRecipe, Measured, Recall, load_recipe
from retrieve_or_generate.pool.scan import scan
from retrieve_or_generate.pool.vectors import vectors
from retrieve_or_generate.store import cache_folder, check_files, content_key, read_json, read_seal, write_json

__all__ = [
    "INDEX",
    "INDEX_SEAL",
    "LEAST_QUERIES",
    "LISTS",
    "RECIPES",
    "Index",
    "IndexRecipe",
    "Measured",
    "Recall",
    "build_index",
    "load_recipe",
    "measure_recall",
    "open_index",
    "packed",
    "recorded_recall",
    "search_index",
    "self_found",
]

Allowed = Callable[[PoolShard], np.ndarray | None] | np.ndarray
"""Rows that may be found: a mask (rows,) bool for each shard (None: all of it), all of them at once, or `packed` bits."""

_VERIFIED_BYTES = 4 << 30  # read in seconds; an index of hundreds of GiB is not hashed for one search
_BATCH_BYTES = 1 << 28  # embeddings read for one batch of queries
_MEASURED = "measured.json"


@dataclass(frozen=True)
class Index:
    """An opened index: its quantisers in memory, its lists on disk where its type can."""

    path: Path
    recipe: IndexRecipe
    built: bool  # by a recipe of ours; else published by others
    fingerprint: str

    def mapped(self) -> Any:
        """FAISS's own object."""
        files = (self.path / INDEX,) if self.built else index_files(self.path, self.recipe.modality)
        return _mapped(files, self.fingerprint)


def open_index(path: Path, pool: Pool, recipe: IndexRecipe | None = None, verify: bool | None = None) -> Index:
    """The index at `path`: a folder that `build_index` wrote, or one published by others.

    `recipe` says what a published one is; without it, the lists to visit are those recorded in it, and the model is the pool's.

    With `verify` every byte of a built one is compared with its sha256; without, sizes and samples of the content. By default
    what is of up to four GiB is verified.

    Raises:
        UsageError: no index there, or one of another pool (other rows, another dimension). IntegrityError: a file changed, or
        cannot be read.
    """
    record = read_seal(path, INDEX_SEAL, verify=False)
    if record is None:
        return _published(path, pool, recipe)
    try:
        own = IndexRecipe.model_validate(record["recipe"])
    except (KeyError, ValidationError):
        raise IntegrityError(f"{path / INDEX_SEAL}: not the record of an index; build it anew") from None
    if record["key"] != own.key(pool):
        raise UsageError(f"{path}: an index of another pool than {pool.folder}; build one for it")
    if recipe:
        if record["key"] != recipe.key(pool):
            raise UsageError(
                f"{path}: an index of another recipe than {recipe.name!r} as it is now; build one for it, or name the "
                f"index alone (retrieve.index={path})"
            )
        own = recipe  # whose nprobe and recall may be newer
    _check_bytes(path, record, verify)
    return Index(path, own, True, content_key(record["files"]))


def _check_bytes(path: Path, record: dict[str, Any], verify: bool | None) -> None:
    files = record["files"]
    whole = sum(known["bytes"] for known in files.values()) <= _VERIFIED_BYTES if verify is None else verify
    if whole:
        return check_files(path, files)
    for name, known in record["sampled"].items():
        if not (path / name).is_file() or sampled(path / name) != known:
            raise IntegrityError(f"{path / name}: missing, or its bytes changed since it was written. Make {path} anew")
    return None


def _published(path: Path, pool: Pool, recipe: IndexRecipe | None) -> Index:
    if recipe:
        recipe.check(pool)
    modality = recipe.modality if recipe else published_modality(path)
    files = index_files(path, modality)
    known = fingerprint(files)
    holds = try_reading(files, known)
    if holds["ntotal"] != pool.rows:
        raise UsageError(
            f"{path}: an index of {holds['ntotal']} rows, but {pool.folder} has {pool.rows}; its answers would be other rows"
        )
    if holds["dim"] != pool.dim:
        raise UsageError(f"{path}: an index of {holds['dim']}-d embeddings, but those of {pool.folder} have {pool.dim}")
    if holds["metric"] not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):  # of unit vectors both order alike
        raise UsageError(f"{path}: an index by neither inner product nor distance")
    own = recipe or IndexRecipe(
        name=path.name,
        pool=pool.name,
        model=pool.model,
        modality=modality,
        factory_string="published",
        nprobe=max(holds["nprobe"], 1),
        train_rows=1,
    )
    return Index(path, own, False, known)


@lru_cache(maxsize=4)
def _mapped(files: tuple[Path, ...], content: str) -> Any:
    """`content` is there to tell builds apart."""
    return read_published(files)


def search_index(
    folder: Path | Index,
    pool: Pool,
    xq: np.ndarray,
    k: int,
    *,
    nprobe: int | None = None,
    overfetch: int = 2,
    verify: bool | None = None,
    allowed: Allowed | None = None,
    recipe: IndexRecipe | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """D (q, k) float32 and I (q, k) int64 as `scan` gives them, of the rows that the index finds.

    `xq` (q, d) float32, unit length. `overfetch` times k rows are taken from the index, scored exactly from the embeddings, and the
    best k kept, ties by row number; -inf and -1 where it finds fewer. `nprobe` replaces the recipe's and `allowed` leaves rows out,
    for this call only. `verify` and `recipe` as in `open_index`.

    Raises `UsageError` if `folder` holds no index or one of another pool, `IntegrityError` if a byte of it changed.
    """
    index = folder if isinstance(folder, Index) else open_index(folder, pool, recipe, verify)
    mapped, modality = index.mapped(), index.recipe.modality
    bits = None if allowed is None else packed(pool, allowed)
    try:
        parameters = search_parameters(mapped, nprobe or index.recipe.nprobe, bits)
    except ValueError as error:
        raise UsageError(f"{index.path}: {error}") from None
    queries, wanted = np.ascontiguousarray(xq, np.float32), min(k * overfetch, pool.rows)
    batch = max(1, _BATCH_BYTES // (wanted * pool.dim * 4))
    D = np.full((len(queries), k), -np.inf, np.float32)
    I = np.full((len(queries), k), -1, np.int64)  # noqa: E741  FAISS's name for it
    for start in range(0, len(queries), batch):
        part = slice(start, start + batch)
        _, found = mapped.search(queries[part], wanted, params=parameters)
        if found.max(initial=-1) >= pool.rows:
            raise IntegrityError(f"{index.path}: found row {found.max()}, but {pool.folder} has {pool.rows}")
        D[part], I[part] = _rescored(pool, modality, queries[part], found, k)
    return D, I


def packed(pool: Pool, allowed: Allowed) -> np.ndarray:
    """One bit a row, as `faiss.IDSelectorBitmap` takes them: an eighth of a byte each, for two billion rows a quarter of a GiB."""
    if isinstance(allowed, np.ndarray) and allowed.dtype == np.uint8:
        wanted: tuple[int, ...] = (-(-pool.rows // 8),)
    else:
        wanted = (pool.rows,)
    if isinstance(allowed, np.ndarray):
        if allowed.shape != wanted:
            raise ValueError(f"a mask of {allowed.shape} {allowed.dtype} does not fit {pool.rows} rows")
        return allowed if allowed.dtype == np.uint8 else np.packbits(allowed, bitorder="little")
    bits = np.zeros(-(-pool.rows // 8), np.uint8)
    for shard in pool.shards:
        mask, offset = allowed(shard), shard.first_row % 8
        here = np.ones(shard.rows, bool) if mask is None else mask
        if here.shape != (shard.rows,):
            raise ValueError(f"a mask of {here.shape} does not fit the {shard.rows} rows of shard {shard.index}")
        part = np.packbits(np.concatenate([np.zeros(offset, bool), here]), bitorder="little")
        first = shard.first_row // 8
        bits[first : first + len(part)] |= part
    return bits


def _rescored(
    pool: Pool, modality: Modality, queries: np.ndarray, found: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    query, place = np.nonzero(found >= 0)
    rows = found[query, place]
    distinct, position = np.unique(rows, return_inverse=True)
    scores = pair_scores(queries, vectors(pool, modality, distinct), query, position)
    order = np.lexsort((rows, -scores, query))
    query, rows, scores = query[order], rows[order], scores[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    best = rank < k
    D = np.full((len(queries), k), -np.inf, np.float32)
    I = np.full((len(queries), k), -1, np.int64)  # noqa: E741  FAISS's name for it
    D[query[best], rank[best]], I[query[best], rank[best]] = scores[best], rows[best]
    return D, I


def measure_recall(
    folder: Path | Index,
    pool: Pool,
    xq: np.ndarray,
    k: int,
    nprobe: int | None = None,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Mean share of the true k nearest that the index finds, over at least a hundred queries `xq` (q, d); it is kept as well.

    Of a pool of fewer than `k` rows it is measured, and said, of as many as there are. `progress` is told the rows that the exact
    scan has passed, and all rows.
    """
    if len(xq) < LEAST_QUERIES:
        raise UsageError(f"recall of {len(xq)} queries says little; give at least {LEAST_QUERIES}")
    index, k = folder if isinstance(folder, Index) else open_index(folder, pool), min(k, pool.rows)
    _, found = search_index(index, pool, xq, k, nprobe=nprobe)
    shards = (pool.embeddings(shard, index.recipe.modality) for shard in pool.shards)
    tell = (lambda rows: progress(rows, pool.rows)) if progress else None
    _, true = scan(xq, shards, k, device=device, progress=tell)
    recall = float(np.mean([np.isin(t[t >= 0], f).mean() for t, f in zip(true, found, strict=True)]))
    measured = Measured(k=k, queries=len(xq), recall_at_k=recall, nprobe=nprobe or index.recipe.nprobe)
    _keep(index, pool, measured)
    return measured


def recorded_recall(index: Index, pool: Pool, k: int, nprobe: int | None = None) -> Measured | None:
    """What was measured of this index over this pool with `nprobe`, at the smallest k from `k` on; None where nothing was."""
    visited, k = nprobe or index.recipe.nprobe, min(k, pool.rows)
    known = _kept(index, pool)
    if index.built:
        known += [Measured(**recall.model_dump(), nprobe=index.recipe.nprobe) for recall in index.recipe.recall]
    fitting = [one for one in known if one.nprobe == visited and one.k >= k]
    return min(fitting, key=lambda one: one.k, default=None)


def _card(index: Index, pool: Pool) -> Path:
    if index.built:
        return index.path / _MEASURED
    return cache_folder() / "indexes" / f"{content_key([index.fingerprint, pool.fingerprint])}-{_MEASURED}"


def _kept(index: Index, pool: Pool) -> list[Measured]:
    path = _card(index, pool)
    if not path.is_file():
        return []
    value = read_json(path)
    try:
        of, found = value["index"], [Measured.model_validate(one) for one in value["recall"]]
    except (KeyError, TypeError, ValidationError):
        raise IntegrityError(f"{path}: not a record of measured recall; delete it and run rog index verify") from None
    return found if of == index.fingerprint else []


def _keep(index: Index, pool: Pool, new: Measured) -> None:
    others = [one for one in _kept(index, pool) if (one.k, one.nprobe) != (new.k, new.nprobe)]
    recall = sorted([*others, new], key=lambda one: (one.nprobe, one.k))
    value = {"index": index.fingerprint, "recall": [one.model_dump() for one in recall]}
    write_json(_card(index, pool), value)


def self_found(index: Index, pool: Pool, queries: int = LEAST_QUERIES, k: int = 10) -> float:
    """Share of sampled rows whose own embedding finds them, or an equal row, among the first `k`.

    Near 0 where the ids of the index are not the pool's rows.
    """
    count = min(queries, pool.rows)
    rows = (np.arange(count, dtype=np.int64) * 2 + 1) * pool.rows // (2 * count)
    own = vectors(pool, index.recipe.modality, rows)
    mapped = index.mapped()
    parameters = search_parameters(mapped, index.recipe.nprobe, None)
    _, found = mapped.search(own.astype(np.float32), min(k, pool.rows), params=parameters)
    distinct, place = np.unique(np.clip(found, 0, pool.rows - 1), return_inverse=True)
    same = (vectors(pool, index.recipe.modality, distinct)[place.reshape(found.shape)] == own[:, None]).all(2)
    return float((same & (found >= 0)).any(1).mean())
