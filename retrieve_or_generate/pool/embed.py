"""A pool made from images: webdataset shards, a folder, or tables of what was downloaded.

Writes what clip-retrieval writes (`img_emb/`, `text_emb/`, `metadata/`), the images that were embedded (`images/`), every candidate
that was not, with its reason (`dropped/`), and `pool.json` last. A finished shard is sealed by `embed_0000.json`, which the pool's
own seal takes in, so a run that was killed goes on after the last one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from retrieve_or_generate.errors import IntegrityError, UsageError, unknown_name
from retrieve_or_generate.executors import core_count
from retrieve_or_generate.models import Clip
from retrieve_or_generate.pixels import suffix_of
from retrieve_or_generate.pocket.places import POOL_SEAL
from retrieve_or_generate.pool.columns import row_hash
from retrieve_or_generate.pool.encode import PRECISIONS, Encoder, Picture, decoded_batches, each_once
from retrieve_or_generate.pool.layout import UNFINISHED
from retrieve_or_generate.pool.sources import SourceShard, find_source
from retrieve_or_generate.store import (
    LOCK,
    TEMPORARY_PREFIX,
    content_key,
    durable_file,
    locked,
    read_json,
    read_seal,
    remove_leftovers,
    seal,
    write_json,
    write_tar,
)

SHARD_BYTES = 4 * 2**30
_VERSION = 1  # part of the key: raise when the same source gives another pool
_METADATA = pa.schema(
    [
        *((name, pa.string()) for name in ("image_path", "caption", "NSFW", "LICENSE", "url", "key", "md5")),
        *((name, pa.float64()) for name in ("similarity", "punsafe", "pwatermark")),
        *((name, pa.int32()) for name in ("width", "height")),
        ("hash", pa.int64()),
    ]
)
_DROPPED = pa.schema([("image_path", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class EmbedSettings:
    """What decides the pool. `captions` None: embed them if the first sample has one."""

    captions: bool | None = None
    images: bool = True
    precision: str = "float32"
    shard_bytes: int = SHARD_BYTES


def embed_pool(
    source: Path,
    out: Path,
    clip: Clip,
    *,
    settings: EmbedSettings | None = None,
    device: str | None = None,
    batch_size: int = 256,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Embed every image of `source` into the pool folder `out`; its seal (`rows`, `dropped`, `model`, …).

    `jobs` threads decode, by default one a core. `progress` is told bytes done and bytes in all. `device` moves the model there.

    Raises:
        UsageError: nothing to embed, or `out` holds something else. IntegrityError: a damaged tar or table, or finished files that
        were changed.
    """
    wanted = _checked(settings or EmbedSettings())
    if device is not None:
        clip = clip.to(device)
    shards = find_source(source, wanted.shard_bytes)
    captions = _has_caption(shards) if wanted.captions is None else wanted.captions
    told = [_VERSION, clip.fingerprint, wanted.precision, captions, wanted.images]
    with locked(out):
        keys = [content_key([told, shard.key()]) for shard in shards]
        key = content_key(keys)
        if (done := read_seal(out, POOL_SEAL, key)) is not None:
            _clear(out)
            return done
        _claim(out, key)
        run = _Run(out, Encoder(clip, wanted.precision), captions, wanted.images, batch_size, jobs or core_count())
        seals = list(run.shards(shards, keys, progress))
        return _finish(out, key, seals, clip, source)


def _checked(settings: EmbedSettings) -> EmbedSettings:
    if settings.precision not in PRECISIONS:
        raise unknown_name("precision", settings.precision, PRECISIONS)
    if settings.shard_bytes < 1:
        raise UsageError(f"shard_bytes must be 1 or more, not {settings.shard_bytes}")
    return settings


def _has_caption(shards: tuple[SourceShard, ...]) -> bool:
    first = next((sample for shard in shards for sample in shard.samples() if sample.image is not None), None)
    return first is not None and first.told()["caption"] is not None


def _claim(out: Path, key: str) -> None:
    """Make `out` ours, or say that it holds something else; a killed run's finished shards stay."""
    begun = read_json(out / UNFINISHED) if (out / UNFINISHED).is_file() else None
    others = [path for path in out.iterdir() if path.name != LOCK and not path.name.startswith(TEMPORARY_PREFIX)]
    if (out / POOL_SEAL).exists() or (begun != {"pool": key} and others):
        raise UsageError(f"{out}: holds another pool or something else; choose another --out or delete it")
    remove_leftovers(out)
    write_json(out / UNFINISHED, {"pool": key})


def _finish(out: Path, key: str, seals: list[dict[str, Any]], clip: Clip, source: Path) -> dict[str, Any]:
    """The pool's seal, made of those of its shards, whose files were hashed when they were written."""
    rows = sum(shard["rows"] for shard in seals)
    if not rows:
        raise UsageError(
            f"{source}: none of its {sum(s['dropped'] for s in seals)} images could be read; see {out}/dropped"
        )
    record = {
        "key": key,
        "files": {name: file for shard in seals for name, file in shard["files"].items()},
        "pool": out.resolve().name,
        "model": clip.name,
        "dim": clip.embed_dim,
        "rows": rows,
        "dropped": sum(shard["dropped"] for shard in seals),
    }
    write_json(out / POOL_SEAL, record)
    _clear(out)
    return record


def _clear(out: Path) -> None:
    """Drop what a finished pool does not need: its seal has taken in those of the shards."""
    for path in (out / UNFINISHED, *out.glob("embed_*.json")):
        path.unlink(missing_ok=True)


def _seal_name(number: int) -> str:
    return f"embed_{number:04d}.json"


@dataclass
class _Shard:
    """What one shard comes to while its samples pass."""

    images: list[torch.Tensor] = field(default_factory=list)
    texts: list[torch.Tensor] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)  # of every sample


@dataclass
class _Run:
    out: Path
    encoder: Encoder
    captions: bool
    images: bool
    batch_size: int
    jobs: int

    def shards(
        self, shards: tuple[SourceShard, ...], keys: list[str], progress: Callable[[int, int], None] | None
    ) -> Iterator[dict[str, Any]]:
        """The seal of each shard, those that are missing made first."""
        total, before = sum(shard.bytes for shard in shards), 0
        with ThreadPoolExecutor(self.jobs) as threads:
            for number, (shard, key) in enumerate(zip(shards, keys, strict=True)):
                done = read_seal(self.out, _seal_name(number), key)
                if done is None:
                    done = self._embed(number, shard, key, threads, _told(progress, before, shard.bytes, total))
                before += shard.bytes
                if progress:
                    progress(before, total)
                yield done

    def _embed(
        self, number: int, shard: SourceShard, key: str, threads: ThreadPoolExecutor, told: Callable[[int], None]
    ) -> dict[str, Any]:
        made, passed = _Shard(), 0
        size = self.encoder.clip.image_size
        ahead = 2 * (self.jobs + -(-self.batch_size // 32))
        for batch in decoded_batches(shard.samples(), size, self.batch_size, threads, ahead):
            self._add(made, batch, number)
            passed += sum(picture.bytes for picture in batch)
            told(passed)
        files = self._write(number, shard, made)
        return seal(self.out, _seal_name(number), key, files, rows=len(made.rows), dropped=len(made.dropped))

    def _add(self, made: _Shard, batch: list[Picture], number: int) -> None:
        kept = [picture for picture in batch if picture.square is not None]
        made.kept += [picture.square is not None for picture in batch]
        made.dropped += [
            {"image_path": picture.sample.name, "reason": picture.reason} for picture in batch if picture.square is None
        ]
        if not kept:
            return
        rows = [_row(picture, f"{number:04d}{len(made.rows) + place:08d}") for place, picture in enumerate(kept)]
        made.rows += rows
        made.images.append(self.encoder.images([picture.square.pixels for picture in kept if picture.square]))
        if self.captions:
            made.texts.append(each_once([row["caption"] or "" for row in rows], self.encoder.texts))

    def _write(self, number: int, shard: SourceShard, made: _Shard) -> list[Path]:
        files = [self._table(f"dropped/dropped_{number:04d}.parquet", made.dropped, _DROPPED)]
        if not made.rows:
            return files
        files.append(self._array(f"img_emb/img_emb_{number:04d}.npy", made.images))
        if self.captions:
            files.append(self._array(f"text_emb/text_emb_{number:04d}.npy", made.texts))
        files.append(self._table(f"metadata/metadata_{number:04d}.parquet", made.rows, _METADATA))
        if self.images:
            files.append(self.out / f"images/{number:05d}.tar")
            write_tar(files[-1], _kept_images(shard, made))
        return files

    def _array(self, name: str, parts: list[torch.Tensor]) -> Path:
        array = torch.cat(parts).cpu().numpy()
        if not np.isfinite(array).all():
            raise UsageError(f"{self.out / name}: features that are not finite; embed with --precision float32")
        with durable_file(self.out / name) as temporary, temporary.open("wb") as file:
            np.save(file, array)
        return self.out / name

    def _table(self, name: str, rows: list[dict[str, Any]], schema: pa.Schema) -> Path:
        with durable_file(self.out / name) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema), temporary)
        return self.out / name


def _told(progress: Callable[[int, int], None] | None, before: int, most: int, total: int) -> Callable[[int], None]:
    """Of a shard under way: that it is done is told when it is sealed."""

    def tell(passed: int) -> None:
        if progress and passed < most:
            progress(before + passed, total)

    return tell


def _row(picture: Picture, key: str) -> dict[str, Any]:
    """Metadata of a picture. A row without a URL is known by what its source calls it."""
    told, square = picture.told, picture.square
    assert square is not None
    numbers = {name: _number(told[name]) for name in ("similarity", "punsafe", "pwatermark")}
    texts = {name: None if told[name] is None else str(told[name]) for name in ("caption", "NSFW", "LICENSE", "url")}
    return {
        **texts,
        **numbers,
        "image_path": picture.sample.name,
        "key": key,
        "md5": picture.md5,
        "width": square.width,
        "height": square.height,
        "hash": row_hash(texts["url"] or picture.sample.name, texts["caption"]),
    }


def _number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _kept_images(shard: SourceShard, made: _Shard) -> Iterator[tuple[str, bytes]]:
    """The images of the rows, as they were found, under the keys of the metadata."""
    rows = iter(made.rows)
    for sample, kept in zip(shard.samples(), made.kept, strict=True):
        if not kept:
            continue
        row, data = next(rows), sample.image_bytes() or b""
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != row["md5"]:
            raise IntegrityError(
                f"{shard.root}: {sample.name} changed while it was embedded; delete the pool and run again"
            )
        yield f"{row['key']}.{suffix_of(data)}", data
