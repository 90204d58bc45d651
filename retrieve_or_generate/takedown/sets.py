"""Images taken out of image sets: shards and tables rewritten without them, rows kept, everything sealed anew."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.image_set import (
    CANDIDATES,
    CANDIDATES_SEAL,
    MANIFEST_TABLE,
    SEAL,
    ImageSet,
    ShardReader,
    candidates_record,
    is_unfinished,
    load_image_set,
    read_table,
    seal_image_set,
    write_table,
)
from retrieve_or_generate.pool.tars import members
from retrieve_or_generate.store import locked, read_json, read_seal, seal, write_bytes, write_tar
from retrieve_or_generate.takedown.found import Found, md5_of
from retrieve_or_generate.takedown.swap import settle, staging, swap

REASON = "takedown"
_EARLIER = ".manifest-{}.parquet"  # as trials knew it; rows only, no image
_DESCRIBED = ".described"  # curation's cache, thumbnails among others; it is computed anew
_SEALED_ANEW = ("key", "files", "task", "source", "class_names", "config", "counts", "record_key")


@dataclass(frozen=True)
class SetFolder:
    """The folder of an image set whose candidates are finished, curated or not."""

    folder: Path

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Every candidate that has or had an image, with `url` and `init_key` of its origin ("" where it has none)."""
        rows = read_table(self.folder / CANDIDATES).to_pandas()
        rows = rows[rows["sha256"] != ""]
        origins = [json.loads(origin) for origin in rows["origin"]]
        told = {name: [str(origin.get(name) or "") for origin in origins] for name in ("url", "init_key")}
        return rows.assign(**told)

    @property
    def made_of(self) -> str:
        """sha256 of the manifest that the images were made of, "" where they were not."""
        return str((read_seal(self.folder, CANDIDATES_SEAL, verify=False) or {}).get("config", {}).get("of", ""))

    @property
    def manifests(self) -> dict[str, Path]:
        """The manifest as it is and as it was before earlier takedowns, by sha256."""
        earlier = {path.name.split("-")[1].split(".")[0]: path for path in self.folder.glob(_EARLIER.format("*"))}
        return earlier | ({self._manifest_sha: self.folder / MANIFEST_TABLE} if self._is_curated else {})

    @property
    def _is_curated(self) -> bool:
        return (self.folder / SEAL).is_file()

    @property
    def _manifest_sha(self) -> str:
        record = read_seal(self.folder, SEAL, verify=False)
        if not record or MANIFEST_TABLE not in record["files"]:
            raise IntegrityError(f"{self.folder / SEAL}: not the record of an image set")
        return str(record["files"][MANIFEST_TABLE]["sha256"])

    def check(self) -> None:
        """Raise `IntegrityError` where the tables of contents and the seals cannot be read."""
        _ = self.rows, self.made_of, self.manifests

    def version(self, manifest: Path) -> ImageSet:
        """The set with that manifest. Its images may be gone."""
        image_set = ImageSet(self.folder, read_json(self.folder / SEAL))
        image_set.manifest = read_table(manifest).to_pandas()
        return image_set

    def keys_of(self, shas: frozenset[str]) -> frozenset[str]:
        return frozenset(self.rows.loc[self.rows["sha256"].isin(shas), "key"])

    def find(self, wanted: Blocklist) -> list[Found]:
        """The images of the set that are wanted, by hash or by URL."""
        every = any(len(digest) == 32 for digest in wanted.digests)
        found = []
        for row, data in self._images(wanted, every):
            md5 = md5_of(data) if data is not None else ""
            if wanted.blocks(sha256=row.sha256, md5=md5, url=row.url):
                found.append(Found(row.sha256, md5, row.url))
        return found

    def _images(self, wanted: Blocklist, every: bool) -> Iterator[tuple[Any, bytes | None]]:
        """Rows with their bytes (None where they are gone): `every` row, or those that the table shows to be wanted."""
        reader = ShardReader(self.folder)
        for row in self.rows.itertuples():
            if every or wanted.blocks(sha256=row.sha256, url=row.url):
                yield row, reader.read([(row.shard, row.key)])[0] if row.shard else None

    def remove(self, keys: frozenset[str]) -> int:
        """Take the images with these keys out; how many there were. Raises `IntegrityError` where the set is damaged."""
        with locked(self.folder):
            here = keys & frozenset(self.rows.loc[self.rows["shard"] != "", "key"])
            if here:
                self._rewrite(here)
        return len(here)

    def _rewrite(self, keys: frozenset[str]) -> None:
        candidates = candidates_record(self.folder)  # verifies every shard
        assert candidates is not None
        curated = load_image_set(self.folder) if self._is_curated else None
        if curated is not None:
            earlier = self.folder / _EARLIER.format(self._manifest_sha)
            write_bytes(earlier, (self.folder / MANIFEST_TABLE).read_bytes())
        shutil.rmtree(self.folder / _DESCRIBED, ignore_errors=True)
        staged = staging(self.folder)
        changed = self._stage_shards(staged, candidates["files"], keys)
        write_table(staged / CANDIDATES, _without(read_table(self.folder / CANDIDATES), keys))
        told = {name: value for name, value in candidates.items() if name not in ("key", "files")}
        seal(staged, CANDIDATES_SEAL, candidates["key"], [staged / name for name in candidates["files"]], **told)
        names = [*changed, CANDIDATES, CANDIDATES_SEAL]
        if curated is not None:
            told = {name: value for name, value in curated.record.items() if name not in _SEALED_ANEW}
            seal_image_set(staged, _without(read_table(self.folder / MANIFEST_TABLE), keys), **told)
            names += [MANIFEST_TABLE, SEAL]
        swap(self.folder, names)

    def _stage_shards(self, staged: Path, files: dict[str, Any], keys: frozenset[str]) -> list[str]:
        """All shards in the staging folder: those without the keys as links; the names of the others."""
        changed = set(self.rows.loc[self.rows["key"].isin(keys), "shard"])
        shards = [name for name in files if name != CANDIDATES]
        for name in shards:
            if name in changed:
                write_tar(staged / name, _kept_members(self.folder / name, keys))
            else:
                os.link(self.folder / name, staged / name)
        return sorted(changed)


def _kept_members(shard: Path, keys: frozenset[str]) -> Iterator[tuple[str, bytes]]:
    with shard.open("rb") as file:
        for member in members(shard):
            if member.name.partition(".")[0] not in keys:
                file.seek(member.offset)
                yield member.name, file.read(member.size)


def _without(table: pa.Table, keys: frozenset[str]) -> pa.Table:
    """The rows with these keys dropped, without shard and rank; those ranked after them move up."""
    rows = table.select(["key", "label", "shard", "status", "reason", "rank"]).to_pandas()
    gone = rows["key"].isin(keys)
    rows.loc[gone, ["shard", "status", "reason"]] = ["", "dropped", REASON]
    rows.loc[gone, "rank"] = -1
    ranked = rows["rank"] >= 0
    rows.loc[ranked, "rank"] = rows[ranked].groupby("label")["rank"].rank(method="first").astype("int64") - 1
    for name in ("shard", "status", "reason", "rank"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(rows[name].tolist()))
    return table


def find_sets(folders: Sequence[Path]) -> list[Path]:
    """The folders of every image set below these whose candidates are finished; of the others, unfinished shards are dropped.

    A new run of what makes them drops those shards, too. An exchange that was cut short is settled first.
    """
    places = {path.parent.resolve() for folder in folders for path in folder.rglob(CANDIDATES_SEAL)}
    finished = []
    for place in sorted(place for place in places if not place.name.startswith(".")):
        with locked(place):
            settle(place)
            if is_unfinished(place):
                for shard in place.glob("*.tar"):
                    shard.unlink()
            else:
                finished.append(place)
    return finished


def affected_sets(sets: Sequence[SetFolder], shas: frozenset[str]) -> dict[SetFolder, frozenset[str]]:
    """The sets that hold or held the image, or one made of it, with its keys."""
    affected = {one: keys for one in sets if (keys := one.keys_of(shas))}
    waiting = list(affected)
    while waiting:
        origin = waiting.pop()
        versions = origin.manifests
        for one in sets:
            if one.made_of in versions:
                derived = frozenset(one.rows.loc[one.rows["init_key"].isin(affected[origin]), "key"])
                if derived - affected.get(one, frozenset()):
                    affected[one] = affected.get(one, frozenset()) | derived
                    waiting.append(one)
    return affected
