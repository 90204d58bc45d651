"""What an index takes in memory and on disk, worked out from its factory string before anything is built.

An index of inverted lists is added part by part and merged on disk, so memory holds its quantisers and a part; all other types are
held whole.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.memory import memory_bytes
from retrieve_or_generate.pool.faiss_files import inner_index, lists_on_disk, reason_of
from retrieve_or_generate.pool.layout import Pool
from retrieve_or_generate.pool.recipe import IndexRecipe

ADD_ROWS = 1 << 16  # rows added at a time
PART_ROWS = 1 << 20  # most rows of a part
_ID_BYTES = 8
_ROOM = 1.5  # a list that grows holds up to twice what is in it, on average this


@dataclass(frozen=True)
class Footprint:
    """Bytes. The largest of `train_bytes` and `add_bytes` is what a build needs, `search_bytes` what a search keeps."""

    train_bytes: int
    add_bytes: int
    search_bytes: int
    index_bytes: int
    build_disk_bytes: int
    on_disk: bool

    @property
    def build_bytes(self) -> int:
        return max(self.train_bytes, self.add_bytes)

    def __str__(self) -> str:
        lies = "its lists stay on disk" if self.on_disk else "it is held whole"
        return (
            f"memory {_size(self.build_bytes)} to build ({_size(self.train_bytes)} to train, {_size(self.add_bytes)} to add), "
            f"{_size(self.search_bytes)} to search ({lies}); disk {_size(self.index_bytes)}, "
            f"{_size(self.build_disk_bytes)} while it is built"
        )


def _size(count: int | float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def empty_index(recipe: IndexRecipe, dim: int) -> Any:
    """The untrained index of a recipe; `UsageError` where the factory string makes none of this dimension."""
    try:
        return faiss.index_factory(dim, recipe.factory_string, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UsageError(
            f"index recipe {recipe.name!r}: {recipe.factory_string!r} is no index of dimension {dim} ({reason_of(error)})"
        ) from None


def footprint(recipe: IndexRecipe, rows: int, dim: int, part_rows: int = PART_ROWS) -> Footprint:
    """Of the recipe's index over `rows` embeddings of `dim`, `part_rows` of them in the largest part."""
    index = empty_index(recipe, dim)
    inner = inner_index(index)
    on_disk = lists_on_disk(index)
    row_bytes, fixed = _row_bytes(inner), _fixed_bytes(index, inner)
    sample = 0 if index.is_trained else min(recipe.train_rows, rows)
    train = sample * 4 * (dim + (inner.d if _transforms(index) else 0))
    block = min(ADD_ROWS, part_rows) * (4 * dim + 4 * inner.d + 2 * row_bytes)
    held = part_rows if on_disk else rows
    add = int(fixed + held * row_bytes * _ROOM + block)
    index_bytes = fixed + rows * row_bytes
    return Footprint(
        train_bytes=train + fixed,
        add_bytes=add,
        search_bytes=fixed if on_disk else index_bytes,
        index_bytes=index_bytes,
        build_disk_bytes=2 * index_bytes if on_disk else fixed + index_bytes,
        on_disk=on_disk,
    )


def pool_footprint(recipe: IndexRecipe, pool: Pool) -> Footprint:
    return footprint(recipe, pool.rows, pool.dim, min(PART_ROWS, max(shard.rows for shard in pool.shards)))


def _row_bytes(inner: Any) -> int:
    if isinstance(inner, faiss.IndexIVF):
        return int(inner.code_size) + _ID_BYTES
    if isinstance(inner, faiss.IndexHNSW):
        graph: Any = inner.hnsw
        links = 4 * graph.nb_neighbors(0)
        return (
            _row_bytes(faiss.downcast_index(inner.storage)) + links + links // 16 + 12
        )  # upper levels hold few; level, offset
    try:
        return int(inner.sa_code_size())
    except RuntimeError:
        raise UsageError(
            f"{type(inner).__name__}: an index whose size is not known beforehand; use IVF, HNSW or Flat"
        ) from None


def _transforms(index: Any) -> bool:
    return isinstance(faiss.downcast_index(index), faiss.IndexPreTransform)


def _fixed_bytes(index: Any, inner: Any) -> int:
    """Transforms, coarse centroids with their graph, and the codebooks of a product quantiser."""
    total = 0
    if _transforms(index):
        total += 4 * (index.d + 1) * inner.d
    if isinstance(inner, faiss.IndexIVF):
        quantizer = faiss.downcast_index(inner.quantizer)
        total += inner.nlist * (_row_bytes(quantizer) if hasattr(quantizer, "sa_code_size") else 4 * inner.d)
        total += inner.nlist * 24  # where each list starts, its length and its room
    if hasattr(inner, "pq"):
        total += 4 * int(inner.pq.ksub) * inner.d
    return int(total)


def check_rows(recipe: IndexRecipe, pool: Pool) -> None:
    """Raise `UsageError` where the pool, or the sample drawn from it, is too small for the quantisers of the recipe."""
    index = empty_index(recipe, pool.dim)  # owns what lies below it
    inner = inner_index(index)
    needed = int(inner.nlist) if isinstance(inner, faiss.IndexIVF) else 1
    if hasattr(inner, "pq"):
        needed = max(needed, int(inner.pq.ksub))
    sample = min(recipe.train_rows, pool.rows)
    if sample < needed:
        raise UsageError(
            f"index recipe {recipe.name!r}: {recipe.factory_string!r} is trained on {needed:,} rows at least, and gets "
            f"{sample:,} of {pool.folder} ({pool.rows:,} rows); choose fewer lists for a pool of this size, or raise train_rows"
        )


def check_fits(stated: Footprint, folder: Path) -> None:
    """Raise `UsageError` where this machine has less memory than a build takes, or the disk of `folder` less room."""
    memory = memory_bytes()
    if stated.build_bytes > memory:
        what = "training" if stated.train_bytes >= stated.add_bytes else "adding"
        hint = (
            "lower train_rows in the recipe"
            if what == "training"
            else "choose an IVF factory string with shorter codes"
        )
        raise UsageError(
            f"{what} takes {_size(stated.build_bytes)} of memory and this machine has {_size(memory)}; {hint}"
        )
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # of a build that was interrupted
    room = shutil.disk_usage(existing).free + there
    if stated.build_disk_bytes > room:
        raise UsageError(
            f"{folder}: building takes {_size(stated.build_disk_bytes)} of disk and {_size(room)} are free; "
            "choose another --out"
        )
