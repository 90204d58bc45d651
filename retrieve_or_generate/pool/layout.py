"""Pools in the layout that clip-retrieval writes and LAION published, unmodified.

Reads `img_emb/img_emb_0000.npy` (float16, rows × dim, unit length), optional `text_emb/`, `metadata/metadata_0000.parquet` (row i
of it is row i of the npy; columns are found through aliases, whatever their case) and optional shards `images/00000.tar`.
Alignment is verified on opening; what does not fit is an error that names the file.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pocket.places import POOL_SEAL, pool_place
from retrieve_or_generate.store import content_key, read_seal

Modality = Literal["image", "text"]

ALIASES: dict[str, tuple[str, ...]] = {  # our name: the names it goes by, lower case
    "url": ("url",),
    "caption": ("caption", "text", "alt_text"),
    "key": ("key", "image_path"),
    "NSFW": ("nsfw",),
    "punsafe": ("punsafe",),
    "similarity": ("similarity",),
    "md5": ("md5",),
    "hash": ("hash",),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
}
_NORM_SAMPLE = 256


@dataclass(frozen=True)
class PoolShard:
    """One part of a pool; its rows are `first_row … first_row + rows − 1` of the whole."""

    index: int
    rows: int
    first_row: int
    image_embeddings: Path
    text_embeddings: Path | None
    metadata: Path
    images: Path | None


@dataclass(frozen=True)
class Pool:
    """An opened pool: cheap to hold, embeddings stay on disk."""

    folder: Path
    name: str
    model: str
    dim: int
    shards: tuple[PoolShard, ...]

    @property
    def rows(self) -> int:
        return self.shards[-1].first_row + self.shards[-1].rows

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits: of the recorded checksums where the pool is sealed, else of sizes and sampled content."""
        sealed = read_seal(self.folder, POOL_SEAL, verify=False)
        if sealed:
            return content_key([sealed["key"], sealed["files"]])
        return content_key(
            [_sampled(path) for shard in self.shards for path in (shard.image_embeddings, shard.metadata)]
        )

    def embeddings(self, shard: PoolShard, modality: Modality) -> np.ndarray:
        """(rows, dim) float16, memory-mapped."""
        path = shard.image_embeddings if modality == "image" else shard.text_embeddings
        if path is None:
            raise UsageError(f"{self.folder}: no text_emb/; search it with retrieve.modalities=[image]")
        return np.load(path, mmap_mode="r")

    def metadata(
        self, rows: Sequence[int] | np.ndarray | None = None, columns: Sequence[str] = ("url", "caption", "NSFW", "key")
    ) -> pa.Table:
        """Columns under our names for `rows` (all of them if None), in the order of `rows`; an absent column is null."""
        if rows is None:
            return pa.concat_tables(self._table(shard, columns) for shard in self.shards)
        wanted = np.asarray(rows, np.int64)
        shard_of = np.searchsorted([shard.first_row for shard in self.shards], wanted, side="right") - 1
        parts, places = [], []
        for number in np.unique(shard_of):
            shard, here = self.shards[number], np.flatnonzero(shard_of == number)
            parts.append(self._table(shard, columns).take(wanted[here] - shard.first_row))
            places.append(here)
        if not parts:
            return self._table(self.shards[0], columns).slice(0, 0)
        return pa.concat_tables(parts).take(np.argsort(np.concatenate(places)))

    def _table(self, shard: PoolShard, columns: Sequence[str]) -> pa.Table:
        file = pq.ParquetFile(shard.metadata)
        present = {name.lower(): name for name in file.schema_arrow.names}
        found = {
            ours: next((present[a] for a in ALIASES.get(ours, (ours.lower(),)) if a in present), None)
            for ours in columns
        }
        table = file.read(columns=[theirs for theirs in dict.fromkeys(found.values()) if theirs])
        arrays = [table[theirs] if theirs else pa.nulls(shard.rows) for theirs in found.values()]
        return pa.table(dict(zip(found, arrays, strict=True)))

    def image_bytes(self, rows: Sequence[int]) -> dict[int, bytes]:
        """Encoded images by row, from the webdataset shards. A row whose image was never fetched is absent.

        Raises `IntegrityError` where the bytes do not match the md5 in the metadata.
        """
        table = self.metadata(rows, ("key", "md5"))
        out: dict[int, bytes] = {}
        for row, key, md5 in zip(rows, table["key"].to_pylist(), table["md5"].to_pylist(), strict=True):
            shard = self.shards[int(np.searchsorted([s.first_row for s in self.shards], row, side="right")) - 1]
            if shard.images is None:
                raise UsageError(f"{self.folder}: no images/ shards; set retrieve.fetch=http to download them")
            place = _members(shard.images).get(str(key))
            if place is None:
                continue
            with shard.images.open("rb") as file:
                file.seek(place[0])
                data = file.read(place[1])
            if md5 is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
                raise IntegrityError(f"{shard.images}: image {key} does not match the md5 in {shard.metadata}")
            out[int(row)] = data
        return out


@lru_cache(maxsize=4096)
def _members(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of every image in a webdataset shard, by key."""
    try:
        with tarfile.open(path) as tar:
            return {
                member.name.rpartition(".")[0]: (member.offset_data, member.size)
                for member in tar
                if member.isreg() and member.name.endswith((".jpg", ".jpeg", ".png", ".webp"))
            }
    except (tarfile.TarError, EOFError, OSError) as error:
        raise IntegrityError(f"{path}: not a whole tar ({error})") from error


def _sampled(path: Path) -> list[int | str]:
    """Size and a hash of the first and last MiB: enough to tell pools apart without reading terabytes."""
    size, part = path.stat().st_size, 1 << 20
    with path.open("rb") as file:
        head = file.read(part)
        file.seek(max(size - part, 0))
        return [size, hashlib.sha256(head + file.read(part)).hexdigest()]


def open_pool(name: str) -> Pool:
    """The pocket pool, or the one in a folder, verified: row counts, dimension, finite numbers, unit length.

    Raises:
        UsageError: no pool there. IntegrityError: a file is missing, truncated, or does not fit the others; its name is given.
    """
    folder = _pocket() if name == "pocket" else Path(name)
    if not (folder / "img_emb").is_dir():
        raise UsageError(
            f"unknown pool {name!r}: give 'pocket', or a folder with img_emb/ and metadata/ as clip-retrieval writes it"
        )
    sealed = read_seal(folder, POOL_SEAL)
    shards = tuple(_shards(folder))
    if not shards:
        raise UsageError(f"{folder}: empty pool, no img_emb/img_emb_*.npy")
    dims = {_check(shard) for shard in shards}
    if len(dims) != 1:
        raise IntegrityError(f"{folder}: shards of different dimensions {sorted(dims)}")
    record = sealed or {}
    return Pool(folder, record.get("pool", folder.name), record.get("model", "unknown"), dims.pop(), shards)


def _pocket() -> Path:
    folder = pool_place()
    if not (folder / POOL_SEAL).is_file():
        from retrieve_or_generate.pocket.world import build_pool  # loads torch, which a finished world does not need

        build_pool()
    return folder


def _shards(folder: Path) -> list[PoolShard]:
    shards: list[PoolShard] = []
    first = 0
    for path in sorted((folder / "img_emb").glob("img_emb_*.npy")):
        digits = re.fullmatch(r"img_emb_(\d+)\.npy", path.name)
        if not digits:
            continue
        number = digits[1]
        metadata = folder / f"metadata/metadata_{number}.parquet"
        text = folder / f"text_emb/text_emb_{number}.npy"
        images = folder / f"images/{int(number):05d}.tar"
        if not metadata.is_file():
            raise IntegrityError(f"{metadata}: missing, but {path.name} is there")
        rows = _load(path).shape[0]
        shards.append(
            PoolShard(
                len(shards),
                rows,
                first,
                path,
                text if text.is_file() else None,
                metadata,
                images if images.is_file() else None,
            )
        )
        first += rows
    return shards


def _load(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise IntegrityError(f"{path}: not a whole npy file ({error})") from error
    if array.ndim != 2 or not len(array):
        raise IntegrityError(f"{path}: shape {array.shape}, expected (rows, dim) with at least one row")
    return array


def _check(shard: PoolShard) -> int:
    """Verify one shard's files against each other; its dimension."""
    try:
        rows = pq.ParquetFile(shard.metadata).metadata.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise IntegrityError(f"{shard.metadata}: not a whole parquet file ({error})") from error
    if rows != shard.rows:
        raise IntegrityError(
            f"{shard.metadata}: {rows} rows, but {shard.image_embeddings.name} has {shard.rows}; they must be aligned"
        )
    dim = 0
    for path in filter(None, (shard.image_embeddings, shard.text_embeddings)):
        array = _load(path)
        if array.shape[0] != shard.rows or (dim and array.shape[1] != dim):
            raise IntegrityError(
                f"{path}: shape {array.shape} does not fit {shard.image_embeddings.name} {(shard.rows, dim)}"
            )
        dim = array.shape[1]
        sample = np.asarray(
            array[np.linspace(0, len(array) - 1, min(len(array), _NORM_SAMPLE)).astype(int)], np.float32
        )
        norms = np.linalg.norm(sample, axis=1)
        if not np.isfinite(norms).all() or np.abs(norms - 1).max() > 0.01:
            raise IntegrityError(
                f"{path}: rows are not of unit length (norms {norms.min():.3f} to {norms.max():.3f}); normalise them first"
            )
    return dim
