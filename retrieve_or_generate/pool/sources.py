"""What a pool can be made from: webdataset shards, a folder of images, or parquet and csv tables of what was fetched.

A source is cut into shards of whole files (tars, tables, images) by their sizes, so the same files make the same shards. Samples
come in a fixed order; their bytes are read by whoever decodes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pool.columns import ALIASES
from retrieve_or_generate.pool.layout import sampled_content
from retrieve_or_generate.pool.tars import IMAGE_SUFFIXES, Member, members, sample_key
from retrieve_or_generate.store import content_key

_TABLES = (".parquet", ".csv")
_PATHS = ("image_path", "path", "file", "file_name", "filename")  # columns that say where an image lies
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Piece:
    """Bytes that lie in a file; of length None, all of it."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                return file.read() if self.size is None else file.read(self.size)
        except OSError as error:
            raise IntegrityError(f"{self.path}: cannot be read ({error.strerror or error})") from error


@dataclass(frozen=True)
class Sample:
    """One candidate row. `name` is what the source calls it; `image` is None where it has none, `why` what is known of that."""

    name: str
    image: Piece | bytes | None
    caption: Piece | str | None = None
    info: Piece | dict[str, Any] = field(default_factory=dict)
    why: str = ""

    def image_bytes(self) -> bytes | None:
        return self.image.read() if isinstance(self.image, Piece) else self.image

    def told(self) -> dict[str, Any]:
        """Caption and columns under our names; a json that is none says nothing."""
        info = _parsed(self.info.read()) if isinstance(self.info, Piece) else self.info
        lower = {str(name).lower(): value for name, value in info.items()}
        out = {
            ours: next((lower[name] for name in names if lower.get(name) is not None), None)
            for ours, names in ALIASES.items()
        }
        if out["caption"] is None and self.caption is not None:
            text = self.caption.read().decode(errors="replace") if isinstance(self.caption, Piece) else self.caption
            out["caption"] = text.strip("\r\n")
        return out


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class SourceShard:
    """Files that become one shard of a pool."""

    root: Path
    files: tuple[Path, ...]
    bytes: int
    read: Callable[[Path, Path], Iterator[Sample]]

    def samples(self) -> Iterator[Sample]:
        for path in self.files:
            yield from self.read(self.root, path)

    def key(self) -> str:
        """Of names, sizes and sampled contents."""
        return content_key([[path.relative_to(self.root).as_posix(), sampled_content(path)] for path in self.files])


def find_source(source: Path, shard_bytes: int) -> tuple[SourceShard, ...]:
    """The shards that `source` makes: tars of a folder, else its tables, else its images in all folders below; or one file.

    Raises `UsageError` where there is nothing of the kind.
    """
    root, paths = (source.parent, [source]) if source.is_file() else (source, sorted(source.rglob("*")))
    near = [path for path in paths if path.parent == root]
    tars = [path for path in near if path.suffix == ".tar"]
    tables = [path for path in near if path.suffix in _TABLES]
    images = [path for path in paths if path.suffix[1:].lower() in IMAGE_SUFFIXES]
    kinds = ((tars, _tar_samples), (tables, _table_samples), (images, _file_sample))
    for files, read in kinds:
        if files:
            return tuple(_cut(root, files, read, shard_bytes))
    raise UsageError(f"{source}: nothing to embed; give a folder with .tar shards, images, or .parquet or .csv tables")


def _cut(
    root: Path, files: list[Path], read: Callable[[Path, Path], Iterator[Sample]], shard_bytes: int
) -> Iterator[SourceShard]:
    taken: list[Path] = []
    size = 0
    for path in files:
        taken.append(path)
        size += path.stat().st_size
        if size >= shard_bytes:
            yield SourceShard(root, tuple(taken), size, read)
            taken, size = [], 0
    if taken:
        yield SourceShard(root, tuple(taken), size, read)


def _file_sample(root: Path, path: Path) -> Iterator[Sample]:
    texts, infos = path.with_suffix(".txt"), path.with_suffix(".json")
    yield Sample(
        path.relative_to(root).as_posix(),
        Piece(path),
        Piece(texts) if texts.is_file() else None,
        Piece(infos) if infos.is_file() else {},
    )


def _tar_samples(root: Path, path: Path) -> Iterator[Sample]:
    """Members that follow each other under one key are a sample, as webdataset reads them."""
    key, parts = "", dict[str, Member]()
    for member in members(path):
        at, suffix = sample_key(member.name)
        if at != key and parts:
            yield _tar_sample(path, key, parts)
            parts = {}
        key = at
        parts[suffix] = member
    if parts:
        yield _tar_sample(path, key, parts)


def _tar_sample(path: Path, key: str, parts: dict[str, Member]) -> Sample:
    pieces = {suffix: Piece(path, member.offset, member.size) for suffix, member in parts.items()}
    image = next((pieces[suffix] for suffix in IMAGE_SUFFIXES if suffix in pieces), None)
    return Sample(key, image, pieces.get("txt"), pieces.get("json", {}))


def _table_samples(root: Path, path: Path) -> Iterator[Sample]:
    """Rows with the bytes of an image (`image`), or with where it lies, relative to the table; `status` other than ok has none."""
    for first, rows in _batches(path):
        known = {name.lower(): name for name in reversed(rows[0])}
        where = next((known[name] for name in _PATHS if name in known), None)
        data = known.get("image")
        if where is None and data is None:
            raise UsageError(f"{path}: no column image (its bytes) or {', '.join(_PATHS)} (where it lies)")
        for number, row in enumerate(rows, first):
            image = row.pop(data) if data else None
            lies = row.get(where) if where else None
            name = str(row.get(known.get("key", "")) or lies or f"{path.stem}-{number}")
            piece = image if isinstance(image, bytes) else _lying(path, lies)
            yield Sample(name, piece, None, row, str(row.get("reason") or ""))


def _lying(table: Path, place: object) -> Piece | None:
    path = table.parent / str(place)
    return Piece(path) if place and path.is_file() else None


def _batches(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rows of a table a thousand at a time, each time with the number of the first."""
    first = 0
    try:
        if path.suffix == ".csv":
            batches = iter(pacsv.read_csv(path).to_batches(_BATCH_ROWS))
        else:
            batches = pq.ParquetFile(path).iter_batches(_BATCH_ROWS)
        for batch in batches:
            rows = batch.to_pylist()
            if rows:
                yield first, rows
            first += len(rows)
    except Exception as error:  # pyarrow answers damage with many types
        raise IntegrityError(f"{path}: cannot be read ({(str(error).splitlines() or ['?'])[0]})") from error
