"""Pools in the layouts that clip-retrieval, LAION and DataComp published, unmodified.

Row i of a shard's metadata is row i of its embeddings (float16, unit length). `parts` says which files those are, `columns` how
theirs are called. Opening checks cheaply that they fit: row counts, dimension, a sample of norms, sizes where a seal recorded
them; `verify` looks at every row. What does not fit is an error that names the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retrieve_or_generate.errors import IncompleteError, IntegrityError, UsageError
from retrieve_or_generate.pocket.places import POOL_SEAL, pool_place
from retrieve_or_generate.pool.columns import count_rows, read_columns
from retrieve_or_generate.pool.parts import Modality, ShardFiles, find_parts, find_shards, open_embeddings
from retrieve_or_generate.pool.tars import image_members
from retrieve_or_generate.store import content_key, read_seal

__all__ = ["Modality", "Pool", "PoolShard", "open_pool", "sampled_content"]

UNFINISHED = "unfinished.json"
"""Stands in a pool folder from when it is begun until its seal is written."""
BEFORE_TAKEDOWN = "files_before_takedown"
"""In a pool's seal: its files as they were before images were taken down."""
_SAMPLE_ROWS = 4096  # of a pool, whose norms are looked at on opening; 8 to 256 of each shard
_CHECKSUM_BYTES = 2**30  # of a sealed pool that are read on opening; of a larger one only `rog verify` reads every byte
_OPENERS = 16
_NORM_ERROR = 0.01  # of float16 numbers; their rounding alone makes a tenth of it


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
    """An opened pool: cheap to hold, embeddings stay on disk. `parts` are the folders whose rows follow each other."""

    folder: Path
    name: str
    model: str
    dim: int
    shards: tuple[PoolShard, ...]
    parts: tuple[Path, ...] = ()

    @property
    def rows(self) -> int:
        return self.shards[-1].first_row + self.shards[-1].rows

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits: of the recorded checksums where the pool is sealed, else of sizes and sampled content.

        A pool that images were taken down from (`rog takedown`) is the same pool: its indexes, searches and runs go on.
        """
        found = [self._part_fingerprint(part) for part in self.parts or (self.folder,)]
        return found[0] if len(found) == 1 else content_key(found)

    def _part_fingerprint(self, part: Path) -> str:
        sealed = read_seal(part, POOL_SEAL, verify=False)
        if sealed:
            return content_key([sealed["key"], sealed.get(BEFORE_TAKEDOWN, sealed["files"])])
        mine = [shard for shard in self.shards if shard.image_embeddings.is_relative_to(part)]
        files = [path for s in mine for path in (s.image_embeddings, s.text_embeddings, s.metadata) if path]
        with ThreadPoolExecutor(_OPENERS) as threads:
            return content_key(list(threads.map(sampled_content, files)))

    def shard_of(self, row: int) -> PoolShard:
        return self.shards[int(np.searchsorted(self._first_rows, row, side="right")) - 1]

    @cached_property
    def _first_rows(self) -> np.ndarray:
        return np.array([shard.first_row for shard in self.shards], np.int64)

    def embeddings(self, shard: PoolShard, modality: Modality) -> np.ndarray:
        """(rows, dim) float16, memory-mapped."""
        path = shard.image_embeddings if modality == "image" else shard.text_embeddings
        if path is None:
            folder = shard.image_embeddings.parents[1] if self.parts[1:] else self.folder
            raise UsageError(f"{folder}: no text_emb/; search it with retrieve.modalities=[image]")
        return open_embeddings(path, modality)

    def metadata(
        self, rows: Sequence[int] | np.ndarray | None = None, columns: Sequence[str] = ("url", "caption", "NSFW", "key")
    ) -> pa.Table:
        """Columns under our names for `rows` (all of them if None), in the order of `rows`, as `read_columns` gives them."""
        if rows is None:
            return pa.concat_tables(read_columns(shard.metadata, columns) for shard in self.shards)
        wanted = np.asarray(rows, np.int64)
        shard_of = np.searchsorted(self._first_rows, wanted, side="right") - 1
        parts, places = [], []
        for number in np.unique(shard_of):
            shard, here = self.shards[number], np.flatnonzero(shard_of == number)
            parts.append(read_columns(shard.metadata, columns, wanted[here] - shard.first_row))
            places.append(here)
        if not parts:
            return read_columns(self.shards[0].metadata, columns, wanted)
        return pa.concat_tables(parts).take(np.argsort(np.concatenate(places)))

    def image_bytes(self, rows: Sequence[int]) -> dict[int, bytes]:
        """Encoded images by row, from the webdataset shards. A row whose image was never fetched is absent.

        Raises `IntegrityError` where the bytes do not match the md5 in the metadata.
        """
        table = self.metadata(rows, ("key", "md5"))
        out: dict[int, bytes] = {}
        for row, key, md5 in zip(rows, table["key"].to_pylist(), table["md5"].to_pylist(), strict=True):
            shard = self.shard_of(row)
            if shard.images is None:
                raise UsageError(f"{self.folder}: no images/ shards; set retrieve.fetch=http to download them")
            place = image_members(shard.images).get(str(key))
            if place is None:
                continue
            with shard.images.open("rb") as file:
                file.seek(place.offset)
                data = file.read(place.size)
            if md5 is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
                raise IntegrityError(f"{shard.images}: image {key} does not match the md5 in {shard.metadata}")
            out[int(row)] = data
        return out


def sampled_content(path: Path) -> list[int | str]:
    """Size and a hash of the first and last 64 KiB: enough to tell files apart without reading terabytes."""
    size, part = path.stat().st_size, 1 << 16
    with path.open("rb") as file:
        head = file.read(part)
        file.seek(max(size - part, part))
        return [size, hashlib.sha256(head + file.read(part)).hexdigest()]


def open_pool(name: str) -> Pool:
    """The pocket pool, or the one in a folder or `pool.yaml`, its files checked against each other by a sample.

    Raises:
        UsageError: no pool there. IntegrityError: a file is missing, truncated, or does not fit the others; its name is given.
        IncompleteError: the pool is not finished.
    """
    place = _pocket() if name == "pocket" else Path(name)
    found = find_parts(place) if name else None  # Path("") is the working folder
    if found is None:
        raise UsageError(
            f"unknown pool {name!r}: give 'pocket', or a folder with img_emb/ and metadata/ as clip-retrieval writes it"
        )
    told, parts = found
    folder = place.parent if place.is_file() else place
    seals = [_sealed(part) for part in parts]
    shards = _numbered([files for part in parts for files in find_shards(part)])
    if not shards:
        raise UsageError(f"{folder}: empty pool, no img_emb/img_emb_*.npy")
    sample = min(256, max(8, _SAMPLE_ROWS // len(shards)))
    with ThreadPoolExecutor(_OPENERS) as threads:
        dims = list(threads.map(partial(_check, sample=sample), shards))
    for shard, dim in zip(shards, dims, strict=True):
        if dim != dims[0]:
            first = shards[0].image_embeddings
            raise IntegrityError(f"{shard.image_embeddings}: dimension {dim}, but {first} has {dims[0]}")
    record = seals[0] if len(parts) == 1 else {}
    called = told.name or record.get("pool") or folder.resolve().name
    return Pool(folder, called, _model(told.model, seals, folder), dims[0], shards, parts)


def _pocket() -> Path:
    folder = pool_place()
    if not (folder / POOL_SEAL).is_file():
        from retrieve_or_generate.pocket.world import build_pool  # loads torch, which a finished world does not need

        build_pool()
    return folder


def _sealed(part: Path) -> dict[str, Any]:
    """The seal of a part, its files as recorded: by checksum, or by size where that would mean reading for minutes."""
    record = read_seal(part, POOL_SEAL, verify=False)
    if record is None:
        if (part / UNFINISHED).is_file():
            raise IncompleteError(f"{part}: a pool that is not finished; run rog index embed again, it goes on with it")
        return {}
    if sum(file["bytes"] for file in record["files"].values()) <= _CHECKSUM_BYTES:
        read_seal(part, POOL_SEAL)
        return record
    for relative, file in record["files"].items():
        path = part / relative
        there = path.stat().st_size if path.is_file() else None
        if there != file["bytes"]:
            what = "missing" if there is None else f"{there} bytes"
            raise IntegrityError(f"{path}: {what}, but {file['bytes']} bytes were recorded. Make {part} anew")
    return record


def _model(listed: str, seals: list[dict[str, Any]], folder: Path) -> str:
    """The model that embedded the pool: of `pool.yaml`, else of the seals, which must agree."""
    known = {seal["model"] for seal in seals if "model" in seal} | ({listed} - {"unknown"})
    if len(known) > 1:
        raise IntegrityError(f"{folder}: parts embedded by different models ({', '.join(sorted(known))})")
    return known.pop() if known else "unknown"


def _numbered(found: list[ShardFiles]) -> tuple[PoolShard, ...]:
    shards: list[PoolShard] = []
    first = 0
    for files in found:
        rows = len(open_embeddings(files.image_embeddings, "image"))
        shards.append(
            PoolShard(
                len(shards), rows, first, files.image_embeddings, files.text_embeddings, files.metadata, files.images
            )
        )
        first += rows
    return tuple(shards)


def _check(shard: PoolShard, sample: int) -> int:
    """Verify one shard's files against each other; its dimension."""
    rows = count_rows(shard.metadata)
    if rows != shard.rows:
        raise IntegrityError(
            f"{shard.metadata}: {rows} rows, but {shard.image_embeddings.name} has {shard.rows}; they must be aligned"
        )
    images = open_embeddings(shard.image_embeddings, "image")
    _check_norms(shard.image_embeddings, images, sample)
    if shard.text_embeddings is not None:
        texts = open_embeddings(shard.text_embeddings, "text")
        if texts.shape != images.shape:
            raise IntegrityError(
                f"{shard.text_embeddings}: shape {texts.shape} does not fit {shard.image_embeddings.name} {images.shape}"
            )
        _check_norms(shard.text_embeddings, texts, sample)
    return int(images.shape[1])


def _check_norms(path: Path, array: np.ndarray, sample: int) -> None:
    chosen = np.linspace(0, len(array) - 1, min(len(array), sample)).astype(int)
    norms = np.linalg.norm(np.asarray(array[chosen], np.float32), axis=1)
    if (told := wrong_norm(norms, chosen)) is not None:
        raise IntegrityError(f"{path}: {told}; a pool holds rows of unit length")


def wrong_norm(norms: np.ndarray, rows: np.ndarray) -> str | None:
    """The first row that is not finite or not of unit length, in words, and how many there are; None where all are well."""
    bad = np.flatnonzero(~(np.abs(norms - 1) <= _NORM_ERROR))  # NaN compares false
    if not len(bad):
        return None
    first = norms[bad[0]]
    what = f"is of norm {first:.3f}, not of unit length" if np.isfinite(first) else "is not finite"
    return f"row {rows[bad[0]]} {what} ({len(bad)} such rows of {len(norms)})"
