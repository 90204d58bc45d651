"""A FAISS index built from a recipe: quantisers trained on a sample, every shard added as a part, parts merged on disk.

Writes `populated.index` and, where the vectors lie in inverted lists, `merged_index.ivfdata`: the files that LAION published and
clip-retrieval serves. `index.json` comes last, with their sha256. Each step is kept and sealed, so a killed build goes on where it
was and ends with the same bytes. Types without mergeable lists (Flat, HNSW, fast-scan) are added in memory in one go.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.pool.faiss_files import (
    INDEX,
    LISTS,
    inner_index,
    lists_on_disk,
    mapped_lists,
    merge_lists,
    reason_of,
    write_lists,
)
from retrieve_or_generate.pool.footprint import ADD_ROWS, PART_ROWS, check_fits, check_rows, empty_index, pool_footprint
from retrieve_or_generate.pool.layout import Pool, PoolShard
from retrieve_or_generate.pool.published import sampled
from retrieve_or_generate.pool.recipe import IndexRecipe
from retrieve_or_generate.store import (
    content_key,
    durable_file,
    locked,
    read_seal,
    remove_leftovers,
    seal,
    sha256_of,
)

INDEX_SEAL = "index.json"
_WORK, _TRAINED = "parts", "trained.index"

Progress = Callable[[int, int], None]
"""Called with the rows added and the rows there are."""


def build_index(pool: Pool, recipe: IndexRecipe, out: Path, progress: Progress | None = None) -> Path:
    """Build the index of `recipe` in folder `out`, or what is missing of it; `out`.

    Raises `UsageError` where recipe and pool do not belong together, the factory string is none, memory or disk do not suffice, or
    `out` holds another index.
    """
    recipe.check(pool)
    key = recipe.key(pool)
    if not (out / INDEX_SEAL).exists():
        check_rows(recipe, pool)
        check_fits(pool_footprint(recipe, pool), out)
    with locked(out, wait=True):
        if read_seal(out, INDEX_SEAL, key) is None:
            if (out / INDEX_SEAL).exists():
                raise UsageError(f"{out}: holds an index of another pool or recipe; choose another folder or delete it")
            remove_leftovers(out)
            files = _populate(pool, recipe, out, key, progress)
            looked_at = {path.name: sampled(path) for path in files}
            seal(out, INDEX_SEAL, key, files, recipe=recipe.model_dump(mode="json"), rows=pool.rows, sampled=looked_at)
        shutil.rmtree(out / _WORK, ignore_errors=True)
    return out


def _populate(pool: Pool, recipe: IndexRecipe, out: Path, key: str, progress: Progress | None) -> list[Path]:
    """Train, add and write; the files of the index."""
    trained = _trained(pool, recipe, out / _WORK, key)
    index = faiss.read_index(str(trained))
    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = recipe.nprobe  # for other programs that search it; ours say it with every call
    if not lists_on_disk(index):
        with _one_thread(isinstance(inner, faiss.IndexHNSW)):
            for span in _spans(pool):
                _add(index, pool, span, recipe, progress)
        with durable_file(out / INDEX) as temporary:
            faiss.write_index(index, str(temporary))
        return [out / INDEX]
    after = content_key([key, sha256_of(trained)])
    parts = [_part(index, pool, span, recipe, out / _WORK, after, progress) for span in _spans(pool)]
    merge_lists(index, [mapped_lists(part) for part in parts], out)
    return [out / INDEX, out / LISTS]


def _trained(pool: Pool, recipe: IndexRecipe, folder: Path, key: str) -> Path:
    """The empty index with its quantisers, as it was kept or trained now."""
    path, name = folder / _TRAINED, "trained.json"
    if read_seal(folder, name, key) is None:
        index = empty_index(recipe, pool.dim)
        if not index.is_trained:
            train(index, _sample(pool, recipe), recipe)
        with durable_file(path) as temporary:
            faiss.write_index(index, str(temporary))
        seal(folder, name, key, [path])
    return path


def _sample(pool: Pool, recipe: IndexRecipe) -> np.ndarray:
    """(n, d) float32: one row, drawn by seed, from each of `train_rows` equal stretches of the pool."""
    count = min(recipe.train_rows, pool.rows)
    edges = (np.arange(count + 1, dtype=np.int64) * pool.rows) // count
    rows = np.random.default_rng(recipe.seed).integers(edges[:-1], edges[1:])
    out = np.empty((count, pool.dim), np.float32)
    for shard in pool.shards:
        start, stop = np.searchsorted(rows, [shard.first_row, shard.first_row + shard.rows])
        if stop > start:
            out[start:stop] = pool.embeddings(shard, recipe.modality)[rows[start:stop] - shard.first_row]
    return out


def train(index: Any, sample: np.ndarray, recipe: IndexRecipe) -> None:
    """Train the transforms, the coarse centroids (on the GPUs where there are any) and the codes of `index` on `sample` (n, d)."""
    whole: Any = faiss.downcast_index(index)
    if isinstance(whole, faiss.IndexPreTransform):
        chain: Any = whole.chain
        for number in range(chain.size()):
            transform = faiss.downcast_VectorTransform(chain.at(number))
            if not transform.is_trained:
                transform.train(sample)
            sample = transform.apply(sample)
    inner = inner_index(index)
    try:
        if isinstance(inner, faiss.IndexIVF):
            _train_centroids(inner, sample)
        inner.train(sample)
    except RuntimeError as error:
        raise UsageError(
            f"index recipe {recipe.name!r}: cannot be trained on {len(sample)} rows ({reason_of(error)})"
        ) from None
    index.is_trained = True


def _train_centroids(ivf: Any, sample: np.ndarray) -> None:
    """k-means as FAISS would run it, apart from the graph of an HNSW quantiser: on one thread, so that its bytes repeat."""
    quantizer = faiss.downcast_index(ivf.quantizer)
    if not isinstance(quantizer, faiss.IndexFlat | faiss.IndexHNSWFlat) or quantizer.ntotal:
        return
    clustering = faiss.Clustering(ivf.d, ivf.nlist, ivf.cp)
    assigner: Any = faiss.IndexFlat(ivf.d, quantizer.metric_type)
    if getattr(faiss, "StandardGpuResources", None) and faiss.get_num_gpus():
        assigner = faiss.index_cpu_to_all_gpus(assigner)
    clustering.train(sample, assigner)
    with _one_thread(isinstance(quantizer, faiss.IndexHNSW)):
        quantizer.add(faiss.vector_to_array(clustering.centroids).reshape(ivf.nlist, ivf.d))


@contextmanager
def _one_thread(needed: bool = True) -> Iterator[None]:
    """A graph depends on the order in which vectors enter it."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if needed else threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


@dataclass(frozen=True)
class _Span:
    """Rows `start … stop − 1` of a shard."""

    shard: PoolShard
    start: int
    stop: int

    @property
    def rows(self) -> tuple[int, int]:
        """The first of them in the pool, and the one after the last."""
        return self.shard.first_row + self.start, self.shard.first_row + self.stop


def _spans(pool: Pool) -> list[_Span]:
    """The pool's shards, those of more than a million rows in pieces."""
    return [
        _Span(shard, start, min(start + PART_ROWS, shard.rows))
        for shard in pool.shards
        for start in range(0, shard.rows, PART_ROWS)
    ]


def _add(index: Any, pool: Pool, span: _Span, recipe: IndexRecipe, progress: Progress | None) -> None:
    embeddings = pool.embeddings(span.shard, recipe.modality)
    numbered = lists_on_disk(index)
    for start in range(span.start, span.stop, ADD_ROWS):
        block = np.ascontiguousarray(embeddings[start : min(start + ADD_ROWS, span.stop)], np.float32)
        first = span.shard.first_row + start
        try:
            if numbered:
                index.add_with_ids(block, np.arange(first, first + len(block)))
            else:
                index.add(block)
        except RuntimeError as error:
            raise UsageError(
                f"index recipe {recipe.name!r}: rows cannot be added block by block ({reason_of(error)})"
            ) from None
        if progress:
            progress(first + len(block), pool.rows)


def _part(
    index: Any, pool: Pool, span: _Span, recipe: IndexRecipe, folder: Path, key: str, progress: Progress | None
) -> Path:
    """The inverted lists of one span, as they were kept or made now. `index` is empty before and after."""
    first, last = span.rows
    path, name = folder / f"{first:012d}.ivf", f"{first:012d}.json"
    own = content_key([key, first, last])
    if read_seal(folder, name, own) is None:
        _add(index, pool, span, recipe, progress)
        with durable_file(path) as temporary:
            write_lists(index, temporary)
        seal(folder, name, own, [path])
        index.reset()
    elif progress:
        progress(last, pool.rows)
    return path
