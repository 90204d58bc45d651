"""The form in which every source hands over its images: an image set on disk.

A folder holds webdataset shards `00000.tar` (`KEY.jpg|png|webp`, `KEY.txt` the caption, `KEY.json` the rest), and three tables of
contents that follow each other: `candidates.parquet`, sealed by `candidates.json`, is what a source wrote; `manifest.parquet`,
sealed by `image_set.json`, is the same rows after curation. A folder without `image_set.json` is unfinished. Bytes follow from
what was added and in which order, and from nothing else: no dates, users or paths.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NotRequired, TypedDict, Unpack

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pixels import UndecodableImage, decode, suffix_of
from retrieve_or_generate.seeds import generator_for
from retrieve_or_generate.store import (
    canonical_json,
    checksums,
    content_key,
    durable_file,
    read_json,
    read_seal,
    seal,
    write_json,
)

CANDIDATES, CANDIDATES_SEAL = "candidates.parquet", "candidates.json"
MANIFEST_TABLE, SEAL = "manifest.parquet", "image_set.json"
UNIT_FILES = ".unit-*"
"""What a source that makes a set in parts knows of each finished one, until all are there."""

REASONS = (
    *("nsfw", "unsafe", "blocked", "refused", "dead_link", "mismatch", "placeholder", "undecodable"),
    *("contaminated", "memorised", "duplicate", "clip_score", "not_selected", "class_cap", "short_class", "takedown"),
)
"""Why a candidate is not in the set, in the order in which the reasons are looked for; "" while or because it is."""

MANIFEST = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("label", pa.int64()),
        ("class_name", pa.string()),
        ("source", pa.string()),
        ("caption", pa.string()),
        ("origin", pa.string()),
        ("query", pa.string()),
        ("clip_score", pa.float32()),
        ("strength", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("rank", pa.int64()),
    ]
)
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_SHARD = re.compile(r"\d{5,}\.tar")
_MEMBER = re.compile(r"[A-Za-z0-9_-]{1,80}\.(jpg|png|webp|txt|json)")
_IMAGE_SUFFIXES = ("jpg", "png", "webp")


def write_table(path: Path, table: pa.Table) -> None:
    """A manifest as parquet: durable, and equal rows give equal bytes."""
    with durable_file(path) as temporary:
        pq.write_table(table.cast(MANIFEST), temporary, compression="zstd", store_schema=False)


def read_table(path: Path) -> pa.Table:
    """A manifest table; `IntegrityError` if it is none."""
    try:
        return pq.read_table(path).cast(MANIFEST)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except (pa.ArrowException, ValueError, OSError) as error:
        raise IntegrityError(f"{path}: not a manifest ({str(error).splitlines()[0]})") from error


def _ours(name: str) -> bool:
    known = (CANDIDATES, CANDIDATES_SEAL, MANIFEST_TABLE, SEAL)
    return name in known or _SHARD.fullmatch(name) is not None or name.startswith(".")


def check_free(folder: Path) -> None:
    """Raise `UsageError` unless `folder` may take an image set: it is not there, empty, or holds an unfinished one."""
    if (folder / SEAL).exists():
        raise UsageError(f"{folder}: holds a finished image set; choose another --out or delete it")
    visible = _visible(folder)
    started = (folder / CANDIDATES_SEAL).exists()
    if visible and not (started and all(_ours(path.name) for path in visible)):
        raise UsageError(f"{folder}: not empty, and not an image set; choose another --out")


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def start_candidates(folder: Path, key: str, fresh: bool = False) -> None:
    """Mark `folder` as begun; refuse one that is finished or not an image set's. The caller holds its lock.

    What was begun under the same key stays, for the caller to go on with; all else, and with `fresh` that too, is dropped.
    """
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not fresh and begun_under(folder) == key:
        return
    write_json(folder / CANDIDATES_SEAL, {"unfinished": key})
    for path in [*_visible(folder), *folder.glob(UNIT_FILES)]:
        if path.name != CANDIDATES_SEAL:
            path.unlink()


class Candidate(TypedDict):
    """One candidate as a writer takes it."""

    key: str
    label: int
    caption: str
    origin: dict[str, Any]
    query: str
    image: bytes | None
    strength: NotRequired[float]
    reason: NotRequired[str]


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Writes candidates, in the order they come, and one shard with their images; `rows` is what the table says of them.

    The shard is there when the block ends well, and not before; without an image there is none. Every member has the same date,
    owner and mode.
    """

    def __init__(self, path: Path, source: str, class_names: Sequence[str]):
        self._path, self._source, self._class_names = path, source, class_names
        self._exits = ExitStack()
        self._file: tarfile.TarFile | None = None
        self.rows: list[dict[str, Any]] = []
        self.images = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.__exit__(kind, error, trace)

    @property
    def files(self) -> list[Path]:
        """The shard, if there is one."""
        return [self._path] if self.images else []

    def add(
        self,
        *,
        key: str,
        label: int,
        caption: str,
        origin: dict[str, Any],
        query: str,
        image: bytes | None,
        strength: float = math.nan,
        reason: str = "",
    ) -> None:
        """One candidate. With a `reason` it is dropped at once, without image; bytes that are no picture give `undecodable`.

        Either way it is a row. Raises `ValueError` for a key that is unsafe, a label out of range, a reason that is not one of
        `REASONS`, and for neither image nor reason.
        """
        if reason and reason not in REASONS:
            raise ValueError(f"reason {reason!r} is none of {REASONS}")
        if image is None and not reason:
            raise ValueError(f"candidate {key!r} has neither image nor reason")
        row = self._row(key, label, caption, origin, query) | {"strength": strength}
        if not reason and image is not None:
            try:
                self._store(row, image)
            except UndecodableImage:
                reason = "undecodable"
        if reason:
            row["status"] = "dropped"
        self.rows.append(row | {"reason": reason})

    def _row(self, key: str, label: int, caption: str, origin: dict[str, Any], query: str) -> dict[str, Any]:
        if not _KEY.fullmatch(key):
            raise ValueError(f"key {key!r}: letters, digits, - and _ only, at most 80")
        if not 0 <= label < len(self._class_names):
            raise ValueError(f"label {label} of {key!r}: there are {len(self._class_names)} classes")
        row: dict[str, Any] = {"key": key, "label": int(label), "class_name": self._class_names[label]}
        row |= {"source": self._source, "caption": caption, "origin": canonical_json(origin), "query": query}
        row |= {"shard": "", "width": 0, "height": 0, "sha256": "", "clip_score": math.nan, "rank": -1}
        return row

    def _store(self, row: dict[str, Any], image: bytes) -> None:
        height, width = decode(image).shape[:2]
        row |= {"shard": self._path.name, "width": width, "height": height}
        row |= {"sha256": hashlib.sha256(image).hexdigest(), "status": "candidate"}
        told = ("label", "class_name", "source", "query", "width", "height", "sha256")
        facts = {name: row[name] for name in told} | {"origin": json.loads(row["origin"])}
        self._member(f"{row['key']}.{suffix_of(image)}", image)
        self._member(f"{row['key']}.txt", row["caption"].encode())
        self._member(f"{row['key']}.json", canonical_json(facts).encode())
        self.images += 1

    def _member(self, name: str, data: bytes) -> None:
        if self._file is None:
            temporary = self._exits.enter_context(durable_file(self._path))
            self._file = self._exits.enter_context(tarfile.TarFile(temporary, "w", format=tarfile.USTAR_FORMAT))
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._file.addfile(member, io.BytesIO(data))


class ImageSetWriter(AbstractContextManager["ImageSetWriter"]):
    """Writes the candidates of one image set, in shards, as they come; `finish` seals them for curation.

    Leaving the block without `finish` leaves an unfinished folder, which the next writer clears. `key` names the inputs and
    parameters that the candidates follow from; `config` says them in full. The caller holds the folder's lock.
    """

    def __init__(
        self,
        folder: Path,
        *,
        task: str,
        source: str,
        key: str,
        class_names: Sequence[str],
        config: dict[str, Any],
        shard_size: int = 1000,
    ):
        self._folder, self._key, self._shard_size = folder, key, shard_size
        self._record = {"task": task, "source": source, "class_names": list(class_names), "config": config}
        self._keys: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        self._shards: list[Path] = []
        start_candidates(folder, key, fresh=True)
        self._shard = self._next_shard()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shard.__exit__(kind, error, trace)

    def _next_shard(self) -> ShardWriter:
        names: Any = self._record["class_names"]
        return ShardWriter(self._folder / f"{len(self._shards):05d}.tar", str(self._record["source"]), names)

    def _close_shard(self) -> None:
        self._shard.__exit__(None, None, None)
        self._rows += self._shard.rows
        self._shards += self._shard.files
        self._shard = self._next_shard()

    def add(self, **candidate: Unpack[Candidate]) -> None:
        """One candidate, as `ShardWriter.add` takes it. Raises `ValueError`, too, for a key that was added before."""
        if (key := candidate["key"]) in self._keys:
            raise ValueError(f"key {key!r} was added already")
        if self._shard.images >= self._shard_size:
            self._close_shard()
        self._shard.add(**candidate)
        self._keys.add(key)

    def finish(self) -> None:
        """Write the last shard, `candidates.parquet`, and `candidates.json` last."""
        self._close_shard()
        table = pa.Table.from_pylist(self._rows, schema=MANIFEST)
        seal_candidates(self._folder, self._key, table, checksums(self._folder, self._shards), **self._record)


def seal_candidates(folder: Path, key: str, table: pa.Table, shards: dict[str, dict[str, Any]], **record: Any) -> None:
    """Write `candidates.parquet`, and `candidates.json` last. `shards` gives size and sha256 of each, by name."""
    write_table(folder / CANDIDATES, table)
    files = shards | checksums(folder, [folder / CANDIDATES])
    write_json(folder / CANDIDATES_SEAL, {"key": key, "files": files, **record})


def candidates_record(folder: Path, key: str | None = None, verify: bool = True) -> dict[str, Any] | None:
    """What `finish` recorded, its files verified; None while the candidates are unfinished or made with another key."""
    return None if is_unfinished(folder) else read_seal(folder, CANDIDATES_SEAL, key, verify)


def is_unfinished(folder: Path) -> bool:
    """Whether its candidates are begun, no more. What cannot be read is not: `read_seal` says what is wrong."""
    try:
        record = read_json(folder / CANDIDATES_SEAL)
    except UsageError:
        return False
    return isinstance(record, dict) and "unfinished" in record


def begun_under(folder: Path) -> str | None:
    """The key under which its candidates were begun; None where they are not begun, or finished."""
    return str(read_json(folder / CANDIDATES_SEAL)["unfinished"]) if is_unfinished(folder) else None


def _counts_by_reason(manifest: pd.DataFrame, class_names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Per class: candidates, kept, and each reason that occurs."""
    counts = {}
    for label, name in enumerate(class_names):
        rows = manifest[manifest["label"] == label]
        dropped = rows.loc[rows["reason"] != "", "reason"].value_counts().sort_index()
        counts[name] = {
            "candidates": len(rows),
            "kept": int((rows["status"] == "kept").sum()),
            **{str(reason): int(count) for reason, count in dropped.items()},
        }
    return counts


def seal_image_set(folder: Path, manifest: pa.Table, **record: Any) -> None:
    """Write `manifest.parquet`, then `image_set.json` last: what the candidates' record says, `record`, counts and checksums."""
    candidates = candidates_record(folder, verify=False)
    if candidates is None:
        raise UsageError(f"{folder}: its candidates are unfinished; run the same command again")
    write_table(folder / MANIFEST_TABLE, manifest)
    names = [*candidates["files"], CANDIDATES_SEAL, MANIFEST_TABLE]
    told = {name: value for name, value in candidates.items() if name not in ("key", "files")} | record
    told["counts"] = _counts_by_reason(manifest.to_pandas(), told["class_names"])
    told["record_key"] = content_key({"key": candidates["key"], **told})
    seal(folder, SEAL, candidates["key"], [folder / name for name in names], **told)


class ImageSet:
    """A finished image set. `record` is what `image_set.json` says; `excluded` names classes that it leaves out on purpose."""

    def __init__(self, folder: Path, record: dict[str, Any]):
        self.folder, self.record = folder, record
        self.key: str = record["key"]
        self.task: str = record["task"]
        self.source: str = record["source"]
        self.class_names: tuple[str, ...] = tuple(record["class_names"])
        self.excluded: tuple[str, ...] = tuple(record.get("excluded", ()))
        self._reader = ShardReader(folder)

    @cached_property
    def manifest(self) -> pd.DataFrame:
        """One row for every candidate, kept or not, with the columns of `MANIFEST`."""
        return read_table(self.folder / MANIFEST_TABLE).to_pandas()

    @cached_property
    def kept(self) -> pd.DataFrame:
        """The images of the set, sorted by label and then rank."""
        rows = self.manifest[self.manifest["status"] == "kept"]
        return rows.sort_values(["label", "rank"], ignore_index=True)

    def counts(self) -> np.ndarray:
        """Kept images of each class, (classes,) int64."""
        return np.bincount(self.kept["label"], minlength=len(self.class_names)).astype(np.int64)

    def rows_at(self, quotas: np.ndarray, order_seed: int | None = None) -> pd.DataFrame:
        """The first `quotas[c]` kept images of each class c, sorted by label and then by their place in the order.

        The order is the ranks', or with `order_seed` a permutation of them. Either way smaller quotas give subsets of larger
        ones. Raises `UsageError` naming a class that holds too few.
        """
        counts = self.counts()
        for label in np.flatnonzero(np.asarray(quotas) > counts):
            name, held = self.class_names[label], counts[label]
            raise UsageError(
                f"{self.folder}: {held} images of {name!r}, but {quotas[label]} are asked for; take a smaller scale"
            )
        starts = np.concatenate([[0], np.cumsum(counts)])
        chosen = [
            starts[label] + self._order(label, counts[label], order_seed)[: quotas[label]]
            for label in range(len(self.class_names))
        ]
        return self.kept.iloc[np.concatenate(chosen)].reset_index(drop=True)

    def _order(self, label: int, count: int, order_seed: int | None) -> np.ndarray:
        if order_seed is None:
            return np.arange(count)
        return generator_for("image set", "order", order_seed, self.class_names[label]).permutation(count)

    def images(self, keys: Sequence[str]) -> list[bytes]:
        """The images' bytes as stored, in the order of `keys`. Raises `KeyError` for a key that is no candidate's and
        `IntegrityError` for one whose image no shard holds.
        """
        return self._reader.read(self.places(keys))

    def places(self, keys: Sequence[str]) -> list[tuple[str, str]]:
        """The shard and the key of each image; `KeyError` for a key that is no candidate's."""
        shards = self.manifest.set_index("key")["shard"].reindex(list(keys))
        if shards.isna().any():
            raise KeyError(f"{self.folder}: no candidate {shards.index[shards.isna()][0]!r}")
        return list(zip(shards.tolist(), keys, strict=True))

    def image_at(self, place: tuple[str, str]) -> bytes:
        """The bytes of one image; raises as `images` does."""
        return self._reader.read([place])[0]


def _member_places(path: Path) -> dict[str, tuple[int, int]]:
    """Where each image of a shard lies, by key: (offset, bytes). Raises `IntegrityError` for what we would not have written."""
    places: dict[str, tuple[int, int]] = {}
    size = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not (member.isfile() and _MEMBER.fullmatch(member.name)):
                raise IntegrityError(f"{path}: unsafe member {member.name!r}; not a shard of an image set")
            if member.offset_data + member.size > size:
                raise IntegrityError(f"{path}: ends within {member.name!r}; the file is truncated")
            key, suffix = member.name.split(".")
            if suffix in _IMAGE_SUFFIXES:
                if key in places:
                    raise IntegrityError(f"{path}: holds {key!r} twice; not a shard of an image set")
                places[key] = member.offset_data, member.size
    return places


class ShardReader:
    """Reads images out of the shards of `folder` by offset; each shard's members are listed once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._members: dict[str, dict[str, tuple[int, int]]] = {}

    def _listed(self, shard: str) -> dict[str, tuple[int, int]]:
        if shard not in self._members:
            path = self._folder / shard
            if not _SHARD.fullmatch(shard) or not path.is_file():
                raise IntegrityError(f"{path}: no such shard, but the manifest names it")
            try:
                self._members[shard] = _member_places(path)
            except tarfile.TarError as error:
                raise IntegrityError(f"{path}: not readable as a tar file ({error})") from error
        return self._members[shard]

    def read(self, places: Sequence[tuple[str, str]]) -> list[bytes]:
        """Image bytes for pairs of (shard, key), in their order. Raises `IntegrityError` for one that is not there."""
        found: dict[tuple[str, str], bytes] = {}
        for shard in dict.fromkeys(shard for shard, _ in places):
            members = self._listed(shard)
            with (self._folder / shard).open("rb") as file:
                for key in (key for name, key in places if name == shard):
                    if key not in members:
                        raise IntegrityError(f"{self._folder / shard}: holds no image {key!r}")
                    offset, size = members[key]
                    file.seek(offset)
                    found[shard, key] = file.read(size)
        return [found[place] for place in places]


def _no_set(folder: Path) -> str:
    """What is there in place of a finished image set."""
    if not folder.is_dir():
        return "no such image set"
    if (folder / CANDIDATES_SEAL).is_file():
        return "an unfinished image set; run the command that makes it again"
    made = "rog retrieve and rog synthesize make them, of images of your own, too (docs/finetune.md)"
    return f"not an image set; {made}"


def load_image_set(folder: Path, task: str | None = None, verify: bool = True) -> ImageSet:
    """Open a finished image set.

    Raises `UsageError` if there is none, it is unfinished, or it is of another task than `task`; `IntegrityError` if a file is
    missing or changed (with `verify=False`, only if the seal itself is).
    """
    if not (folder / SEAL).is_file():
        raise UsageError(f"{folder}: {_no_set(folder)}")
    record = read_seal(folder, SEAL, verify=verify)
    told = {name: value for name, value in (record or {}).items() if name not in ("files", "record_key")}
    if record is None or content_key(told) != record.get("record_key"):
        raise IntegrityError(f"{folder / SEAL}: changed since it was written. Make {folder} anew")
    if task is not None and record["task"] != task:
        raise UsageError(f"{folder}: an image set of task {record['task']!r}, not {task!r}")
    return ImageSet(folder, record)
