"""Puts the pocket world on disk at first use, in the layouts that the real things are published in.

Writes below the cache folder (`ROG_CACHE`, or `~/.cache/rog`):
  `pool/`        what LAION published: img_emb/ text_emb/ metadata/, images as webdataset shards, and planted.parquet (the truth)
  `tasks/NAME/`  what CLIP_benchmark reads: {train,val,test}/{nshards.txt,0.tar}, class names and templates;
                 of `NAME-shifted` a task.yaml that extends NAME, and its shifted test set
Both are sealed last (`pool.json`, `task.json`) with the checksum of every file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import mmh3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.models import Clip, image_features, load_clip, text_features
from retrieve_or_generate.pocket import captions
from retrieve_or_generate.pocket.pictures import SPLITS, Labelled, PoolRow, decode, evaluation_split, pool_rows
from retrieve_or_generate.pocket.places import FORMAT, POOL_SEAL, SEED_STUDY, TASK_SEAL, pool_place, task_place
from retrieve_or_generate.pocket.shifted import SHIFTED
from retrieve_or_generate.precision import one_thread
from retrieve_or_generate.store import content_key, durable_file, locked, remove_leftovers, seal, write_bytes, write_tar

_SHARD_ROWS = 5000


def build_pool() -> None:
    """Build the pocket pool if it is not there (about fifteen seconds on one core)."""
    folder = pool_place()
    with locked(folder, wait=True):
        if not (folder / POOL_SEAL).is_file():
            remove_leftovers(folder)
            with one_thread():
                _write_pool(folder, load_clip("pocket"))


def build_task(task: str) -> None:
    """Build one of the pocket tasks, and the one that it extends, if they are not there."""
    if task in SHIFTED:
        build_task(SHIFTED[task].of)
    folder = task_place(task)
    with locked(folder, wait=True):
        if not (folder / TASK_SEAL).is_file():
            remove_leftovers(folder)
            _write_shifted(folder, task) if task in SHIFTED else _write_task(folder, task)


def _write_array(path: Path, array: np.ndarray) -> None:
    with durable_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _write_table(path: Path, table: pa.Table) -> None:
    with durable_file(path) as temporary:
        pq.write_table(table, temporary)


def _write_pool(folder: Path, clip: Clip) -> None:
    rows = pool_rows()
    for number, first in enumerate(range(0, len(rows), _SHARD_ROWS)):
        part = rows[first : first + _SHARD_ROWS]
        keys = [f"{number:05d}{i:04d}" for i in range(len(part))]
        pixels = np.stack([decode(row.jpeg) for row in part]).transpose(0, 3, 1, 2)
        images = image_features(clip, np.ascontiguousarray(pixels))
        distinct, place = np.unique([row.caption for row in part], return_inverse=True)
        texts = text_features(clip, distinct.tolist())[place]
        _write_array(folder / f"img_emb/img_emb_{number:04d}.npy", images.astype(np.float16))
        _write_array(folder / f"text_emb/text_emb_{number:04d}.npy", texts.astype(np.float16))
        similarity = (images * texts).sum(1)
        _write_table(folder / f"metadata/metadata_{number:04d}.parquet", _metadata(part, keys, first, similarity))
        write_tar(folder / f"images/{number:05d}.tar", _members(part, keys))
    _write_table(
        folder / "planted.parquet",
        pa.Table.from_pylist([{"row": i, **row.planted} for i, row in enumerate(rows)], _PLANTED),
    )
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".npy", ".parquet", ".tar")]
    seal(
        folder,
        POOL_SEAL,
        content_key([SEED_STUDY, FORMAT, clip.fingerprint]),
        files,
        pool="pocket",
        model="pocket",
        rows=len(rows),
    )


_PLANTED = pa.schema(
    [
        ("row", pa.int64()),
        ("kind", pa.string()),
        ("task", pa.string()),
        ("class_name", pa.string()),
        ("caption_kind", pa.string()),
        ("of", pa.string()),
        ("identical", pa.bool_()),
    ]
)


def _members(rows: Iterable[PoolRow], keys: list[str]) -> Iterator[tuple[str, bytes]]:
    """What a download of the rows would have kept: nothing of a dead link."""
    for key, row in zip(keys, rows, strict=True):
        if not row.dead:
            yield f"{key}.jpg", row.jpeg
            yield f"{key}.txt", row.caption.encode()


def _metadata(rows: tuple[PoolRow, ...], keys: list[str], first: int, similarity: np.ndarray) -> pa.Table:
    urls = [f"https://pictures.example/{first + i:06d}.jpg" for i in range(len(rows))]
    return pa.table(
        {
            "image_path": keys,
            "caption": [row.caption for row in rows],
            "NSFW": [row.nsfw or None for row in rows],
            "similarity": pa.array(similarity, pa.float64()),
            "LICENSE": ["?"] * len(rows),
            "url": urls,
            "key": keys,
            "width": pa.array([32] * len(rows), pa.int32()),
            "height": pa.array([32] * len(rows), pa.int32()),
            "md5": [hashlib.md5(row.jpeg, usedforsecurity=False).hexdigest() for row in rows],
            "punsafe": [row.punsafe for row in rows],
            "hash": [mmh3.hash64((url + row.caption).encode())[0] for url, row in zip(urls, rows, strict=True)],
        }
    )


def _write_task(folder: Path, task: str) -> None:
    words = captions.VOCABULARIES[task]
    for split in SPLITS:
        _write_split(folder / split, evaluation_split(task, split))
    write_bytes(folder / "classnames.txt", "\n".join(words.class_names).encode())
    write_bytes(
        folder / "zeroshot_classification_templates.txt",
        "\n".join(t.replace("{}", "{c}") for t in words.templates).encode(),
    )
    synonyms = [f"{name}\t{word}" for name in words.class_names for word in words.synonyms.get(name, ())]
    write_bytes(folder / "synonyms.tsv", "\n".join(synonyms).encode())
    _seal_task(folder, task)


def _write_shifted(folder: Path, task: str) -> None:
    """The shifted test set in CLIP_benchmark's layout, and the file that attaches it."""
    shift = SHIFTED[task]
    _write_split(folder / shift.name / "test", shift.drawn())
    write_bytes(folder / shift.name / "classnames.txt", "\n".join(captions.VOCABULARIES[shift.of].class_names).encode())
    write_bytes(folder / "task.yaml", f"extends: {shift.of}\nshifts: {{{shift.name}: {shift.name}}}\n".encode())
    _seal_task(folder, task)


def _write_split(folder: Path, pictures: Iterable[Labelled]) -> None:
    members: list[tuple[str, bytes]] = []
    for index, picture in enumerate(pictures):
        key = f"{index:06d}"
        members += [(f"{key}.cls", str(picture.label).encode()), (f"{key}.jpg", picture.jpeg)]
    write_tar(folder / "0.tar", members)
    write_bytes(folder / "nshards.txt", b"1")


def _seal_task(folder: Path, task: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".tar", ".txt", ".tsv", ".yaml")]
    seal(folder, TASK_SEAL, content_key([SEED_STUDY, FORMAT, task]), files, task=task)


def planted() -> pa.Table:
    """The truth about every row of the pocket pool: its kind, task and class, and what it is a copy of."""
    build_pool()
    return pq.read_table(pool_place() / "planted.parquet")
